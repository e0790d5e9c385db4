"""Two worlds for the bakery: one under the simulation loop, one under the live loop."""

import asyncio

from rota.base.instant import Duration, Instant, milliseconds, seconds, to_seconds
from rota.base.journal import Journal
from rota.base.random_streams import RandomStreams, Stream
from rota.runtime.clocks import SystemClock
from rota.runtime.faults import FailNth, FaultKind, FaultPlan, random_plan
from rota.runtime.live import LiveLoop
from rota.runtime.observers import CheckLaws
from rota.runtime.simulation import SimulationLoop
from rota.testing.toy.bakery import (
    BakeBatch,
    Bakery,
    BakeryCommand,
    BakeryEvent,
    BatchBaked,
    BatchBurnt,
    LoafOrdered,
    LoafPolicy,
    RefuseLoaf,
    ShortestRecipeFirst,
)

MACHINE = "bakery"
ROW_TYPES = {MACHINE: (BakeryEvent, BakeryCommand)}
PATIENCE = seconds(30)
LIVE_PATIENCE = milliseconds(2)


def build(policy: LoafPolicy | None = None, *, patience: Duration = PATIENCE, max_waiting: int = 100) -> Bakery:
    """The one construction that both worlds, and replays, use."""
    return Bakery(policy or ShortestRecipeFirst(), patience=patience, max_waiting=max_waiting)


def orders(seed: int, num_loaves: int, span: Duration) -> list[tuple[Duration, LoafOrdered]]:
    """Loaves with the time at which they are ordered. Whole groups come at one instant, so that ties are common."""
    stream = RandomStreams(seed).stream("orders")
    num_groups = max(num_loaves // 4, 1)
    times = sorted(stream.integers(0, span) for _ in range(num_groups))
    return [
        (Duration(times[number % num_groups]), LoafOrdered(f"loaf-{number}", seconds(stream.integers(10, 60))))
        for number in range(num_loaves)
    ]


def fault_plan(seed: int, span: Duration) -> FaultPlan:
    """Ovens that burn whatever is in them for a while."""
    kind = FaultKind("burning", duration=(seconds(20), seconds(200)))
    return random_plan(RandomStreams(seed).stream("faults"), [kind], ["oven-0", "oven-1"], span, num_faults=4)


def simulate(
    seed: int,
    *,
    num_loaves: int = 200,
    start: Instant = Instant(0),
    journal: Journal | None = None,
    bakery: Bakery | None = None,
    shuffle: Stream | None = None,
    fail: FailNth | None = None,
) -> Bakery:
    """Bake everything, faults on, under virtual time. Loaves come faster than they bake, so that queues form."""
    span = seconds(num_loaves * 5)
    bakery = bakery or build(max_waiting=num_loaves // 2)
    faults = fault_plan(seed, span)
    streams = RandomStreams(seed)
    loop = SimulationLoop(start, journal, [CheckLaws({MACHINE: bakery})], shuffle=shuffle)
    recipes = {loaf.loaf_id: loaf.recipe_time for _, loaf in orders(seed, num_loaves, span)}

    def carry_out(name: str, command: BakeryCommand, now: Instant) -> None:
        if isinstance(command, RefuseLoaf):
            return
        # The truth that the machine cannot know: the longest recipe, more or less. Named by the batch, not by when.
        error = streams.stream(f"baking/{'+'.join(command.loaf_ids)}").uniform(0.8, 1.3)
        done_at = Instant(now + round(error * max(recipes[loaf_id] for loaf_id in command.loaf_ids)))
        is_burning = faults.active("burning", f"oven-{command.oven}", Instant(done_at - start)) is not None
        is_lost = (fail is not None and fail.fails(command)) or is_burning
        loop.post(done_at, name, BatchBurnt(command.oven) if is_lost else BatchBaked(command.oven))

    loop.add_machine(MACHINE, bakery, carry_out)
    for delay, loaf in orders(seed, num_loaves, span):
        loop.post(Instant(start + delay), MACHINE, loaf)
    loop.run()
    return bakery


async def run_live(seed: int, *, num_loaves: int = 40, journal: Journal | None = None) -> Bakery:
    """Bake everything in real time, a thousand times faster than a baker would. Every seventh batch burns."""
    bakery = build(patience=LIVE_PATIENCE)
    loop = LiveLoop(SystemClock(), journal)
    num_batches = 0
    all_done = asyncio.Event()

    def report(event: BakeryEvent) -> None:
        loop.submit(MACHINE, event)
        if not bakery.unfinished():
            all_done.set()

    def carry_out(name: str, command: BakeryCommand, now: Instant) -> None:
        nonlocal num_batches
        if isinstance(command, BakeBatch):
            num_batches += 1
            outcome = BatchBurnt(command.oven) if num_batches % 7 == 0 else BatchBaked(command.oven)
            asyncio.get_running_loop().call_later(0.001, report, outcome)

    loop.add_machine(MACHINE, bakery, carry_out)
    for delay, loaf in orders(seed, num_loaves, milliseconds(20)):
        asyncio.get_running_loop().call_later(to_seconds(delay), report, loaf)
    while len(bakery.states) < num_loaves or bakery.unfinished():
        all_done.clear()
        await all_done.wait()
    loop.close()
    return bakery
