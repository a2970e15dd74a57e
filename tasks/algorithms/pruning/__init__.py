"""Which weights and layers go: importance of layers, depth pruning, WANDA, and N:M patterns. Nothing is trained."""
