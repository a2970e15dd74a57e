"""Fewer bits per weight: GPTQ with masks, SparseGPT, coordinate descent, embeddings, mixed bits, EoRA's correction."""
