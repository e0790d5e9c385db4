"""The running sequences that only decode, advanced all together: a step costs what changes, not what runs.

A sequence that has caught up computes one token in every step until something happens to it. So nothing is written to
it: its counts are its count when it joined plus the steps since, and the blocks that the next step needs are those of
the sequences whose last block is full, which are found by the remainder of their count.
"""

from rota.serving.instance.ledger import Holding
from rota.serving.model.commands import Grant
from rota.serving.model.request import Request, RequestId


class Rounds:
    """How many steps have been planned, and how many of these have finished."""

    __slots__ = ("num_finished", "num_planned")

    def __init__(self) -> None:
        self.num_planned = 0
        self.num_finished = 0


STILL = Rounds()
"""What sequences count by that advance by themselves: never changes."""


class Paced(Holding):
    """A sequence's blocks and its two counts, which are relative to the steps of whatever it goes along with."""

    __slots__ = ("_computed", "_rounds", "_tokens", "grant", "id", "request")

    def __init__(self, request: Request, block_size: int) -> None:
        # Hashes of a part of a block, or of no whole number of blocks, say nothing of blocks.
        ratio, rest = divmod(request.hash_block_tokens or block_size, block_size)
        hashes = request.block_hashes if ratio and not rest else ()
        super().__init__(
            request.id, hashes, ratio or 1, min(len(hashes) * ratio, request.num_prompt_tokens // block_size)
        )
        self.id: RequestId = request.id
        self.request = request
        self._rounds = STILL
        self._tokens = request.num_prompt_tokens
        self._computed = 0
        self.grant = Grant(request.id, 1)
        """What a step gives it for as long as it decodes."""

    @property
    def num_tokens(self) -> int:
        return self._rounds.num_finished + self._tokens

    @num_tokens.setter
    def num_tokens(self, value: int) -> None:
        self._tokens = value - self._rounds.num_finished

    @property
    def num_computed_tokens(self) -> int:
        return self._rounds.num_planned + self._computed

    @num_computed_tokens.setter
    def num_computed_tokens(self, value: int) -> None:
        self._computed = value - self._rounds.num_planned

    @property
    def is_paced(self) -> bool:
        """Whether it goes along with a group."""
        return self._rounds is not STILL

    def go_along(self, rounds: Rounds) -> None:
        """Count by these steps from now on; the counts themselves stay what they are."""
        tokens, computed = self.num_tokens, self.num_computed_tokens
        self._rounds = rounds
        self._tokens = tokens - rounds.num_finished
        self._computed = computed - rounds.num_planned


class DecodeGroup(Rounds):
    """The sequences that compute one token a step. They join between two steps and may leave at any time."""

    __slots__ = ("_block_size", "_by_phase", "_sum_computed", "num_members")

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self._block_size = block_size
        self._by_phase: dict[int, list[Paced]] = {}
        """Those whose next block is due when the number of planned steps has this remainder."""
        self.num_members = 0
        self._sum_computed = 0

    @property
    def num_context_tokens(self) -> int:
        """The sum of the members' computed tokens."""
        return self._sum_computed + self.num_members * self.num_planned

    def join(self, sequence: Paced) -> None:
        """Take in a sequence that lacks one token."""
        sequence.go_along(self)
        self._by_phase.setdefault(self._phase(sequence), []).append(sequence)
        self.num_members += 1
        self._sum_computed += sequence._computed

    def leave(self, sequence: Paced) -> None:
        """Let a member go; it counts by itself again."""
        phase = self._phase(sequence)
        members = self._by_phase[phase]
        members.remove(sequence)
        if not members:
            del self._by_phase[phase]
        self.num_members -= 1
        self._sum_computed -= sequence._computed
        sequence.go_along(STILL)

    def dissolve(self) -> None:
        """Let everybody go."""
        for members in self._by_phase.values():
            for sequence in members:
                sequence.go_along(STILL)
        self._by_phase.clear()
        self.num_members = 0
        self._sum_computed = 0

    def num_blocks_due(self) -> int:
        """New blocks that the next step needs."""
        return len(self._by_phase.get((self.num_planned + 1) % self._block_size, ()))

    def num_steps_within(self, num_blocks: int) -> int:
        """For how many more steps so many new blocks suffice; 0 for an empty group."""
        if not self.num_members:
            return 0
        # In as many steps as a block has tokens everybody takes one; in the last such round they take them in turn.
        whole, left = divmod(num_blocks, self.num_members)
        num_steps = whole * self._block_size
        for distance, phase in self._in_turn():
            left -= len(self._by_phase[phase])
            if left < 0:
                return num_steps + distance
        return num_steps

    def plan(self) -> None:
        """One more step is planned. The caller has taken the blocks that were due."""
        self.num_planned = planned = self.num_planned + 1
        for sequence in self._by_phase.get(planned % self._block_size, ()):
            sequence.num_blocks += 1

    def finish(self) -> None:
        """The steps that were planned have finished."""
        self.num_finished = self.num_planned

    def leap(self, num_steps: int) -> int:
        """Finish and plan as many steps, all at once; returns the blocks that they take."""
        num_blocks = 0
        whole, rest = divmod(num_steps, self._block_size)
        for distance, phase in self._in_turn():
            num_new = whole + (distance < rest)
            if num_new:
                members = self._by_phase[phase]
                num_blocks += num_new * len(members)
                for sequence in members:
                    sequence.num_blocks += num_new
        self.num_planned += num_steps
        self.num_finished += num_steps
        return num_blocks

    def _in_turn(self) -> list[tuple[int, int]]:
        """The phases that have members, each with how many steps come before the one that is due."""
        first, block_size = self.num_planned + 1, self._block_size
        return sorted([((phase - first) % block_size, phase) for phase in self._by_phase])

    def _phase(self, sequence: Paced) -> int:
        # With c computed tokens after step p, the step that plans token c + 1 takes a block if c is a whole number of
        # blocks; c - p never changes.
        return (1 - sequence._computed) % self._block_size
