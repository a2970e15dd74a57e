"""What algorithms ask of a model: its family, its matrices, its masks, the walk over its blocks, and saved states."""
