"""tokenizer.json, its settings and the generation settings, from the vocabulary in a GGUF file.

The splitting rules of byte-level BPE are llama.cpp's (src/llama-vocab.cpp, MIT), by the name that
the file gives; a name that is not here gives no tokenizer, rather than one that splits differently.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as splitters
from tokenizers.processors import TemplateProcessing

from longrope_export.gguf_format import GgufHeader

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = r"\p{N}"
# tokenizer.ggml.pre -> rules, applied one after the other
_SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), (_DIGITS, _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
}
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")  # ignore_merges
_WITH_BOS = _WHOLE_WORDS_FIRST  # where the file does not say
_SPACE = "\u2581"


def write_tokenizer(header: GgufHeader, folder: Path, max_length: int) -> str | None:
    """Write tokenizer.json and tokenizer_config.json; where that cannot be, a sentence why.

    Args:
        max_length: tokens that the model takes, for model_max_length.
    """
    tokenizer = build_tokenizer(header)
    if tokenizer is None:
        kind, pre = header.get("tokenizer.ggml.model"), header.get("tokenizer.ggml.pre")
        return f"no tokenizer: kind {kind!r} with splitting rule {pre!r} is not known here"
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.dumps(tokenizer_settings(header, max_length), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(settings + "\n", encoding="utf-8")
    return None


def build_tokenizer(header: GgufHeader) -> Tokenizer | None:
    """The tokenizer, or None for a kind or a splitting rule that is not known here."""
    kind, pre = header.get("tokenizer.ggml.model"), header.get("tokenizer.ggml.pre", "default")
    texts = header.get("tokenizer.ggml.tokens")
    if not isinstance(texts, list) or len(set(texts)) != len(texts):
        return None
    stated = header.get("tokenizer.ggml.token_type")
    types = [1] * len(texts) if stated is None else [int(kind) for kind in stated]
    if len(types) != len(texts):
        return None
    if kind == "gpt2" and pre in _SPLITS:
        tokenizer = _byte_level(header, texts, types, pre)
        add_bos = pre in _WITH_BOS
    elif kind == "llama" and header.get("tokenizer.ggml.scores") is not None:
        tokenizer = _sentencepiece(header, texts, types)
        add_bos = True
    else:
        return None
    tokenizer.add_tokens(_added_tokens(header, texts, types))
    _add_template(tokenizer, header, texts, add_bos)
    return tokenizer


def tokenizer_settings(header: GgufHeader, max_length: int) -> dict[str, Any]:
    """tokenizer_config.json."""
    texts = header.get("tokenizer.ggml.tokens")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    for kind, index in special_ids(header).items():
        settings[f"{kind}_token"] = texts[index]
    template = header.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    return settings


def generation_settings(header: GgufHeader) -> dict[str, Any]:
    """generation_config.json: the special tokens; the end of a turn is an end token too."""
    ids = special_ids(header)
    settings: dict[str, Any] = {
        f"{kind}_token_id": ids[kind] for kind in ("bos", "eos", "pad") if kind in ids
    }
    turn_end = header.get("tokenizer.ggml.eot_token_id")
    if isinstance(turn_end, int) and "eos" in ids and turn_end != ids["eos"]:
        settings["eos_token_id"] = [ids["eos"], turn_end]
    return settings


def special_ids(header: GgufHeader) -> dict[str, int]:
    """bos, eos, unk and pad, as far as the file names them."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    texts = header.get("tokenizer.ggml.tokens", ())
    ids = {kind: header.get(f"tokenizer.ggml.{name}_token_id") for kind, name in names.items()}
    return {k: i for k, i in ids.items() if isinstance(i, int) and 0 <= i < len(texts)}


def _byte_level(
    header: GgufHeader, texts: Sequence[str], types: Sequence[int], pre: str
) -> Tokenizer:
    vocabulary = {t: i for i, t in enumerate(texts) if types[i] != TokenType.UNUSED}
    merges = [tuple(merge.split(" ", 1)) for merge in header.get("tokenizer.ggml.merges", ())]
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _WHOLE_WORDS_FIRST)
    tokenizer = Tokenizer(model)
    if "qwen" in pre:
        tokenizer.normalizer = normalizers.NFC()
    rules = [splitters.Split(Regex(rule), "isolated") for rule in _SPLITS[pre]]
    bytes_only = splitters.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = splitters.Sequence([*rules, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(header: GgufHeader, texts: Sequence[str], types: Sequence[int]) -> Tokenizer:
    """BPE over pieces; what is not in the vocabulary falls back to bytes."""
    vocabulary = {text: index for index, text in enumerate(texts)}
    pieces = [i for i in range(len(texts)) if types[i] == TokenType.NORMAL]
    merges = _merges(texts, pieces, header.get("tokenizer.ggml.scores"))
    unknown = special_ids(header).get("unk", 0)
    model = models.BPE(
        vocab=vocabulary,
        merges=merges,
        unk_token=texts[unknown],
        fuse_unk=True,
        byte_fallback=TokenType.BYTE in types,
    )
    tokenizer = Tokenizer(model)
    prefix = bool(header.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", _SPACE)
    first = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*first, spaces])
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    return tokenizer


def _merges(
    texts: Sequence[str], pieces: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Every way to make a piece out of two others, the best piece first.

    SentencePiece joins the neighbours whose union has the highest score; a list of merges says the
    same. Where all scores are equal (the file was made from merges) the order of ids stands in.
    """
    known = {texts[index]: index for index in pieces}
    no_scores = len({float(scores[index]) for index in pieces}) < 2
    found = []
    for text, index in known.items():
        rank = index if no_scores else -float(scores[index])
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in known and right in known:
                found.append((rank, known[left], known[right], left, right))
    found.sort(key=lambda entry: entry[:3])
    return [(left, right) for *_, left, right in found]


def _added_tokens(
    header: GgufHeader, texts: Sequence[str], types: Sequence[int]
) -> list[AddedToken]:
    """Tokens that are found in the text before it is split: control and user-defined ones."""
    # Phi-3's own tokenizer lets these swallow the spaces behind them; llama.cpp does the same
    strips = header.architecture == "phi3" and header.get("tokenizer.ggml.model") == "llama"
    keep = ("<unk>", "<s>", "<|endoftext|>")
    added = []
    for text, kind in zip(texts, types, strict=True):
        special = kind in (TokenType.CONTROL, TokenType.UNKNOWN)
        if special or kind == TokenType.USER_DEFINED:
            rstrip = strips and special and text not in keep
            added.append(AddedToken(text, special=special, normalized=False, rstrip=rstrip))
    return added


def _add_template(
    tokenizer: Tokenizer, header: GgufHeader, texts: Sequence[str], add_bos: bool
) -> None:
    ids = special_ids(header)
    ends = {"bos": add_bos, "eos": False}
    wanted = [
        kind
        for kind, default in ends.items()
        if header.get(f"tokenizer.ggml.add_{kind}_token", default) and kind in ids
    ]
    if not wanted:
        return
    named = {kind: texts[ids[kind]] for kind in wanted}
    tokenizer.post_processor = TemplateProcessing(
        single=[text for text in (named.get("bos"), "$A", named.get("eos")) if text],
        special_tokens=[(named[kind], ids[kind]) for kind in wanted],
    )
