"""What a decision of the router costs in a large fleet: a dispatch, and a round of migration.

    python benchmarks/decision_cost.py [--num-instances 64 1000] [--what decisions rounds] [--rounds R] > result.json

The policies run on the router's own views, in its own machine, with reports that tell of every sequence. A `pick` is
the call of the dispatch policy, an `arrival` the machine's whole answer, admission and accounting included; there is
one report for each, as at one request a second for each instance, which reports every second. Policies that look at
roles are also asked in a fleet of three of them, and where a request decodes. An `admit` is the call of
`deadline_admission` for a prompt of 32,000 tokens, with eight of them waiting at each instance.

The rows of `long prompts` are of prompts of 24,000 to 32,000 tokens, by blocks of 16 that the router remembers, one
dispatch policy after the other behind `bounded_queue` and one admission policy after the other before
`prefix_then_load`. There a `request` is all that the machine does for one: admission, dispatch, what it remembers of
the prompt, first token and end.

A `round` of migration is the router's question to the policy with the check of its answer, every 0.05 s: a `live` one,
where a twentieth of the instances has reported since the last; a `busy` one, where beside that a tenth of them ended a
request and got one; a `fresh` one, where all have reported. Policies read reports ahead, when they come: a `report` is
the machine's whole answer to one, an `end` to the end of a request that runs (`none` reads nothing). An `unread` round
is a fresh one of a policy that was told nothing ahead. One instance in sixteen is short of memory, with a head that
does not fit, so that there is something to plan; nothing comes of any move, so that there is as much to plan in each
round.

Counted is CPU time of the process. A figure is the median over the calls of a round, then over the rounds, beside the
lowest and the highest round, and the slowest call of all."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rota import __version__
from rota.base.instant import Instant, after, seconds
from rota.base.random_streams import Stream
from rota.serving.api import InstanceId, MigrationPolicy, QueueRules, Request, RequestId, SequenceReport, TenantId
from rota.serving.cluster.answers import ask_migration
from rota.serving.cluster.ledger import ClusterReading
from rota.serving.cluster.machine import ClusterMachine
from rota.serving.cluster.prefix_index import PrefixIndex
from rota.serving.model.events import (
    FirstTokenSeen,
    InstanceReported,
    InstanceStarted,
    RequestArrived,
    RequestFinished,
)
from rota.serving.model.instance import InstanceLimits, InstanceReport, InstanceSpec, Role
from rota.serving.policies.admission import ADMISSION
from rota.serving.policies.admission.bounded_queue import BoundedQueue
from rota.serving.policies.admission.deadline_admission import DeadlineAdmission
from rota.serving.policies.dispatch import DISPATCH
from rota.serving.policies.dispatch.least_outstanding_tokens import LeastOutstandingTokens
from rota.serving.policies.dispatch.round_robin import RoundRobin
from rota.serving.policies.migration import MIGRATION
from rota.serving.policies.order import ORDER
from rota.serving.predictors.step_time.profiles import load_profile

DISPATCH_TARGET_MS = 0.1
MIGRATION_TARGET_MS = 5.0
REQUEST_TARGET_MS = 0.45
NUM_BLOCKS = 3000
BLOCK_SIZE = 16
NUM_DISPATCHES = 500
NUM_LONG_PROMPT_TOKENS = 32_000
ALIKE = (Role.MIXED,)
OF_THREE_ROLES = (Role.PREFILL, Role.DECODE, Role.MIXED)
NUM_MIGRATION_ROUNDS = 10
WHAT = ("decisions", "rounds")


class Fleet:
    """A router's machine, and instances that report what it sent them."""

    def __init__(
        self,
        num_instances: int,
        num_running: int,
        dispatch: Any,
        roles: Sequence[Role] = ALIKE,
        migration: MigrationPolicy | None = None,
    ) -> None:
        self.stream = Stream(0, "fleet")
        self.now = Instant(seconds(1))
        self.policy = SwitchedLater()
        self.machine = ClusterMachine(self.policy, BoundedQueue(max_unfinished=10**9), migration=migration)
        self.report_costs_ms: list[float] = []
        self.end_costs_ms: list[float] = []
        self.running: dict[InstanceId, list[SequenceReport]] = {}
        self.waiting: dict[InstanceId, list[SequenceReport]] = {}
        self.num_arrived = 0
        for number in range(num_instances):
            instance_id = InstanceId(f"i{number:04}")
            limits = InstanceLimits(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
            spec = InstanceSpec(instance_id, limits, role=roles[number % len(roles)])
            self.machine.handle(InstanceStarted(spec), self.now)
            self.running[instance_id], self.waiting[instance_id] = [], []
        for number in range(num_instances * num_running):
            self.admit(self.arrive(), is_crowded=number % num_instances % 16 == 0, num_running=num_running)
        for number in range(num_instances):
            request_id, instance_id = self.arrive()
            if number % 16 == 0:
                self.waiting[instance_id].append(SequenceReport(request_id, 100 * BLOCK_SIZE, 0))
            else:
                self.machine.handle(RequestFinished(request_id, instance_id), self.now)
        self.policy.dispatch = dispatch
        self.report()

    def arrive(self) -> tuple[RequestId, InstanceId]:
        """One request more; where it went."""
        self.num_arrived += 1
        request = Request(RequestId(f"r{self.num_arrived}"), self.now, self.stream.integers(50, 1500), 500)
        (command,) = self.machine.handle(RequestArrived(request), self.now)
        return request.id, command.instance_id  # type: ignore[union-attr]

    def admit(self, sent: tuple[RequestId, InstanceId], *, is_crowded: bool, num_running: int) -> None:
        """It runs, on an instance that is nearly full or half full with `num_running` like it."""
        request_id, instance_id = sent
        share = NUM_BLOCKS // num_running
        num_blocks = share if is_crowded else self.stream.integers(share // 5, share * 4 // 5)
        self.machine.handle(FirstTokenSeen(request_id, instance_id), self.now)
        self.running[instance_id].append(SequenceReport(request_id, num_blocks * BLOCK_SIZE, num_blocks))

    def report(self, every: int = 1, first: int = 0) -> None:
        """A later report of every so many instances, with as many free blocks as before."""
        self.now = after(self.now, seconds(0.05))
        for instance_id in list(self.running)[first::every]:
            running, waiting = self.running[instance_id], self.waiting[instance_id]
            num_free = NUM_BLOCKS - sum(each.num_blocks for each in running)
            report = InstanceReport(
                instance_id,
                self.now,
                len(running),
                len(waiting),
                num_free,
                NUM_BLOCKS,
                0,
                tuple(running),
                tuple(waiting),
            )
            self.report_costs_ms.append(cost_ms(partial(self.machine.handle, InstanceReported(report), self.now)))

    def turn_over(self, first: int) -> None:
        """One request ends at every tenth instance that has memory, and as many arrive."""
        for instance_id in [each for number, each in enumerate(self.running) if number % 16][first::10]:
            if self.running[instance_id]:
                ended = RequestFinished(self.running[instance_id].pop().request_id, instance_id)
                self.end_costs_ms.append(cost_ms(partial(self.machine.handle, ended, self.now)))
                self.arrive()

    def cluster(self) -> ClusterReading:
        return ClusterReading(self.now, self.machine.instance_views())


class SwitchedLater:
    """Round robin while the fleet is filled, so that every policy meets the same one; then the policy measured."""

    requires: frozenset[Any] = frozenset()

    def __init__(self) -> None:
        self.dispatch: Any = RoundRobin()
        self.costs_ms: list[float] = []

    def pick(self, request: Any, cluster: Any) -> Any:
        before = time.process_time_ns()
        pick = self.dispatch.pick(request, cluster)
        self.costs_ms.append((time.process_time_ns() - before) / 1e6)
        return pick

    def pick_decode(self, request: Any, at: Any, cluster: Any) -> Any:
        return self.dispatch.pick_decode(request, at, cluster)


def cost_ms(call: Callable[[], object]) -> float:
    before = time.process_time_ns()
    call()
    return (time.process_time_ns() - before) / 1e6


def dispatch_costs(
    name: str, num_instances: int, num_running: int, roles: Sequence[Role] = ALIKE
) -> dict[str, list[float]]:
    """One round: what the policy and the whole machine take for an arrival, and the policy for where it decodes."""
    policy = DISPATCH.create(name, services={"stream": Stream(1, name)})
    fleet = Fleet(num_instances, num_running, policy, roles)
    costs, decode_costs = [], []
    for number in range(NUM_DISPATCHES):
        fleet.report(every=num_instances, first=number % num_instances)
        costs.append(cost_ms(fleet.arrive))
        if hasattr(policy, "pick_decode"):
            request, at = Request(RequestId(f"d{number}"), fleet.now, 500, 500), InstanceId("i0000")
            decode_costs.append(cost_ms(partial(policy.pick_decode, request, at, fleet.cluster())))
    found = {"pick": fleet.policy.costs_ms[-NUM_DISPATCHES:], "arrival": costs}
    return found | {"pick_decode": decode_costs} if decode_costs else found


def costs_of_calls(policy: Any, method: str) -> list[float]:
    """What each later call of a policy's method costs, as the calls come."""
    asked, costs_ms = getattr(policy, method), []

    def timed(*arguments: Any) -> Any:
        before = time.process_time_ns()
        answer = asked(*arguments)
        costs_ms.append((time.process_time_ns() - before) / 1e6)
        return answer

    setattr(policy, method, timed)
    return costs_ms


class LongPrompts:
    """A router's machine that is sent prompts of 24,000 to 32,000 tokens in blocks of 16, with eight requests at each
    instance, about half of which have their first token.

    All share 1,024 tokens, and every second one goes on from one of the last 256: it shares the most of that.
    """

    def __init__(self, dispatch: Any, admission: Any, num_instances: int, queue: QueueRules, order: Any) -> None:
        self.stream = Stream(2, "long prompts")
        self.now = Instant(seconds(1))
        self.costs_ms = {"admit": costs_of_calls(admission, "admit"), "pick": costs_of_calls(dispatch, "pick")}
        self.costs_ms |= {"arrival": [], "first token": [], "end": []}
        self.machine = ClusterMachine(dispatch, admission, prefix_index=PrefixIndex(), queue=queue, order=order)
        self.system_prompt = self.new_hashes(64)
        self.sessions: list[tuple[int, ...]] = []
        self.waiting: deque[tuple[RequestId, InstanceId]] = deque()
        self.running: deque[tuple[RequestId, InstanceId]] = deque()
        limits = InstanceLimits(num_blocks=60_000, block_size=BLOCK_SIZE)
        for number in range(num_instances):
            self.machine.handle(InstanceStarted(InstanceSpec(InstanceId(f"i{number:04}"), limits)), self.now)
        for _ in range(8 * num_instances):
            self.arrive()
            if len(self.waiting) > 4 * num_instances:
                self.first_token()

    def new_hashes(self, num: int) -> tuple[int, ...]:
        return tuple([self.stream.integers(-(2**63), 2**63) for _ in range(num)])

    def arrive(self) -> None:
        self.now = after(self.now, seconds(0.01))
        length = self.stream.integers(1500, NUM_LONG_PROMPT_TOKENS // BLOCK_SIZE + 1)
        is_new = not self.sessions or self.stream.integers(0, 2)
        before = self.system_prompt if is_new else self.sessions[self.stream.integers(0, len(self.sessions))]
        before = before[: length * 7 // 8]
        hashes = before + self.new_hashes(length - len(before))
        self.sessions = [*self.sessions[-255:], hashes]
        name = f"r{self.stream.integers(0, 2**62)}"
        tenant = TenantId(f"t{self.stream.integers(0, 10)}")
        request = Request(RequestId(name), self.now, length * BLOCK_SIZE, 300, tenant=tenant, block_hashes=hashes)
        for command in self.timed("arrival", RequestArrived(request)):
            self.waiting.append((command.request_id, command.instance_id))

    def first_token(self) -> None:
        self.running.append(self.waiting.popleft())
        self.timed("first token", FirstTokenSeen(*self.running[-1]))

    def end(self) -> None:
        request_id, instance_id = self.running.popleft()
        for command in self.timed("end", RequestFinished(request_id, instance_id, 200)):
            self.waiting.append((command.request_id, command.instance_id))

    def timed(self, what: str, event: Any) -> Any:
        before = time.process_time_ns()
        commands = self.machine.handle(event, self.now)
        self.costs_ms[what].append((time.process_time_ns() - before) / 1e6)
        return commands


def long_prompt_costs(
    num_instances: int, *, dispatch: str = "prefix_then_load", admission: str = "bounded_queue", order: str = ""
) -> dict[str, list[float]]:
    """One round: what the two policies take for a long prompt, the whole machine for its arrival, and for all of the
    request: arrival, first token and end."""
    services = {"stream": Stream(1, dispatch), "step_time": load_profile("llama-3.1-8b-a100").predictor()}
    parameters = {"ttft_seconds": 6000.0} if admission == "deadline_admission" else {"max_unfinished": 10**9}
    sent = LongPrompts(
        DISPATCH.create(dispatch, services=services),
        ADMISSION.create(admission, parameters, services=services),
        num_instances,
        QueueRules(max_outstanding_per_instance=8 if order else 0),
        ORDER.create(order) if order else None,
    )
    for _ in range(NUM_DISPATCHES):
        sent.end()
        sent.first_token()
        sent.arrive()
    found = {what: costs[-NUM_DISPATCHES:] for what, costs in sent.costs_ms.items()}
    parts = (found.pop("end"), found.pop("first token"), found["arrival"])
    return found | {"request": [sum(each) for each in zip(*parts, strict=True)]}


def admission_costs(num_instances: int) -> list[float]:
    """One round: what `deadline_admission` takes to promise or refuse, where eight prompts wait at each instance."""
    policy = DeadlineAdmission(step_time=load_profile("llama-3.1-8b-a100").predictor(), ttft_seconds=6000.0)
    machine = ClusterMachine(LeastOutstandingTokens(), policy)
    limits = InstanceLimits(num_blocks=60_000, block_size=BLOCK_SIZE)
    for number in range(num_instances):
        machine.handle(InstanceStarted(InstanceSpec(InstanceId(f"i{number:04}"), limits)), Instant(0))
    costs = []
    for number in range(8 * num_instances + NUM_DISPATCHES):
        request = Request(RequestId(f"r{number}"), Instant(number), NUM_LONG_PROMPT_TOKENS, 300)
        cluster = ClusterReading(Instant(number), machine.instance_views())
        if number >= 8 * num_instances:
            costs.append(cost_ms(partial(policy.admit, request, cluster, number)))
            policy.request_ended(request, None)
        else:
            machine.handle(RequestArrived(request), Instant(number))
    return costs


def migration_costs(name: str, num_instances: int, num_running: int) -> dict[str, list[float]]:
    """One round: calls of the policy, each with nothing under way."""
    policy, untold = MIGRATION.create(name), MIGRATION.create(name)
    fleet = Fleet(num_instances, num_running, RoundRobin(), migration=policy)
    costs: dict[str, list[float]] = {f"{how} round": [] for how in ("live", "busy", "fresh", "unread")}
    nobody: frozenset[RequestId] = frozenset()
    for asked in (policy, untold):
        ask_migration(asked, fleet.machine.instance_views(), nobody, fleet.now)
    fleet.report_costs_ms.clear()
    for number in range(NUM_MIGRATION_ROUNDS):
        for how, every, first in (("live", 20, number), ("busy", 20, number + 10), ("fresh", 1, 0), ("unread", 1, 0)):
            fleet.report(every=every, first=first)
            if how == "busy":
                fleet.turn_over(number)
            fleet.now = after(fleet.now, seconds(10))  # What came to nothing is tried again.
            asked = untold if how == "unread" else policy
            ask = partial(ask_migration, asked, fleet.machine.instance_views(), nobody, fleet.now)
            costs[f"{how} round"].append(cost_ms(ask))
    return costs | {"report": fleet.report_costs_ms, "end": fleet.end_costs_ms}


def row(rounds: Sequence[Sequence[float]], target_ms: float) -> dict[str, Any]:
    medians = [statistics.median(each) for each in rounds]
    median = statistics.median(medians)
    return {
        "cpu_ms": {
            "median": round(median, 4),
            "lowest": round(min(medians), 4),
            "highest": round(max(medians), 4),
            "slowest_call": round(max(max(each) for each in rounds), 4),
        },
        "target_ms": target_ms,
        "meets": median <= target_ms,
    }


def decisions(num_instances: int, num_running: int, num_rounds: int) -> dict[str, Any]:
    """What is decided for one request, by every dispatch policy and by admission with promises."""
    results: dict[str, Any] = {}
    for name in DISPATCH.names():
        fleets = {name: ALIKE}
        if getattr(DISPATCH.load(name), "reads_roles", False):
            fleets[f"{name} of three roles"] = OF_THREE_ROLES
        for label, roles in fleets.items():
            measured = [dispatch_costs(name, num_instances, num_running, roles) for _ in range(num_rounds)]
            for what in measured[0]:
                rounds = [each[what] for each in measured]
                results[f"{what} {label} {num_instances}"] = row(rounds, DISPATCH_TARGET_MS)
    promised = [admission_costs(num_instances) for _ in range(num_rounds)]
    results[f"admit deadline_admission {num_instances}"] = row(promised, DISPATCH_TARGET_MS)
    return results | long_prompts(num_instances, num_rounds)


def long_prompts(num_instances: int, num_rounds: int) -> dict[str, Any]:
    """What each dispatch and each admission policy costs with long prompts that the router remembers."""
    results: dict[str, Any] = {}
    for policies in [{"dispatch": name} for name in DISPATCH.names()] + [
        {"admission": name} for name in ADMISSION.names() if name != "bounded_queue"
    ]:
        measured = [long_prompt_costs(num_instances, **policies) for _ in range(num_rounds)]
        for what in measured[0]:
            label = f"{what} {next(iter(policies.values()))} long prompts {num_instances}"
            target_ms = REQUEST_TARGET_MS if what == "request" else DISPATCH_TARGET_MS
            results[label] = row([each[what] for each in measured], target_ms)
    return results


def migration_rounds(num_instances: int, num_running: int, num_rounds: int) -> dict[str, Any]:
    """What every migration policy costs in its rounds, and with each report and each end."""
    results: dict[str, Any] = {}
    for name in MIGRATION.names():
        measured = [migration_costs(name, num_instances, num_running) for _ in range(num_rounds)]
        for what in measured[0]:
            target_ms = MIGRATION_TARGET_MS if what.endswith("round") else DISPATCH_TARGET_MS
            results[f"{what} {name} {num_instances}"] = row([each[what] for each in measured], target_ms)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-instances", type=int, nargs="*", default=[64, 1000])
    parser.add_argument("--num-running", type=int, default=32, help="sequences that run on each instance")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--what", nargs="*", choices=WHAT, default=WHAT)
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    results: dict[str, Any] = {}
    for num_instances in arguments.num_instances:
        if "decisions" in arguments.what:
            results |= decisions(num_instances, arguments.num_running, arguments.rounds)
        if "rounds" in arguments.what:
            results |= migration_rounds(num_instances, arguments.num_running, arguments.rounds)
        print(f"{num_instances} instances: measured", file=sys.stderr, flush=True)
    provenance = {
        "command": " ".join(["python benchmarks/decision_cost.py", *sys.argv[1:]]),
        "rota": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "num_cores": len(os.sched_getaffinity(0)),
        "load_average_before": round(load_before, 2),
        "num_running": arguments.num_running,
        "rounds": arguments.rounds,
    }
    print(json.dumps({"results": results, "provenance": provenance}, indent=2))


if __name__ == "__main__":
    main()
