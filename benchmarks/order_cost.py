"""What an order of an engine's sequences costs a step, with 128 running and 1,000 waiting of as many tenants.

    python benchmarks/order_cost.py [--num-steps N] [--rounds R] [--order NAME ...]
        [--document-blocks B] > result.json

Two loads: in `full` nobody ends, so that nobody who waits can start; in `turning over` one request ends and another
arrives in every step. `order_us` is the time inside the order policy and in choosing whom it displaces; `step_us` is
all that the instance machine needs to plan the step. Counted is CPU time; a figure is a
median over the steps of the quietest round. Steps take 20 ms; the queues of `skip_join_mlfq` have quanta of
many, as they must where a preempted request is computed again. With `--document-blocks` each prompt begins with one of
ten documents of so many blocks.
"""

import argparse
import json
import os
import platform
import sys
import time
from statistics import median

from rota import __version__
from rota.base.instant import Instant
from rota.base.random_streams import RandomStreams
from rota.serving.api import Pool
from rota.serving.instance import draft as drafting
from rota.serving.instance.machine import InstanceMachine
from rota.serving.model.capabilities import EVERYTHING
from rota.serving.model.events import SequenceArrived, StepFinished
from rota.serving.model.instance import InstanceLimits
from rota.serving.model.request import SLO, Request, RequestId, TenantId
from rota.serving.policies.order import ORDER
from rota.serving.stack import Parameters, StackConfig, engine_policies

NUM_RUNNING, NUM_WAITING, NUM_TENANTS = 128, 1000, 1000
BOUND_US = 100.0
PARAMETERS = {"skip_join_mlfq": Parameters(order={"base_ms": 2000.0})}


class Clock:
    """Adds up the time between entering and leaving, the outermost if they nest."""

    def __init__(self):
        self.spent = 0
        self._depth = 0
        self._began = 0

    def timed(self, function):
        def call(*args, **kwargs):
            if self._depth == 0:
                self._began = time.thread_time_ns()
            self._depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.spent += time.thread_time_ns() - self._began

        return call


class TimedCursor:
    def __init__(self, cursor, clock):
        self.next = clock.timed(cursor.next)
        self.granted = clock.timed(cursor.granted)
        self.refused = clock.timed(cursor.refused)


class TimedOrder:
    """An order policy under a clock."""

    def __init__(self, order, clock):
        self._open = clock.timed(order.open)
        self._clock = clock
        self.requires, self.running_order, self.displacing = order.requires, order.running_order, order.displacing
        self.displaces = clock.timed(order.displaces)
        if hasattr(order, "request_ended"):
            self.request_ended = clock.timed(order.request_ended)

    def open(self, view, pool):
        cursor = self._open(view, pool)
        # To walk over those who run costs the same under every order, and to time each step of it more than that.
        return cursor if pool is Pool.RUNNING else TimedCursor(cursor, self._clock)


def measure(name, *, is_turning_over, num_steps, num_document_blocks=0, seed=0):
    stream = RandomStreams(seed).stream("order_cost")
    policies = engine_policies(
        StackConfig(order=name, parameters=PARAMETERS.get(name, Parameters())), EVERYTHING, "the benchmark"
    )
    clock = Clock()
    order = TimedOrder(policies.order, clock)
    limits = InstanceLimits(num_blocks=400_000, max_num_seqs=NUM_RUNNING, max_num_batched_tokens=8192)
    machine = InstanceMachine(limits, order=order, batch=policies.batch, memory=policies.memory)
    drafting_choose = drafting.choose_displaced
    drafting.choose_displaced = clock.timed(drafting_choose)
    now = 0
    num_requests = 0

    def arrive():
        nonlocal num_requests
        num_requests += 1
        number = num_requests if num_requests <= NUM_TENANTS else stream.integers(1, NUM_TENANTS + 1)
        # Whoever comes later has more before it, so that those who run stay.
        request = Request(
            RequestId(f"r{num_requests}"),
            Instant(now),
            stream.integers(16, 200) + 16 * num_document_blocks,
            max_tokens=1000 + num_requests,
            block_hashes=tuple((number % 10, block) for block in range(num_document_blocks)),
            tenant=TenantId(f"tenant-{number}"),
            slo=SLO(ttft=10**12 + now, e2e=10**13 + now),
        )
        return machine.handle(SequenceArrived(request), Instant(now))

    try:
        (step,) = arrive()
        for _ in range(NUM_RUNNING + NUM_WAITING - 1):
            arrive()
        order_us, step_us = [], []
        for number in range(60 + num_steps):
            now += 20_000_000
            ended = ()
            if is_turning_over and number >= 40:
                ended = (machine.running[stream.integers(0, len(machine.running))].id,)
                arrive()
            clock.spent = 0
            began = time.thread_time_ns()
            (step,) = machine.handle(StepFinished(step.step_id, ended), Instant(now))
            spent = time.thread_time_ns() - began
            if number >= 60:
                order_us.append(clock.spent / 1000)
                step_us.append(spent / 1000)
    finally:
        drafting.choose_displaced = drafting_choose
    statistics = machine.statistics()
    order_us.sort()
    return {
        "num_running": statistics.num_running,
        "num_waiting": statistics.num_waiting,
        "num_preemptions": statistics.num_preemptions,
        "order_us": median(order_us),
        "order_us_p99": order_us[int(0.99 * len(order_us))],
        "step_us": median(step_us),
    }


def quietest(rounds):
    """The round of the lowest median: what else a machine does can only add to it. With the highest beside it."""
    best = min(rounds, key=lambda one: one["order_us"])
    return best | {"order_us_highest_round": max(one["order_us"] for one in rounds)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--order", nargs="+", default=ORDER.names())
    parser.add_argument("--document-blocks", type=int, default=0)
    arguments = parser.parse_args()
    found = {}
    for name in arguments.order:
        found[name] = {
            load: quietest(
                [
                    measure(
                        name,
                        is_turning_over=load != "full",
                        num_steps=arguments.num_steps,
                        num_document_blocks=arguments.document_blocks,
                    )
                    for _ in range(arguments.rounds)
                ]
            )
            for load in ("full", "turning over")
        }
        print(f"{name}: {[round(each['order_us']) for each in found[name].values()]} µs", file=sys.stderr)
    result = {
        "command": " ".join(["python benchmarks/order_cost.py", *sys.argv[1:]]),
        "provenance": {
            "rota": __version__,
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
            "num_cores": len(os.sched_getaffinity(0)),
            "load_average": round(os.getloadavg()[0], 2),
        },
        "num_tenants": NUM_TENANTS,
        "bound_us": BOUND_US,
        "orders": found,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
