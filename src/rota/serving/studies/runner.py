"""Many runs, side by side: in processes of this machine, or on a Ray cluster. Results come as they get ready."""

import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, Self, TypeVar

from rota.base.errors import RotaError
from rota.serving.engines.ray.cluster import join

Item = TypeVar("Item")
Result = TypeVar("Result")

TICK_SECONDS = 0.5
"""How often whoever waits is told that the work goes on."""
QUEUED_PER_WORKER = 2
"""Runs handed over ahead of need, so that no worker waits for its next one."""


class Runner(Protocol):
    """What carries out runs."""

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], on_tick: Callable[[], None] = ...
    ) -> Iterator[tuple[int, Result]]:
        """Yield `(index, function(items[index]))` in the order in which they get ready. An error of one run is raised
        here, and the others end. `on_tick` is called now and then while nothing is ready. Function, items and results
        must be picklable."""
        ...


class LocalRunner:
    """Processes of this machine, each started from nothing (spawned) when there is work for it, until the runner is
    closed.

    A worker may take its share of `memory_share` of the machine's memory and no more; it ignores Ctrl-C, which is for
    whoever started it, and it ends when that process has gone, however it went. One worker is this process itself.
    """

    def __init__(self, num_workers: int | None = None, *, memory_share: float = 0.8) -> None:
        """As many workers as there are cores that this process may use, unless told."""
        self.num_workers = num_workers or len(os.sched_getaffinity(0))
        memory = int(memory_share * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        self._memory_max = memory // self.num_workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, whatever they are at."""
        if self._pool is not None:
            # Without this a run under way would be waited for, after Ctrl-C and after an error of another run.
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], on_tick: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[int, Result]]:
        if self.num_workers == 1 or len(items) < 2:
            for index, item in enumerate(items):
                yield index, function(item)
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.num_workers, context, _settle, (self._memory_max,))
        try:
            yield from _drain(self._pool, function, items, QUEUED_PER_WORKER * self.num_workers, on_tick)
        except BrokenProcessPool:
            raise RotaError(
                "a worker process died in the middle of a run", hint="it may have run out of memory; try fewer --jobs"
            ) from None


def _drain(
    pool: ProcessPoolExecutor,
    function: Callable[[Item], Result],
    items: Sequence[Item],
    num_ahead: int,
    on_tick: Callable[[], None],
) -> Iterator[tuple[int, Result]]:
    """Keep few runs handed over at a time, so that memory does not grow with their number."""
    left = iter(enumerate(items))
    running: dict[Future[Result], int] = {}
    while True:
        for index, item in islice(left, num_ahead - len(running)):
            running[pool.submit(function, item)] = index
        if not running:
            return
        ready, _ = wait(running, TICK_SECONDS, return_when=FIRST_COMPLETED)
        for future in sorted(ready, key=running.__getitem__):
            yield running.pop(future), future.result()
        on_tick()


def _settle(memory_max: int) -> None:
    """Make this process a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or memory_max < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_max, hard))


def _follow(parent: BaseProcess) -> None:
    """End with the process that started this one."""
    parent.join()
    os._exit(1)


class RayRunner:
    """Tasks on a Ray cluster, each on one of its cores: on the one that `RAY_ADDRESS` names or that runs here, else on
    one that is started here for as long as this runner lives.

    Rota of the same version must be installed on every node, and files must be at the same path.
    """

    def __init__(self, address: str | None = None) -> None:
        """Raises `ConfigError` where Ray is not installed or no cluster answers."""
        self._ray, self._is_ours = join(address, "--on ray")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the cluster; one that was started here ends."""
        if self._is_ours:
            self._ray.shutdown()

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], on_tick: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[int, Result]]:
        ray = self._ray
        # Not retried after an error of the run itself: the same run would fail the same way.
        task = ray.remote(max_retries=3)(_guarded)
        left = iter(enumerate(items))
        running: dict[Any, int] = {}
        try:
            while True:
                num_ahead = max(1, QUEUED_PER_WORKER * int(ray.cluster_resources().get("CPU", 1)))
                for index, item in islice(left, num_ahead - len(running)):
                    running[task.remote(function, item)] = index
                if not running:
                    return
                ready, _ = ray.wait(list(running), timeout=TICK_SECONDS)
                for reference in ready:
                    index = running.pop(reference)
                    result, error = ray.get(reference)
                    if error is not None:
                        raise error
                    yield index, result
                on_tick()
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _guarded(function: Callable[[Item], Result], item: Item) -> tuple[Result | None, RotaError | None]:
    """Errors that a user may meet travel as values: Ray would wrap them in text."""
    try:
        return function(item), None
    except RotaError as error:
        return None, error
