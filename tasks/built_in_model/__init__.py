"""The maker of the built-in model and its corpus: sentence frames become specifications, these a tokenizer and a model.

It is needed only to retrain that model or to write its texts again; no other model of the pipeline needs anything of
it. Its output is ordinary: what reads it is `sources`' and `models`'.
"""
