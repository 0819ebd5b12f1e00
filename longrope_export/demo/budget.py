"""Which contexts the demo can measure in the time that is left."""

from __future__ import annotations

PROBE_CONTEXT = 2048
FULL_CONTEXTS = (8192, 16384)

# Beyond the model's window, where it has to show: at 10240 tokens the original still copes (7.9, and
# 9.7 with the factors). The last one is measured whatever it takes.
_BEYOND = (16384, 12288)

# At this context attention, which grows with the square, costs as much as the rest. Measured on two
# cores with 135M parameters: 33 s at 4096 tokens, 97 s at 8192, 195 s at 12288, 326 s at 16384.
_EVEN_CONTEXT = 3845


def estimate_seconds(context: int, probe_seconds: float) -> float:
    """Time of one perplexity run at `context` tokens.

    Args:
        probe_seconds: what a run at PROBE_CONTEXT took on this machine.
    """
    return probe_seconds * _work(context) / _work(PROBE_CONTEXT)


def affordable_contexts(seconds: float, probe_seconds: float) -> list[int]:
    """Contexts to measure with both files in `seconds`, rising.

    One beyond the window comes first, the shortest of them even where the time is too short for it;
    then the window itself.
    """

    def fits(*contexts: int) -> bool:
        needed = sum(2 * estimate_seconds(context, probe_seconds) for context in contexts)
        return needed <= seconds

    for context in _BEYOND:
        if fits(FULL_CONTEXTS[0], context):
            return [FULL_CONTEXTS[0], context]
        if fits(context):
            return [context]
    return [_BEYOND[-1]]


def _work(context: int) -> float:
    return context * (1 + context / _EVEN_CONTEXT)
