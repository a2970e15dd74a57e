"""Bodies that two stages share: training a recovery, or codes, and quantising blocks.

A stage alone keeps its own body; the mathematics is in `tasks.algorithms`.
"""
