"""Two conversations."""

from __future__ import annotations

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "And one?"},
    {"role": "assistant", "content": "\nfive "},
]
AS_MESSAGES = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})
