"""GGUF: from a Hugging Face folder or from another GGUF, with the factors baked in."""
