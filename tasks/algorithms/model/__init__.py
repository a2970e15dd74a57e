"""Views of a model for algorithms: its family, its matrices, its masks, the walk over its blocks, and saved states."""
