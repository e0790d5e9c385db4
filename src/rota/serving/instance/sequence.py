"""One request's life on one instance."""

from rota.base.errors import PolicyError
from rota.base.instant import Instant
from rota.base.table import TransitionTable
from rota.serving.api import SequenceView
from rota.serving.instance.decodes import Paced
from rota.serving.model.request import Request

SEQUENCE = TransitionTable(
    "sequence",
    {
        "waiting": {
            "admitted": "running",
            "adopted": "running",
            "replayed": "preempted",
            "aborted": "aborted",
        },
        "running": {
            "preempted": "preempted",
            "stopped": "resting",
            "finished": "finished",
            "aborted": "aborted",
        },
        "preempted": {"admitted": "running", "aborted": "aborted"},
        "resting": {"resumed": "running", "left": "left", "aborted": "aborted"},
        "finished": {},
        "aborted": {},
        "left": {},
    },
    initial="waiting",
    final={"finished", "aborted", "left"},
)


class Sequence(Paced):
    """The state behind `SequenceView`. Only the instance machine and its draft write it."""

    __slots__ = (
        "admitted_seq",
        "arrived_at",
        "granted",
        "num_cached_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "priority",
        "queue_position",
        "state",
        "tenant",
    )

    def __init__(self, request: Request, block_size: int) -> None:
        super().__init__(request, block_size)
        self.priority = request.priority
        self.tenant = request.tenant
        self.arrived_at: Instant = request.arrived_at
        self.num_prompt_tokens = request.num_prompt_tokens
        self.num_cached_tokens = 0
        """Of the computed tokens, those found in the prefix cache at the first admission."""
        self.num_preemptions = 0
        self.admitted_seq = -1
        self.queue_position = 0
        self.granted = 0
        """Tokens that the step under way computes of it by itself; of one that goes along with the group, 0."""
        self.state: str = SEQUENCE.initial

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_pending_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    def move(self, event: str) -> None:
        """Follow the table; an illegal move raises `IllegalMove`."""
        self.state = SEQUENCE.move(self.state, event)

    def __repr__(self) -> str:
        return (
            f"Sequence({self.id} {self.state} computed={self.num_computed_tokens}/{self.num_tokens} "
            f"blocks={self.num_blocks} priority={self.priority})"
        )


def own(view: SequenceView) -> Sequence:
    """The sequence behind a view; raises `PolicyError` where there is none."""
    if not isinstance(view, Sequence):
        raise PolicyError(f"{view!r} is not a sequence of this instance")
    return view
