"""The packed model folder that is shipped: its format, and who plans, writes and reads it.

Lossless: what goes in comes out, bit by bit. How integers and positions are coded is `tasks.algorithms.packing`'s.
"""
