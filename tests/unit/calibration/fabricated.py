"""Facts of an engine whose step times are known, because they are made up here."""

from collections.abc import Callable

from rota.base.random_streams import RandomStreams, Stream
from rota.serving.engines.vllm.facts import EngineFacts, StepRecord
from rota.serving.model.instance import InstanceLimits

LIMITS = InstanceLimits(
    num_blocks=900, block_size=32, max_num_seqs=24, max_num_batched_tokens=512, max_model_len=1024, watermark_blocks=9
)
ENGINE = EngineFacts("vLLM 0.32.0", "fabricated", "cpu", "bfloat16", LIMITS)

Truth = Callable[[list[tuple[int, int]], int, int], float]
GAP_NS = 200_000


def straight(prefills: list[tuple[int, int]], num_decodes: int, decode_kv: int) -> float:
    """Ns of a step: an engine that is a straight sum."""
    tokens = num_decodes + sum(new for new, _ in prefills)
    pairs = sum(new * (context + new / 2) for new, context in prefills)
    context = sum(context for _, context in prefills)
    return 9e6 + 400e3 * tokens + 100e3 * num_decodes + 2500.0 * decode_kv + 300.0 * pairs + 4000.0 * context


def bent(prefills: list[tuple[int, int]], num_decodes: int, decode_kv: int) -> float:
    """Ns of a step: an engine that computes sixteen tokens in the time of one, and sixty-four at half the price."""
    tokens = num_decodes + sum(new for new, _ in prefills)
    return 9e6 + 200e3 * max(0, min(tokens, 64) - 16) + 500e3 * max(0, tokens - 64) + 2500.0 * decode_kv


def facts(
    truth: Truth,
    *,
    num_stretches: int = 20,
    num_steps: int = 60,
    noise: float = 0.0,
    outliers: float = 0.0,
    cpu: bool = True,
    seed: int = 0,
) -> list[StepRecord]:
    """Stretches of steps with idle moments between. `noise` is the deviation of a step's time, as a share; `outliers`
    is the share of steps that take three times as long, as on a machine that others use; their CPU time does not."""
    stream = RandomStreams(seed).stream("fabricated")
    records: list[StepRecord] = []
    now = 10**12
    for _ in range(num_stretches):
        now += 10**9
        level = stream.integers(1, LIMITS.max_num_seqs + 1)
        for step in range(num_steps):
            prefills, num_decodes, decode_kv = _batch(stream, level)
            cpu_ns = truth(prefills, num_decodes, decode_kv) * max(0.5, 1 + noise * stream.normal())
            step_ns = round(cpu_ns * (3.0 if stream.random() < outliers else 1.0))
            is_last = step == num_steps - 1
            num_running = num_decodes + len(prefills)
            records.append(
                StepRecord(
                    step=len(records) + 1,
                    at=now,
                    unix_at=now,
                    step_ns=step_ns,
                    decision_ns=1000,
                    num_running=num_running,
                    num_waiting=0,
                    num_free_blocks=100,
                    num_blocks=LIMITS.num_blocks,
                    prefills=tuple(prefills),
                    num_prefill_tokens=sum(new for new, _ in prefills),
                    num_decodes=num_decodes,
                    decode_kv_tokens=decode_kv,
                    num_cached_tokens=0,
                    num_admitted=len(prefills),
                    num_displaced=0,
                    num_preempted=0,
                    num_finished=num_running if is_last else 0,
                    cpu_ns=round(cpu_ns) if cpu else None,
                )
            )
            now += step_ns + GAP_NS
    return records


def _batch(stream: Stream, level: int) -> tuple[list[tuple[int, int]], int, int]:
    num_prefills = stream.integers(0, 4) if stream.random() < 0.3 else 0
    prefills = [(stream.integers(2, 200), stream.choice([0, 0, 64, 512])) for _ in range(num_prefills)]
    num_decodes = stream.integers(0, level + 1) if prefills else stream.integers(1, level + 1)
    return prefills, num_decodes, num_decodes * stream.integers(10, 900)
