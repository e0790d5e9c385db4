"""First come, first served."""

from typing import Literal

from rota.serving.api import NOTHING, EngineCapabilities, EngineView, InOrder, Pool, SequenceView


class Fcfs:
    """Serve in queue order: arrival, with preempted sequences at the front; running ones in order of admission.

    Rule: vLLM's default. Good when requests are alike. Starves nobody, but short work waits behind long work
    (head-of-line blocking), and a burst of one tenant delays all others."""

    requires: EngineCapabilities = NOTHING
    running_order: Literal["admission", "own"] = "admission"
    displacing = False
    repeatable = True

    def open(self, view: EngineView, pool: Pool) -> InOrder:
        return InOrder(view.running if pool is Pool.RUNNING else view.waiting)

    def displaces(self, view: EngineView, waiting: SequenceView, running: SequenceView) -> bool:
        return False
