"""`rota export`: a journal for other eyes."""

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from rota.base.errors import ConfigError
from rota.base.provenance import provenance
from rota.cli.flags import Json, writing
from rota.cli.journals import open_journal
from rota.cli.output import print_json, say
from rota.export.csv import write_timeline_csv
from rota.export.perfetto import write_perfetto
from rota.serving.timelines import timeline_of


def export(
    journal: Annotated[Path, typer.Argument(metavar="JOURNAL", help="A journal file.")],
    perfetto: Annotated[
        Path | None, typer.Option("--perfetto", metavar="FILE", help="Write a trace that ui.perfetto.dev opens.")
    ] = None,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write one row an item.")] = None,
    json: Json = False,
) -> None:
    """Turn a journal into a Perfetto trace or a CSV file, or both.

    An instance is a process: its steps are spans, its requests are spans that may cross, its free blocks are a counter,
    and every decision is a mark with its reason.
    """
    if perfetto is None and csv is None:
        raise ConfigError("--perfetto or --csv: one of them is needed", hint="rota export JOURNAL --perfetto run.json")
    file = open_journal(journal)
    timeline = timeline_of(file)
    digest = file.end.digest if file.end else None
    made_by = provenance(seed=file.header.seed, config_hash=file.header.config_hash, journal_digest=digest)
    if perfetto is not None:
        with writing("--perfetto", perfetto):
            write_perfetto(timeline, perfetto, msgspec.to_builtins(made_by))
    if csv is not None:
        with writing("--csv", csv):
            write_timeline_csv(timeline, csv)
    written = {"perfetto": perfetto, "csv": csv}
    if json:
        paths = {name: str(path) if path is not None else None for name, path in written.items()}
        print_json({**paths, "num_items": len(timeline), "resources": timeline.resources()})
    for path in written.values():
        if path is not None:
            say(f"wrote {path}: {len(timeline):,} items")
