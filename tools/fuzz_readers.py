"""Looks for files that make a trace reader do anything but read them or refuse them with their spot.

    pip install atheris          # coverage-guided; without it, inputs are mutated blindly
    python tools/fuzz_readers.py --seconds 1200 --corpus build/fuzz
    python tools/fuzz_readers.py --blind --runs 20000 --seed 7

An input is a byte that picks a format and what is let pass, and a file. A finding is any exception but the errors for
bad input, an error without file, line and column, a row that breaks the rule of `Arrival` or cannot become a request,
and a trace that does not come back equal from Rota's own format. The first finding stops the run; its input is kept.
At the end, the lines of the readers that the inputs reach are counted.
"""

import argparse
import json
import random
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

try:
    import atheris
except ImportError:
    atheris = None

MAX_ROWS = 2_000
"""A description may ask for any number of requests."""
MAX_INPUT_BYTES = 8_192
WORDS = (
    '"timestamp"', '"input_length"', '"output_length"', '"hash_ids"', '"session"', '"tenant"', '"priority"', '"at"',
    '"num_prompt_tokens"', '"num_output_tokens"', '"prefix_hashes"', '"hash_block_tokens"', '"after"', '"gap"', '"id"',
    '"program"', '"conversations"', '"from"', '"human"', '"gpt"', '"value"', '"RequestArrived"', '"RequestFinished"',
    '"rota-trace"', '"rota-journal"', "TIMESTAMP,ContextTokens,GeneratedTokens", "+00:00", "Z", "\\ud800", "1e999",
    "NaN", "-0", "9223372036854775808", "18446744073709551616", "2147483648", "quantiles", "[arrivals]", "[[sessions]]",
    "0.5", "\r\n", ",,", "[[", "]]", "{}", "\0", "\ufeff", "☺", "2024-02-29 23:59:60", "0001-01-01 00:00:00",
)  # fmt: skip
SYNTHETIC = """num_requests = 5
length_correlation = 0.5
[arrivals]
rate = 5.0
batch = {quantiles = {"0" = 1, "1" = 3}}
windows = {seconds = 60.0, weights = [1.0, 0.5]}
[prompt]
quantiles = {"0" = 8, "1" = 160}
[output]
quantiles = {"0" = 1, "1" = 4}
[[sessions]]
turns = {quantiles = {"0" = 1, "1" = 3}}
wait_seconds = {quantiles = {"0" = 0.0, "1" = 3.0}}
new_tokens = {quantiles = {"0" = 1, "1" = 30}}
"""


def import_readers() -> Any:
    """The readers, and everything that judges what they read."""
    from types import SimpleNamespace

    from rota.base.errors import ConfigError, DataError
    from rota.base.instant import Instant
    from rota.base.random_streams import RandomStreams
    from rota.serving.workload import formats
    from rota.serving.workload.arrivals import to_request
    from rota.serving.workload.followers import ArrivalFlow
    from rota.serving.workload.formats.leniency import Leniency
    from rota.serving.workload.formats.rota import OrderRule, RotaFormat, problem_of

    for name in formats.FORMATS.names():
        formats.FORMATS.load(name)
    return SimpleNamespace(
        ConfigError=ConfigError,
        DataError=DataError,
        Instant=Instant,
        RandomStreams=RandomStreams,
        formats=formats,
        to_request=to_request,
        ArrivalFlow=ArrivalFlow,
        Leniency=Leniency,
        OrderRule=OrderRule,
        RotaFormat=RotaFormat,
        problem_of=problem_of,
    )


def inputs(folder: Path) -> list[bytes]:
    """A good file of every format, for every way to let things pass."""
    from tests.unit.workload.samples import TEXTS, journal_bytes

    names = READERS.formats.FORMATS.names()
    files = [
        (name.split(" 2024")[0].split(" with")[0].replace(" ", "_"), text.encode()) for name, text in TEXTS.items()
    ]
    files += [
        ("synthetic", SYNTHETIC.encode()),
        ("journal", b"\n".join(journal_bytes(folder).split(b"\n")[:40]) + b"\n"),
    ]
    path = folder / "parquet"
    rows = [each for name, text in files if name == "rota" for each in read(name, text, 0)]
    READERS.formats.writer_of("parquet").write(path, rows)
    files.append(("parquet", path.read_bytes()))
    return [bytes([names.index(name) + len(names) * way]) + content for name, content in files for way in range(3)]


def leniency(way: int) -> Any:
    """What is let pass in one of three ways."""
    options: tuple[dict[str, Any], ...] = (
        {},
        {"zero": "one", "skip_unfinished": True},
        {"zero": "skip", "is_unsorted": True, "skip_unfinished": True},
    )
    return READERS.Leniency(**options[way % 3])


def read(name: str, content: bytes, way: int) -> list[Any]:
    """The first rows of a file. Raises the errors for bad input."""
    FILE.write_bytes(content)
    rows = READERS.formats.read_trace(FILE, READERS.RandomStreams(0), format_name=name, leniency=leniency(way))
    return list(islice(rows, MAX_ROWS))


def check(data: bytes) -> None:
    """Raise if a reader does with an input what no reader may."""
    if not data:
        return
    names = READERS.formats.FORMATS.names()
    name, way = names[data[0] % len(names)], data[0] // len(names) % 3
    content = data[1:]
    try:
        rows = read(name, content, way)
        READERS.formats.recognise(FILE)
    except READERS.DataError as error:
        refuse(error, rf"{re.escape(str(FILE))}:\d+:\d+: .")
    except READERS.ConfigError as error:
        # Descriptions are configuration: their spot is a line and a key, and some errors are of the whole file.
        refuse(error, rf"{re.escape(str(FILE))}(:\d+)?(:\d+)?: .")
        assert name == "synthetic", f"{name}: {error!r}"
    else:
        judge(rows, is_sorted=not leniency(way).is_unsorted)


def refuse(error: Any, expected: str) -> None:
    """Raise unless an error for bad input names its spot, in a few words that can be printed."""
    assert re.match(expected, error.message), f"an error without its spot: {error.message!r}"
    error.message.encode()
    assert len(error.message) < 1_000, f"an error of {len(error.message)} characters"


def judge(rows: Sequence[Any], *, is_sorted: bool) -> None:
    """Whatever was read keeps the rules, can be played, and comes back from Rota's own format."""
    rule = READERS.OrderRule(is_unsorted=not is_sorted)
    for arrival in rows:
        problem = READERS.problem_of(arrival) or rule.problem_of(arrival)
        assert problem is None, f"{problem} in {arrival!r:.300}"

    def build(arrival: Any, number: int, at: Any) -> Any:
        size = 16 if arrival.hash_block_tokens % 16 == 0 else None
        return READERS.to_request(
            arrival, f"r-{number}", READERS.Instant(0), max_model_len=2**20, block_size=size, arrived_at=at
        )

    flow = READERS.ArrivalFlow(rows, build)
    waiting = [request for request, _ in flow]
    num_played = 0
    while waiting:
        request = waiting.pop()
        num_played += 1
        waiting += [follower for follower, _ in flow.ended(request.id, request.arrived_at)]
    assert num_played == len(rows), f"{num_played} of {len(rows)} rows came"
    if rows and is_sorted:
        READERS.RotaFormat().write(FILE, rows)
        assert list(READERS.RotaFormat().read(FILE)) == list(rows), "the rows come back changed"


# --- blind ------------------------------------------------------------------------------------------------------------


def mutated(seeds: Sequence[bytes], draw: random.Random) -> bytes:
    """A seed with a few things done to it."""
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(1, len(data) + 1)
        kind = draw.randrange(7)
        if kind == 0:
            data[place : place + draw.randint(1, 8)] = b""
        elif kind == 1:
            data[place:place] = draw.choice(WORDS).encode()
        elif kind == 2:
            data[place : place + 1] = bytes([draw.randrange(256)])
        elif kind == 3:
            data[place : place + 1] = draw.choice([b"0", b"9", b"-", b".", b",", b'"', b"\n", b"[", b"}", b"e"])
        elif kind == 4:
            del data[place:]
        elif kind == 5:
            end = data.find(b"\n", place) + 1 or len(data)
            data[place:place] = data[place:end]
        else:
            other = draw.choice(seeds)
            data[place:] = other[draw.randrange(1, len(other) + 1) :]
    return bytes(data)


def fuzz_blindly(num_runs: int, seed: int, seeds: Sequence[bytes]) -> Iterator[bytes]:
    """Check mutated seeds, the same for the same seed; yields each input after it was found to be harmless."""
    draw = random.Random(seed)
    for number in range(num_runs):
        data = seeds[number] if number < len(seeds) else mutated(seeds, draw)
        try:
            check(data)
        except Exception as error:
            error.add_note(f"run {number}, input {data!r:.2000}")
            raise
        yield data


# --- what was reached -------------------------------------------------------------------------------------------------


def executable(code: CodeType) -> set[int]:
    """Lines of functions that can run; those of modules and classes ran on import."""
    found: set[int] = set()
    if code.co_flags & 0x02:  # CO_OPTIMIZED: the body of a function
        found = {line for _, _, line in code.co_lines() if line is not None and line > code.co_firstlineno}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            found |= executable(inner)
    return found


def reached(data: Sequence[bytes]) -> dict[str, tuple[int, int]]:
    """Lines of each reader's file that the inputs run, and how many there are."""
    folder = str(ROOT / "src" / "rota" / "serving" / "workload" / "formats")
    ran: dict[str, set[int]] = {}

    def trace(frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(folder):
            return None
        if event == "line":
            ran.setdefault(frame.f_code.co_filename, set()).add(frame.f_lineno)
        return trace

    for each in data:
        sys.settrace(trace)
        try:
            check(each)
        finally:
            sys.settrace(None)
    found = {}
    for path in sorted(Path(folder).glob("*.py")):
        lines = executable(compile(path.read_text(encoding="utf-8"), str(path), "exec"))
        # Writers are not readers.
        lines &= readers_lines(path)
        if lines:
            found[path.stem] = (len(lines & ran.get(str(path), set())), len(lines))
    return found


def readers_lines(path: Path) -> set[int]:
    """Lines outside functions and classes that write."""
    import ast

    tree = ast.parse(path.read_text(encoding="utf-8"))
    lines = set(range(1, len(path.read_text(encoding="utf-8").splitlines()) + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and re.match(
            r"_?(write|[Ww]rit)|_check_writable|_stamp", node.name
        ):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def report(num_runs: int, data: Sequence[bytes]) -> None:
    """Say how much was looked at."""
    found = reached(data)
    total = [sum(each[index] for each in found.values()) for index in (0, 1)]
    said = {
        "runs": num_runs,
        "findings": 0,
        "inputs_kept": len(data),
        "lines_reached": round(total[0] / total[1], 4),
        "lines_by_file": {name: f"{ran} of {lines}" for name, (ran, lines) in found.items()},
    }
    sys.stdout.write(json.dumps(said, indent=2) + "\n")


def main() -> None:
    """Look as the command line says."""
    global READERS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="how long to look, with atheris")
    parser.add_argument("--corpus", type=Path, help="folder that keeps inputs from run to run")
    parser.add_argument("--blind", action="store_true", help="mutate without looking at coverage")
    parser.add_argument("--runs", type=int, default=20_000, help="how many inputs, blindly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count-lines", action="store_true", help="count the lines that the corpus reaches, and stop")
    options = parser.parse_args()
    is_guided = atheris is not None and not options.blind
    if is_guided:
        with atheris.instrument_imports(include=["rota.serving.workload", "rota.base.config"]):
            READERS = import_readers()
    else:
        READERS = import_readers()
    seeds = inputs(FOLDER)
    if options.count_lines:
        report(0, [*seeds, *(path.read_bytes() for path in sorted(options.corpus.iterdir()))])
    elif not is_guided:
        kept = list(fuzz_blindly(options.runs, options.seed, seeds))
        report(len(kept), kept[:: max(1, len(kept) // 2_000)])
    else:
        corpus = options.corpus or FOLDER / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(seeds):
            (corpus / f"seed-{number}").write_bytes(seed)
        words = FOLDER / "words"
        quoted = ("".join(f"\\x{byte:02x}" for byte in word.encode()) for word in WORDS)
        words.write_text("".join(f'"{word}"\n' for word in quoted))
        atheris.Setup(
            [sys.argv[0], f"-max_total_time={options.seconds}", f"-seed={options.seed + 1}", f"-dict={words}",
             f"-max_len={MAX_INPUT_BYTES}", "-timeout=300", "-rss_limit_mb=3000", "-print_final_stats=1",
             f"-artifact_prefix={corpus.parent}/", str(corpus)],
            check,
        )  # fmt: skip
        atheris.Fuzz()


_KEPT = tempfile.TemporaryDirectory(prefix="rota-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
FOLDER = Path(_KEPT.name)
FILE = FOLDER / "input"
READERS: Any = None
"""What `import_readers` gave; set before anything is checked."""

if __name__ == "__main__":
    main()
