"""A synthetic workload as a TOML file: `num_requests`, `[arrivals]`, `[prompt]`, `[output]`, `[prefix]`, `[[classes]]`.

num_requests = 10000
[arrivals]
rate = 6.0                                              # requests a second
cv = 1.0                                                # 1 is Poisson, more is burstier
[prompt]
quantiles = {"0" = 16, "0.5" = 512, "0.9" = 2048, "1" = 4096}
[output]
quantiles = {"0" = 1, "0.5" = 128, "0.9" = 512, "1" = 1024}
[prefix]                                                # optional
num_groups = 20
num_tokens = 1024
share = 0.5
[[classes]]                                             # optional; shares are weights
share = 0.1
priority = -1
tenant = "interactive"
"""

import re
from collections.abc import Iterator
from pathlib import Path

from rota.base.config import load_toml
from rota.base.random_streams import RandomStreams
from rota.serving.workload.arrivals import Arrival
from rota.serving.workload.formats.leniency import Tally
from rota.serving.workload.generator import SyntheticWorkload, generate


class SyntheticFormat:
    """Reads a description and draws the arrivals that it describes."""

    name = "synthetic"
    first_line = "TOML with a table [arrivals]"

    def __init__(self) -> None:
        self.tally = Tally()

    def recognises(self, head: str) -> bool:
        return re.search(r"(?m)^\s*(\[\s*arrivals\s*\]|arrivals\s*=|arrivals\.)", head) is not None

    def read(self, path: Path, streams: RandomStreams) -> Iterator[Arrival]:
        """Yield the arrivals that the file describes. Raises `ConfigError` naming file, line and key if it describes
        none."""
        return generate(load_toml(path, SyntheticWorkload), streams)
