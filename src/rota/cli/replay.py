"""`rota replay`: do fresh machines, told the same, decide the same?"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from rota import __version__
from rota.base.journal import Row
from rota.base.replay import replay as replay_rows
from rota.cli.flags import Json
from rota.cli.journals import FreshMachines, open_journal
from rota.cli.output import Progress, print_json, print_lines, warn

REPORT_EVERY = 1_000


def replay(
    journal: Annotated[Path, typer.Argument(metavar="JOURNAL", help="A journal file.")],
    json: Json = False,
) -> None:
    """Feed a journal into fresh machines and compare what they decide.

    The machines are built from the configuration in the journal's header. Prints how many rows were identical, or the
    first difference; a difference is exit code 1.
    """
    file = open_journal(journal)
    machines = FreshMachines(file)
    if file.header.rota_version != __version__:
        warn(f"{journal} was written by rota {file.header.rota_version}; this is rota {__version__}")
    num_rows = 0
    with Progress("replaying", total=None, unit="rows") as progress:

        def counted() -> Iterator[Row]:
            nonlocal num_rows
            for row in machines.rows():
                yield row
                num_rows += 1
                if num_rows % REPORT_EVERY == 0:
                    progress.reached(num_rows)

        difference = replay_rows(counted(), machines.by_name)
    is_complete = file.end is not None and file.end.end == "closed"
    if json:
        facts = None
        if difference is not None:
            facts = {
                "row": difference.seq,
                "machine": difference.machine,
                "at_ns": difference.at,
                "event": difference.event,
                "expected": difference.expected,
                "got": difference.got,
            }
        print_json(
            {
                "num_rows": num_rows,
                "is_identical": difference is None,
                "is_complete": is_complete,
                "difference": facts,
                "config_hash": file.header.config_hash,
                "journal_digest": file.end.digest if file.end else None,
                "rota_version": file.header.rota_version,
            }
        )
    elif difference is None:
        print_lines([f"{num_rows:,} rows, identical"])
    else:
        print_lines([f"{num_rows:,} rows identical, then a difference:", str(difference)])
    if difference is not None:
        raise typer.Exit(1)
    if not is_complete:
        why = "has no end mark: its writer was stopped" if file.end is None else "reached its limit of bytes"
        warn(f"{journal} {why}, so this is not the whole run")
