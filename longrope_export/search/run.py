"""A search from texts to factors.json: find, choose on validation documents, report on test ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from longrope_export.config import FactorTier, LongRopeConfig
from longrope_export.errors import ConfigError
from longrope_export.ladder import MethodOptions, attention_factor, make_config, parse_ladder
from longrope_export.search.algorithms import Algorithm, Finalist, find_finalists
from longrope_export.search.documents import split_documents
from longrope_export.search.evaluator import Fitness, single_tier
from longrope_export.search.jobs import Document, Span
from longrope_export.search.judge import better_rule, choose, measure_rules, tabulate
from longrope_export.search.ladder_search import LadderSearch, LadderSettings
from longrope_export.search.needles import make_needles
from longrope_export.search.options import SEARCHED_ATTENTION, Outcome
from longrope_export.search.run_base import Run, Texts, indices_of, names_of
from longrope_export.search.space import START_TOKENS, SearchSpace, make_space, with_start

STRENGTHS = (0.6, 0.3)  # of YaRN's attention factor, as further seeds of one tier
CHEAP_BLOCKS = 4
HELD_OUT = "search, validation and test come from different works"


class SearchRun(Run):
    """A search for one tier or for a ladder. Raises as Run does."""

    def _prepare(self, texts: Texts, rng: np.random.Generator) -> list[Document]:
        options = self.options
        if options.target_length <= self.model.window:
            raise ConfigError(
                f"--target-length {options.target_length}: the model's own window is "
                f"{self.model.window} already"
            )
        counts = (options.num_search_documents, *options.documents[1:])
        self.split = split_documents(texts.works, options.target_length, counts, rng, texts.start)
        documents = list(self.split.all)
        self._needles = self._add_needles(documents, texts, rng)
        return documents

    def execute(self) -> Outcome:
        """See Run."""
        closed = self._closed_forms()
        candidates = self._search_ladder() if self.options.ladder else self._search_tier(closed)
        self._say("choosing on validation documents")
        configs = {**candidates, **closed}
        validation = self.indices("validation")
        chosen = choose(self.judging, configs, validation)
        config = configs[chosen]
        config, rules = self._with_rule(config)
        self._say("reporting on test documents")
        best_form = choose(self.judging, closed, validation)
        test = {**closed, **self._ablation(chosen, configs[chosen]), "result": config}
        rows = tabulate(self.judging, test, self.indices("test"), best_form)
        result = {
            "chosen": chosen,
            "baseline": best_form,
            "test": [row.to_json() for row in rows],
            "validation": [
                row.to_json() for row in tabulate(self.judging, configs, validation, best_form)
            ],
            "rules": [asdict(rule) for rule in rules],
            "held_out": self.split.note or HELD_OUT,
            "documents": names_of(self.split),
        }
        return self._finish(config, result)

    def _search_tier(self, closed: Mapping[str, LongRopeConfig]) -> dict[str, LongRopeConfig]:
        self._say("searching")
        options, space = self.options, self._space()
        template = single_tier(next(iter(closed.values())))
        needles = options.algorithm is Algorithm.LONGROPE2
        documents = self._needles["search"] if needles else self.indices("search")
        fitness = Fitness(self.searching, template, documents)
        cheap = Fitness(self.searching, template, documents[:1], self._cheap_blocks())
        finalists = find_finalists(
            options.algorithm,
            space,
            self._seeds(space, closed),
            fitness,
            cheap,
            np.random.default_rng(options.seed + 1),
            evolution=options.sizes,
            practical=options.practical,
            on_best=self._found,
            on_seeds=self._seeded,
        )
        return {
            f"searched ({number}, {finalist.origin})": template(finalist.tier)
            for number, finalist in enumerate(finalists, start=1)
        }

    def _search_ladder(self) -> dict[str, LongRopeConfig]:
        assert self.options.ladder is not None
        lengths = parse_ladder(self.options.ladder, self.model.window, self.options.target_length)
        settings = LadderSettings(
            tuple(lengths[1:]),
            family_evaluations=self.options.practical.family_evaluations,
            tier_tokens=self.options.tier_tokens,
            refine=self.options.refine,
        )

        def found(loss: float, origin: str) -> None:
            self._found(Finalist(self.model.native.tiers[-1], loss, origin))

        search = LadderSearch(self.model, self.searching, self.indices("search"), settings, found)
        self._say("searching the smooth family")
        family = search.find_family()
        candidates = {"searched family": search.member(family)}
        if settings.refine:
            self._say("searching tier by tier")
            candidates["searched tiers"] = search.config(search.refine(family))
        return candidates

    # -- what they need

    def _closed_forms(self) -> dict[str, LongRopeConfig]:
        """What the result is compared with, by the names of --against."""
        target, ladder = self.options.target_length, self.options.ladder
        forms = {}
        for name in self.options.compared:
            method, _, strength = name.partition("-ladder")
            if method == name:
                config = make_config(self.model, name, target)
                forms[name] = single_tier(config)(config.tiers[-1])
            else:
                options = MethodOptions(attention_strength=float(strength.lstrip(":") or 1))
                forms[name] = make_config(
                    self.model, method, target, ladder=ladder, options=options
                )
        return forms

    def _space(self) -> SearchSpace:
        options, native = self.options, self.model.native
        ratio = options.target_length / self.model.window
        start = START_TOKENS if options.start_tokens else (native.tiers[-1].num_start_tokens,)
        if options.attention == SEARCHED_ATTENTION:
            log = float(np.log(ratio))
            scope = (1.0, round(1.0 + 0.25 * log, 3))
            return make_space(
                native, options.target_length, attention_range=scope, start_tokens=start
            )
        factor = attention_factor(options.attention, ratio, self.model.window, 1.0)
        return make_space(native, options.target_length, attention=factor, start_tokens=start)

    def _seeds(
        self, space: SearchSpace, closed: Mapping[str, LongRopeConfig]
    ) -> dict[str, FactorTier]:
        """The paper's three; with the attention factor as a gene, the closed forms as they are."""
        target, warm = self.options.target_length, self.options.warm_start
        begin = {} if warm is None else {"warm start": replace(warm.tiers[-1], max_length=target)}
        if space.attention_range is None:
            return begin | space.seeds(self.model.native.provenance.get("family", ""))
        seeds = begin | {name: config.tiers[-1] for name, config in closed.items()}
        for strength in STRENGTHS:
            options = MethodOptions(attention_strength=strength)
            made = make_config(self.model, "yarn", target, options=options)
            seeds[f"yarn, strength {strength:g}"] = made.tiers[-1]
        return seeds

    def _with_rule(self, config: LongRopeConfig) -> tuple[LongRopeConfig, list[Any]]:
        """The model's own tiers in front, and the rule that is better, or that was asked for."""
        native = self.model.native
        if len(config.tiers) == 1:
            config = replace(config, tiers=(*native.tiers, *config.tiers))
        if self.options.switch is not None:
            return replace(config, switch=self.options.switch), []
        self._say("measuring both rules")
        needles = self._needles.get("validation", [])
        rows = measure_rules(self.judging, config, self.indices("validation"), needles)
        return replace(config, switch=better_rule(rows)), list(rows)

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
        wanted: dict[str, tuple[Sequence[Document], int]] = {}
        if self.options.algorithm is Algorithm.LONGROPE2 and not self.options.ladder:
            wanted["search"] = (self.split.search, 1)
        if self.options.switch is None and self.options.needle_keys:
            wanted["validation"] = (self.split.validation, self.options.needle_keys)
        indices: dict[str, list[int]] = {}
        for name, (haystacks, keys) in wanted.items():
            indices[name] = []
            for haystack in haystacks:
                indices[name].append(len(documents))
                documents.append(make_needles(haystack, texts.encode, keys, rng, texts.start))
        return indices

    def indices(self, name: str) -> list[int]:
        """Indices of the documents of one set: "search", "validation" or "test"."""
        return indices_of(self.split, name)

    def _cheap_blocks(self) -> tuple[Span, ...]:
        """A few blocks over the whole target, an eighth of its tokens together at most."""
        length = self.options.target_length
        size = max(8, min(512, length // (8 * CHEAP_BLOCKS)))
        starts = np.linspace(0, length - size, CHEAP_BLOCKS).round().astype(int)
        return tuple((int(start), int(start) + size) for start in starts)
