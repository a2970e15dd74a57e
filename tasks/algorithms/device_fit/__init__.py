"""A model's bytes and traffic on a device: footprint, placement in its memories, the verdict and its limiting term."""
