"""Devices as files, a model's contents as they count there, and the table of what fits.

The verdict itself is computed in `tasks.algorithms.device_fit`; here are its inputs and how it is told.
"""
