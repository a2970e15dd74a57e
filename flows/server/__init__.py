"""Prefect's server and its state in this project: settings, the UI, a temporary server, and the end of dead runs."""
