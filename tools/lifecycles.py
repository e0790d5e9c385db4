"""Print docs/lifecycles.md: the diagrams of every transition table, from the tables themselves.

python tools/lifecycles.py > docs/lifecycles.md
"""

import sys

from rota.base.table import TransitionTable
from rota.serving.cluster.lifecycles import INSTANCE_LIFECYCLE, MEMBER_LIFECYCLE, MIGRATION_LIFECYCLE, REQUEST_LIFECYCLE
from rota.serving.instance.sequence import SEQUENCE

TABLES: tuple[tuple[TransitionTable, str], ...] = (
    (REQUEST_LIFECYCLE, "A request at the router, from arrival to its one end."),
    (SEQUENCE, "A request's life on one instance."),
    (INSTANCE_LIFECYCLE, "An instance as the router sees it."),
    (MEMBER_LIFECYCLE, "An instance of a fleet that is scaled, whatever requests it has."),
    (
        MIGRATION_LIFECYCLE,
        "A request on its way to another instance. Its source owns it in every state but `committed`.",
    ),
)


def page() -> str:
    """The whole page."""
    parts = [
        "# Lifecycles\n\n"
        "Generated from the transition tables in the code (`python tools/lifecycles.py`). A move that no table\n"
        "lists raises `IllegalMove`.\n"
    ]
    for table, sentence in TABLES:
        parts.append(f"## {table.name.capitalize()}\n\n{sentence}\n\n```mermaid\n{table.diagram().strip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page())
