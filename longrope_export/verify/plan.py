"""What is run: how the tokens of one text are handed to a runtime, and which logits are compared.

Every case stops at the places where implementations go wrong: the end of each start-token window, the
border of an inner batch, each tier border, and the longest length.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.runtimes.base import RuntimeInfo
from longrope_export.verify.reference import tier_of

UBATCH = 512  # llama.cpp's inner batch
_CALL = 2048  # tokens of a large call
_CHUNK = 333  # of a small one: divides nothing
_KEPT_ALL = 1024  # up to this length the logits of every position are compared
_WINDOW = 8  # positions around each stop, beyond
_BEFORE = 256  # tokens before a border that is looked at by itself
_BORDERS = 6  # at most so many tier borders of a long ladder
_BATCH = "batch of two lengths"
_SINGLE = 3  # tokens one by one, on each side of a border


@dataclass(frozen=True)
class Row:
    """One compared row of logits.

    Attributes:
        position: of the token that the logits follow.
        tier: index of the tier that the token is computed under.
        origin: position of the sequence's first token.
    """

    position: int
    tier: int
    origin: int = 0


@dataclass(frozen=True)
class Append:
    """One call: `count` more tokens, of which the last `keep` are compared."""

    count: int
    keep: int


@dataclass(frozen=True)
class Case:
    """One sequence from nothing, or several at once.

    Attributes:
        name: for tables.
        appends: the calls, in order; empty for a batch.
        chunk_size: most tokens of one call of the runtime.
        declared_length: told to the runtime at the start; None leaves it to find out.
        batch: lengths of sequences that are computed together, instead of appends.
        batch_keep: rows that are compared of each.
        origin: position of the first token. Above 0 nothing lies before it: a few tokens then
            show what a runtime does at any position, however far.
    """

    name: str
    appends: tuple[Append, ...] = ()
    chunk_size: int = _CALL
    declared_length: int | None = None
    batch: tuple[int, ...] = ()
    batch_keep: int = 1
    origin: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest sequence."""
        return max((*self.batch, sum(append.count for append in self.appends)))

    @property
    def length(self) -> int:
        """Position behind the last token."""
        return self.origin + self.num_tokens


def make_cases(config: LongRopeConfig, limit: int) -> list[Case]:
    """The plan: sequences of up to `limit` tokens, and short ones at every tier border.

    Args:
        limit: at least 2, at most the last tier's max_length.
    """
    return [*_from_the_start(config, limit), *_jumps(config, limit)]


def _from_the_start(config: LongRopeConfig, limit: int) -> list[Case]:
    borders = checked_borders(config, limit)
    first = min(borders, default=limit)
    chunk_size = min(_CHUNK, max(1, (limit if limit <= _KEPT_ALL else first) // 3 - 1))
    lengths = (min(limit, max(1, first // 2)), min(limit, first + _SINGLE))
    batch = Case(_BATCH, batch=lengths, batch_keep=min(_WINDOW, *lengths))
    if config.switch is SwitchPolicy.CAUSAL:
        stops = _stops(config, borders, limit, UBATCH)
        whole = Case("one prefill", _whole(stops, limit))
        end = limit if limit <= _KEPT_ALL else min(limit, first + _WINDOW // 2)
        stops = _stops(config, [b for b in borders if b < end], end, chunk_size)
        chunks = Case(f"chunks of {chunk_size}", _whole(stops, end), chunk_size)
        steps = [Case("one by one over borders", _steps(borders, limit))] if borders else []
        return [whole, chunks, *steps, batch]
    ends = sorted({limit, *borders, *(b + 1 for b in borders if b < limit)})
    cases = []
    for end in ends:
        appends = _whole(_stops(config, [], end, UBATCH), end)
        cases.append(Case(f"one prefill of {end}", appends, declared_length=end))
    appends = _whole(_stops(config, [], limit, chunk_size), limit)
    chunks = Case(f"chunks of {chunk_size}", appends, chunk_size, limit)
    steps = [Case("one by one over borders", _steps(borders, limit))] if borders else []
    return [*cases, chunks, *steps, batch]


def _jumps(config: LongRopeConfig, limit: int) -> list[Case]:
    """Some tokens around each tier border and at the end, with nothing before them."""
    target = config.max_position_embeddings
    borders = [b for b in checked_borders(config, target) if b > _WINDOW]
    pinned = config.switch is SwitchPolicy.SEQUENCE
    cases = []
    for border in [*borders, target]:
        end = border if pinned else min(border + _WINDOW // 2, target)
        origin = border - _before(border, limit)
        whole = (Append(end - origin, min(end - origin, 2 * _WINDOW)),)
        cases.append(Case(f"from position {origin}", whole, declared_length=end, origin=origin))
    for border in borders:
        before = _before(border, limit)
        origin = border - before
        steps = _steps([before], min(before + _SINGLE, target - origin))
        cases.append(Case(f"from position {origin}, one by one", steps, origin=origin))
    return cases


def _before(border: int, limit: int) -> int:
    """Tokens in front of a border that is looked at by itself; there is a gap before them."""
    return max(1, min(_BEFORE, border - 1, limit - _WINDOW // 2))


def rows_of(case: Case, config: LongRopeConfig) -> list[Row]:
    """The compared rows, in the order in which the runtime hands them out."""

    def row(position: int, length: int) -> Row:
        return Row(position, tier_of(config, position, length), case.origin)

    if case.batch:
        return [
            row(position, length)
            for length in case.batch
            for position in range(length - case.batch_keep, length)
        ]
    rows, end = [], case.origin
    for append in case.appends:
        end += append.count
        length = max(end, case.declared_length or 0)
        rows += [row(position, length) for position in range(end - append.keep, end)]
    return rows


def cases_for(info: RuntimeInfo, cases: Sequence[Case], config: LongRopeConfig) -> list[Case]:
    """The cases that a runtime can run, named for what it makes of them.

    One that hands out the last logits of a call alone computes rows token by token; for it the
    longest prefill is run once more with its last row alone, whole.
    """
    chosen = [case for case in cases if info.any_position or not case.origin]
    if info.log_probabilities is not None:
        chosen = [of_prefixes(case, config) for case in chosen]
    if not info.batches:
        apart = "two lengths, one after the other"
        chosen = [replace(case, name=apart) if case.batch else case for case in chosen]
    if not info.rows_apart:
        return chosen
    prefills = [case for case in chosen if case.appends and not case.origin]
    longest = max(prefills, key=lambda case: case.num_tokens)  # the first of several
    whole = replace(
        longest,
        name=f"{longest.name}, the last row alone",
        appends=(Append(longest.num_tokens, 1),),
    )
    return [whole, *map(_with_rows_apart, chosen)]


def _with_rows_apart(case: Case) -> Case:
    keep = max((append.keep for append in case.appends), default=case.batch_keep)
    return case if keep == 1 else replace(case, name=f"{case.name}, rows token by token")


def of_prefixes(case: Case, config: LongRopeConfig) -> Case:
    """The case for a runtime that computes each row as the end of a text of its own.

    Under `sequence` without the rows that belong to the tier of a longer text.
    """
    if config.switch is SwitchPolicy.CAUSAL:
        return case

    def kept(end: int, keep: int, length: int) -> int:
        tier = tier_of(config, length - 1, length)
        return sum(tier_of(config, p, p + 1) == tier for p in range(end - keep, end))

    appends, end = [], case.origin
    for append in case.appends:
        end += append.count
        keep = kept(end, append.keep, max(end, case.declared_length or 0))
        appends.append(Append(append.count, keep))
    batch_keep = min((kept(n, case.batch_keep, n) for n in case.batch), default=1)
    return replace(case, appends=tuple(appends), batch_keep=batch_keep)


def checked_borders(config: LongRopeConfig, limit: int) -> list[int]:
    """Tier borders below `limit`; of a long ladder the first, the last and some between."""
    borders = [tier.max_length for tier in config.tiers if tier.max_length < limit]
    if len(borders) <= _BORDERS:
        return borders
    step = (len(borders) - 1) / (_BORDERS - 1)
    return [borders[round(number * step)] for number in range(_BORDERS)]


def _stops(config: LongRopeConfig, borders: Iterable[int], limit: int, inner: int) -> list[int]:
    """Ends of the calls: a little behind each start window and border, and behind one border of an
    inner batch of `inner` tokens. Those count from the begin of a call.
    """
    behind = _WINDOW // 2
    marks = [*(tier.num_start_tokens for tier in config.tiers), *borders]
    stops = sorted({limit, *(min(limit, mark + behind) for mark in marks if 0 < mark <= limit)})
    gaps = itertools.pairwise([0, *stops])
    begin = next((begin for begin, end in gaps if end - begin > inner + behind), None)
    return stops if begin is None else sorted([*stops, begin + inner + behind])


def _whole(stops: list[int], limit: int) -> tuple[Append, ...]:
    """Calls that end a little behind each stop, so that the stop lies inside of one."""
    counts = [end - begin for begin, end in itertools.pairwise([0, *stops])]
    most = limit if limit <= _KEPT_ALL else _WINDOW
    return tuple(Append(count, min(count, most)) for count in counts)


def _steps(borders: list[int], limit: int) -> tuple[Append, ...]:
    """A prefill up to just before each border, then single tokens over it."""
    appends, position = [], 0
    for border in borders:
        begin = border - _SINGLE
        if begin > position:
            appends.append(Append(begin - position, 1))
            position = begin
        while position < min(border + _SINGLE, limit):
            appends.append(Append(1, 1))
            position += 1
    return tuple(appends)
