"""How a stage runs: its inputs and outputs, publishing, failures, journal, lineage, locks, and what a kill left behind.

It knows dvc.yaml and no model: what a stage computes is the stage's. Files, hashes and git are read and written here.
"""
