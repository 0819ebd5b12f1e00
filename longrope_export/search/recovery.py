"""Short tiers of an extended model: factors that give the short window back (LongRoPE, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from longrope_export.config import FactorTier, LongRopeConfig, SwitchPolicy
from longrope_export.errors import ConfigError
from longrope_export.search.algorithms import Algorithm, find_finalists
from longrope_export.search.documents import Split, split_documents
from longrope_export.search.evaluator import Fitness, single_tier
from longrope_export.search.jobs import Document
from longrope_export.search.judge import choose, tabulate
from longrope_export.search.options import Outcome
from longrope_export.search.run_base import Run, Texts, indices_of, names_of
from longrope_export.search.space import make_recovery_space, recovery_seeds

LONG = "long factors"
PLAIN = "plain RoPE"
OWN = "the model's own short factors"


class RecoveryRun(Run):
    """One search for each short length; the model's own tier serves what is longer.

    Raises as Run does.
    """

    def _prepare(self, texts: Texts, rng: np.random.Generator) -> list[Document]:
        options, window = self.options, self.model.window
        if options.target_length != window:
            raise ConfigError(
                f"--recover keeps the model's length: expected --target-length {window}, got "
                f"{options.target_length}"
            )
        if options.algorithm is Algorithm.LONGROPE2 or options.ladder or options.warm_start:
            raise ConfigError(
                "--recover has its own seeds: it takes algorithm longrope or practical, and neither "
                "--ladder nor --warm-start"
            )
        if list(options.recover) != sorted(set(options.recover)):
            raise ConfigError(f"--recover: lengths must rise, got {options.recover}")
        self._spaces = {
            length: make_recovery_space(self.model.native, length, options.recover_cap)
            for length in options.recover
        }
        documents: list[Document] = []
        self._splits: dict[int, tuple[Split, int]] = {}
        for length in options.recover:
            counts = (options.at(length).num_search_documents, *options.documents[1:])
            split = split_documents(texts.works, length, counts, rng, texts.start)
            self._splits[length] = split, len(documents)
            documents += split.all
            self.held_out = split.held_out
        return documents

    def execute(self) -> Outcome:
        """See Run."""
        tiers, results, seeds = [], [], []
        ended = []
        for number, length in enumerate(self.options.recover):
            left = len(self.options.recover) - number
            self.searching.allow(self.options.budget, 1 / left)
            tier, result = self._recover(length)
            ended += [length] * self.searching.is_spent
            tiers.append(tier)
            results.append(result)
            seeds.append(self.seed_losses)
        self.seed_losses = seeds[0]  # beside the history, whose plot shows the first phase
        native = self.model.native
        own_rule = native.switch if len(native.tiers) > 1 else SwitchPolicy.SEQUENCE
        kept = [tier for tier in native.tiers if tier.max_length not in self.options.recover]
        config = replace(
            native,
            tiers=tuple(sorted((*tiers, *kept), key=lambda tier: tier.max_length)),
            switch=self.options.switch or own_rule,
        )
        shown = {
            "chosen": ", ".join(f"{r['length']}: {r['chosen']}" for r in results),
            "test": [
                {**row, "name": f"{r['length']}: {row['name']}"}
                for r in results
                for row in r["test"]
            ],
            **{name: results[-1][name] for name in ("baseline", "held_out", "documents")},
            "notes": [f"{length}: its share of the budget ended the search" for length in ended],
        }
        return self._finish(config, {**shown, "recovered": results})

    def _recover(self, length: int) -> tuple[FactorTier, dict[str, Any]]:
        self._say(f"recovering {length} tokens")
        options, native = self.options, self.model.native
        split, first = self._splits[length]
        space = self._spaces[length]
        seeds = recovery_seeds(space, native)
        template = single_tier(native)
        fitness = Fitness(self.searching, template, indices_of(split, "search", first))
        sizes = options.at(length).sizes
        practical = replace(
            options.practical,
            family_evaluations=0,  # it interpolates towards longer text
            gradient_steps=options.practical.gradient_steps if self.has_gradient else 0,
        )
        documents = len(fitness.documents)
        self.searching.expected = self.searching.evaluations + (
            practical.expected_jobs(len(seeds), documents, len(space.start_tokens))
            if options.algorithm is Algorithm.PRACTICAL
            else sizes.individuals * documents
        )
        finalists = find_finalists(
            options.algorithm,
            space,
            seeds,
            fitness,
            None,
            np.random.default_rng([options.seed, length]),
            evolution=sizes,
            practical=practical,
            on_best=lambda finalist: self._found(finalist.loss, finalist.origin),
            on_seeds=self._seeded,
        )
        configs: dict[str, LongRopeConfig] = {
            LONG: template(replace(native.tiers[-1], max_length=length)),
            PLAIN: template(FactorTier(length, (1.0,) * native.num_pairs)),
        }
        own = native.select_tier(length)
        if own != native.tiers[-1]:
            configs[OWN] = template(replace(own, max_length=length))
        for number, finalist in enumerate(finalists, start=1):
            configs[f"recovered ({number}, {finalist.origin})"] = template(finalist.tier)
        validation = indices_of(split, "validation", first)
        chosen = choose(self.judging, configs, validation)
        shown: Mapping[str, LongRopeConfig] = {
            **{name: configs[name] for name in (LONG, PLAIN, OWN) if name in configs},
            "result": configs[chosen],
        }
        rows = tabulate(self.judging, shown, indices_of(split, "test", first), LONG)
        result = {
            "length": length,
            "chosen": chosen,
            "baseline": LONG,
            "test": [row.to_json() for row in rows],
            "held_out": split.held_out,
            "documents": names_of(split),
        }
        return configs[chosen].tiers[-1], result
