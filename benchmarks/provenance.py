"""Where the figures of a benchmark that simulates come from, as its result file says it."""

import os
import platform
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rota import __version__


def of_simulated(command: str, began: float, seeds: Sequence[int], note: str) -> dict[str, Any]:
    """`began` is `time.process_time()` at its beginning."""
    return {
        "command": command,
        "rota": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu_seconds": round(time.process_time() - began, 1),
        "seeds": list(seeds),
        "note": note,
    }
