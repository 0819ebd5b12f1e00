"""The tokenizer keys of a GGUF file, from the tokenizer files of a Hugging Face folder.

Three kinds: byte-level BPE in tokenizer.json; SentencePiece in tokenizer.model (its own module);
and a SentencePiece model that only tokenizer.json holds ("llama-hf").
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf.constants import TokenType
from gguf.gguf_writer import GGUFWriter
from tokenizers import AddedToken, Tokenizer

from longrope_converters.to_gguf.families import NativeFamily
from longrope_converters.to_gguf.pre_tokenizers import pre_tokenizer_name
from longrope_converters.to_gguf.sentencepiece_vocabulary import (
    TokenTable,
    looks_special,
    read_phi3_vocabulary,
    read_sentencepiece,
)
from longrope_converters.to_gguf.special_tokens import (
    SPECIAL_TYPES,
    SpecialTokens,
    read_optional,
    read_special_tokens,
    token_text,
)
from longrope_export.errors import ModelError
from longrope_export.models.hf_config import HfConfig

_NAMED_TOKENS = tuple(f"{kind}_token" for kind in SPECIAL_TYPES)
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# ids of CodeLlama's infilling tokens, which its files do not name
_CODE_LLAMA_VOCAB = 32016
_CODE_LLAMA_IDS = {"prefix": 32007, "suffix": 32008, "middle": 32009, "eot": 32010}
_GRANITE_SMALL_VOCAB = 49152


def add_vocabulary(
    writer: GGUFWriter, config: HfConfig, family: NativeFamily, pre: str | None
) -> None:
    """Add tokens, scores or merges, special tokens and chat template to the metadata.

    Raises:
        ModelError: missing, damaged or contradictory tokenizer files.
        UnsupportedError: a BPE pre-tokenizer without a name (see pre_tokenizer_name).
    """
    folder, settings = config.folder, read_optional(config.folder / "tokenizer_config.json")
    tokenizer = read_optional(folder / "tokenizer.json")
    uses_llama_rules = "llama-hf" in family.tokenizers
    if uses_llama_rules and settings.get("add_prefix_space") is not None:
        writer.add_add_space_prefix(settings["add_prefix_space"])
    if config.family.name == "phi3" and settings.get("tokenizer_class") == "GPT2Tokenizer":
        kind = "bpe"
    else:
        kind = _tokenizer_kind(folder, tokenizer, family.tokenizers)
    vocab_size = config.require_int("vocab_size")
    if kind == "bpe":
        _add_bpe_tokens(writer, folder, vocab_size, pre)
        special = read_special_tokens(folder, tokenizer, with_merges=True)
        if not special.merges:
            raise ModelError(
                f"{folder}: a BPE tokenizer without merges, in tokenizer.json and merges.txt alike: "
                "llama.cpp cannot load its GGUF; look whether the folder is whole"
            )
    else:
        if kind == "llama-hf":
            table = _read_llama_hf(folder, settings)
        elif config.family.name == "phi3":
            table = read_phi3_vocabulary(folder, vocab_size)
        else:
            table = read_sentencepiece(folder, vocab_size)
        _add_scored_tokens(writer, table)
        special = read_special_tokens(folder, tokenizer, vocab_size=len(table.texts))
    special.write(writer)
    if uses_llama_rules:
        _add_llama_exceptions(writer, vocab_size)


def load_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json, with the tokens that only the other files declare added as transformers does.

    Raises:
        ModelError: no such file, or one that `tokenizers` cannot read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{folder}: neither tokenizer.json nor tokenizer.model is there")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception for a file it cannot parse
        raise ModelError(f"{path}: cannot be read as a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = read_optional(folder / "tokenizer_config.json")
    declared = settings.get("added_tokens_decoder") or {}
    listed = sorted(declared.items(), key=lambda item: int(item[0]))
    tokenizer.add_tokens([_added_token(entry) for _, entry in listed])
    tokenizer.add_special_tokens(
        [_added_token(entry) for entry in _special_entries(folder, settings)]
    )
    return tokenizer


def _special_entries(folder: Path, settings: dict[str, Any]) -> list[Any]:
    if "added_tokens_decoder" not in settings:
        settings = {**settings, **read_optional(folder / "special_tokens_map.json")}
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    entries = [settings.get(name) for name in _NAMED_TOKENS] + list(extra)
    return [entry for entry in entries if token_text(entry)]


def _added_token(entry: Any) -> AddedToken:
    text = token_text(entry) or ""
    if not isinstance(entry, dict):
        return AddedToken(text, special=True, normalized=False)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(text, **{flag: bool(entry[flag]) for flag in flags if flag in entry})


def _tokenizer_kind(folder: Path, tokenizer: dict[str, Any], order: tuple[str, ...]) -> str:
    """The first kind whose files are there."""
    for kind in order:
        if kind == "sentencepiece" and (folder / "tokenizer.model").is_file():
            return kind
        if kind == "llama-hf" and _holds_sentencepiece(tokenizer):
            return kind
        if kind == "bpe":
            return kind
    raise ModelError(f"{folder / 'tokenizer.model'}: no such file; the tokenizer must be in it")


def _holds_sentencepiece(tokenizer: dict[str, Any]) -> bool:
    model, decoder = tokenizer.get("model") or {}, tokenizer.get("decoder") or {}
    return (
        model.get("type") == "BPE"
        and bool(model.get("byte_fallback"))
        and decoder.get("type") == "Sequence"
    )


def _add_bpe_tokens(writer: GGUFWriter, folder: Path, vocab_size: int, pre: str | None) -> None:
    tokenizer = load_tokenizer(folder)
    name = pre_tokenizer_name(tokenizer, folder / "tokenizer.json", pre)
    texts, types = _bpe_tokens(tokenizer, folder, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(texts)
    writer.add_token_types(types)


def _bpe_tokens(
    tokenizer: Tokenizer, folder: Path, vocab_size: int
) -> tuple[list[str], list[TokenType]]:
    """Texts and types of all ids; ids that no token has are padding."""
    texts = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    largest = max(vocabulary.values(), default=0)
    if largest >= vocab_size:
        raise ModelError(
            f"{folder}: the tokenizer has token id {largest}, but vocab_size in config.json is "
            f"{vocab_size}; the tokenizer does not belong to this model"
        )
    for text, index in vocabulary.items():
        texts[index], types[index] = text, TokenType.NORMAL
    for index, token in tokenizer.get_added_tokens_decoder().items():
        text = token.content
        if not token.normalized:
            # llama.cpp expects control and user-defined tokens as they look after decoding
            text = tokenizer.decode(
                tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False
            )
        if token.special or looks_special(text):
            types[index] = TokenType.CONTROL
        else:
            types[index] = TokenType.USER_DEFINED
            text = text.replace("\u2581", " ")
        texts[index] = text
    return texts, types


def _add_scored_tokens(writer: GGUFWriter, table: TokenTable) -> None:
    """A SentencePiece vocabulary."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(table.texts)
    writer.add_token_scores(table.scores)
    writer.add_token_types(table.types)


def _read_llama_hf(folder: Path, settings: dict[str, Any]) -> TokenTable:
    """Tokens without scores: tokenizer.json keeps merges, which llama.cpp's SPM does not read."""
    if str(settings.get("tokenizer_class", "")).startswith("LlamaTokenizer"):
        defaults = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        settings = {**defaults, **settings}
    tokenizer = load_tokenizer(folder)
    special = {token_text(entry) for entry in _special_entries(folder, settings)}
    tokens = list(_llama_hf_tokens(tokenizer, special))
    return TokenTable(
        [text.encode() for text, _ in tokens], [-1000.0] * len(tokens), [kind for _, kind in tokens]
    )


def _llama_hf_tokens(
    tokenizer: Tokenizer, special: set[str | None]
) -> Iterator[tuple[str, TokenType]]:
    base_size = tokenizer.get_vocab_size(with_added_tokens=False)
    by_id = {index: text for text, index in tokenizer.get_vocab(with_added_tokens=True).items()}
    for index in range(base_size):
        text = by_id[index]
        if _BYTE_TOKEN.fullmatch(text):
            yield text, TokenType.BYTE
        else:
            yield text, TokenType.CONTROL if text in special else TokenType.NORMAL
    for index, token in sorted(tokenizer.get_added_tokens_decoder().items()):
        if index >= base_size:
            kind = TokenType.CONTROL if token.content in special else TokenType.USER_DEFINED
            yield token.content, kind


def _add_llama_exceptions(writer: GGUFWriter, vocab_size: int) -> None:
    """Models that llama.cpp's converter knows by the size of their vocabulary."""
    if vocab_size == _CODE_LLAMA_VOCAB:
        SpecialTokens(ids=_CODE_LLAMA_IDS).write(writer)
    if vocab_size == _GRANITE_SMALL_VOCAB:
        writer.add_add_bos_token(False)
