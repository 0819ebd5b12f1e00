"""The scorer against a reference that shares no code with it, for every family."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import make_model
from torch.nn.functional import cross_entropy

from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.errors import ModelError, UnsupportedError
from longrope_export.ladder import make_config
from longrope_export.models import token_losses as losses_module
from longrope_export.models.model import Model, load_model
from longrope_export.models.torch_model import load_torch_model
from longrope_export.search.jobs import Document, Job
from longrope_export.search.scorer import Scorer
from longrope_export.verify.reference import reference_logits

FAMILIES = [
    "llama", "mistral", "phi3", "granite", "qwen2", "qwen3", "gemma2", "gemma3", "mixtral",
    "qwen3_moe",
]  # fmt: skip
WINDOW, LENGTH = 64, 256
IDS = tuple(torch.randint(3, 300, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist())


class Case:
    """A toy of one family, its configs, and the losses that the reference computes."""

    def __init__(self, folder: Path, family: str) -> None:
        make_model(folder, family, dtype="float32", max_position_embeddings=WINDOW)
        self.model: Model = load_model(folder)
        self.scorer = Scorer(folder, [Document(IDS)], WINDOW)
        self.reference, _ = load_torch_model(folder)
        self.one = make_config(self.model, "yarn", LENGTH, switch=SwitchPolicy.SEQUENCE)
        ladder = make_config(self.model, "yarn", LENGTH, ladder="64,128,256")
        tiers = [
            replace(t, num_start_tokens=n) for t, n in zip(ladder.tiers, (0, 3, 8), strict=True)
        ]
        self.ladder = replace(ladder, tiers=tuple(tiers))

    def losses(self, config: LongRopeConfig, positions: list[int] | None = None) -> torch.Tensor:
        """(n - 1,) loss of each token but the first."""
        ids = IDS if positions is None else IDS[: len(positions) + 1]
        logits = reference_logits(
            self.reference, config, ids[: len(ids) - 1], positions=positions, length=LENGTH
        )
        return cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


@pytest.fixture(params=FAMILIES, scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("toy") / request.param, request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("toy") / "llama", "llama")


def test_whole_passes_agree_with_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses_module, "LOGIT_VALUES", 320 * 50)  # several chunks of logits
    for config in (case.one, case.ladder):
        score, expected = case.scorer.score(Job(config, 0)), case.losses(config)
        assert score.mean == pytest.approx(float(expected.mean()), abs=2e-6)
        assert score.counts == (63, 64, 64, 64)
        assert score.losses[1] == pytest.approx(float(expected[63:127].sum()), abs=2e-4)
        assert score.tokens == LENGTH


def test_blocks_behind_a_prefix_that_agrees_are_exact(case: Case) -> None:
    expected = case.losses(case.ladder)
    before = replace(case.ladder, tiers=case.ladder.tiers[:2], max_position_embeddings=128)
    later = case.scorer.score(Job(case.ladder, 0, ((128, 256),), before))
    assert later.losses[0] == pytest.approx(float(expected[128:].sum()), abs=3e-4)
    assert later.counts == (127,)
    later = case.scorer.score(Job(case.ladder, 0, ((100, 160), (200, 256)), case.ladder))
    assert later.losses == pytest.approx(
        (float(expected[100:160].sum()), float(expected[200:].sum())), abs=3e-4
    )
    same = case.scorer.score(Job(case.one, 0, ((100, 140), (200, 256)), case.one))
    expected = case.losses(case.one)
    assert same.losses == pytest.approx(
        (float(expected[100:140].sum()), float(expected[200:].sum())), abs=3e-4
    )


def test_a_prefix_serves_many_candidates_and_is_left_as_it_was(case: Case) -> None:
    before = replace(case.ladder, tiers=case.ladder.tiers[:2], max_position_embeddings=128)
    job = Job(case.ladder, 0, ((128, 256),), before)
    first = case.scorer.score(job)
    last = case.ladder.tiers[2]
    slower = replace(last, rescale_factors=tuple(2 * f for f in last.rescale_factors))
    other = replace(case.ladder, tiers=(*case.ladder.tiers[:2], slower))
    changed = case.scorer.score(replace(job, config=other))
    assert changed.losses != first.losses
    expected = case.losses(other)
    assert changed.losses[0] == pytest.approx(float(expected[128:].sum()), abs=3e-4)
    assert case.scorer.score(job).losses == first.losses


def test_moved_blocks_agree_with_the_reference(llama: Case) -> None:
    blocks = ((0, 32), (100, 132), (224, 256))
    positions = [p for a, b in blocks for p in range(a, b)]
    expected = llama.losses(llama.one, positions)
    score = llama.scorer.score(Job(llama.one, 0, blocks))
    assert score.losses == pytest.approx(
        [float(part.sum()) for part in expected.split(32)], abs=1e-4
    )
    assert score.tokens == 96


@pytest.mark.parametrize("pair", [0, 5, 7])
def test_gradients_agree_with_differences(llama: Case, pair: int) -> None:
    start = replace(llama.one.tiers[0], num_start_tokens=4)
    config = replace(llama.one, tiers=(start,))
    score = llama.scorer.score(Job(config, 0, gradient=True))
    assert len(score.gradient) == len(start.rescale_factors) + 1
    assert score.mean == pytest.approx(llama.scorer.score(Job(config, 0)).mean, abs=1e-6)

    def loss(step: float, attention: float = 0.0) -> float:
        factors = list(start.rescale_factors)
        factors[pair] *= math.exp(step)
        tier = replace(
            start,
            rescale_factors=tuple(factors),
            attention_factor=start.attention_factor * math.exp(attention),
        )
        return llama.scorer.score(Job(replace(config, tiers=(tier,)), 0)).mean

    h = 5e-4  # the loss turns quickly with the fastest pair
    by_factor = (loss(h) - loss(-h)) / (2 * h)
    assert score.gradient[pair] == pytest.approx(by_factor, rel=0.01, abs=1e-3)
    by_attention = (loss(0, h) - loss(0, -h)) / (2 * h)
    assert score.gradient[-1] == pytest.approx(by_attention, rel=0.01, abs=1e-3)


def test_gradients_are_refused_where_they_would_be_of_something_else(llama: Case) -> None:
    with pytest.raises(UnsupportedError, match="got 3 tiers"):
        llama.scorer.score(Job(llama.ladder, 0, gradient=True))


def test_only_answers_count_where_a_document_has_them(llama: Case) -> None:
    document = Document(IDS, answers=((60, 64), (250, 256)))
    scorer = Scorer.of_model(llama.scorer.model, [document], WINDOW)
    expected = llama.losses(llama.one)
    score = scorer.score(Job(llama.one, 0))
    assert score.counts == (4, 6)
    assert score.losses == pytest.approx(
        (float(expected[59:63].sum()), float(expected[249:255].sum())), abs=1e-4
    )
    logits = reference_logits(llama.reference, llama.one, IDS, length=LENGTH)
    right = logits[:-1].argmax(-1) == torch.tensor(IDS[1:])
    assert score.hits == (int(right[59:63].sum()), int(right[249:255].sum()))


def test_a_loss_that_is_no_number_is_an_error(llama: Case, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "nan", dtype="float32", max_position_embeddings=WINDOW)
    scorer = Scorer(folder, [Document(IDS)], WINDOW)
    with torch.no_grad():
        scorer.model.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(ModelError, match="the loss is nan"):
        scorer.score(Job(llama.one, 0))


def test_equal_jobs_have_equal_keys_and_others_have_not(llama: Case) -> None:
    job = Job(llama.one, 0)
    assert job.key == Job(replace(llama.one, provenance={"other": 1}), 0).key
    others = [
        Job(llama.ladder, 0),
        Job(llama.one, 1),
        Job(llama.one, 0, ((0, 8),)),
        Job(llama.one, 0, ((0, 8),), llama.one),
        Job(llama.one, 0, gradient=True),
    ]
    assert len({job.key, *(other.key for other in others)}) == 6
