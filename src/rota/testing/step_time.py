"""Conformance of step-time predictors: `check_step_time(predictor)` raises AssertionError at the first broken rule."""

from rota.base.random_streams import RandomStreams, Stream
from rota.serving.api import StepTimePredictor
from rota.serving.predictors.step_time.runs import decode_run

Prefills = tuple[tuple[int, int], ...]


def check_step_time(predictor: StepTimePredictor, *, num_steps: int = 300, seed: int = 0) -> None:
    """Prove on random steps, small ones and ones far beyond any engine, that a predictor

    * gives whole nanoseconds, more than none for any step that is not empty;
    * gives the same answer to the same question, whatever was asked between;
    * never answers less when a step has more: a token, a context token, a sequence of either kind;
    * tells the times of a run of decodes, if it offers that, exactly as step by step.
    """
    stream = RandomStreams(seed).stream("testing.step_time")
    steps = [_step(stream) for _ in range(num_steps)]
    times = [_time(predictor, *step) for step in steps]
    for (prefills, num_decodes, kv_tokens), time in zip(steps, times, strict=True):
        shown = f"prefills={prefills}, num_decodes={num_decodes}, decode_kv_tokens={kv_tokens}"
        assert type(time) is int and time > 0, f"{shown}: took {time!r}, not a positive int"
        assert _time(predictor, prefills, num_decodes, kv_tokens) == time, f"{shown}: another answer when asked again"
        for what, more in _more(stream, prefills, num_decodes, kv_tokens):
            longer = _time(predictor, *more)
            assert longer >= time, f"{shown}: took {time} ns, but with {what} {longer} ns"
        if num_decodes:
            _check_run(predictor, num_decodes, kv_tokens, stream.integers(1, 200))


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
    stream: Stream, prefills: Prefills, num_decodes: int, kv_tokens: int
) -> list[tuple[str, tuple[Prefills, int, int]]]:
    extra = 1 + _size(stream, 13)
    decodes = 1 + _size(stream, 5)
    kv_of_decodes = decodes * stream.integers(0, 2) * _size(stream, 12)
    more: list[tuple[str, tuple[Prefills, int, int]]] = [
        (f"{decodes} decodes more", (prefills, num_decodes + decodes, kv_tokens + kv_of_decodes)),
        (f"a prefill of {extra + 1} tokens more", ((*prefills, (extra + 1, 0)), num_decodes, kv_tokens)),
    ]
    if num_decodes:
        more.append((f"{extra} context tokens more", (prefills, num_decodes, kv_tokens + extra)))
    if prefills:
        (new, context), *rest = prefills
        more.append((f"{extra} new tokens more", (((new + extra, context), *rest), num_decodes, kv_tokens)))
        more.append((f"{extra} prefix tokens more", (((new, context + extra), *rest), num_decodes, kv_tokens)))
    return more
