"""The one error tree. Every refusal says what, where, expected, got, and what to do."""

from __future__ import annotations


class LongRopeError(Exception):
    """Bad input or wrong use. The command line prints the message alone and exits with 2."""


class ConfigError(LongRopeError):
    """A LongRopeConfig, or a part of one, that cannot mean anything."""


class FactorFileError(LongRopeError):
    """A factors file that cannot be read, or that does not fit the model."""


class ModelError(LongRopeError):
    """A model folder or file that is damaged, incomplete or of an unknown kind."""


class GgufError(ModelError):
    """A GGUF file that is damaged or that uses what this reader does not know."""


class UnsupportedError(LongRopeError):
    """The target cannot express a field of the config, or the architecture is not known to it."""


class OutputError(LongRopeError):
    """An output that cannot be written: it exists, it is an input, the disk is full."""


class ToolError(LongRopeError):
    """A program that we run (pip, cmake, llama-quantize, ...) is missing or failed."""
