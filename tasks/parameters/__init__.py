"""params.yaml: its schema with units and ranges, and what it forbids before any weights are loaded.

A rule that needs params and a config alone is here; one that needs weights or activations is the stage's. What the
machine has is read here, too, as the rules hold the needs against it.
"""
