"""The packed model folder that is shipped: its format, and the modules that plan, write and read it.

Lossless: what goes in comes out, bit by bit. How integers and positions are coded is `tasks.algorithms.packing`'s.
"""
