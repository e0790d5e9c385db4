"""`rota serve --engine URL` before llama.cpp's own server, as a user meets it: by the OpenAI client."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from tests.live.llama_cpp_server import MODEL, NUM_SLOTS

pytestmark = pytest.mark.live

ROTA = [sys.executable, "-m", "rota.cli.main"]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
LONG = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 3500, "extra_body": {"ignore_eos": True}}
"""Half a minute's work at the least: nobody waits for its end."""
PATIENCE_SECONDS = 60.0


class LlamaCpp:
    """One server, which can be killed and started again at the same address."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = self.start("0")

    def start(self, port: str) -> str:
        address = self.folder / "url"
        address.unlink(missing_ok=True)
        script = Path(__file__).with_name("llama_cpp_server.py")
        with (self.folder / "llama.cpp.log").open("a") as log:
            self.process = subprocess.Popen([sys.executable, str(script), str(self.folder), port], stderr=log)
        until(lambda: address.exists() or self.process.poll() is not None)
        assert address.exists(), (self.folder / "llama.cpp.log").read_text()[-4000:]
        return address.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def metrics(self) -> dict[str, float]:
        return read_metrics(f"{self.url}/metrics", "llamacpp:")


@dataclass
class Served:
    """The router, the server behind it, and a client."""

    engine: LlamaCpp
    client: openai.OpenAI

    def metrics(self) -> dict[str, float]:
        return read_metrics(str(self.client.base_url).replace("/v1/", "/metrics"), "rota:")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("llama_cpp")
    engine = LlamaCpp(folder)
    router = subprocess.Popen(
        [*ROTA, "serve", "--engine", engine.url, "--port", "0", "--json", "--drain", "1", "--run-dir", str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        lines: list[str] = []
        for line in router.stdout or ():
            lines.append(line)
            if line.startswith("}"):
                break
        url = json.loads("".join(lines))["url"]
        yield Served(engine, openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE_SECONDS))
    finally:
        if router.poll() is None:
            os.killpg(router.pid, signal.SIGINT)
            router.wait(60)
        engine.kill()


def test_it_answers_whole_and_in_streams(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == [MODEL]

    chat = {"model": MODEL, "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    whole = served.client.chat.completions.create(**chat)
    assert whole.choices[0].message.content
    assert whole.usage is not None
    assert 0 < whole.usage.completion_tokens <= 12
    chunks = list(served.client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] in ("stop", "length")
    assert chunks[-1].usage is not None

    text = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8, "extra_body": {"ignore_eos": True}}
    whole = served.client.completions.create(**text)
    assert whole.choices[0].text
    assert whole.usage.completion_tokens == 8
    pieces = list(served.client.completions.create(**text, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices)
    assert pieces[-1].choices[0].finish_reason == "length"


def test_its_own_words_come_back(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="context size"):
        served.client.completions.create(model=MODEL, prompt="hello " * 9000, max_tokens=4)


def test_load_is_read_and_whoever_leaves_frees_a_slot(served: Served) -> None:
    streams = [served.client.completions.create(**LONG, stream=True) for _ in range(NUM_SLOTS)]
    for stream in streams:
        next(iter(stream))
    assert served.engine.metrics()["requests_processing"] == NUM_SLOTS
    until(lambda: load(served) == (NUM_SLOTS, 0))
    for stream in streams:
        stream.close()
    until(lambda: served.engine.metrics()["requests_processing"] == 0)
    until(lambda: load(served) == (0, 0))
    metrics = served.metrics()
    assert metrics["clients_left_total"] == NUM_SLOTS
    assert metrics['instance_reports_total{instance="e0",source="probe"}'] > 0


def test_a_server_that_dies_is_said_to_and_one_that_comes_back_is_used(served: Served) -> None:
    stream = served.client.completions.create(**LONG, stream=True)
    next(iter(stream))
    served.engine.kill()
    with pytest.raises(openai.APIError) as caught:
        for _ in stream:
            pass
    assert caught.value.code == "engine_lost"
    served.engine.start(served.engine.url.rpartition(":")[2])
    # Held by the router until the server is found again.
    answer = served.client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=2)
    assert answer.choices[0].message.content


def load(served: Served) -> tuple[float, float]:
    """Running and waiting, as the router last read them."""
    metrics = served.metrics()
    return tuple(metrics[f'instance_num_requests_{state}{{instance="e0"}}'] for state in ("running", "waiting"))


def read_metrics(url: str, prefix: str) -> dict[str, float]:
    """Name with labels, without the prefix, to value."""
    with urllib.request.urlopen(url, timeout=PATIENCE_SECONDS) as page:
        text = page.read().decode()
    return {name: float(value) for name, value in re.findall(rf"^{prefix}(\S+) (\S+)$", text, re.MULTILINE)}


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)
