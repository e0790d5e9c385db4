"""A whole vLLM server with our scheduler inside, as `VllmServer` says to start it, asked by an OpenAI client."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import OpenAI

from rota.base.instant import milliseconds
from rota.base.journal import read_journal
from rota.serving.engines.managed import free_port
from rota.serving.engines.model_package import prepare_model
from rota.serving.engines.vllm.facts import read_facts
from rota.serving.engines.vllm.replay import ROW_TYPES
from rota.serving.engines.vllm.server import VllmServer
from rota.serving.model.events import SequenceArrived
from rota.serving.model.request import SLO

pytestmark = pytest.mark.live

START_TIMEOUT_SECONDS = 600.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "stack.toml").write_text('order = "strict_priority"\n')
    server = VllmServer(
        model=prepare_model(),
        port=free_port(),
        served_model_name="smollm2-135m",
        stack=folder / "stack.toml",
        facts=folder / "facts.jsonl",
        journal=folder / "journal",
        max_model_len=512,
        max_num_seqs=4,
    )
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            server.command(),
            env={**os.environ, **server.environment()},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while True:
            assert process.poll() is None, (folder / "log").read_text()[-4000:]
            try:
                client.models.list()
                break
            except Exception:
                assert time.monotonic() < deadline, (folder / "log").read_text()[-4000:]
                time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def test_it_answers_sensibly_and_says_what_it_did(server: VllmServer) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    def ask(number: int) -> str:
        answer = client.chat.completions.create(
            model=server.served_model_name,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            max_tokens=24,
            temperature=0,
            extra_body={"priority": number % 2},
        )
        return answer.choices[0].message.content or ""

    with ThreadPoolExecutor(12) as executor:
        answers = list(executor.map(ask, range(12)))
    assert all("Paris" in answer for answer in answers), answers

    assert server.facts is not None
    deadline = time.monotonic() + 10
    while sum(record.num_finished for record in read_facts(server.facts)) < 12:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    facts = read_facts(server.facts)
    assert max(record.num_running for record in facts) == 4
    assert max(record.num_waiting for record in facts) > 0
    assert all(record.step_ns > 0 for record in facts)


def test_the_scheduler_inside_hears_tenant_and_targets(server: VllmServer) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    told = {"tenant": "team", "slo_ttft_ms": 750.0, "slo_tpot_ms": 40, "waited_ms": 60_000.0}
    for extra in ({}, {"vllm_xargs": told}):
        client.completions.create(model=server.served_model_name, prompt="Once", max_tokens=2, extra_body=extra)
    assert server.journal is not None
    deadline = time.monotonic() + 10
    while True:
        events = [row.event for row in read_journal(server.journal, ROW_TYPES)]
        requests = [event.request for event in events if isinstance(event, SequenceArrived)]
        if any(request.tenant == "team" for request in requests):
            break
        assert time.monotonic() < deadline, "its arrival is not in the journal"
        time.sleep(0.2)
    request = next(request for request in requests if request.tenant == "team")
    assert request.slo == SLO(ttft=milliseconds(750), tpot=milliseconds(40))
    before = max(request.arrived_at for request in requests if request.tenant != "team")
    assert request.arrived_at < before, "what it waited at the router is counted"
