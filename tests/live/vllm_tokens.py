"""Runs one vLLM engine over a fixed script of arrivals and writes the tokens of every request: a program, not a test.

The engine core runs in this process, so that requests meet steps at the same points in every run.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

PREAMBLE = (
    "You answer questions for the visitors of a small museum by the harbour. Be kind, be brief, and say so when you do "
    "not know. Today it rains, the tower is closed, and the boats leave from the second pier instead of the first. "
)
"""Longer than a block, so that prompts share one."""
PROMPTS = [
    f"{PREAMBLE}{opening} {subject}"
    for opening in (
        "Explain in plain words",
        "Write a short story about",
        "List five facts about",
        "Argue for and against",
    )
    for subject in ("the sea.", "a clock that runs backwards.", "bread and salt.")
]
MAX_TOKENS = 40
BLOCK_SIZE = 32
EVE_COMES_BEFORE = 20
BACKLOG = {"ada": (30, 12, 0), "ben": (10, 24, 0), "eve": (8, 12, EVE_COMES_BEFORE)}
"""Of each tenant: how many requests, tokens of each answer, the step before which they come."""
AGEING_SECONDS = 1.0
LOW = "low"
MAX_NUM_SEQS = 6
NUM_CROWDING = 3 * MAX_NUM_SEQS
"""Though all who run may end in one step, there are as many who wait, and more."""


def main(spec: dict[str, object], out: str) -> None:
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        # One thread, wherever there is room: threads that wait for each other crawl on a busy machine.
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        OMP_NUM_THREADS="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="WARNING",
    )
    from vllm import LLM

    result: dict[str, object] = {}
    if spec.get("backlogs"):
        for plugin in spec["backlogs"]:  # type: ignore[attr-defined]
            llm = _engine(LLM, spec, plugin)
            _backlog(llm)
            llm.llm_engine.engine_core.shutdown()  # type: ignore[attr-defined]
        Path(out).write_text(json.dumps(result))
        return
    if spec.get("crowded_out"):
        for name, plugin in spec["crowded_out"].items():  # type: ignore[attr-defined]
            llm = _engine(LLM, spec, plugin)
            result[name] = _crowded_out(llm)
            llm.llm_engine.engine_core.shutdown()  # type: ignore[attr-defined]
        Path(out).write_text(json.dumps(result))
        return
    llm = _engine(LLM, spec, spec["plugin"])
    result["together"] = _together(llm, dict.fromkeys(range(len(PROMPTS)), 0))
    if spec["late"]:
        result["late"] = _together(llm, {n: (n - 7) * 5 if n >= 8 else 0 for n in range(len(PROMPTS))})
    if spec["alone"]:
        result["alone"] = {name: tokens for n in range(len(PROMPTS)) for name, tokens in _together(llm, {n: 0}).items()}
    Path(out).write_text(json.dumps(result))
    llm.llm_engine.engine_core.shutdown()  # type: ignore[attr-defined]


def _engine(kind: Callable[..., object], spec: dict[str, object], plugin: object) -> object:
    settings: dict[str, object] = {}
    if plugin is not None:
        settings["scheduler_cls"] = "rota.serving.engines.vllm.plugin.RotaScheduler"
        settings["additional_config"] = {"rota": plugin}
    return kind(
        str(spec["model"]),
        dtype=str(spec["dtype"]),
        enforce_eager=True,
        block_size=BLOCK_SIZE,
        max_model_len=256,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=128,
        # Six sequences share the preamble's block and outgrow the rest: memory runs out while they decode.
        num_gpu_blocks_override=10,
        enable_prefix_caching=bool(spec.get("prefix_caching", True)),
        **settings,
    )


def _together(llm: object, arrivals: dict[int, int]) -> dict[str, list[int]]:
    """Give each prompt to the engine before the step that `arrivals` names; those that come late are of class 0, the
    others of class 1. Returns the tokens by prompt."""
    from vllm import SamplingParams

    engine = llm.llm_engine  # type: ignore[attr-defined]
    parameters = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    tokens: dict[str, list[int]] = {}
    step = 0
    while len(tokens) < len(arrivals):
        for n, before in arrivals.items():
            if before == step:
                engine.add_request(f"p{n}", PROMPTS[n], parameters, priority=0 if before else 1)
        for output in engine.step():
            if output.finished:
                tokens[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
    return tokens


def _backlog(llm: object) -> None:
    """Three tenants with more work than the engine holds at once: the first sends all of its own ahead of the others,
    the second wants long answers, the third comes late. Where they are served in the order of arrival, the first has
    had everything before the second gets a token."""
    from vllm import SamplingParams

    engine = llm.llm_engine  # type: ignore[attr-defined]
    step = 0
    while step <= EVE_COMES_BEFORE or engine.has_unfinished_requests():
        for tenant, (num_requests, max_tokens, before) in BACKLOG.items():
            for n in range(num_requests if before == step else 0):
                parameters = SamplingParams(
                    temperature=0.0, max_tokens=max_tokens, ignore_eos=True, extra_args={"tenant": tenant}
                )
                # Nobody repeats another's prompt and its answer: such answers are shared by vLLM and not in a replay.
                prompt = f"{PROMPTS[n % len(PROMPTS)]} ({tenant} {n})"
                engine.add_request(f"{tenant}{n}", prompt, parameters)
        engine.step()
        step += 1


def _crowded_out(llm: object) -> dict[str, object]:
    """One request of class 1 while there are always more of class 0 than the engine holds, until ten that arrived at
    least `AGEING_SECONDS` after it have been served. Returns the names of those ten and later ones, and the names of
    all in the order of their first tokens, those of one step together."""
    from vllm import SamplingParams

    engine = llm.llm_engine  # type: ignore[attr-defined]
    came_at: dict[str, float] = {}
    served: list[list[str]] = []

    def add(name: str, priority: int) -> None:
        parameters = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        came_at[name] = time.time()
        engine.add_request(name, f"{PROMPTS[len(came_at) % len(PROMPTS)]} ({name})", parameters, priority=priority)

    def later() -> list[str]:
        return [name for name, at in came_at.items() if at > came_at[LOW] + AGEING_SECONDS]

    for n in range(NUM_CROWDING):
        add(f"high {n}", 0)
    first_seen: set[str] = set()
    num_steps = 0
    while engine.has_unfinished_requests():
        num_steps += 1
        if num_steps == 5:
            add(LOW, 1)
        outputs = engine.step()
        first = [output.request_id for output in outputs if output.request_id not in first_seen]
        first_seen.update(first)
        served.append(first)
        if LOW not in came_at or len(first_seen.intersection(later())) < 10:
            for _ in range(NUM_CROWDING - engine.get_num_unfinished_requests()):
                add(f"high {len(came_at)}", 0)
    return {"later": later(), "served": served}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
