"""`rota serve` over two real vLLMs, as a user starts it: no test itself."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROTA = (sys.executable, "-m", "rota.cli.main")
MODEL = "smollm2-135m"


@contextmanager
def two_vllms_served(
    folder: Path, *words: str, engine_options: tuple[str, ...]
) -> "Iterator[tuple[subprocess.Popen[str], str]]":
    """The process and the URL of its API, once both engines are ready. Journal and logs come to lie in `folder`."""
    process = subprocess.Popen(
        [
            *(*ROTA, "serve", "--port", "0", "--instances", "2", "--json", "--wait-for-all", "--drain", "5"),
            *("--run-dir", str(folder), "--journal", str(folder / "journal.jsonl"), *words),
            *(word for option in engine_options for word in ("--engine-option", option)),
        ],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        lines: list[str] = []
        for line in process.stdout or ():
            lines.append(line)
            if line.startswith("}"):
                break
        assert lines, (folder / "vllm-0.log").read_text()[-4000:]
        yield process, json.loads("".join(lines))["url"]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(60)
