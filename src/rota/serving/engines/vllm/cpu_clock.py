"""Processor time of an engine's workers: what a step cost, whoever else had the cores meanwhile."""

import multiprocessing
import os
import time

_THREADS_OF = 2
"""Linux's clock ids: a process's id negated and shifted, and in the low bits which of its clocks is meant."""


class WorkerCpuClock:
    """Counts the CPU time of the processes that compute steps: those that this engine has started, or else itself.

    An engine that waits does so asleep or in another process, so on a CPU engine a step's count is what it computed.
    """

    def __init__(self) -> None:
        pids = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
        self._clocks = [(~pid << 3) | _THREADS_OF for pid in pids or [os.getpid()]]

    def now(self) -> int | None:
        """Nanoseconds in all since they were started; None where the system does not tell, or one of them is gone."""
        try:
            return sum(time.clock_gettime_ns(clock) for clock in self._clocks)
        except (OSError, AttributeError):
            return None
