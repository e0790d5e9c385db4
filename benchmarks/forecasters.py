"""How well demand predictors tell what comes, on the Azure day of `scaling.py`, and what that is worth.

    pip install 'rota[forecast,neural]'
    nice python benchmarks/forecasters.py    # under ten CPU minutes; writes benchmarks/results/forecasters.json

Bins of 30 s; two days are known before the third is forecast, at every fourth bin. The error of a forecast is the mean
of the absolute errors of the six bins after it, as a share of the day's mean. `last_value` is the control: what no
forecaster should be worse than. Then the network scales the fleet, as the others do in `scaling.py`: instance-seconds
and promises kept. The network is trained once, after two days, for 100 steps; its threads stall each other on a shared
machine: OMP_NUM_THREADS=1.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from scaling import BIN, DAY, Arm, Load, loads, provenance, run

from rota.base.instant import seconds
from rota.serving.predictors.demand import DEMAND

RESULTS = Path(__file__).parent / "results" / "forecasters.json"
NUM_AHEAD = 6
EVERY = 4
SEASON = round(DAY / BIN)
NEURAL = {"train_after_bins": 2 * SEASON, "refit_every": 0, "look_back_bins": SEASON, "horizon_bins": 24,
          "num_steps": 100}  # fmt: skip
PREDICTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "holt_winters": ("holt_winters", {"season_bins": SEASON}),
    "seasonal_naive": ("seasonal_naive", {"season_bins": SEASON}),
    "TimeMixer": ("neural", {**NEURAL, "network": "TimeMixer"}),
}


class Predictor(Protocol):
    def forecast(self, history: Sequence[float], num_ahead: int) -> Sequence[float]: ...


class LastValue:
    """It stays as it was."""

    def forecast(self, history: Sequence[float], num_ahead: int) -> Sequence[float]:
        return [history[-1]] * num_ahead


def counts(load: Load) -> list[float]:
    """Arrivals in each bin of all days."""
    found = [0.0] * round(load.num_days * DAY / BIN)
    for at, _ in load.arrivals:
        found[at // seconds(BIN)] += 1
    return found


def errors(predictor: Predictor, series: Sequence[float]) -> dict[str, Any]:
    """Over the last day: how far off, and what it took."""
    first = len(series) - SEASON
    mean = sum(series[first:]) / SEASON
    began = time.process_time()
    predictor.forecast(series[:first], NUM_AHEAD)
    fitted = time.process_time() - began
    off = []
    began = time.process_time()
    for now in range(first, len(series) - NUM_AHEAD, EVERY):
        told = predictor.forecast(series[:now], NUM_AHEAD)
        off.append(sum(abs(a - b) for a, b in zip(told, series[now:], strict=False)) / NUM_AHEAD / mean)
    took = time.process_time() - began
    off.sort()
    return {
        "error_mean": round(sum(off) / len(off), 4),
        "error_p95": round(off[int(0.95 * len(off))], 4),
        "fit_cpu_seconds": round(fitted, 2),
        "forecast_cpu_ms": round(1e3 * took / len(off), 2),
    }


def main() -> None:
    began = time.process_time()
    load = loads()["azure"]
    series = counts(load)
    found: dict[str, Any] = {"last_value": errors(LastValue(), series)}

    def keep(name: str) -> None:
        print(name, found[name], flush=True)
        told = provenance("azure", began) | {"command": "python benchmarks/forecasters.py"}
        RESULTS.write_text(json.dumps({"provenance": told, "results": found}, indent=1) + "\n")

    keep("last_value")
    for name, (demand, parameters) in PREDICTORS.items():
        found[name] = errors(DEMAND.create(demand, parameters, where=name), series)
        keep(name)
    name = "TimeMixer"
    demand, parameters = PREDICTORS[name]
    arm = Arm(
        "forecast",
        f"0.8/s, {name}",
        "forecast",
        {"rate_per_instance": 0.8, "bin_seconds": BIN, "shrink_after_seconds": 120.0},
        demand,
        parameters,
        needs_history=True,
    )
    found[name]["fleet"] = run(load, arm)
    keep(name)


if __name__ == "__main__":
    main()
