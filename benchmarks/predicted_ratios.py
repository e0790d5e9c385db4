"""Did the simulator predict what was measured live? The ratios of `priority_live.py` and `abusive_tenant.py`, simulated
beside live, with step times that were fitted to another load.

    python benchmarks/predicted_ratios.py > result.json                    # calibrates first: two engines for minutes
    python benchmarks/predicted_ratios.py --profiles FOLDER > result.json  # with profiles that it left in FOLDER

Two engines are calibrated at once, each on its core, since that is how they run in the benchmarks; for each dtype that
these used. The simulated requests are those of the live runs: the same moments, prompts of as many tokens by the
model's own tokenizer, answers of the lengths that were asked for. Each ratio is of two arms of one run, and so is its
prediction; what both arms have in common drops out.

Not simulated: engines behind vllm-router, whose dispatch is not ours. `fair_at_the_router` has stock engines live; the
simulator has our engines in the order of the router's queue, which hands them no more than they run at once, so that
they have nothing to put in order."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import abusive_tenant
import priority_live

from rota import __version__
from rota.base.config import parse_toml
from rota.base.instant import Duration, Instant
from rota.base.random_streams import RandomStreams
from rota.cli.load_facts import lengths
from rota.serving.api import EngineView, InOrder, Pool
from rota.serving.assemble import SystemConfig
from rota.serving.bench.plan import LoadClass, Mix, Planned, at_rate, bounded
from rota.serving.bench.prompts import Prompts
from rota.serving.engines.model_package import prepare_model
from rota.serving.metrics.definitions import RequestRecord, distribution_ms
from rota.serving.model.instance import InstanceId, InstanceSpec
from rota.serving.model.request import Request, RequestId, TenantId
from rota.serving.policies.order.strict_priority import StrictPriority
from rota.serving.predictors.step_time.profiles import Profile, load_profile
from rota.serving.sim.cluster import SimulatedCluster, WorldOptions
from rota.serving.stack import StackConfig

RESULTS = Path(__file__).parent / "results"
DATES = "%Y-%m-%d"
PRIORITY_STACKS = {
    "vllm_fcfs": priority_live.STACKS["fcfs.toml"],
    "vllm_priority": f'order = "{Path(__file__).stem}:WithoutDisplacing"\n',
    "rota_fcfs": priority_live.STACKS["fcfs.toml"],
    "rota_strict_priority": priority_live.STACKS["strict_priority.toml"],
    "rota_strict_priority_short_steps": priority_live.STACKS["short_steps.toml"],
}
ABUSIVE = ("abusive_tenant", "abusive_tenant_overload_ours")
ALONE = " alone"
CORES = ("0", "1")


class WithoutDisplacing(StrictPriority):
    """vLLM's own `priority`: it puts the queue in order, and displaces nobody who runs."""

    displacing = False
    running_order = "admission"

    def open(self, view: EngineView, pool: Pool) -> InOrder:
        return super().open(view, pool) if pool is Pool.WAITING else InOrder(view.running)


@dataclass(frozen=True, slots=True)
class Known:
    """A request as the live run had it."""

    planned: Planned
    num_prompt_tokens: int
    tenant: str = "default"


@dataclass(frozen=True, slots=True)
class Arm:
    """What is simulated, and what was measured."""

    stack: str
    requests: Sequence[Known]
    live: dict[str, float]


@dataclass(frozen=True, slots=True)
class Run:
    """One live run."""

    name: str
    dtype: str
    max_num_seqs: int
    arms: dict[str, Arm]
    figures: Any
    """From records to figures, by the names that the live ones have."""
    ratios: Sequence[tuple[str, str, str]]
    """A figure, the arm above the line and the arm below it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", type=Path, help="a folder with the profiles of an earlier calibration")
    parser.add_argument("--keep-profiles", type=Path, default=Path("profiles"), help="where new ones are left")
    parser.add_argument("--seconds", type=float, default=150.0, help="of each calibration's load")
    parser.add_argument("--priority", type=Path, default=RESULTS / "priority_live.json")
    parser.add_argument("--fairness", type=Path, nargs="*", default=[RESULTS / f"{name}.json" for name in ABUSIVE])
    options = parser.parse_args()
    runs = [priority_run(options.priority), *map(fairness_run, options.fairness)]
    folder = options.profiles or options.keep_profiles
    if options.profiles is None:
        folder.mkdir(parents=True, exist_ok=True)
        for dtype, max_num_seqs in sorted({(run.dtype, run.max_num_seqs) for run in runs}):
            calibrate(folder, dtype, max_num_seqs, options.seconds)
    found = {run.name: compared(run, profiles_of(folder, run.dtype)) for run in runs}
    for name, each in found.items():
        say(name, each["ratios"])
    print(json.dumps({"runs": found, "provenance": provenance(folder, runs)}, indent=2))


# --- step times -------------------------------------------------------------------------------------------------------


def calibrate(folder: Path, dtype: str, max_num_seqs: int, seconds: float) -> None:
    """Both engines at once, each under a load of its own: neither had the machine to itself in the live runs."""
    rota = str(Path(sys.executable).with_name("rota"))
    running = []
    for core in CORES:
        words = [rota, "calibrate", "--engine", "vllm", "--cores", core, "--duration", str(seconds), "--seed", core]
        words += ["--engine-option", f"dtype={dtype}", "--engine-option", f"max_num_seqs={max_num_seqs}"]
        running.append(
            # Its report is for reading; stdout is for the result.
            subprocess.Popen([*words, "--output", str(profile_path(folder, dtype, core))], stdout=sys.stderr)
        )
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit("an engine could not be calibrated")


def profile_path(folder: Path, dtype: str, core: str) -> Path:
    return folder / f"{dtype}-{core}.toml"


def profiles_of(folder: Path, dtype: str) -> list[Profile]:
    return [load_profile(str(profile_path(folder, dtype, core))) for core in CORES]


# --- what was sent ----------------------------------------------------------------------------------------------------


def priority_run(path: Path) -> Run:
    found = json.loads(path.read_text())
    options = argparse.Namespace(**found["provenance"]["options"])
    # The live prompts were cut to so many tokens, by the model's tokenizer.
    everybody = [Known(each, each.num_prompt_tokens) for each in priority_live.plan_of(options)]
    high = [each for each in everybody if each.planned.class_name == priority_live.HIGH]
    arms, ratios = {}, []
    for name, live in found["results"].items():
        stack = PRIORITY_STACKS[name].format(options.chunk_size)
        arms[name] = Arm(stack, everybody, flat(live))
        if "alone" in live:
            arms[name + ALONE] = Arm(stack, high, flat(live["alone"]))
            ratios += [(f"high_ttft_ms {which}", name, name + ALONE) for which in ("mean", "p99")]
            others = [other for other in found["results"] if other not in priority_live.HAVE_IT_TO_THEMSELVES]
            ratios += [(f"high_ttft_ms {which}", other, name) for other in others for which in ("mean", "p99")]
            ratios += [("low_ttft_ms p99", name, other) for other in others]
            ratios += [("output_tokens_per_second", name, other) for other in others]
    return Run(path.stem, options.dtype, options.max_num_seqs, arms, priority_figures, ratios)


def fairness_run(path: Path) -> Run:
    found = json.loads(path.read_text())
    options = argparse.Namespace(**found["provenance"]["options"])
    requests = abusive_requests(options)
    arms = {
        name: Arm(abusive_tenant.OURS[name][0].format(max_num_seqs=options.max_num_seqs), requests, flat(live))
        for name, live in found["results"].items()
        if name in abusive_tenant.OURS
    }
    figures = [f"small_{what} {which}" for what in ("ttft_ms", "e2e_ms") for which in ("mean", "p99")]
    ratios = []
    for arm in (arm for arm in arms if arm != "rota_fcfs"):
        ratios += [(figure, "rota_fcfs", arm) for figure in figures]
        ratios.append(("output_tokens_per_second", arm, "rota_fcfs"))
    return Run(path.stem, "bfloat16", options.max_num_seqs, arms, fairness_figures, ratios)


def abusive_requests(options: argparse.Namespace) -> list[Known]:
    """What `rota bench` sends for each tenant, as its chat template makes tokens of it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepare_model())
    known = []
    for number, tenant in enumerate((*abusive_tenant.SMALL, abusive_tenant.GREEDY)):
        is_small = tenant in abusive_tenant.SMALL
        rate = options.rate * (1 if is_small else options.times * len(abusive_tenant.SMALL))
        streams = RandomStreams(options.seed + number)
        plan = at_rate(
            rate,
            1.0,
            lengths("--prompt-tokens", options.small_prompt if is_small else options.greedy_prompt),
            lengths("--max-tokens", options.max_tokens),
            Mix([LoadClass()], [], streams),
            streams,
        )
        prompts = Prompts(streams)
        for each in bounded(plan, num_requests=max(1, round(rate * options.seconds)), duration=None):
            text = prompts.text(each.index, each.num_prompt_tokens)
            chat = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
            )
            known.append(Known(each, len(chat["input_ids"]), tenant))
    return sorted(known, key=lambda each: each.planned.at)


def flat(live: dict[str, Any]) -> dict[str, float]:
    """The figures of one arm, by one name each."""
    figures = {"output_tokens_per_second": live["output_tokens_per_second"]}
    for name, value in live.items():
        if name.endswith(("ttft_ms", "e2e_ms")):
            figures |= {f"{name} {which}": value[which] for which in ("mean", "p99")}
    return figures


# --- simulated --------------------------------------------------------------------------------------------------------


def simulated(arm: Arm, profiles: Sequence[Profile]) -> list[RequestRecord]:
    specs = [
        InstanceSpec(InstanceId(f"i{core}"), profile.instance_limits())
        for core, profile in zip(CORES, profiles, strict=True)
    ]
    # What lies between steps, and between a client and the steps, is a constant of the world.
    overhead = sum(profile.step_overhead() for profile in profiles) // len(profiles)
    front_end = sum(profile.front_end() for profile in profiles) // len(profiles)
    cluster = SimulatedCluster(
        SystemConfig(stack=parse_toml(arm.stack, StackConfig, "stack"), instances=tuple(specs)),
        [(request_of(number, each), each.planned.max_tokens) for number, each in enumerate(arm.requests)],
        profiles[0].predictor(),
        WorldOptions(step_overhead=Duration(overhead), front_end=Duration(front_end)),
        step_times={spec.id: profile.predictor() for spec, profile in zip(specs, profiles, strict=True)},
    )
    cluster.run()
    return cluster.records


def request_of(number: int, known: Known) -> Request:
    """As the router is told of it: clients declare what they want, and get that."""
    return Request(
        id=RequestId(f"r{number:04}"),
        arrived_at=Instant(known.planned.at),
        num_prompt_tokens=known.num_prompt_tokens,
        max_tokens=known.planned.max_tokens,
        priority=known.planned.priority,
        tenant=TenantId(known.tenant),
    )


def priority_figures(records: Sequence[RequestRecord]) -> dict[str, float]:
    figures = {"output_tokens_per_second": tokens_per_second(records)}
    for name, priority in ((priority_live.HIGH, -1), (priority_live.LOW, 0)):
        figures |= latencies(name, [each for each in records if each.priority == priority])
    return figures


def fairness_figures(records: Sequence[RequestRecord]) -> dict[str, float]:
    """Of the small tenants the worst p99 and the mean, as `abusive_tenant.py` has it."""
    small = [[each for each in records if each.tenant == tenant] for tenant in abusive_tenant.SMALL]
    of_each = [latencies("small", each) for each in small]
    of_all = latencies("small", [each for part in small for each in part])
    worst = {name: max(each[name] for each in of_each) for name in of_all if name.endswith("p99")}
    return {"output_tokens_per_second": tokens_per_second(records), **of_all, **worst}


def latencies(name: str, records: Sequence[RequestRecord]) -> dict[str, float]:
    if not records:
        return {}
    found = {}
    for what, distribution in (
        ("ttft_ms", distribution_ms([first_token_at(each) - each.arrived_at for each in records])),
        ("e2e_ms", distribution_ms([each.finished_at - each.arrived_at for each in records])),
    ):
        found |= {f"{name}_{what} {which}": getattr(distribution, which) for which in ("mean", "p99")}
    return found


def first_token_at(record: RequestRecord) -> Instant:
    assert record.first_token_at is not None, record
    return record.first_token_at


def tokens_per_second(records: Sequence[RequestRecord]) -> float:
    span = max(each.finished_at for each in records) - min(each.arrived_at for each in records)
    return 1e9 * sum(each.num_output_tokens for each in records) / span


# --- compared ---------------------------------------------------------------------------------------------------------


def compared(run: Run, profiles: Sequence[Profile]) -> dict[str, Any]:
    guessed = {name: run.figures(simulated(arm, profiles)) for name, arm in run.arms.items()}
    ratios = []
    for figure, above, below in run.ratios:
        live = run.arms[above].live[figure] / run.arms[below].live[figure]
        predicted = guessed[above][figure] / guessed[below][figure]
        ratios.append(
            {
                "figure": figure,
                "of": f"{above} / {below}",
                "live": live,
                "simulated": predicted,
                "off_by": predicted / live - 1,
            }
        )
    figures = {
        name: {
            figure: {"live": value, "simulated": guessed[name][figure], "off_by": guessed[name][figure] / value - 1}
            for figure, value in arm.live.items()
            if figure in guessed[name]
        }
        for name, arm in run.arms.items()
    }
    return {"ratios": ratios, "figures": figures}


def say(name: str, ratios: Sequence[dict[str, Any]]) -> None:
    lines = [f"{name}: {'':<72} {'live':>9} {'simulated':>9} {'off by':>8}"]
    for each in ratios:
        what = f"{each['figure']}, {each['of']}"
        lines.append(f"  {what:<88} {each['live']:>9.2f} {each['simulated']:>9.2f} {each['off_by']:>+8.0%}")
    print("\n".join(lines), file=sys.stderr, flush=True)


def provenance(folder: Path, runs: Sequence[Run]) -> dict[str, Any]:
    calibrated = {}
    for dtype in sorted({run.dtype for run in runs}):
        for core, profile in zip(CORES, profiles_of(folder, dtype), strict=True):
            assert profile.calibration is not None
            errors = profile.calibration.errors[0]
            calibrated[f"{dtype}, core {core}"] = {
                "engine": profile.calibration.engine,
                "date": profile.calibration.date,
                "num_steps": profile.calibration.num_steps,
                "held_out_mape": errors.mape,
                "held_out_bias": errors.bias,
                "noise": profile.calibration.noise,
                "cpu_mape": profile.calibration.cpu_mape,
            }
    return {"rota": __version__, "simulated_at": time.strftime(DATES), "calibrated": calibrated}


if __name__ == "__main__":
    main()
