"""A vocabulary from tokenizer.model, with the tokens that other files add or rename."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import TokenType

from longrope_converters.to_gguf.special_tokens import read_optional
from longrope_export.errors import ModelError, UnsupportedError

_ABSENT_SCORE, _ADDED_SCORE = -10000.0, -1000.0
# added tokens that some models forget to mark as special
_SPECIAL_TEXTS = frozenset({"<pad>", "<mask>", "<2mass>", "[@BOS@]"})
_SPECIAL_BRACKETS = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))


@dataclass
class TokenTable:
    """Texts, scores and types of all token ids."""

    texts: list[bytes]
    scores: list[float]
    types: list[TokenType]

    def put(self, index: int, text: str, score: float, kind: TokenType) -> None:
        """Set one token; an id beyond the model's vocabulary is left out."""
        if 0 <= index < len(self.texts):
            self.texts[index], self.scores[index], self.types[index] = text.encode(), score, kind


def looks_special(text: str) -> bool:
    """Whether an added token is a control token by its spelling."""
    return text in _SPECIAL_TEXTS or any(
        text.startswith(left) and text.endswith(right) for left, right in _SPECIAL_BRACKETS
    )


def read_sentencepiece(folder: Path, vocab_size: int) -> TokenTable:
    """tokenizer.model, then added_tokens.json, then tokenizer_config.json.

    Raises:
        ModelError: a file that is not a SentencePiece model.
        UnsupportedError: the sentencepiece package is not installed.
    """
    table = _read_model(folder / "tokenizer.model", vocab_size)
    _put_added_tokens(table, folder)
    for index, entry in _declared_tokens(folder):
        text = str(entry["content"])
        if entry.get("special") or looks_special(text):
            table.put(index, text, _ADDED_SCORE, TokenType.CONTROL)
        else:
            text = text.replace("\u2581", " ")
            table.put(index, text, _ADDED_SCORE, TokenType.USER_DEFINED)
    return table


def read_phi3_vocabulary(folder: Path, vocab_size: int) -> TokenTable:
    """As read_sentencepiece, but phi3's tokens are taken as marked, and tokenizer.json's too."""
    table = _read_model(folder / "tokenizer.model", vocab_size)
    _put_added_tokens(table, folder)
    listed = read_optional(folder / "tokenizer.json").get("added_tokens") or []
    for index, entry in (*_declared_tokens(folder), *((int(item["id"]), item) for item in listed)):
        kind = TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED
        table.put(index, str(entry["content"]), _ADDED_SCORE, kind)
    return table


def _read_model(path: Path, vocab_size: int) -> TokenTable:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise UnsupportedError(
            f"{path}: reading it needs the sentencepiece package: pip install sentencepiece"
        ) from error
    model = SentencePieceProcessor()
    try:
        model.LoadFromFile(str(path))
    except (RuntimeError, OSError) as error:
        raise ModelError(f"{path}: not a SentencePiece model: {error}") from error
    table = TokenTable(
        [f"[PAD{index}]".encode() for index in range(vocab_size)],
        [_ABSENT_SCORE] * vocab_size,
        [TokenType.UNUSED] * vocab_size,
    )
    for index in range(min(model.vocab_size(), vocab_size)):
        table.put(index, model.IdToPiece(index), model.GetScore(index), _piece_type(model, index))
    return table


def _piece_type(model: Any, index: int) -> TokenType:
    if model.IsUnknown(index):
        return TokenType.UNKNOWN
    if model.IsControl(index):
        return TokenType.CONTROL
    if model.IsUnused(index):
        return TokenType.UNUSED
    if model.IsByte(index):
        return TokenType.BYTE
    return TokenType.NORMAL


def _put_added_tokens(table: TokenTable, folder: Path) -> None:
    for text, index in read_optional(folder / "added_tokens.json").items():
        table.put(int(index), text, _ADDED_SCORE, TokenType.USER_DEFINED)


def _declared_tokens(folder: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    declared = read_optional(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    return [(int(index), entry) for index, entry in declared.items()]
