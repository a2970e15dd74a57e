"""Where models and texts come from: local folders and files, or the Hugging Face hub at a pinned commit.

It copies and checks what is untrusted. What the texts are used for, and how models are loaded, is not its business.
"""
