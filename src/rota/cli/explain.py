"""`rota explain`: why a request ran where and when it did."""

from pathlib import Path
from typing import Annotated

import typer

from rota.cli.flags import Json
from rota.cli.journals import open_journal
from rota.cli.output import print_json, print_lines
from rota.serving.explain import explain as story_of


def explain(
    journal: Annotated[Path, typer.Argument(metavar="JOURNAL", help="A journal file.")],
    request: Annotated[str, typer.Argument(metavar="REQUEST", help="The id of a request in it.")],
    json: Json = False,
) -> None:
    """Say why a request ran where and when it did.

    Told from the journal alone: who decided what and for which reason, how long the request waited and what held it,
    who displaced it, and how it ended. Times count from its arrival.
    """
    story = story_of(open_journal(journal), request)
    if json:
        print_json(story)
    else:
        print_lines(story.lines())
