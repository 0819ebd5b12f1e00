"""The runtime itself: torch, transformers and the standard library, nothing of this package.

The modules of this folder, in the order of remote_code.PARTS, are also the one modelling file that
an exported folder carries; so they import torch at their head, unlike the rest of the package.
"""
