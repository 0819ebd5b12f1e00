"""Special token ids, BOS/EOS habits, merges and chat templates of a Hugging Face folder.

The rules are those of llama.cpp's converter at the release that pre_tokenizers.json names. The
gguf package has them too, but an older edition that misses byte-level post-processors and
normalizers, and whose result would change with the installed version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf.constants import Keys
from gguf.gguf_writer import GGUFWriter

from longrope_export.errors import ModelError
from longrope_export.models.hf_config import read_json_object

SPECIAL_TYPES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

_SPACE = "\u0120"  # in GPT-2's byte alphabet

ChatTemplate = str | list[dict[str, str]]


@dataclass
class SpecialTokens:
    """What a folder says about its special tokens, in the order in which it is written."""

    merges: list[str] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)
    added: dict[str, bool] = field(default_factory=dict)
    chat_template: ChatTemplate | None = None
    normalizer_flags: dict[str, bool] = field(default_factory=dict)

    def write(self, writer: GGUFWriter) -> None:
        if self.merges:
            writer.add_token_merges(self.merges)
        for kind, token_id in self.ids.items():
            _add_if_known(writer, f"add_{kind}_token_id", token_id)
        for kind, value in self.added.items():
            _add_if_known(writer, f"add_add_{kind}_token", value)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)
            names = writer.kv_data[0].get(Keys.Tokenizer.CHAT_TEMPLATES)
            if names is not None:
                names.value = sorted(names.value)  # the writer collects them in a set
        for name, value in self.normalizer_flags.items():
            writer.add_bool(f"tokenizer.ggml.normalizer.{name}", value)


def _add_if_known(writer: GGUFWriter, method: str, value: int | bool) -> None:
    """GGUF has no key for some kinds, such as cls."""
    add = getattr(writer, method, None)
    if add is not None:
        add(value)


def read_special_tokens(
    folder: Path,
    tokenizer: Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    with_merges: bool = False,
) -> SpecialTokens:
    """Read tokenizer_config.json, config.json and the chat template files too.

    Args:
        folder: the model folder.
        tokenizer: its tokenizer.json, {} if it has none.
        vocab_size: ids from here on are left out; None keeps all.
        with_merges: read the merges of a BPE tokenizer.
    """
    settings = read_optional(folder / "tokenizer_config.json")
    special = SpecialTokens()
    if with_merges:
        special.merges = _merges(folder, tokenizer)
    _read_normalizer(tokenizer.get("normalizer") or {}, special.normalizer_flags)
    habits = _PostProcessor(settings, special.added)
    if tokenizer:
        habits.read(tokenizer.get("post_processor") or {})
    if settings:
        special.chat_template = _chat_template(folder, settings)
        _read_settings(settings, habits.kinds, tokenizer, special, vocab_size)
    config = read_optional(folder / "config.json")
    text_config = config.get("text_config") or {}
    for kind in habits.kinds:
        token_id = config.get(f"{kind}_token_id")
        if token_id is None:
            token_id = text_config.get(f"{kind}_token_id")
        _set_id(special, kind, token_id, vocab_size)
    return special


def read_optional(path: Path) -> dict[str, Any]:
    """A JSON object, or {} if there is no such file."""
    return read_json_object(path) if path.is_file() else {}


def token_text(entry: Any) -> str | None:
    """The text of a token given as a string or as an object with `content`."""
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) else None


def _read_settings(
    settings: dict[str, Any],
    kinds: tuple[str, ...],
    tokenizer: Mapping[str, Any],
    special: SpecialTokens,
    vocab_size: int | None,
) -> None:
    added = tokenizer.get("added_tokens") or []
    ids = {entry.get("content"): entry.get("id") for entry in reversed(added)}
    for kind in kinds:
        habit = settings.get(f"add_{kind}_token")
        if isinstance(habit, bool):
            special.added.setdefault(kind, habit)
        text = token_text(settings.get(f"{kind}_token"))
        if text is not None:
            _set_id(special, kind, ids.get(text), vocab_size)


def _set_id(special: SpecialTokens, kind: str, token_id: Any, vocab_size: int | None) -> None:
    if not isinstance(token_id, int) or token_id < 0:
        return
    if vocab_size is None or token_id < vocab_size:
        special.ids.setdefault(kind, token_id)


def _merges(folder: Path, tokenizer: Mapping[str, Any]) -> list[str]:
    merges = (tokenizer.get("model") or {}).get("merges") or []
    if not merges:
        return _merges_from_text(folder / "merges.txt")
    if isinstance(merges[0], str):
        return list(merges)
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in merges):
        raise ModelError(f"{folder / 'tokenizer.json'}: merges must be strings or pairs of them")
    # a space inside a piece would read as the separator
    return [f"{a.replace(' ', _SPACE)} {b.replace(' ', _SPACE)}" for a, b in merges]


def _merges_from_text(path: Path) -> list[str]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    if lines and lines[0].startswith("#"):
        lines = lines[1:]
    pairs = [line.split() for line in lines]
    return [" ".join(pair) for pair in pairs if len(pair) == 2]


def _read_normalizer(normalizer: dict[str, Any], flags: dict[str, bool]) -> None:
    match normalizer.get("type"):
        case "Lowercase":
            flags["lowercase"] = True
        case "StripAccents":
            flags["strip_accents"] = True
        case "BertNormalizer":
            flags.update(
                {
                    name: normalizer[name]
                    for name in ("lowercase", "strip_accents")
                    if normalizer.get(name) is not None
                }
            )
        case "Sequence":
            for part in normalizer.get("normalizers", []):
                _read_normalizer(part, flags)


def _chat_template(folder: Path, settings: dict[str, Any]) -> ChatTemplate | None:
    """The template of tokenizer_config.json; where it has none, that of the template files."""
    if "chat_template" in settings:
        template = settings["chat_template"]
    else:
        template = _template_from_files(folder)
    return template if isinstance(template, str | list) else None


def _template_from_files(folder: Path) -> Any:
    main = folder / "chat_template.jinja"
    if not main.is_file():
        return read_optional(folder / "chat_template.json").get("chat_template")
    text = main.read_text(encoding="utf-8")
    others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if not others:
        return text
    named = [{"name": path.stem, "template": path.read_text(encoding="utf-8")} for path in others]
    return [{"name": "default", "template": text}, *named]


class _PostProcessor:
    """Reads off the post-processor which special tokens are put around a text.

    `settings` (tokenizer_config.json) is completed on the way: a post-processor that uses a token
    nobody named makes it the BOS, EOS, CLS or SEP token. `kinds` grows by "eot" when the
    post-processor ends in another token than the declared EOS.
    """

    def __init__(self, settings: dict[str, Any], added: dict[str, bool]) -> None:
        self.settings, self.added = settings, added
        self.kinds: tuple[str, ...] = SPECIAL_TYPES
        self.token = {kind: settings.get(f"{kind}_token") for kind in ("bos", "cls", "eos", "sep")}
        for kind, stand_in in (("bos", "cls"), ("eos", "sep")):
            if not self.token[kind] and self.token[stand_in]:
                self.name_token(kind, self.token[stand_in])

    def name_token(self, kind: str, token: Any) -> None:
        self.token[kind] = token
        if self.settings:
            self.settings[f"{kind}_token"] = token

    def read(self, post_processor: dict[str, Any]) -> None:
        for part in post_processor.get("processors") or [post_processor]:
            match part.get("type"):
                case "ByteLevel":
                    self.added.setdefault("bos", False)
                    self.added.setdefault("eos", False)
                case "RobertaProcessing":
                    self.read_roberta(part)
                case "TemplateProcessing":
                    self.read_template(part.get("single") or [], part.get("pair") or [])

    def read_roberta(self, part: dict[str, Any]) -> None:
        self.added.update(bos=True, eos=True, sep=True)
        for kind, fallback in (("cls", "bos"), ("sep", "eos")):
            if not self.token[kind] and self.settings:
                self.name_token(kind, part.get(kind, [self.token[fallback]])[0])

    def read_template(self, single: list[dict[str, Any]], pair: list[dict[str, Any]]) -> None:
        first = _special_id(single[0]) if len(single) > 1 else None
        last = _special_id(single[-1]) if len(single) > 1 else None
        if first:
            self.read_first(first)
        if last:
            self.read_last(last)
        if first and pair and _special_id(pair[0]) == first:
            pair = pair[1:]
        if last and pair and _special_id(pair[-1]) == last:
            pair = pair[:-1]
        self.read_pair(pair, ends_in_special=bool(last))

    def read_first(self, first: str) -> None:
        if not self.settings:
            self.token["bos"] = first
        elif first not in (self.token["bos"], self.token["cls"]):
            for kind in ("bos", "cls"):
                if not self.token[kind]:
                    self.name_token(kind, first)
        self.added["bos"] = first in (self.token["bos"], self.token["cls"])

    def read_last(self, last: str) -> None:
        if not self.settings:
            self.token["eos"] = last
        elif last != self.token["eos"]:
            spare = next((kind for kind in ("eot", "eom") if kind not in self.kinds), None)
            if spare is not None:
                self.kinds = (*self.kinds, spare)
                self.settings[f"{spare}_token"] = self.token["eos"]
            self.name_token("eos", last)
        self.added["eos"] = last == self.token["eos"]

    def read_pair(self, pair: list[dict[str, Any]], ends_in_special: bool) -> None:
        """Whether a separator stands between the two texts of a pair: A [sep] [eos] B."""
        middle = pair[1:-1]
        if not middle or _sequence_id(pair[0]) != "A" or _sequence_id(pair[-1]) != "B":
            return
        separators = [_special_id(part) for part in middle]
        usual = (self.token["sep"], self.token["eos"])
        known = [token is not None and token in usual for token in separators]
        add = known[0] and not ends_in_special
        if len(middle) == 2:
            add = add or known[1]
        self.added["sep"] = add
        if add and not self.token["sep"] and self.settings:
            self.settings["sep_token"] = self.token["eos"]


def _special_id(part: dict[str, Any]) -> str | None:
    return (part.get("SpecialToken") or {}).get("id")


def _sequence_id(part: dict[str, Any]) -> str | None:
    return (part.get("Sequence") or {}).get("id")
