"""Runs in processes: every one once, errors as they were, memory bounded, and no process left behind."""

import os
from pathlib import Path

import pytest

from rota.base.errors import ConfigError, RotaError
from rota.serving.studies.runner import LocalRunner


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def refuse(number: int) -> int:
    if number == 5:
        raise ConfigError("number 5 is refused", hint="try another")
    return number


def die(number: int) -> int:
    os._exit(3)


def hog(num_bytes: int) -> str:
    try:
        return f"took {len(bytearray(num_bytes))}"
    except MemoryError:
        return "refused"


def test_every_item_is_run_once_in_workers_that_then_end() -> None:
    ticks: list[None] = []
    with LocalRunner(2) as runner:
        found = dict(runner.map(square, list(range(20)), lambda: ticks.append(None)))
        again = dict(runner.map(square, [3, 4]))
    assert {index: result for index, (result, _) in found.items()} == {n: n * n for n in range(20)}
    workers = {pid for _, pid in (*found.values(), *again.values())}
    assert os.getpid() not in workers and 1 <= len(workers) <= 2, "workers are kept from one call to the next"
    assert ticks
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_one_worker_or_one_item_needs_no_process() -> None:
    with LocalRunner(1) as one, LocalRunner(2) as two:
        pids = {pid for _, (_, pid) in (*one.map(square, [1, 2, 3]), *two.map(square, [1]))}
    assert pids == {os.getpid()}


def test_an_error_comes_back_as_it_was() -> None:
    with LocalRunner(2) as runner, pytest.raises(ConfigError, match="number 5 is refused") as raised:
        list(runner.map(refuse, list(range(10))))
    assert raised.value.hint == "try another"


def test_a_worker_that_dies_is_told_of() -> None:
    with LocalRunner(2) as runner, pytest.raises(RotaError, match="a worker process died") as raised:
        list(runner.map(die, [1, 2]))
    assert raised.value.hint is not None and "--jobs" in raised.value.hint


def test_a_worker_takes_its_share_of_memory_and_no_more() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    share = 2 * 2**30 / total
    with LocalRunner(2, memory_share=share) as runner:
        found = dict(runner.map(hog, [2**20, 2 * 2**30]))
    assert found == {0: "took 1048576", 1: "refused"}
