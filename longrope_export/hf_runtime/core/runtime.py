"""Puts a definition onto a text model of transformers, and takes it off again."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from longrope_export.hf_runtime.core.attention import AttentionConfig, SegmentedPass
from longrope_export.hf_runtime.core.cached_rows import (
    CachedRows,
    Columns,
    known_rows,
    recompute_cache,
    turn_cache,
)
from longrope_export.hf_runtime.core.planning import (
    Plan,
    Planner,
    find_positions,
    find_real_tokens,
)
from longrope_export.hf_runtime.core.rotation import TierTables, rotate

TEXT_MODELS = (
    "LlamaModel",
    "MistralModel",
    "MixtralModel",
    "Qwen2Model",
    "Qwen2MoeModel",
    "Qwen3Model",
    "Qwen3MoeModel",
    "Phi3Model",
    "PhimoeModel",
    "GemmaModel",
    "Gemma2Model",
    "Gemma3TextModel",
    "GraniteModel",
    "GraniteMoeModel",
)
KEPT_TURNS = 1 << 24  # cos values that one forward may keep for its layers, 64 MB of float32


class Embeddings(tuple[Tensor, Tensor]):
    """cos and sin for the rescaled layers; `plain` holds those of the other layers."""

    plain: tuple[Tensor, Tensor]

    def to(self, *args: Any, **kwargs: Any) -> Embeddings:
        """All four on a device: accelerate's hooks call it, and would else lose `plain`."""
        moved = Embeddings(part.to(*args, **kwargs) for part in self)
        cos, sin = self.plain
        moved.plain = cos.to(*args, **kwargs), sin.to(*args, **kwargs)
        return moved


class TieredRotary(nn.Module):
    """Takes the place of the model's rotary embedding.

    Attributes:
        original: the model's own, which still serves gemma3's layers with a sliding window.
    """

    def __init__(self, runtime: Runtime, original: nn.Module) -> None:
        super().__init__()
        self.runtime, self.original = runtime, original

    @torch.no_grad()
    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin, each (batch, n, rotary_dim) in the dtype of x.

        Args:
            layer_type: gemma3 asks once per type; only its full-attention layers are rescaled.
        """
        if layer_type is not None and layer_type != "full_attention":
            return self.original(x, position_ids, layer_type)  # type: ignore[no-any-return]
        cos, sin = self.runtime.cos_sin(x, position_ids)
        if self.runtime.rescales_every_layer:
            return cos, sin
        pair = Embeddings((cos, sin))
        pair.plain = self.runtime.plain_cos_sin(x, position_ids)
        return pair


class UnderWay(threading.local):
    """What the runtimes are computing in this thread; two threads may run one model.

    Outside of the runtimes, so that models can be copied and pickled.

    Attributes:
        plans: of the forward that runs.
        forced: tiers of the rows while a cache is recomputed.
    """

    def __init__(self) -> None:
        self.plans: WeakKeyDictionary[Runtime, Plan] = WeakKeyDictionary()
        self.forced: WeakKeyDictionary[Runtime, Tensor] = WeakKeyDictionary()


UNDER_WAY = UnderWay()


class Runtime:
    """One text model under one definition; made by `install`.

    Args:
        text_model: LlamaModel or another of TEXT_MODELS.
        definition: the JSON shape of a factors file, valid.
        pin_length: under the `sequence` rule, the final length that every sequence is declared to
            have; its tier serves all of them and nothing is ever recomputed.
        keep_keys: see turn_cache.
        error: the exception class of every refusal.

    Raises:
        error: the definition does not fit the model.
    """

    def __init__(
        self,
        text_model: Any,
        definition: Mapping[str, Any],
        pin_length: int | None,
        keep_keys: bool | None,
        error: type[Exception],
    ) -> None:
        self.text_model, self.definition, self.error = text_model, definition, error
        self.keep_keys = keep_keys
        self.tables = TierTables(definition)
        self.planner = Planner(definition, self.tables, pin_length, error)
        scaling = definition.get("logit_scaling")
        self.log_base: int | None = scaling["base_length"] if scaling else None
        self.exempt = frozenset(scaling["exempt_layers"]) if scaling else frozenset()
        self.rescaled = self._check_fit()
        # gemma3's rotary embedding tells its two kinds of layers apart by itself
        asked = self._full_attention_layers() or frozenset(range(self.num_layers))
        self.rescales_every_layer = self.rescaled >= asked
        self._parameters = list(inspect.signature(text_model.forward).parameters)
        self._install()

    @property
    def num_layers(self) -> int:
        return len(self.text_model.layers)

    def freeze(self, tier_index: int | None) -> None:
        """One tier for every token from now on, for training and for sequence-parallel shards.

        Args:
            tier_index: 0 is the first tier; negative counts from the end; None ends it.
        """
        self.planner.freeze(tier_index)

    # -- the hooks, in the order in which a forward meets them

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before_forward(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Plans the forward, brings the cache to the right tier, passes on what layers need."""
        inputs = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        tokens = ids if ids is not None else embeds
        if tokens is None:
            return None  # the model itself complains
        if inputs.get("cache") is not None:
            raise self.error("continuous batching (generate_batch) has a paged cache: use generate")
        batch, num_new = tokens.shape[:2]
        cache: Any = inputs.get("past_key_values")
        mask: Any = inputs.get("attention_mask")
        rows = known_rows(cache, self.definition, self.error)
        num_cached = rows.length if rows else 0
        given = inputs.get("position_ids")
        positions = find_positions(given, mask, batch, num_cached, num_new)
        real = find_real_tokens(mask, batch, num_cached, num_new)
        forced = UNDER_WAY.forced.get(self)
        if forced is not None:
            plan = Plan(0, positions, real, forced[:, None], forced)
        else:
            plan = self.planner.plan(positions, real, num_cached, rows.tiers if rows else None)
        if rows and rows.tiers is not None and not torch.equal(rows.tiers, plan.rows):
            self._change_tiers(cache, rows, plan.rows, tokens.device)
        if plan.segments:
            before = [rows.columns().positions] if rows and num_cached else []
            plan.key_positions = torch.cat([*before, positions], dim=1)
            inputs["longrope_pass"] = self._segmented_pass(plan)
        if self.log_base is not None and int(positions.max()) + 1 > self.log_base:
            inputs["longrope_query_scale"] = self._query_scale(positions, tokens.device)
        if given is None:
            inputs["position_ids"] = positions.to(tokens.device)
        UNDER_WAY.plans[self] = plan
        return (), inputs

    def cos_sin(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """For the rotary embedding, in the middle of a forward."""
        tiers = self._rotary_tiers(position_ids)
        cos, sin = self.tables.cos_sin(position_ids, tiers, x.device)
        return torch.cat((cos, cos), -1).to(x.dtype), torch.cat((sin, sin), -1).to(x.dtype)

    def plain_cos_sin(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """For the layers that are not rescaled; the model's own embedding may have a scaling."""
        cos, sin = self.tables.plain_cos_sin(position_ids, x.device)
        return torch.cat((cos, cos), -1).to(x.dtype), torch.cat((sin, sin), -1).to(x.dtype)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _rotary_tiers(self, position_ids: Tensor) -> Tensor:
        plan = UNDER_WAY.plans.get(self)
        if plan is None:
            raise self.error(
                "the rotary embedding was called outside of the text model's forward: the runtime "
                "does not know which sequence this is"
            )
        return plan.tokens

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after_forward(self, _: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Notes which tokens the cache now holds, and under which tier."""
        plan = UNDER_WAY.plans.pop(self, None)
        cache = kwargs.get("past_key_values")
        if cache is None:
            found = output if isinstance(output, tuple) else output.values()
            cache = next((part for part in found if isinstance(part, Cache)), None)
        if plan is None or cache is None:
            return
        if int(cache.get_seq_length()) != plan.num_cached + plan.positions.shape[1]:
            return  # under gradient checkpointing the layers leave the cache alone
        rows = CachedRows.of(cache)
        if rows is None:
            rows = CachedRows()
            cache.layers.append(rows)
        ids = kwargs.get("input_ids") if not self.planner.is_causal else None
        columns = Columns(plan.positions, plan.real, None if ids is None else ids.cpu())
        rows.extend(columns, plan.rows, self.definition)

    def _change_tiers(
        self, cache: Any, rows: CachedRows, tiers: Tensor, device: torch.device
    ) -> None:
        if self.planner.is_causal:
            turn_cache(cache, rows, tiers, self.rescaled, self.tables, self.keep_keys, self.error)
            return
        UNDER_WAY.forced[self] = tiers
        try:
            recompute_cache(cache, rows, self.text_model, device, self.error)
        finally:
            del UNDER_WAY.forced[self]

    # -- what the layers get

    def _segmented_pass(self, plan: Plan) -> SegmentedPass:
        assert plan.key_positions is not None
        numbers = plan.key_positions.numel() * self.tables.original.numel() * len(plan.segments)
        return SegmentedPass(plan, self.tables.turn, rotate, numbers <= KEPT_TURNS, self.error)

    def _query_scale(self, positions: Tensor, device: torch.device) -> Tensor:
        """max(ln(p + 1) / ln(base_length), 1), Entropy-ABF, arXiv 2401.07004 section 3.2."""
        assert self.log_base is not None
        base = torch.tensor(self.log_base, dtype=torch.float64).log()
        return ((positions + 1).double().log() / base).clamp(min=1).float().to(device)

    # -- putting it on

    def _check_fit(self) -> frozenset[int]:
        """The layers that are rescaled.

        Raises:
            error: a field of the definition does not fit the model.
        """
        name = type(self.text_model).__name__
        config, rotary = self.text_model.config, self.text_model.rotary_emb
        by_type = self._full_attention_layers()
        block = dict(config.rope_parameters)
        block = block["full_attention"] if by_type is not None else block
        prefix = "" if by_type is None else "full_attention_"
        numbers = {
            "rope_theta": float(block["rope_theta"]),
            "rotary_dim": 2 * len(getattr(rotary, prefix + "inv_freq")),
        }
        for label, expected in numbers.items():
            got = self.definition[label]
            if abs(got - expected) > 1e-6 * expected:
                raise self.error(
                    f"{label} is {got:g}, the model ({name}) has {expected:g}: these factors are "
                    f"for another model"
                )
        layers = self.definition.get("layers")
        rescaled = frozenset(range(self.num_layers) if layers is None else layers)
        for label, named in (("layers", rescaled), ("exempt_layers", self.exempt)):
            if named and max(named) >= self.num_layers:
                raise self.error(
                    f"{label} names layer {max(named)}, the model ({name}) has {self.num_layers} "
                    f"(0..{self.num_layers - 1}): these factors are for another model"
                )
        if by_type is not None and not rescaled <= by_type:
            raise self.error(
                f"layers must be among the layers with full attention, {sorted(by_type)}, since "
                f"the others of {name} have a base of their own; got "
                f"{'all layers' if layers is None else sorted(rescaled)}"
            )
        return rescaled

    def _full_attention_layers(self) -> frozenset[int] | None:
        """Layers with full attention where the model ropes per layer type (gemma3), else None."""
        if not hasattr(self.text_model.rotary_emb, "full_attention_inv_freq"):
            return None
        types = self.text_model.config.layer_types
        return frozenset(index for index, kind in enumerate(types) if kind == "full_attention")

    def _install(self) -> None:
        model = self.text_model
        model.rotary_emb = TieredRotary(self, model.rotary_emb)
        self._hooks = [
            model.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            model.register_forward_hook(self.after_forward, with_kwargs=True),
        ]
        several_tiers = self.planner.is_causal and len(self.tables.borders) > 1
        for index, layer in enumerate(model.layers):
            attention = layer.self_attn
            if several_tiers or self.log_base is not None:
                attention.config = AttentionConfig(
                    attention, index in self.rescaled, index in self.exempt
                )
            if not self.rescales_every_layer and index not in self.rescaled:
                hook = attention.register_forward_pre_hook(_use_plain_embeddings, with_kwargs=True)
                self._hooks.append(hook)

    def remove(self) -> None:
        """Give the model back as it was."""
        model = self.text_model
        model.rotary_emb = model.rotary_emb.original
        for hook in self._hooks:
            hook.remove()
        for layer in model.layers:
            if isinstance(layer.self_attn.config, AttentionConfig):
                layer.self_attn.config = layer.self_attn.config.original


def _use_plain_embeddings(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In front of the attention of a layer that is not rescaled."""
    pair = kwargs["position_embeddings"]
    if isinstance(pair, Embeddings):
        kwargs["position_embeddings"] = pair.plain
    return args, kwargs


def find_text_model(model: nn.Module, error: type[Exception]) -> Any:
    """The one text model inside a model.

    Raises:
        error: none of the known ones, or several.
    """
    found = [part for part in model.modules() if type(part).__name__ in TEXT_MODELS]
    if len(found) != 1:
        raise error(
            f"{type(model).__name__}: {len(found)} text models of a known kind in it, expected one "
            f"of {', '.join(TEXT_MODELS)}"
        )
    return found[0]


def has_definition(text_model: Any, error: type[Exception]) -> bool:
    """Whether a definition of this runtime is at work on a text model.

    Raises:
        error: one is, but by another copy of this code, as in a folder with trust_remote_code.
    """
    rotary = text_model.rotary_emb
    if isinstance(rotary, TieredRotary):
        return True
    if type(rotary).__name__ == TieredRotary.__name__:
        raise error(
            f"this model came with a LongRoPE definition of its own, in {type(rotary).__module__}: "
            f"load it without trust_remote_code to use another definition or none"
        )
    return False


def install(
    model: nn.Module,
    definition: Mapping[str, Any],
    pin_length: int | None = None,
    keep_keys: bool | None = None,
    error: type[Exception] = ValueError,
) -> Runtime:
    """Put a definition onto the text model inside a model.

    Raises:
        error: an unknown model, one that has a definition already, or one that it does not fit.
    """
    text_model = find_text_model(model, error)
    if has_definition(text_model, error):
        raise error("this model has a LongRoPE definition already: remove_longrope first")
    return Runtime(text_model, definition, pin_length, keep_keys, error)
