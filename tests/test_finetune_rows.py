"""Rows for fine-tuning, of every layout, and what a model makes of them; targets: test_finetune_targets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hf_reference import toy_config, toy_model
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope_export.config import FactorTier
from longrope_export.errors import ConfigError
from longrope_export.finetune.recipes import Layout
from longrope_export.finetune.retrieval import Retrieval
from longrope_export.finetune.rows import IGNORED, Row, RowSettings, TrainingRows, batch
from longrope_export.finetune.samples import Sample
from longrope_export.hf_runtime import apply_longrope

# rows

FAR = 10_000  # ids of work k are k * FAR + their place


def samples_of(*lengths: int, targets: Sequence[float] = (1.0,)) -> list[Sample]:
    """Works whose tokens name their places; a share of the tokens of each is a target."""
    rng = np.random.default_rng(5)
    return [
        Sample(
            f"work {k}",
            np.arange(k * FAR, k * FAR + n, dtype=np.int32),
            rng.random(n) < targets[k % len(targets)],
        )
        for k, n in enumerate(lengths)
    ]


def check_targets(row: Row, samples: Sequence[Sample]) -> None:
    """A token is a target if its work says so and its predecessor stands right before it."""
    for i, token in enumerate(row.ids.tolist()):
        work, place = divmod(token, FAR)
        follows = i > 0 and row.ids[i - 1] == token - 1 and place > 0
        expected = token if follows and samples[work].is_target[place] else IGNORED
        assert row.targets[i] == expected


def all_settings(window: int) -> list[RowSettings]:
    tokens = max(2, window // 3)
    return [
        RowSettings(window, Layout.PACKED),
        RowSettings(window, Layout.DOCUMENTS),
        RowSettings(window, Layout.SINGLE),
        RowSettings(window, Layout.LONG),
        RowSettings(window, Layout.MIXED, short_length=window // 2, short_share=0.4),
        RowSettings(window, Layout.POSE, tokens=tokens, chunks=min(tokens, 3)),
        RowSettings(window, Layout.POSE, tokens=tokens, chunks=2, true_places=True),
    ]


many = st.lists(st.integers(2, 90), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(lengths=many, window=st.integers(4, 40), seed=st.integers(0, 9))
def test_rows_of_every_layout(lengths: list[int], window: int, seed: int) -> None:
    samples = samples_of(*lengths, targets=(1.0, 0.5, 0.0))
    for chosen in all_settings(window):
        try:
            rows = TrainingRows(samples, chosen, seed)
        except ConfigError:
            continue
        assert len(rows) > 0
        seen: list[int] = []
        for index in range(2 * len(rows)):
            row = rows.row(index)
            check_targets(row, samples)
            check_shape(row, chosen)
            if index < len(rows):
                seen += row.ids.tolist()
        if not chosen.true_places:
            assert len(seen) == len(set(seen)), "a token came twice in an epoch"


def check_shape(row: Row, chosen: RowSettings) -> None:
    n, window = len(row.ids), chosen.window
    assert {a.dtype for a in (row.ids, row.positions, row.targets)} == {np.dtype(np.int32)}
    assert len(row.positions) == len(row.targets) == n
    assert row.positions[0] == 0
    assert row.positions.max() < window
    steps, follows = np.diff(row.positions), np.diff(row.ids) == 1
    if chosen.layout is Layout.POSE:
        assert n == chosen.tokens
        assert (steps > 0).all()
        assert (steps > 1).sum() < chosen.chunks
        if chosen.true_places:
            np.testing.assert_array_equal(row.ids - row.ids[0], row.positions)
        else:
            assert follows.all()
        return
    assert n == window or (chosen.layout is Layout.SINGLE and n <= window)
    if chosen.layout in (Layout.LONG, Layout.SINGLE):
        assert follows.all()
        assert not row.is_packed
    if chosen.layout is not Layout.MIXED:
        assert row.is_packed == (chosen.layout is Layout.DOCUMENTS)
    np.testing.assert_array_equal(steps == 1, follows if row.is_packed else np.ones(n - 1, bool))
    if row.is_packed:
        assert (row.positions[1:][~follows] == 0).all()


@pytest.mark.parametrize("chosen", all_settings(24), ids=lambda chosen: chosen.layout)
def test_rows_depend_on_the_seed_and_the_index_alone(chosen: RowSettings) -> None:
    samples = samples_of(*[5, 9, 30, 50, 100, 12, 7, 80] * 3)
    rows = TrainingRows(samples, chosen, seed=4)
    count = 3 * len(rows)
    in_order = [rows.row(index) for index in range(count)]
    for index in np.random.default_rng(0).permutation(count)[:40].tolist():
        for reader in (rows, TrainingRows(samples, chosen, seed=4)):
            again = reader.row(index)
            np.testing.assert_array_equal(again.ids, in_order[index].ids)
            np.testing.assert_array_equal(again.positions, in_order[index].positions)
            np.testing.assert_array_equal(again.targets, in_order[index].targets)
    epochs = [[r.ids.tolist() for r in in_order[k : k + len(rows)]] for k in (0, len(rows))]
    assert epochs[0] != epochs[1]
    other = TrainingRows(samples, chosen, seed=5)
    assert [other.row(k).ids.tolist() for k in range(len(rows))] != epochs[0]


@pytest.mark.parametrize("layout", [Layout.POSE, Layout.LONG])
def test_retrieval_rows_ask_for_numbers_that_stand_in_them(layout: Layout) -> None:
    samples = samples_of(*[5000] * 6)
    chosen = RowSettings(2500, layout, tokens=900)
    retrieval = Retrieval(0.4, 2, lambda text: [-byte for byte in text.encode()])
    rows = TrainingRows(samples, chosen, 3, retrieval)
    plain = TrainingRows(samples, chosen, 3)
    asked = 0
    for index in range(10):
        row, text = rows.row(index), plain.row(index)
        np.testing.assert_array_equal(row.positions, text.positions)
        assert len(row.ids) == len(text.ids) and not row.is_packed
        hidden = row.ids < 0
        if not hidden.any():
            np.testing.assert_array_equal(row.targets, text.targets)
            continue
        asked += 1
        kept = row.ids[~hidden]
        np.testing.assert_array_equal(kept, text.ids[: len(kept)])
        words = "".join(chr(-token) if token < 0 else "\0" for token in row.ids.tolist())
        facts = dict(re.findall(r"magic numbers for (\S+) is: (\d+)\.", words))
        answers = re.findall(r"number for (\S+) mentioned in the text is:( \d+\.)", words)
        assert len(facts) == 2 and {key: answer[1:-1] for key, answer in answers} == facts
        learned = "".join(chr(-token) for token in row.targets[row.targets != IGNORED].tolist())
        assert learned == "".join(answer for _, answer in answers)
        np.testing.assert_array_equal(row.ids, rows.row(index).ids)
    assert asked == 4


def test_retrieval_that_cannot_be_is_refused() -> None:
    def encode(text: str) -> list[int]:
        return [0] * len(text)

    samples = samples_of(500)
    for share, keys, message in ((1.5, 1, "retrieval_share"), (0.5, 65, "retrieval_keys")):
        with pytest.raises(ConfigError, match=message):
            Retrieval(share, keys, encode)
    with pytest.raises(ConfigError, match="layout long or pose, not packed"):
        TrainingRows(samples, RowSettings(200), 0, Retrieval(0.5, 1, encode))
    rows = TrainingRows(samples, RowSettings(200, Layout.LONG), 0, Retrieval(1, 5, encode))
    with pytest.raises(
        ConfigError, match=r"200 tokens is too short for 5 needles.*: give fewer by retrieval_keys"
    ):
        rows.row(0)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 1.0])
def test_mixed_rows_have_the_share_of_short_ones(share: float) -> None:
    samples = samples_of(*[10] * 200, *[70] * 30, *[500] * 4)
    chosen = RowSettings(100, Layout.MIXED, short_length=64, short_share=share)
    rows = TrainingRows(samples, chosen, seed=0)
    kinds = []
    for index in range(len(rows)):
        row = rows.row(index)
        works = {len(samples[work]) for work in set((row.ids // FAR).tolist())}
        assert works == {10} if row.is_packed else works <= {70, 500}
        kinds.append(row.is_packed)
    assert np.mean(kinds) == pytest.approx(share, abs=1 / len(kinds))
    limit = min(20 / share if share else 999, 41 / (1 - share) if share < 1 else 999)
    assert len(rows) == pytest.approx(limit, abs=1)


def test_pieces_of_long_chats_without_an_answer_are_dropped() -> None:
    chat = samples_of(100, targets=(0.0,))[0]
    chat.is_target[[5, 40, 75]] = True  # 40 begins a piece: nothing stands before it
    rows = TrainingRows([chat], RowSettings(20, Layout.SINGLE), seed=0)
    found = sorted(rows.row(k).ids[0] for k in range(len(rows)))
    assert found == [0, 60]


def test_true_places_reach_the_whole_work_and_all_of_the_window() -> None:
    chosen = RowSettings(64, Layout.POSE, tokens=8, true_places=True)
    rows = TrainingRows(samples_of(80, 63), chosen, seed=0)
    made = [rows.row(k) for k in range(4000)]
    assert {int(i) for row in made for i in row.ids} == set(range(80))
    assert {int(p) for row in made for p in row.positions} == set(range(64))
    targets = [int((row.targets != IGNORED).sum()) for row in made]
    assert set(targets) == {6, 7}  # 7 where nothing was skipped


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 1}, "window 1"),
        ({"layout": "boxed"}, "layout 'boxed': expected packed, documents"),
        ({"layout": Layout.POSE, "tokens": 65}, "65 tokens of a pose row.*window of 64"),
        ({"layout": Layout.POSE, "tokens": 8, "chunks": 9}, "9 chunks of 8"),
        ({"layout": "pose", "tokens": 8, "chunks": 0}, "0 chunks"),
        ({"layout": Layout.MIXED}, "needs short_length"),
        ({"layout": Layout.MIXED, "short_length": 8, "short_share": 1.5}, "short_share 1.5"),
    ],
)
def test_settings_out_of_bounds_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RowSettings(**{"window": 64, **fields})


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (RowSettings(64), "packed needs 64 tokens in all, and 3 works have 60 tokens, the longest"),
        (RowSettings(32, Layout.LONG), "long needs a work of 32 tokens"),
        (RowSettings(64, Layout.POSE, tokens=32), "pose needs a work of 32 tokens"),
        (RowSettings(32, Layout.POSE, tokens=8, true_places=True), "pose needs a work of 32"),
        (RowSettings(16, Layout.MIXED, short_length=20), "3 rows of short works and 0 of longer"),
        (RowSettings(16, Layout.MIXED, short_length=8), "0 rows of short works and 3 of longer"),
    ],
)
def test_works_that_are_too_short_for_the_layout_are_refused(
    chosen: RowSettings, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingRows(samples_of(20, 20, 20), chosen, seed=0)


def test_works_without_targets_and_a_negative_seed_are_refused() -> None:
    with pytest.raises(ConfigError, match="none of 1 works has a token to learn"):
        TrainingRows(samples_of(90, targets=(0.0,)), RowSettings(16), seed=0)
    with pytest.raises(ConfigError, match="seed -1"):
        TrainingRows(samples_of(90), RowSettings(16), seed=-1)


# batches


def some_rows(samples: list[Sample], chosen: RowSettings, count: int) -> list[Row]:
    rows = TrainingRows(samples, chosen, seed=1)
    return [rows.row(index) for index in range(count)]


def test_rows_are_padded_on_the_right() -> None:
    rows = some_rows(samples_of(5, 8), RowSettings(16, Layout.SINGLE), 2)
    made = batch(rows, pad_id=3)
    assert {name: (a.shape, a.dtype) for name, a in made.items()} == dict.fromkeys(
        ("input_ids", "position_ids", "labels", "attention_mask"), ((2, 8), np.dtype(np.int64))
    )
    short = [len(row.ids) for row in rows].index(5)
    assert made["attention_mask"].sum(1).tolist() == [len(row.ids) for row in rows]
    assert made["input_ids"][short, 5:].tolist() == [3, 3, 3]
    assert made["labels"][short, 5:].tolist() == [IGNORED] * 3
    assert made["position_ids"][short].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]


def test_packed_rows_have_no_mask_and_do_not_go_with_jumps() -> None:
    samples = samples_of(*[9] * 8, 60, 60)
    packed = some_rows(samples, RowSettings(24, Layout.DOCUMENTS), 1)
    single = some_rows(samples, RowSettings(24, Layout.SINGLE), 1)
    pose = some_rows(samples, RowSettings(48, Layout.POSE, tokens=24, chunks=3), 1)
    assert "attention_mask" not in batch(packed + single, pad_id=0)
    assert batch(pose + single, pad_id=0)["attention_mask"][0].all()
    with pytest.raises(ConfigError, match="different batches"):
        batch(packed + pose, pad_id=0)
    with pytest.raises(ConfigError, match="no rows"):
        batch([], pad_id=0)


# what a model computes


def small_samples(*lengths: int) -> list[Sample]:
    rng = np.random.default_rng(2)
    return [
        Sample(f"{n}", rng.integers(2, 96, n).astype(np.int32), np.ones(n, bool)) for n in lengths
    ]


def forward(model: Any, arguments: dict[str, np.ndarray]) -> Any:
    tensors = {k: torch.from_numpy(v) for k, v in arguments.items() if k != "labels"}
    return model(**tensors, use_cache=False).logits


@pytest.mark.parametrize("switch", ["causal", "sequence"])
@torch.no_grad()
def test_documents_of_a_packed_row_are_computed_as_if_alone(switch: str) -> None:
    model = toy_model()
    apply_longrope(model, toy_config(model, switch))  # tiers end at 6, 13 and 24
    rows = some_rows(small_samples(4, 9, 7, 3, 20, 5), RowSettings(24, Layout.DOCUMENTS), 2)
    short = Row(rows[1].ids[:17], rows[1].positions[:17], rows[1].targets[:17], is_packed=True)
    rows = [rows[0], short]
    together = forward(model, batch(rows, pad_id=0))
    assert sum(int((row.positions == 0).sum()) for row in rows) >= 4
    for logits, row in zip(together, rows, strict=True):
        begins = [*np.flatnonzero(row.positions == 0).tolist(), len(row.ids)]
        for first, stop in pairwise(begins):
            alone = model(torch.from_numpy(row.ids[first:stop]).long()[None], use_cache=False)
            torch.testing.assert_close(logits[first:stop], alone.logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("true_places", [False, True])
@torch.no_grad()
def test_a_pose_row_is_a_window_with_holes(true_places: bool) -> None:
    window, factor = 48, 3.0
    chosen = RowSettings(window, Layout.POSE, tokens=16, chunks=3, true_places=true_places)
    rows = some_rows(small_samples(60, 80), chosen, 3)
    assert all(row.positions[-1] > 20 for row in rows)
    model = toy_model()
    tier = FactorTier(window, (factor,) * 4)
    config = toy_config(model, tiers=(tier,), max_position_embeddings=window, logit_scaling=None)
    apply_longrope(model, config)
    ours = forward(model, batch(rows, pad_id=0))

    scaling = {"rope_type": "linear", "factor": factor, "rope_theta": 10000.0}
    stock = toy_model(rope_parameters=scaling)
    torch.testing.assert_close(ours, forward(stock, batch(rows, pad_id=0)), atol=1e-4, rtol=0)
    for logits, row in zip(ours, rows, strict=True):
        ids, mask = np.zeros((1, window), np.int64), np.zeros((1, window), np.int64)
        ids[0, row.positions], mask[0, row.positions] = row.ids, 1
        places = np.arange(window)[None]
        whole = forward(stock, {"input_ids": ids, "attention_mask": mask, "position_ids": places})
        torch.testing.assert_close(logits, whole[0, row.positions], atol=1e-4, rtol=0)
