"""`rota trace`: describe traces, take parts of them, make more or less of them, convert them."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rota.base.errors import ConfigError
from rota.cli.flags import Json, Seed, at_least, positive, writing
from rota.cli.output import Progress, print_json, print_table, say, warn

if TYPE_CHECKING:
    from rota.serving.workload.arrivals import Arrival
    from rota.serving.workload.formats import TraceReader, TraceWriter

PROGRESS_EVERY = 4096


class ZeroLength(StrEnum):
    """What becomes of a row with a length of 0."""

    REFUSE = "refuse"
    ONE = "one"
    SKIP = "skip"


class By(StrEnum):
    """How the rate is changed."""

    COMPRESS = "compress"
    THIN = "thin"
    SUPERPOSE = "superpose"


File = Annotated[Path, typer.Argument(metavar="FILE", help="Trace file; the format is recognised from its content.")]
Out = Annotated[Path, typer.Option("--output", "-o", help="File to write, replacing what is there.")]
To = Annotated[
    str | None,
    typer.Option("--to", metavar="FORMAT", help="Format to write; that of the trace, or else rota, which holds all."),
]
Zero = Annotated[
    ZeroLength | None,
    typer.Option("--zero", help="Rows with a length of 0: refuse them, read it as 1, or leave them out."),
]
SkipUnfinished = Annotated[
    bool, typer.Option("--skip-unfinished", help="Leave out requests of a journal that never ended well.")
]


class Source:
    """A trace that can be read as often as needed, with progress; what was not taken as it is stays on record."""

    def __init__(
        self, path: Path, seed: int, zero: ZeroLength | None, skip_unfinished: bool, *, is_unsorted: bool = False
    ) -> None:
        from rota.serving.workload.formats import recognise
        from rota.serving.workload.formats.leniency import Leniency

        self.path = path
        self._seed = seed
        self._leniency = Leniency(
            zero=None if zero is None else zero.value, is_unsorted=is_unsorted, skip_unfinished=skip_unfinished
        )
        self.reader: TraceReader = recognise(path, self._leniency)

    def read(self) -> "Iterator[Arrival]":
        """The trace, from its beginning."""
        from rota.base.random_streams import RandomStreams
        from rota.serving.workload.formats import recognise

        self.reader = recognise(self.path, self._leniency)
        with Progress(f"reading {self.path.name}", total=None, unit="rows") as progress:
            for number, arrival in enumerate(self.reader.read(self.path, RandomStreams(self._seed))):
                if number % PROGRESS_EVERY == 0:
                    progress.reached(number)
                yield arrival

    @property
    def not_taken(self) -> dict[str, int]:
        """What the last reading left out or changed, and how often."""
        return dict(self.reader.tally.counts)


def describe(
    file: File,
    cache_blocks: Annotated[
        list[int] | None, typer.Option("--cache-blocks", metavar="N", help="Size of a cache for prefixes; repeatable.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report that opens offline.")] = None,
    zero: Zero = None,
    skip_unfinished: SkipUnfinished = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Say what a trace is like: how much comes when, how long it is, what it shares, what belongs together.

    Prefix hit rates are of prompt tokens, for a cache without end and for caches of some sizes in the trace's own
    blocks.
    """
    from rota.base.config import config_hash
    from rota.base.provenance import provenance
    from rota.serving.workload.description import DEFAULT_CACHE_BLOCKS, Gathering
    from rota.serving.workload.trace_report import write_trace_report

    sizes = [at_least("--cache-blocks", size, 1) for size in cache_blocks or DEFAULT_CACHE_BLOCKS]
    source = Source(file, seed, zero, skip_unfinished)
    gathering = Gathering(source.reader.name, sizes)
    for arrival in source.read():
        gathering.take(arrival)
    description = gathering.description(source.not_taken)
    if report is not None:
        with writing("--report", report):
            made_by = provenance(seed=seed, config_hash=config_hash({"trace": file.name, "cache_blocks": sizes}))
            write_trace_report(report, file.name, gathering, description, made_by)
        say(f"report: {report}")
    if json:
        print_json(description)
    else:
        _print_description(description)


def sample(
    file: File,
    output: Out,
    rows: Annotated[int | None, typer.Option("--rows", metavar="N", help="About so many rows.")] = None,
    share: Annotated[float | None, typer.Option("--share", metavar="F", help="So large a part, such as 0.1.")] = None,
    to: To = None,
    zero: Zero = None,
    skip_unfinished: SkipUnfinished = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Take a random part of a trace. Sessions and programs are taken whole or not at all; instants stay as they are,
    so that the rate falls with the number of rows. With --rows, the last session may bring some more.
    """
    from rota.serving.workload.shaping import moved_to_start, sample_rows, sample_share

    source = Source(file, seed, zero, skip_unfinished)
    if (rows is None) == (share is None):
        raise ConfigError("--rows or --share: one of them is needed", hint="such as --share 0.1")
    if rows is not None:
        taken = sample_rows(source.read, at_least("--rows", rows, 1), seed)
    else:
        taken = sample_share(source.read(), _share("--share", share), seed)
    _finish(json, [_write(source, moved_to_start(taken), "--output", output, to)])


def scale(
    file: File,
    output: Out,
    rate_factor: Annotated[float, typer.Option(metavar="F", help="So many times as many rows a second.")] = 1.0,
    by: Annotated[
        By, typer.Option(help="Compress time, thin the trace, or lay copies of it over each other.")
    ] = By.COMPRESS,
    prompt_factor: Annotated[float, typer.Option(metavar="F", help="Prompts so many times as long.")] = 1.0,
    output_factor: Annotated[float, typer.Option(metavar="F", help="Outputs so many times as long.")] = 1.0,
    to: To = None,
    zero: Zero = None,
    skip_unfinished: SkipUnfinished = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Make a trace faster or slower, and its requests longer or shorter.

    --by compress moves every arrival, keeps all rows, and makes bursts shorter. --by thin (factors below 1) drops
    sessions at random. --by superpose (factors above 1) adds copies that begin at random moments, with sessions and
    prefixes of their own: bursts add up as independent ones do. Waits of programs are not scaled by any of them.
    """
    from rota.serving.workload.retiming import scale_rate
    from rota.serving.workload.shaping import sample_share, scale_lengths, superpose

    positive("--rate-factor", rate_factor)
    source = Source(file, seed, zero, skip_unfinished)
    if by is By.THIN:
        if rate_factor > 1:
            raise ConfigError("--rate-factor: must be at most 1 with --by thin", hint="superpose makes more of a trace")
        rows = sample_share(source.read(), rate_factor, seed)
    elif by is By.SUPERPOSE:
        if rate_factor < 1:
            raise ConfigError(
                "--rate-factor: must be at least 1 with --by superpose", hint="thin makes less of a trace"
            )
        rows = superpose(source.read, rate_factor, seed)
    else:
        rows = scale_rate(source.read(), rate_factor)
    lengths = positive("--prompt-factor", prompt_factor), positive("--output-factor", output_factor)
    _finish(json, [_write(source, scale_lengths(rows, *lengths), "--output", output, to)])


def split(
    file: File,
    train: Annotated[Path, typer.Option(help="File for the first part.")],
    holdout: Annotated[Path, typer.Option(help="File for the other part.")],
    share: Annotated[float, typer.Option(metavar="F", help="How much goes to the first part.")] = 0.8,
    at_random: Annotated[
        bool, typer.Option("--at-random", help="Draw sessions for the parts, in place of cutting time in two.")
    ] = False,
    to: To = None,
    zero: Zero = None,
    skip_unfinished: SkipUnfinished = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Split a trace in two, to fit on one part and to check on the other.

    Time is cut after that share of the span; a session belongs where it begins, and the other part begins at 0 again.
    """
    from rota.serving.workload.shaping import moved_to_start, split_at_random, split_in_time

    source = Source(file, seed, zero, skip_unfinished)
    if not 0 < share < 1:
        raise ConfigError(f"--share: must be between 0 and 1, not {share:g}")
    at = 0
    if not at_random:
        last = max((arrival.at for arrival in source.read() if not arrival.after), default=0)
        at = round(share * last)
        if not at:
            raise ConfigError("--share: the trace has no span to cut", hint="--at-random draws sessions instead")
    written = []
    for flag, path, is_first in (("--train", train, True), ("--holdout", holdout, False)):
        rows: Iterable[Arrival]
        if at_random:
            rows = moved_to_start(split_at_random(source.read(), share, seed, is_first=is_first))
        else:
            rows = split_in_time(source.read(), at, is_first=is_first)
        written.append(_write(source, rows, flag, path, to))
    _finish(json, written)


def convert(
    file: File,
    output: Out,
    to: To = None,
    lossy: Annotated[bool, typer.Option("--lossy", help="Leave out what the format cannot hold, and say so.")] = False,
    sort: Annotated[bool, typer.Option("--sort", help="Put rows in order of time that are not.")] = False,
    zero: Zero = None,
    skip_unfinished: SkipUnfinished = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Write a trace in another format; in rota's own, which holds everything, unless --to names one.

    What the format cannot hold is refused, or left out with --lossy and counted. --sort holds 100,000 rows in memory
    at a time, the rest in temporary files.
    """
    from rota.serving.workload.sorting import in_order

    source = Source(file, seed, zero, skip_unfinished, is_unsorted=sort)
    rows = in_order(source.read()) if sort else source.read()
    _finish(json, [_write(source, rows, "--output", output, to or "rota", is_lossy=lossy)])


# --- writing ----------------------------------------------------------------------------------------------------------


def _share(flag: str, value: float | None) -> float:
    if value is None or not 0 < value <= 1:
        raise ConfigError(f"{flag}: must be above 0 and at most 1, not {value}")
    return value


def _write(
    source: Source, rows: "Iterable[Arrival]", flag: str, path: Path, to: str | None, *, is_lossy: bool = False
) -> dict[str, Any]:
    """Write rows to a file, all of them or none; what came of it."""
    from rota.serving.workload.conversion import Conversion
    from rota.serving.workload.formats import WRITTEN, writer_of

    # What a reader drew or made up of sessions goes on in the format that holds it.
    name = to or (source.reader.name if source.reader.name in WRITTEN else "rota")
    writer: TraceWriter = writer_of(name)
    if path.exists() and path.samefile(source.path):
        raise ConfigError(f"{flag}: {path} is the trace that is read")
    conversion = Conversion(name, writer.holds, is_lossy=is_lossy)
    with writing(flag, path), _whole(path) as part:
        num_rows = writer.write(part, conversion.fitted(rows))
    if not num_rows:
        path.unlink()
        raise ConfigError(f"{flag}: no row is left to write to {path}")
    losses = {what: count for what, count in conversion.losses.items() if count}
    return {"path": str(path), "format": name, "num_rows": num_rows, "lost": losses, "not_taken": source.not_taken}


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file beside the one to be written, which takes its place when it is complete."""
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _finish(json: bool, written: list[dict[str, Any]]) -> None:
    """Say what was written, what was lost, and what was not taken as it was."""
    if json:
        print_json(written[0] if len(written) == 1 else {"parts": written})
    else:
        print_table(("file", "format", "rows"), [(one["path"], one["format"], one["num_rows"]) for one in written])
    lost: Counter[str] = Counter()
    for one in written:
        lost.update(one["lost"])
    for what, count in lost.items():
        warn(f"{count:,} rows lost {what}")
    for what, count in written[0]["not_taken"].items():
        warn(f"{count:,} {what}")


def _print_description(description: Any) -> None:
    from rota.serving.workload.trace_report import arrival_facts, length_rows, prefix_rows

    print_table(("", ""), [("format", description.format), *arrival_facts(description).items()])
    for rows in (length_rows(description), prefix_rows(description)):
        if rows:
            print()
            print_table(list(rows[0]), [list(row.values()) for row in rows])
    for what, count in description.not_taken_as_they_are.items():
        warn(f"{count:,} {what}")
