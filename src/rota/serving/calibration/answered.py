"""Requests of a journal with the lengths of their answers, and what a predictor would have said of them."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from rota.base.errors import DataError
from rota.base.journal import JournalFile
from rota.serving.api import LengthPredictor
from rota.serving.model.commands import Fail, Reject
from rota.serving.model.events import ClientLeft, RequestArrived, RequestFinished
from rota.serving.model.request import Request, RequestId

MAX_ANSWERED = 500_000
"""Answers kept. Of a longer journal, its end."""


class Answered(NamedTuple):
    """A request that was answered in full."""

    request: Request
    num_output_tokens: int
    arrived: int
    """Place of its arrival among the journal's rows."""
    ended: int
    """Place of its end."""


class Requests:
    """The requests of a journal: those that were answered, in order of arrival, and how many were not, by why."""

    def __init__(self) -> None:
        self.answered: list[Answered] = []
        self.left_out: dict[str, int] = {}


def read_answered(journal: JournalFile, reached: Callable[[int], None]) -> Requests:
    """Read a journal to its end; `reached` hears how many rows have passed. Raises `DataError` for a journal that
    cannot be read, and for one without requests."""
    found = Requests()
    open_requests: dict[RequestId, tuple[Request, int]] = {}
    left_out: Counter[str] = Counter()
    num_arrived = 0
    for place, row in enumerate(journal):
        if place % 4096 == 0:
            reached(place)
        event = row.event
        if isinstance(event, RequestArrived):
            num_arrived += 1
            # What it shares with others is long, and nothing here goes by it.
            open_requests[event.request.id] = (msgspec.structs.replace(event.request, block_hashes=()), place)
        elif isinstance(event, RequestFinished) and event.request_id in open_requests:
            request, arrived = open_requests.pop(event.request_id)
            if event.num_output_tokens:
                found.answered.append(Answered(request, event.num_output_tokens, arrived, place))
                if len(found.answered) > MAX_ANSWERED + 4096:
                    left_out["earlier than the last half million"] += 4096
                    del found.answered[:4096]
            else:
                left_out["their engine did not say how long the answer was"] += 1
        elif isinstance(event, ClientLeft):
            left_out["their clients left"] += open_requests.pop(event.request_id, None) is not None
        for command in row.commands:
            if isinstance(command, Reject | Fail):
                left_out["refused or failed"] += open_requests.pop(command.request_id, None) is not None
    if not num_arrived:
        raise DataError(
            f"{journal.path}: no request arrives in this journal",
            hint="journals of rota simulate and rota serve have requests, those of a vLLM plug-in have not",
        )
    if open_requests:
        left_out["had not ended when the journal did"] += len(open_requests)
    found.left_out = {why: count for why, count in left_out.items() if count}
    found.answered.sort(key=lambda each: each.arrived)
    return found


def said_by(predictor: LengthPredictor, answered: list[Answered]) -> Iterator[float]:
    """What a predictor says of each at its arrival, having heard of all that ended before: in order of arrival."""
    by_end = sorted(answered, key=lambda each: each.ended)
    num_ended = 0
    for each in answered:
        while by_end[num_ended].ended < each.arrived:
            predictor.request_ended(by_end[num_ended].request, by_end[num_ended].num_output_tokens)
            num_ended += 1
        yield predictor.predict(each.request)
