"""Scores of a model on text: protocols, windows, log-likelihoods, bytes per token, failures of generations."""
