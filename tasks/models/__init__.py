"""Model folders: dense ones, gptqmodel's, the masks beside them, safetensors headers, the sparsity ledger.

Folders in, models and tensors out, and back. The packed format has a room of its own; nothing is computed or judged.
"""
