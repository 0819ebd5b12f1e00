"""A search from texts to factors.json: find, choose on validation documents, report on test ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from longrope_export.config import FactorTier, LongRopeConfig, SwitchPolicy
from longrope_export.errors import ConfigError
from longrope_export.ladder import MethodOptions, attention_factor, make_config, parse_ladder
from longrope_export.search.algorithms import Algorithm, find_finalists
from longrope_export.search.documents import split_documents
from longrope_export.search.evaluator import Budget, Fitness, single_tier
from longrope_export.search.jobs import Document, Span
from longrope_export.search.judge import (
    RuleRow,
    better_rule,
    choose,
    losses_of,
    measure_rules,
    tabulate,
)
from longrope_export.search.ladder_search import LadderSearch, LadderSettings
from longrope_export.search.needles import FEWER, make_needles
from longrope_export.search.options import CLOSED_FORMS, SEARCHED_ATTENTION, Outcome
from longrope_export.search.run_base import SETS, Run, Texts, indices_of, names_of
from longrope_export.search.space import START_TOKENS, SearchSpace, make_space, with_start

STRENGTHS = (0.6, 0.3)  # of YaRN's attention factor, as further seeds of one tier
CHEAP_BLOCKS = 4
SHOWN_SEEDS = 2  # beside the closed forms in the table of the test documents
ATTENTION_REACH = 0.25  # of ln s, above 1: where the attention factor is a gene


class SearchRun(Run):
    """A search for one tier or for a ladder. Raises as Run does."""

    def _prepare(self, texts: Texts, rng: np.random.Generator) -> list[Document]:
        options = self.options
        if options.target_length <= self.model.window:
            raise ConfigError(
                f"--target-length {options.target_length}: the model's own window is "
                f"{self.model.window} already"
            )
        self._forms = self._closed_forms()
        self._space = self._make_space()
        self._seeds = self._make_seeds()
        self._ladder = self._ladder_settings()
        counts = (options.num_search_documents, *options.documents[1:])
        self.split = split_documents(texts.works, options.target_length, counts, rng, texts.start)
        self.held_out = self.split.held_out
        documents = list(self.split.all)
        self._needles = self._add_needles(documents, texts, rng)
        return documents

    def execute(self) -> Outcome:
        """See Run."""
        self._say("searching")
        candidates = self._search_tier() if self._ladder is None else self._search_ladder()
        self._say("choosing on validation documents")
        # LongRoPE2 is judged by what it searches for: answers to needles
        asks = self.options.algorithm is Algorithm.LONGROPE2
        validation = self._needles["validation, one key"] if asks else self.indices("validation")
        configs = {**candidates, **self._forms}
        # one tier is scored as `sequence` computes long text, and a ladder under `causal`
        own = SwitchPolicy.SEQUENCE if self._ladder is None else SwitchPolicy.CAUSAL
        switch, rules = self.options.switch, list[RuleRow]()
        if switch is None:
            first = choose(self.judging, self._written(configs, own), validation)
            rules = self._measure_rules(configs[first])
            switch = better_rule(rules)
        written = self._written(configs, switch)
        chosen = choose(self.judging, written, validation)
        baseline = choose(self.judging, {name: written[name] for name in self._forms}, validation)
        config = written[chosen]
        self._say("reporting on test documents")
        shown = {**self._forms, **self._best_seeds(), **self._ablation(chosen, configs[chosen])}
        if switch is SwitchPolicy.CAUSAL and len(self._forms[baseline].tiers) == 1:
            shown[f"{baseline}, {switch}"] = written[baseline]
        shown["result"] = config
        result = {
            "chosen": chosen,
            "baseline": baseline,
            "test": self._rows(shown, self.indices("test"), baseline),
            "validation": self._rows(written, validation, baseline),
            "rules": [asdict(rule) for rule in rules],
            "held_out": self.held_out,
            "documents": names_of(self.split),
            "notes": self._notes(),
        }
        if asks:
            needles = self._needles["test, one key"]
            result["test_needles"] = self._rows(shown, needles, baseline)
        return self._finish(config, result)

    def _search_tier(self) -> dict[str, LongRopeConfig]:
        options = self.options
        template = single_tier(self.model.native)
        asks = options.algorithm is Algorithm.LONGROPE2
        documents = self._needles["search, one key"] if asks else self.indices("search")
        if asks:  # the paper's search draws no closed form: they are scored for those who watch
            losses = losses_of(self.judging, list(self._forms.values()), documents).mean(axis=1)
            self._seeded(dict(zip(self._forms, losses.tolist(), strict=True)))
        fitness = Fitness(self.searching, template, documents)
        cheap = Fitness(self.searching, template, documents[:1], self._cheap_blocks())
        practical = options.practical
        if not self.has_gradient:
            practical = replace(practical, gradient_steps=0)
        if options.algorithm is Algorithm.PRACTICAL:
            windows = len(self._space.start_tokens)
            expected = practical.expected_jobs(len(self._seeds), len(documents), windows)
        else:
            expected = options.sizes.individuals * len(documents)
        self.searching.expected = expected
        finalists = find_finalists(
            options.algorithm,
            self._space,
            self._seeds,
            fitness,
            cheap,
            np.random.default_rng(options.seed + 1),
            evolution=options.sizes,
            practical=practical,
            on_best=lambda finalist: self._found(finalist.loss, finalist.origin),
            on_seeds=self._seeded,
        )
        return {
            f"searched ({number}, {finalist.origin})": template(finalist.tier)
            for number, finalist in enumerate(finalists, start=1)
        }

    def _search_ladder(self) -> dict[str, LongRopeConfig]:
        assert self._ladder is not None
        documents = self.indices("search")
        search = LadderSearch(
            self.model, self.searching, documents, self._ladder, self._found, self._seeded
        )
        self.searching.expected = self._ladder.expected_jobs(len(documents))
        self._say("searching the smooth family")
        family = search.find_family()
        candidates = {"searched family": search.member(family)}
        if self._ladder.refine:
            self._say("searching tier by tier")
            candidates["searched tiers"] = search.config(search.refine(family))
        return candidates

    # -- what is searched

    def _closed_forms(self) -> dict[str, LongRopeConfig]:
        """What the result is compared with, by the names of --against."""
        target, ladder = self.options.target_length, self.options.ladder
        forms = {}
        for name in self.options.compared:
            method, _, strength = name.partition("-ladder")
            if method == name:
                config = make_config(self.model, name, target)
                forms[name] = single_tier(config)(config.tiers[-1])
                continue
            try:
                options = MethodOptions(attention_strength=float(strength.lstrip(":") or 1))
            except ValueError as error:
                raise ConfigError(
                    f"--against {name}: expected METHOD-ladder or METHOD-ladder:NUMBER"
                ) from error
            forms[name] = make_config(self.model, method, target, ladder=ladder, options=options)
        return forms

    def _ladder_settings(self) -> LadderSettings | None:
        if self.options.ladder is None:
            return None
        lengths = parse_ladder(self.options.ladder, self.model.window, self.options.target_length)
        return LadderSettings(
            tuple(lengths[1:]),
            family_evaluations=self.options.practical.family_evaluations,
            tier_tokens=self.options.tier_tokens,
            refine=self.options.refine,
        )

    def _make_space(self) -> SearchSpace:
        options, native = self.options, self.model.native
        ratio = options.target_length / self.model.window
        start = START_TOKENS if options.start_tokens else (native.tiers[-1].num_start_tokens,)
        if options.attention == SEARCHED_ATTENTION:
            scope = (1.0, round(1.0 + ATTENTION_REACH * math.log(ratio), 3))
            return make_space(
                native, options.target_length, attention_range=scope, start_tokens=start
            )
        factor = attention_factor(options.attention, ratio, self.model.window, 1.0)
        return make_space(native, options.target_length, attention=factor, start_tokens=start)

    def _make_seeds(self) -> dict[str, FactorTier]:
        """The paper's three; with the attention factor as a gene, the closed forms as they are."""
        target, space = self.options.target_length, self._space
        seeds = self._warm_seed()
        if space.attention_range is None:
            family = "mistral" if "mistral" in self.model.architecture.lower() else ""
            named = space.seeds(family)
            return seeds | {
                f"{name}, attention {space.attention:.3f}": t for name, t in named.items()
            }
        for name in CLOSED_FORMS:
            tier = make_config(self.model, name, target).tiers[-1]
            within = space.within(tier)
            seeds[name if within == tier else f"{name}, brought into the bounds"] = within
        for strength in STRENGTHS:
            options = MethodOptions(attention_strength=strength)
            made = make_config(self.model, "yarn", target, options=options)
            seeds[f"yarn, strength {strength:g}"] = made.tiers[-1]
        return seeds

    def _warm_seed(self) -> dict[str, FactorTier]:
        warm, native = self.options.warm_start, self.model.native
        if warm is None:
            return {}
        if (warm.logit_scaling, warm.layers) != (native.logit_scaling, native.layers):
            raise ConfigError(
                "--warm-start: its log scaling or its choice of layers is not the model's own, and "
                "a search changes neither"
            )
        tier = replace(warm.tiers[-1], max_length=self.options.target_length)
        within = self._space.within(tier)
        return {"warm start" if within == tier else "warm start, brought into the bounds": within}

    # -- what is reported

    def _rows(
        self, configs: Mapping[str, LongRopeConfig], documents: Sequence[int], baseline: str
    ) -> list[dict[str, Any]]:
        return [row.to_json() for row in tabulate(self.judging, configs, documents, baseline)]

    def _best_seeds(self) -> dict[str, LongRopeConfig]:
        """The seeds with the lowest losses that are no closed form of the table."""
        template = single_tier(self.model.native)
        known = [config.tiers[-1] for config in self._forms.values()]
        ranked = sorted(self.seed_losses, key=lambda name: self.seed_losses[name])
        others = [n for n in ranked if n in self._seeds and self._seeds[n] not in known]
        return {f"seed {name}": template(self._seeds[name]) for name in others[:SHOWN_SEEDS]}

    def _notes(self) -> list[str]:
        notes = []
        if self.options.algorithm is Algorithm.PRACTICAL and not self.has_gradient:
            notes.append("no gradient stage: the model scales its logits, or ropes layers apart")
        if self.options.budget != Budget() and self.searching.is_spent:
            notes.append("the budget ended the search")
        return notes

    def _written(
        self, configs: Mapping[str, LongRopeConfig], switch: SwitchPolicy
    ) -> dict[str, LongRopeConfig]:
        """What would be written of each: the model's own tiers in front of a single one, and a rule."""
        own = self.model.native.tiers
        return {
            name: replace(
                config,
                tiers=config.tiers if len(config.tiers) > 1 else (*own, *config.tiers),
                switch=switch,
            )
            for name, config in configs.items()
        }

    def _measure_rules(self, config: LongRopeConfig) -> list[RuleRow]:
        self._say("measuring both rules")
        needles = self._needles.get("validation", [])
        written = self._written({"": config}, config.switch)[""]
        return measure_rules(self.judging, written, self.indices("validation"), needles)

    def _ablation(self, name: str, config: LongRopeConfig) -> dict[str, LongRopeConfig]:
        """The chosen single tier without its start tokens: what they are worth (table 11)."""
        tier = config.tiers[-1]
        rows = {name: config}
        if len(config.tiers) == 1 and tier.num_start_tokens:
            rows[f"{name}, no start tokens"] = replace(config, tiers=(with_start(tier, 0),))
        return rows

    def _add_needles(
        self, documents: list[Document], texts: Texts, rng: np.random.Generator
    ) -> dict[str, list[int]]:
        """Documents with needles, behind the others; their indices."""
        wanted: list[tuple[str, Sequence[Document], int, str]] = []
        if self.options.algorithm is Algorithm.LONGROPE2:
            way_out = "give a longer --target-length, or another --algorithm"
            wanted += [(f"{name}, one key", getattr(self.split, name), 1, way_out) for name in SETS]
        if self.options.switch is None and self.options.needle_keys:
            wanted.append(("validation", self.split.validation, self.options.needle_keys, FEWER))
        indices: dict[str, list[int]] = {}
        for name, haystacks, keys, way_out in wanted:
            indices[name] = []
            for haystack in haystacks:
                indices[name].append(len(documents))
                documents.append(
                    make_needles(haystack, texts.encode, keys, rng, texts.start, way_out=way_out)
                )
        return indices

    def indices(self, name: str) -> list[int]:
        """Indices of the documents of one set: "search", "validation" or "test"."""
        return indices_of(self.split, name)

    def _cheap_blocks(self) -> tuple[Span, ...]:
        """A few blocks over the whole target, an eighth of its tokens together at most."""
        length = self.options.target_length
        size = max(1, min(512, length // (8 * CHEAP_BLOCKS)))
        starts = np.linspace(0, length - size, CHEAP_BLOCKS).round().astype(int)
        return tuple((int(start), int(start) + size) for start in starts)
