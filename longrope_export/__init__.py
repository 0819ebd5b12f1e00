"""Give a RoPE language model a longer context, and bake it into the formats people deploy."""

__version__ = "0.1.0"
