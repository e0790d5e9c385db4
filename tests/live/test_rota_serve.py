"""What `make serve` starts, as a user meets it: `rota serve` over two real vLLMs, asked by the real OpenAI client."""

import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from tests.live.served import ROTA, two_vllms_served

from rota.serving.engines.vllm.facts import read_engine, read_facts

pytestmark = pytest.mark.live

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@dataclass
class Served:
    """A router that runs, and where it keeps its things."""

    process: "subprocess.Popen[str]"
    client: openai.OpenAI
    folder: Path

    def chat(self, **extra: object) -> openai.types.chat.ChatCompletion:
        return self.client.chat.completions.create(
            model="smollm2-135m", messages=QUESTION, max_tokens=16, temperature=0, **extra
        )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "stack.toml").write_text('order = "strict_priority"\ndispatch = "round_robin"\n')
    words = ("--stack", str(folder / "stack.toml"))
    options = ("max_num_seqs=4", "max_model_len=1024")
    with two_vllms_served(folder, *words, engine_options=options) as (process, url):
        yield Served(process, openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120), folder)


def test_it_answers_sensibly_from_both_engines(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == ["smollm2-135m"]
    answers = [served.chat() for _ in range(2)]
    assert all("Paris" in (answer.choices[0].message.content or "") for answer in answers)
    streamed = served.client.chat.completions.create(
        model="smollm2-135m", messages=QUESTION, max_tokens=16, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    assert text == answers[0].choices[0].message.content
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        steps = [len(list(read_facts(served.folder / f"vllm-{index}.facts.jsonl"))) for index in range(2)]
        if min(steps) > 0:
            break
        time.sleep(0.2)
    assert min(steps) > 0, "one of the engines ran no step"


def test_a_class_sent_by_header_displaces_inside_the_engines(served: Served) -> None:
    def low(number: int) -> int:
        answer = served.client.completions.create(
            model="smollm2-135m", prompt=f"{number}. Once upon a time", max_tokens=160, extra_body={"ignore_eos": True}
        )
        return answer.usage.completion_tokens

    def high() -> str | None:
        time.sleep(2)  # by then every slot of both engines is taken
        return served.chat(extra_headers={"x-gateway-inference-objective": "1"}).choices[0].message.content

    with ThreadPoolExecutor(16) as pool:
        lows = [pool.submit(low, number) for number in range(14)]
        answers = [pool.submit(high) for _ in range(2)]
        assert all("Paris" in (answer.result() or "") for answer in answers)
        assert [each.result() for each in lows] == [160] * 14, "displaced requests end with all of their tokens"
    facts = [step for index in range(2) for step in read_facts(served.folder / f"vllm-{index}.facts.jsonl")]
    assert sum(step.num_displaced for step in facts) > 0


def test_the_routers_reports_come_from_the_engines_facts(served: Served) -> None:
    before = router_metrics(served)
    stream = served.client.completions.create(
        model="smollm2-135m", prompt="Once upon a time", max_tokens=300, stream=True, extra_body={"ignore_eos": True}
    )
    shown = [router_metrics(served) for index, _ in enumerate(stream) if index % 100 == 50]
    running = [page.get(f'instance_num_requests_running{{instance="vllm-{i}"}}') for page in shown for i in range(2)]
    assert 1.0 in running, "its own page shows it"
    after = router_metrics(served)
    grown = {key: after[key] - before.get(key, 0.0) for key in after}
    told = {i: grown[f'instance_reports_total{{instance="vllm-{i}",source="facts"}}'] for i in range(2)}
    probed = {i: grown[f'instance_reports_total{{instance="vllm-{i}",source="probe"}}'] for i in range(2)}
    busy = max(told, key=lambda index: told[index])
    assert told[busy] > 5
    assert told[busy] > 3 * probed[busy], "while steps run, it is hardly ever asked"
    assert grown[f'instance_decode_tokens_total{{instance="vllm-{busy}"}}'] >= 290
    assert grown[f'instance_step_seconds_total{{instance="vllm-{busy}"}}'] > 0

    # What the engine itself wrote of its steps, against what the router's machine was told. vLLM's metrics count the
    # null block, so a report that came from a probe names one block more.
    facts = served.folder / f"vllm-{busy}.facts.jsonl"
    engine = read_engine(facts)
    assert engine is not None
    ends = {(step.num_running - step.num_finished, step.num_waiting) for step in read_facts(facts)}
    rows = (json.loads(line) for line in (served.folder / "journal.jsonl").read_text().splitlines())
    reports = [row["event"]["report"] for row in rows if (row.get("event") or {}).get("type") == "InstanceReported"]
    of_steps = [
        (report["num_running"], report["num_waiting"])
        for report in reports
        if report["instance_id"] == f"vllm-{busy}" and report["num_blocks"] == engine.limits.num_blocks
    ]
    assert len(of_steps) >= told[busy]
    assert set(of_steps) <= ends


def router_metrics(served: Served) -> dict[str, float]:
    """The router's metrics: name with labels, without `rota:`, to value."""
    with urllib.request.urlopen(str(served.client.base_url).replace("/v1/", "/metrics")) as page:
        text = page.read().decode()
    return {name: float(value) for name, value in re.findall(r"^rota:(\S+) (\S+)$", text, re.MULTILINE)}


def test_bad_input_is_answered_in_openais_shape(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.chat.completions.create(model="smollm2-135m", messages=QUESTION, max_tokens="many")  # type: ignore[call-overload]
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError):
        served.client.chat.completions.create(model="no-such-model", messages=QUESTION, max_tokens=4)


def test_an_engine_that_dies_mid_stream_is_replaced_by_the_other_or_told(served: Served) -> None:
    """Streams go on at the other engine; those that hold what does not travel, here a seed, end in an error there."""
    streams = [
        served.client.completions.create(
            model="smollm2-135m",
            prompt="Once upon a time",
            max_tokens=600,
            stream=True,
            extra_body={"ignore_eos": True} | pinned,
        )
        for pinned in ({}, {}, {"seed": 1}, {"seed": 1})
    ]
    for stream in streams:
        next(iter(stream))
    victim = engines(served)[0]
    os.kill(victim, signal.SIGKILL)
    ends = [_end(stream) for stream in streams]
    assert ends[:2] == ["length", "length"]
    assert sorted(ends[2:]) == ["engine_lost", "length"]
    assert "Paris" in (served.chat().choices[0].message.content or ""), "the other engine goes on"


def test_it_stops_in_order_and_its_journal_replays(served: Served) -> None:
    assert engines(served)
    os.kill(served.process.pid, signal.SIGINT)
    assert served.process.wait(60) == 0
    deadline = time.monotonic() + 20
    while engines(served) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not engines(served), "an engine was left behind"
    replayed = subprocess.run(
        [*ROTA, "replay", str(served.folder / "journal.jsonl")], capture_output=True, text=True, timeout=60
    )
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    assert "identical" in replayed.stdout


def _end(stream: "openai.Stream[openai.types.Completion]") -> str:
    """How a stream ended: its finish reason, or the code of its error."""
    try:
        for chunk in stream:
            if chunk.choices and chunk.choices[0].finish_reason:
                return chunk.choices[0].finish_reason
    except openai.APIError as error:
        return str(error.code)
    return "nothing"


def engines(served: Served) -> list[int]:
    """Process ids of the engines' servers: their command lines name our folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if "api_server" in command and str(served.folder) in command:
                found.append(int(entry.name))
    return sorted(found)
