"""Conformance of step-time predictors: `check_step_time(predictor)` raises AssertionError at the first broken rule."""

from rota.base.random_streams import RandomStreams, Stream
from rota.serving.api import StepTimePredictor
from rota.serving.predictors.step_time.runs import SkewPredictor, decode_run

Prefills = tuple[tuple[int, int], ...]


MEASURED_DIP = 0.1
"""How much less a mixed step may take with more in it, where the model reads measured tables."""


def check_step_time(
    predictor: StepTimePredictor, *, num_steps: int = 300, seed: int = 0, is_measured: bool = False
) -> None:
    """Prove on random steps, small ones and ones far beyond any engine, that a predictor

    * gives whole nanoseconds, more than none for any step that is not empty;
    * gives the same answer to the same question, whatever was asked between;
    * never answers less when a step has more: a token, a context token, a sequence of either kind;
    * tells the times of a run of decodes, if it offers that, exactly as step by step;
    * charges for decodes of unlike length, if it offers that, nothing where they are alike, never less for a longer
      longest one, and the same in every step of a run.

    `is_measured` is for models that read tables of a kernel which likes some mixes better than others: there a sequence
    that comes on top is as long as those that are there (one that lowers their mean may truly save time), and a step
    of both kinds may take `MEASURED_DIP` less.
    """
    stream = RandomStreams(seed).stream("testing.step_time")
    steps = [_step(stream) for _ in range(num_steps)]
    times = [_time(predictor, *step) for step in steps]
    for (prefills, num_decodes, kv_tokens), time in zip(steps, times, strict=True):
        shown = f"prefills={prefills}, num_decodes={num_decodes}, decode_kv_tokens={kv_tokens}"
        assert type(time) is int and time > 0, f"{shown}: took {time!r}, not a positive int"
        assert _time(predictor, prefills, num_decodes, kv_tokens) == time, f"{shown}: another answer when asked again"
        for what, more in _more(stream, prefills, num_decodes, kv_tokens, is_measured):
            longer = _time(predictor, *more)
            is_mixed = bool(more[0] and more[1])
            floor = time * (1 - MEASURED_DIP) if is_measured and is_mixed else time
            assert longer >= floor, f"{shown}: took {time} ns, but with {what} {longer} ns"
        if num_decodes:
            _check_run(predictor, num_decodes, kv_tokens, stream.integers(1, 200))
            if isinstance(predictor, SkewPredictor):
                num_new = sum(new_tokens for new_tokens, _ in prefills)
                _check_skew(predictor, num_new, num_decodes, kv_tokens, stream.integers(0, 5000))


def _check_skew(predictor: SkewPredictor, num_new: int, num_decodes: int, kv_tokens: int, excess: int) -> None:
    mean = kv_tokens // num_decodes
    alike = predictor.skew_time(num_new, num_decodes, mean * num_decodes, mean)
    shown = f"{num_decodes} decodes over {kv_tokens} context tokens beside {num_new} new ones"
    assert alike == 0, f"{shown}: {alike} ns for being unlike, though they are alike"
    longest = -(-kv_tokens // num_decodes) + excess
    times = [predictor.skew_time(num_new, num_decodes, kv_tokens, longest + more) for more in (0, 1, 100)]
    assert all(type(time) is int for time in times) and 0 <= times[0] <= times[1] <= times[2], (
        f"{shown}: {times} ns for a longest one of {longest}, {longest + 1} and {longest + 100}"
    )
    later = predictor.skew_time(num_new, num_decodes, kv_tokens + 7 * num_decodes, longest + 7)
    assert later == times[0], f"{shown}: {times[0]} ns for being unlike, and seven steps on {later} ns"


def _check_run(predictor: StepTimePredictor, num_decodes: int, kv_tokens: int, num_steps: int) -> None:
    run = decode_run(predictor, num_decodes, kv_tokens, num_steps)
    stepped = [_time(predictor, (), num_decodes, kv_tokens + step * num_decodes) for step in range(num_steps)]
    shown = f"a run of {num_steps} steps of {num_decodes} decodes from {kv_tokens} context tokens"
    assert len(run) == num_steps, f"{shown} came as {len(run)} times"
    for step, (left, right) in enumerate(zip(run, stepped, strict=True)):
        assert left == right, f"{shown}: step {step} took {left} ns in the run and {right} ns alone"


def _time(predictor: StepTimePredictor, prefills: Prefills, num_decodes: int, kv_tokens: int) -> int:
    return predictor.step_time(prefills=prefills, num_decodes=num_decodes, decode_kv_tokens=kv_tokens)


def _step(stream: Stream) -> tuple[Prefills, int, int]:
    """A random step that is not empty; sizes are even in their logarithm, so that small ones are as likely as large."""
    prefills = tuple((1 + _size(stream, 14), _size(stream, 17)) for _ in range(stream.integers(0, 4)))
    num_decodes = _size(stream, 10) if prefills else 1 + _size(stream, 10)
    return (
        prefills,
        num_decodes,
        sum(1 + _size(stream, 17) for _ in range(min(num_decodes, 3))) * max(1, num_decodes // 3),
    )


def _size(stream: Stream, bits: int) -> int:
    return stream.integers(0, 2 ** stream.integers(0, bits + 1))


def _more(
    stream: Stream, prefills: Prefills, num_decodes: int, kv_tokens: int, is_measured: bool
) -> list[tuple[str, tuple[Prefills, int, int]]]:
    extra = 1 + _size(stream, 13)
    decodes = 1 + _size(stream, 5)
    kv_of_decodes = decodes * stream.integers(0, 2) * _size(stream, 12)
    prefill = (extra + 1, 0)
    if is_measured:
        kv_of_decodes = decodes * -(-kv_tokens // max(1, num_decodes))
        prefill = prefills[0] if prefills else prefill
    more: list[tuple[str, tuple[Prefills, int, int]]] = [
        (f"{decodes} decodes more", (prefills, num_decodes + decodes, kv_tokens + kv_of_decodes)),
        (f"a prefill of {prefill[0]} tokens more", ((*prefills, prefill), num_decodes, kv_tokens)),
    ]
    if num_decodes:
        more.append((f"{extra} context tokens more", (prefills, num_decodes, kv_tokens + extra)))
    if prefills:
        (new, context), *rest = prefills
        more.append((f"{extra} new tokens more", (((new + extra, context), *rest), num_decodes, kv_tokens)))
        more.append((f"{extra} prefix tokens more", (((new, context + extra), *rest), num_decodes, kv_tokens)))
    return more
