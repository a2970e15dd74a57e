"""What a model scores on text: protocols, windows, log-likelihoods, bytes per token, failures of generations."""
