"""Least attained service first, of a request or of its program."""

from collections import OrderedDict
from typing import Any, Literal

from rota.base.errors import ConfigError
from rota.serving.api import ProgramId, RequestId, SequenceView
from rota.serving.policies.parameters import at_least_one
from rota.serving.policies.ranked import Rank, RankedOrder

_NUM_PROGRAMS_MAX = 65_536
"""Programs whose service is remembered; the one unused for longest is forgotten first."""


class LeastAttainedService(RankedOrder):
    """Serve whoever has been served the fewest output tokens; it displaces those who have had more.

    Rule: foreground-background (Kleinrock), in quanta of `quantum_tokens`, so that two requests do not displace each
    other token by token. With `of = "program"`, a request begins with what the calls of its program that have ended
    were served (PLAS of Autellix, Luo et al., 2025, which does not say its quanta). Nothing is predicted. Prompts do
    not count: a long one is paid in a few steps, and whoever was displaced for it would pay it again. Whoever was
    preempted `preempted_at_most` times stays ahead of its class to its end.

    Classes go first. Good where lengths differ much and nobody can guess them. The longest pay: they wait whenever
    somebody newer is there, and starve under sustained overload but for the bound on preemptions.
    """

    def __init__(
        self,
        *,
        of: Literal["request", "program"] = "request",
        quantum_tokens: int = 64,
        preempted_at_most: int = 8,
        skip_refused: bool = False,
    ) -> None:
        super().__init__(skip_refused=skip_refused)
        if of not in ("request", "program"):
            raise ConfigError(f"least_attained_service: of must be 'request' or 'program', not {of!r}")
        at_least_one("least_attained_service", quantum_tokens=quantum_tokens, preempted_at_most=preempted_at_most)
        self._of_program = of == "program"
        self._quantum = quantum_tokens
        self._preempted_at_most = preempted_at_most
        self._programs: OrderedDict[ProgramId, int] = OrderedDict()
        """Output tokens of the calls that have ended."""
        self._before: dict[RequestId, int] = {}
        """What a request's program had been served when it was first looked at."""

    def rank(self, sequence: SequenceView) -> Rank:
        if sequence.num_preemptions >= self._preempted_at_most:
            return (0, sequence.arrived_at)
        attained = sequence.num_output_tokens
        if self._of_program and (program := sequence.request.program) is not None:
            before = self._before.get(sequence.request.id)
            if before is None:
                before = self._before[sequence.request.id] = self._programs.get(program, 0)
            attained += before
        return (1, attained // self._quantum)

    def request_ended(self, request: Any, num_output_tokens: int | None) -> None:
        self._before.pop(request.id, None)
        if self._of_program and request.program is not None and num_output_tokens is not None:
            self._programs[request.program] = self._programs.get(request.program, 0) + num_output_tokens
            self._programs.move_to_end(request.program)
            if len(self._programs) > _NUM_PROGRAMS_MAX:
                self._programs.popitem(last=False)
