"""Run a model, whatever its folder is: dense, quantised, packed, or exported to another engine.

It loads and calls. What is asked of the model, and what the answers mean, is evaluation's.
"""
