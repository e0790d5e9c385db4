"""Sessions whose turns wait for each other: how many there are, how long after the last, how much of it they keep."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from math import inf

import msgspec

from rota.base.instant import Duration, seconds
from rota.base.random_streams import RandomStreams, Stream
from rota.serving.model.request import DEFAULT_TENANT, TenantId
from rota.serving.workload.arrivals import MAX_TOKENS, Arrival
from rota.serving.workload.distributions import Amounts, Lengths, QuantileSampler, check
from rota.serving.workload.formats.prefixes import PREFIX_BLOCK_TOKENS, Numbers, PrefixChain


class Conversations(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kind of session. A later turn comes when the one before has ended and a wait is over.

    A share `continues` of the later turns keeps the beginning of the previous prompt, all of it unless `kept` says
    which part, and goes on with `new_tokens`, among which may be the previous answer; the others share nothing and are
    as long as first prompts are. Lengths that are not given are those of the workload.
    """

    turns: Lengths
    wait_seconds: Amounts
    new_tokens: Lengths
    continues: float = 1.0
    kept: Amounts | None = None
    share: float = 1.0
    """Of the sessions; a weight."""
    priority: int = 0
    tenant: str = DEFAULT_TENANT
    prompt: Lengths | None = None
    output: Lengths | None = None

    def __post_init__(self) -> None:
        check(0 <= self.continues <= 1, "continues", "from 0 to 1", self.continues)
        most = 1.0 if self.kept is None else self.kept.points()[-1][1]
        check(most <= 1, "kept", "of parts from 0 to 1", most)
        check(0 < self.share < inf, "share", "positive", self.share)
        check(bool(self.tenant), "tenant", "not empty", self.tenant)


class ConversationSampler:
    """Draws sessions, turn by turn."""

    def __init__(
        self, kinds: Sequence[Conversations], prompt: Lengths, output: Lengths, streams: RandomStreams
    ) -> None:
        self._kinds = [_Kind(kind, prompt, output) for kind in kinds]
        self._until: list[float] = []
        for kind in kinds:
            self._until.append((self._until[-1] if self._until else 0.0) + kind.share)
        self._stream = streams.stream("workload.sessions")
        self._numbers = Numbers()

    def session(self, name: str, at: int) -> Iterator[Arrival]:
        """The turns of a session that begins at this instant."""
        stream = self._stream
        place = bisect_right(self._until, stream.random() * self._until[-1])
        kind = self._kinds[min(place, len(self._kinds) - 1)]
        facts, chain = kind.facts, PrefixChain(self._numbers)
        num_tokens = 0
        for turn in range(kind.turns.draw(stream)):
            gap = seconds(kind.wait.value(stream.random())) if turn else Duration(0)
            at += gap
            if turn and stream.random() < facts.continues:
                num_shared = kind.num_kept(num_tokens, stream)
                num_tokens = min(MAX_TOKENS, num_shared + kind.new.draw(stream))
            else:
                num_shared, num_tokens = 0, kind.prompt.draw(stream)
            yield Arrival(
                Duration(at),
                num_tokens,
                kind.output.draw(stream),
                chain.prompt(num_tokens, num_shared),
                PREFIX_BLOCK_TOKENS,
                session=name,
                tenant=TenantId(facts.tenant),
                priority=facts.priority,
                program=name,
                id=str(turn),
                after=(str(turn - 1),) if turn else (),
                gap=gap,
            )


class _Kind:
    """A kind of session, with what it draws from."""

    def __init__(self, facts: Conversations, prompt: Lengths, output: Lengths) -> None:
        self.facts = facts
        self.turns = QuantileSampler(facts.turns)
        self.wait = QuantileSampler(facts.wait_seconds)
        self.new = QuantileSampler(facts.new_tokens)
        self.prompt = QuantileSampler(facts.prompt or prompt)
        self.output = QuantileSampler(facts.output or output)
        self._kept = None if facts.kept is None else QuantileSampler(facts.kept)

    def num_kept(self, num_tokens: int, stream: Stream) -> int:
        """How much of a prompt of so many tokens the next one begins with."""
        return num_tokens if self._kept is None else round(num_tokens * self._kept.value(stream.random()))
