"""Versions of the compressed model: promotion, rollback, their bytes, the canary's samples, signed updates to devices.

Git tags in GTO's format are the truth. It judges no model, runs no stage and needs no server.
"""
