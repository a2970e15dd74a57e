"""The commands of `edgepress`: what they take, what they print, and with which code they end.

A command reads its arguments, calls rooms and prints; what models, devices and figures are is theirs. Nothing imports
this room but `tasks.__main__` and the flows, and it imports no flow: those are found by name when their command is
asked for.
"""
