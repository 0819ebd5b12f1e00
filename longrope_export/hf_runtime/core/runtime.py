"""Puts a definition onto a text model of transformers, and takes it off again."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from longrope_export.hf_runtime.core.attention import AttentionConfig, SegmentedPass
from longrope_export.hf_runtime.core.cached_rows import CachedRows, Columns
from longrope_export.hf_runtime.core.planning import (
    KEPT_TURNS,
    Plan,
    find_positions,
    find_real_tokens,
    last_positions,
    split_columns,
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
    "Gemma2Model",
    "Gemma3TextModel",
    "GraniteModel",
    "GraniteMoeModel",
)
ROTATABLE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


class Embeddings(tuple[Tensor, Tensor]):
    """cos and sin for the rescaled layers; `own` holds the model's own for the other layers."""

    own: tuple[Tensor, Tensor]


class TieredRotary(nn.Module):
    """Takes the place of the model's rotary embedding.

    Attributes:
        original: the model's own, which still serves layers that are not rescaled.
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
        names = () if layer_type is None else (layer_type,)
        pair.own = self.original(x, position_ids, *names)
        return pair


class Runtime:
    """One text model under one definition; made by `install`.

    Args:
        text_model: LlamaModel or another of TEXT_MODELS.
        definition: the JSON shape of a factors file, valid.
        pin_length: under the `sequence` rule, the final length that every sequence is declared to
            have; its tier serves all of them and nothing is ever recomputed.
        error: the exception class of every refusal.

    Raises:
        error: the definition does not fit the model.
    """

    def __init__(
        self,
        text_model: Any,
        definition: Mapping[str, Any],
        pin_length: int | None,
        error: type[Exception],
    ) -> None:
        self.text_model, self.definition, self.error = text_model, definition, error
        self.tables = TierTables(definition)
        self.is_causal = definition.get("switch", "causal") == "causal"
        scaling = definition.get("logit_scaling")
        self.log_base: int | None = scaling["base_length"] if scaling else None
        self.exempt = frozenset(scaling["exempt_layers"]) if scaling else frozenset()
        self.last_position = int(self.tables.borders[-1]) - 1
        self.frozen: int | None = None
        self.pinned: int | None = None
        if pin_length is not None:
            self._pin(pin_length)
        self.rescaled = self._check_fit()
        # gemma3's rotary embedding tells its two kinds of layers apart by itself
        asked = self._full_attention_layers() or frozenset(range(self.num_layers))
        self.rescales_every_layer = self.rescaled >= asked
        self._plan: Plan | None = None
        self._forced: Tensor | None = None  # tiers of the rows while a cache is recomputed
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
        count = len(self.tables.borders)
        if tier_index is not None and not -count <= tier_index < count:
            raise self.error(f"freeze: tier {tier_index} of {count}; use 0..{count - 1} or None")
        self.frozen = None if tier_index is None else tier_index % count

    # -- the hooks, in the order in which a forward meets them

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before_forward(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Plans the forward, brings the cache to the right tier, passes on what layers need."""
        inputs = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        tokens = ids if ids is not None else embeds
        if tokens is None:
            return None  # the model itself complains
        batch, num_new = tokens.shape[:2]
        cache, mask = inputs.get("past_key_values"), inputs.get("attention_mask")
        rows = self._rows_of(cache)
        num_cached = rows.length if rows else 0
        given = inputs.get("position_ids")
        positions = find_positions(given, mask, batch, num_cached, num_new)
        real = find_real_tokens(mask, batch, num_cached, num_new)
        plan = self._make_plan(positions, real, rows)
        if rows and rows.tiers is not None and not torch.equal(rows.tiers, plan.rows):
            if self.is_causal:
                self._turn_cache(cache, rows, plan.rows)
            else:
                self._recompute_cache(cache, rows, plan.rows)
        if plan.segments:
            before = [rows.columns().positions] if rows and num_cached else []
            plan.key_positions = torch.cat([*before, positions], dim=1)
            inputs["longrope_pass"] = self._segmented_pass(plan)
        if self.log_base is not None and int(positions.max()) + 1 > self.log_base:
            inputs["longrope_query_scale"] = self._query_scale(positions, tokens.device)
        if given is None:
            inputs["position_ids"] = positions.to(tokens.device)
        self._plan = plan
        return (), inputs

    def cos_sin(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """For the rotary embedding, in the middle of a forward."""
        tiers = self._rotary_tiers(position_ids)
        cos, sin = self.tables.cos_sin(position_ids, tiers, x.device)
        return torch.cat((cos, cos), -1).to(x.dtype), torch.cat((sin, sin), -1).to(x.dtype)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _rotary_tiers(self, position_ids: Tensor) -> Tensor:
        if self._plan is None:
            raise self.error(
                "the rotary embedding was called outside of the text model's forward: the runtime "
                "does not know which sequence this is"
            )
        return self._plan.tokens

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after_forward(self, _: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Notes which tokens the cache now holds, and under which tier."""
        plan, self._plan = self._plan, None
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
        ids = kwargs.get("input_ids") if not self.is_causal else None
        rows.extend(Columns(plan.positions, plan.real, None if ids is None else ids.cpu()), plan.rows)

    # -- which tier

    def _make_plan(self, positions: Tensor, real: Tensor, rows: CachedRows | None) -> Plan:
        batch = len(positions)
        num_cached = rows.length if rows else 0
        fixed = self.frozen if self.frozen is not None else self.pinned
        if self._forced is not None or fixed is not None:
            if self.frozen is None and self._forced is None:
                self._check_length(positions, real)
            tiers = self._forced if self._forced is not None else torch.full((batch,), fixed)
            return Plan(num_cached, positions, real, tiers[:, None], tiers)
        self._check_length(positions, real)
        known = positions.clamp(max=self.last_position)
        if not self.is_causal and not num_cached:
            known = last_positions(known, real)
        elif not self.is_causal:
            known = torch.where(real, known, torch.zeros_like(known)).amax(1, keepdim=True)
        tokens = self.tables.select(known)
        nothing = torch.full_like(tokens, -1)
        marked = torch.where(real, tokens, nothing) if tokens.shape == real.shape else tokens
        new_rows = marked.amax(1)
        if not self.is_causal and tokens.shape == real.shape:
            # packed documents: the cache of a row can only go on with its last one
            last = torch.where(real, torch.arange(real.shape[1]), -1).amax(1).clamp(min=0)
            new_rows = tokens.gather(1, last[:, None])[:, 0]
        idle = ~real.any(1)
        if idle.any():  # a row of padding stays where it is
            old = rows.tiers if rows and rows.tiers is not None else torch.zeros_like(new_rows)
            new_rows = torch.where(idle, old, new_rows)
        if tokens.shape == real.shape:
            tokens = torch.where(real, tokens, new_rows[:, None])
        else:
            tokens = new_rows[:, None]
        if torch.equal(tokens, new_rows[:, None].expand_as(tokens)):
            return Plan(num_cached, positions, real, new_rows[:, None], new_rows)
        if not self.is_causal:
            return Plan(num_cached, positions, real, tokens, new_rows)
        segments = split_columns(tokens)
        return Plan(num_cached, positions, real, new_rows[:, None], new_rows, segments)

    def _check_length(self, positions: Tensor, real: Tensor) -> None:
        last = self.last_position if self.pinned is None else int(self.tables.borders[self.pinned]) - 1
        if int(positions.max()) <= last:
            return
        beyond = int(torch.where(real, positions, torch.zeros_like(positions)).max())
        if beyond > last and self.pinned is not None:
            raise self.error(
                f"a sequence has {beyond + 1} tokens, pin_length chose the tier for at most "
                f"{last + 1}: apply the runtime again with a larger pin_length"
            )
        if beyond > last:
            raise self.error(
                f"a sequence has {beyond + 1} tokens, the last tier ends at "
                f"max_position_embeddings = {last + 1}: make factors for a longer target"
            )

    def _pin(self, length: int) -> None:
        if self.is_causal:
            raise self.error("pin_length is for switch = sequence; under causal no length is needed")
        if not 1 <= length <= self.last_position + 1:
            raise self.error(f"pin_length must be 1..{self.last_position + 1} tokens, got {length}")
        self.pinned = int(self.tables.select(torch.tensor(length - 1)))

    # -- the cache

    def _rows_of(self, cache: Any) -> CachedRows | None:
        if cache is None:
            return None
        if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
            raise self.error(f"cache of type {type(cache).__name__} is not known; use DynamicCache")
        rows, held = CachedRows.of(cache), int(cache.get_seq_length())
        if held != (rows.length if rows else 0):
            raise self.error(
                f"the cache holds {held} tokens of which the runtime has seen "
                f"{rows.length if rows else 0}: it must be filled by this model after the runtime "
                f"was put on it, and cut only with cache.crop"
            )
        return rows

    def _turn_cache(self, cache: Cache, rows: CachedRows, tiers: Tensor) -> None:
        """Re-rotate the cached keys of the rows whose tier changes; the others turn by nothing."""
        assert rows.tiers is not None
        positions = rows.columns().positions
        turns: dict[torch.device, tuple[Tensor, Tensor]] = {}
        for index in sorted(self.rescaled):
            layer: Any = cache.layers[index]
            if type(layer) not in ROTATABLE_LAYERS:
                raise self.error(
                    f"layer {index} of the cache is a {type(layer).__name__}, whose keys cannot be "
                    f"rotated again at a tier border; use DynamicCache or StaticCache"
                )
            keys = layer.keys
            if keys.device not in turns:
                before, after = rows.tiers[:, None], tiers[:, None]
                turns[keys.device] = self.tables.turn(positions, before, after, keys.device)
            cos, sin = turns[keys.device]
            held = min(keys.shape[2], positions.shape[1])  # the last ones, at the front
            turned = rotate(keys[:, :, :held], cos[:, -held:], sin[:, -held:])
            if isinstance(layer, StaticLayer):
                keys[:, :, :held] = turned
            else:
                layer.keys = turned
        rows.tiers = tiers

    def _recompute_cache(self, cache: Cache, rows: CachedRows, tiers: Tensor) -> None:
        """Fill the cache again from its tokens, every row under its new tier."""
        columns = rows.columns()
        if columns.input_ids is None:
            raise self.error(
                "a sequence outgrew its tier under switch = sequence and its cache must be "
                "recomputed, but part of it came as inputs_embeds: pass pin_length to "
                "apply_longrope, or use input_ids"
            )
        device = self.text_model.get_input_embeddings().weight.device
        cache.reset()
        self._forced = tiers
        try:
            self.text_model(
                input_ids=columns.input_ids.to(device),
                attention_mask=None if columns.real.all() else columns.real.long().to(device),
                position_ids=columns.positions.to(device),
                past_key_values=cache,
                use_cache=True,
            )
        finally:
            self._forced = None

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
        fields = {
            "rope_theta": float(block["rope_theta"]),
            "rotary_dim": 2 * len(getattr(rotary, prefix + "inv_freq")),
        }
        for field, expected in fields.items():
            got = self.definition[field]
            if abs(got - expected) > 1e-6 * expected:
                raise self.error(
                    f"{field} is {got:g}, the model ({name}) has {expected:g}: these factors are "
                    f"for another model"
                )
        layers = self.definition.get("layers")
        rescaled = frozenset(range(self.num_layers) if layers is None else layers)
        for field, named in (("layers", rescaled), ("exempt_layers", self.exempt)):
            if named and max(named) >= self.num_layers:
                raise self.error(
                    f"{field} names layer {max(named)}, the model ({name}) has {self.num_layers} "
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
        several_tiers = self.is_causal and len(self.tables.borders) > 1
        for index, layer in enumerate(model.layers):
            attention = layer.self_attn
            if several_tiers or self.log_base is not None:
                attention.config = AttentionConfig(
                    attention, index in self.rescaled, index in self.exempt
                )
            if not self.rescales_every_layer and index not in self.rescaled:
                hook = attention.register_forward_pre_hook(_use_own_embeddings, with_kwargs=True)
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


def _use_own_embeddings(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In front of the attention of a layer that is not rescaled."""
    pair = kwargs["position_embeddings"]
    if isinstance(pair, Embeddings):
        kwargs["position_embeddings"] = pair.own
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


def install(
    model: nn.Module,
    definition: Mapping[str, Any],
    pin_length: int | None = None,
    error: type[Exception] = ValueError,
) -> Runtime:
    """Put a definition onto the text model inside a model.

    Raises:
        error: an unknown model, one that has a definition already, or one that it does not fit.
    """
    text_model = find_text_model(model, error)
    if isinstance(text_model.rotary_emb, TieredRotary):
        raise error("this model has a LongRoPE definition already: remove_longrope first")
    return Runtime(text_model, definition, pin_length, error)
