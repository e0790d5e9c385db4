"""Which sequences have a copy of their blocks in host memory."""

from rota.base.errors import LawBroken
from rota.serving.model.request import RequestId


class HostMemory:
    """The copies of one instance, within `num_blocks`.

    Full blocks only: they never change, so a copy stays valid for as long as it is kept. The copy of one that waits is
    kept until it is back; with `reuse` it stays *spare* then, until room lacks."""

    def __init__(self, num_blocks: int, *, reuse: bool) -> None:
        self.num_blocks = num_blocks
        self._reuse = reuse
        self._copies: dict[RequestId, int] = {}
        self._spare: dict[RequestId, None] = {}
        """Those of sequences that are back, the oldest first."""
        self.num_used = 0

    def keep(self, request_id: RequestId, num_blocks: int) -> int:
        """Have the first so many blocks of a preempted sequence kept; returns how many of them must be copied for that.
        Where they do not fit nothing is copied, and what is kept of it already stays."""
        self._spare.pop(request_id, None)
        valid = self._copies.get(request_id, 0)
        num_new = num_blocks - valid
        if num_new <= 0:
            return 0
        num_spare = sum(self._copies[one] for one in self._spare)
        if self.num_used + num_new - num_spare > self.num_blocks:
            return 0
        while self.num_used + num_new > self.num_blocks:
            self.forget(next(iter(self._spare)))
        self._copies[request_id] = num_blocks
        self.num_used += num_new
        return num_new

    def num_kept(self, request_id: RequestId) -> int:
        """Blocks of which there is a copy."""
        return self._copies.get(request_id, 0)

    def came_back(self, request_id: RequestId) -> None:
        """A sequence runs again."""
        if request_id not in self._copies:
            return
        if self._reuse:
            self._spare[request_id] = None
        else:
            self.forget(request_id)

    def forget(self, request_id: RequestId) -> None:
        """Drop a copy, if there is one."""
        self._spare.pop(request_id, None)
        self.num_used -= self._copies.pop(request_id, 0)

    def check(self, here: set[RequestId]) -> None:
        """Recount; raises `LawBroken` where a block leaked. `here` are all that have not ended."""
        if sum(self._copies.values()) != self.num_used or self.num_used > self.num_blocks:
            raise LawBroken(f"law 3: {self.num_used} host blocks counted of {self.num_blocks}, {self._copies} kept")
        if not here >= set(self._copies) or not set(self._copies) >= set(self._spare):
            raise LawBroken("law 3: host memory keeps blocks of somebody who has ended")
