"""For which lengths it pays to decode elsewhere: a table that the simulator made (`benchmarks/heat_map.py`)."""

from bisect import bisect_left
from collections.abc import Sequence
from importlib.resources import files
from math import log2
from pathlib import Path

import msgspec

from rota.base.errors import ConfigError, DataError
from rota.base.nearest import did_you_mean

SHIPPED = files("rota") / "data" / "heat_maps"


class HeatMap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Gains by length of the prompt, by output tokens for each of its tokens, and by load."""

    source: str
    """Model, accelerator, fleets and versions that it was made with."""
    prompt_tokens: tuple[int, ...]
    ratios: tuple[float, ...]
    """Output tokens for each prompt token."""
    loads: tuple[float, ...]
    """Shares of what the fleet that does both at every instance can take."""
    gains: tuple[tuple[tuple[float, ...], ...], ...]
    """Mean time of a request together / apart - 1, by prompt length, ratio and load: above 0 where apart is faster."""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "ratios", "loads"):
            values = getattr(self, name)
            if not values or values[0] <= 0 or list(values) != sorted(set(values)):
                raise ValueError(f"{name} must rise, from above 0")
        shape = {(len(rows), len(cell)) for rows in self.gains for cell in rows}
        if len(self.gains) != len(self.prompt_tokens) or shape != {(len(self.ratios), len(self.loads))}:
            raise ValueError("gains must have a cell for each prompt length and ratio, with a number for each load")

    def gain(self, num_prompt_tokens: int, num_output_tokens: int) -> float:
        """The gains of the nearest cell (by factors), added up over all loads."""
        row = _nearest(self.prompt_tokens, num_prompt_tokens)
        column = _nearest(self.ratios, num_output_tokens / num_prompt_tokens)
        return sum(self.gains[row][column])


def load_heat_map(name: str) -> HeatMap:
    """One that is shipped, or the path of a JSON file. Raises `ConfigError` for a name that is not known, and
    `DataError` for a file that is no heat map."""
    known = sorted(entry.name.removesuffix(".json") for entry in SHIPPED.iterdir() if entry.name.endswith(".json"))
    if name not in known and not name.endswith(".json"):
        raise ConfigError(f"unknown heat map {name!r}", hint=did_you_mean(name, known))
    try:
        data = (SHIPPED / f"{name}.json" if name in known else Path(name)).read_bytes()
        return msgspec.json.decode(data, type=HeatMap)
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from None
    except msgspec.DecodeError as error:
        raise DataError(f"{name}: not a heat map: {error}") from None


def _nearest(values: Sequence[float], wanted: float) -> int:
    """The place of the value that is the least factor away; of two, the lower one."""
    right = bisect_left(values, wanted)
    places = [place for place in (right - 1, right) if 0 <= place < len(values)]
    return min(places, key=lambda place: abs(log2(values[place] / wanted)))
