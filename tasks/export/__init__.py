"""A packed or quantised model in the formats of other engines: ONNX Runtime GenAI and llama.cpp.

A code that an engine gets has the value that the package computes with; nothing is quantised again.
"""
