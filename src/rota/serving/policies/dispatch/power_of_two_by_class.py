"""Prompts to the least loaded prefill instance; each decode to the one of two that has fewer heavy decodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rota.base.errors import ConfigError
from rota.base.instant import Duration, Instant, seconds, to_seconds
from rota.base.random_streams import Stream
from rota.serving.api import (
    NOTHING,
    ClusterView,
    EngineCapabilities,
    Flip,
    InstanceId,
    InstanceView,
    Pick,
    Request,
    RequestId,
    Role,
)
from rota.serving.policies.dispatch.by_role import ByRole, place_of
from rota.serving.policies.dispatch.scoring import least_loaded, load_scores
from rota.serving.policies.observed_lengths import ObservedLengths
from rota.serving.policies.parameters import at_least_one

Reserve = Literal["greedy", "static", "dynamic"]


@dataclass(frozen=True, slots=True)
class _Placed:
    """A request that was sent somewhere to decode."""

    instance_id: InstanceId
    num_tokens_min: int
    """Prompt and first token."""
    num_tokens_max: int
    """Prompt and the upper end of the predicted range."""
    is_heavy: bool


class PowerOfTwoByClass:
    """Of the decode instances that can take a request, two at random, and of these the one with the smaller share of
    heavy decodes.

    Rule: TetriInfer (2024). The prompt goes to the prefill instance with the fewest outstanding tokens. Once its first
    token has come, the length of the answer is predicted, as a range of `bucket_tokens`; it is heavy if the middle of
    the range is above `heavy_tokens`. Of the decode instances that would admit it, two are drawn, and the one with the
    smaller share of heavy decodes takes it; fewer booked tokens, then the id, decide among equals. Where none would
    admit it, it decodes where it is. An instance admits it

    * `greedy`: if what is known of it fits now;
    * `static`: if all of it fits beside all of everybody's, at the upper end of each range: then nobody is preempted if
      the predictions hold;
    * `dynamic`: if what is known of it fits now, and all that it and the others will have by then fits when the first
      of those who are there has ended.

    Published: the rule and `bucket_tokens` (the range of its predictor). Its sources put the limit of heavy decodes
    anywhere from 100 to 512 tokens, so `heavy_tokens` is a choice. Ours: the predictor, which is the median of the
    answers that ended lately for like prompts (see `ObservedLengths`; theirs is a language model of 125 million
    parameters that names the range in three of four cases).

    Flips: with `flip_after_seconds`, an instance that has had nothing to do for so long, or as a decode instance less
    than a tenth of its memory booked, takes the other role, if there is another one of its own and nobody of the other
    has as little to do. Published: a minute, and a tenth; off unless asked for.

    Instances of role `mixed` take prompts where no prefill instance is, and decode beside the decode instances. Good
    where long and short answers mix and memory is short. Starves nobody; a heavy decode may stay at a prefill instance
    while others wait there.
    """

    requires: EngineCapabilities = NOTHING
    reads_roles = True
    reads_sequences = True

    def __init__(
        self,
        *,
        stream: Stream,
        heavy_tokens: int = 128,
        bucket_tokens: int = 200,
        reserve: Reserve = "dynamic",
        guess_tokens: int = 256,
        flip_after_seconds: float = 0.0,
    ) -> None:
        """`heavy_tokens` and `bucket_tokens` are output tokens, at least 1; `guess_tokens` is predicted before any
        answer ended. `flip_after_seconds` of 0 flips nobody; TetriInfer's is 60. `stream` is the source of the draws.
        Raises `ConfigError` outside of that."""
        at_least_one(
            "power_of_two_by_class",
            heavy_tokens=heavy_tokens,
            bucket_tokens=bucket_tokens,
            guess_tokens=guess_tokens,
        )
        if reserve not in ("greedy", "static", "dynamic"):
            raise ConfigError(f"power_of_two_by_class: reserve must be greedy, static or dynamic, not {reserve!r}")
        if not 0.0 <= flip_after_seconds < 1e9:
            raise ConfigError(f"power_of_two_by_class: flip_after_seconds must be at least 0, not {flip_after_seconds}")
        self._flip_after = seconds(flip_after_seconds)
        self._idle_since: dict[InstanceId, Instant] = {}
        self._stream = stream
        self._heavy_tokens = heavy_tokens
        self._bucket_tokens = bucket_tokens
        self._reserve = reserve
        self._by_role = ByRole()
        self._lengths = ObservedLengths(guess_tokens=guess_tokens)
        self._placed: dict[RequestId, _Placed] = {}
        self._at: dict[InstanceId, dict[RequestId, _Placed]] = {}

    def pick(self, request: Request, cluster: ClusterView) -> Pick:
        instances = cluster.instances
        roles = self._by_role.of(instances)
        takers = roles.prefill or roles.mixed or instances
        chosen = least_loaded(takers)
        is_split = chosen.role is Role.PREFILL and bool(roles.not_prefill)
        reason = f"fewest outstanding tokens ({chosen.num_outstanding_tokens}) of {len(takers)} that take prompts"
        return Pick(chosen.id, reason, load_scores(takers), prefill_only=is_split)

    def pick_decode(self, request: Request, at: InstanceId, cluster: ClusterView) -> Pick:
        left = list(self._by_role.of(cluster.instances).not_prefill)
        if (place := place_of(at, left)) is not None:
            del left[place]
        num_decode = len(left)
        low = self._lengths.predict(request) // self._bucket_tokens * self._bucket_tokens
        placed = _Placed(
            at,
            request.num_prompt_tokens + 1,
            request.num_prompt_tokens + min(low + self._bucket_tokens, request.max_tokens),
            low + self._bucket_tokens // 2 > self._heavy_tokens,
        )
        drawn: list[InstanceView] = []
        while left and len(drawn) < 2:
            view = left.pop(self._stream.integers(0, len(left)))
            if self._admits(view, placed):
                drawn.append(view)
        kind = f"{'heavy' if placed.is_heavy else 'light'}, {low} to {low + self._bucket_tokens} tokens expected"
        if not drawn:
            return Pick(at, f"none of {num_decode} that decode admits it ({self._reserve}; {kind})")
        chosen = min(drawn, key=lambda view: (self._share_heavy(view.id), view.num_booked_tokens, view.id))
        self._forget(request.id)
        self._placed[request.id] = placed = _Placed(
            chosen.id, placed.num_tokens_min, placed.num_tokens_max, placed.is_heavy
        )
        self._at.setdefault(chosen.id, {})[request.id] = placed
        shares = ", ".join(f"{view.id} {self._share_heavy(view.id):.0%}" for view in drawn)
        return Pick(chosen.id, f"{kind}; heavy decodes at {shares}, drawn of {num_decode}")

    def request_ended(self, request: Request, num_output_tokens: int | None) -> None:
        self._forget(request.id)
        if num_output_tokens is not None:
            self._lengths.learn(request, num_output_tokens)

    def flip(self, cluster: ClusterView) -> Flip | None:
        if not self._flip_after:
            return None
        since, now = self._idle_since, cluster.now
        self._idle_since = {view.id: since.get(view.id, now) for view in cluster.instances if _has_little_to_do(view)}
        for view in cluster.instances:
            if view.role is Role.MIXED or now - self._idle_since.get(view.id, now) < self._flip_after:
                continue
            role = Role.DECODE if view.role is Role.PREFILL else Role.PREFILL
            others = [each for each in cluster.instances if each.role is role]
            is_last = sum(each.role is view.role for each in cluster.instances) == 1
            if others and not is_last and not any(each.id in self._idle_since for each in others):
                idle = to_seconds(Duration(now - self._idle_since.pop(view.id)))
                return Flip(view.id, role, f"{view.id} had little to do for {idle:g} s; no {role} instance had")
        return None

    # --- inside ------------------------------------------------------------------------------------------------------

    def _forget(self, request_id: RequestId) -> None:
        placed = self._placed.pop(request_id, None)
        if placed is not None:
            here = self._at[placed.instance_id]
            del here[request_id]
            if not here:
                del self._at[placed.instance_id]

    def _share_heavy(self, instance_id: InstanceId) -> float:
        here = self._at.get(instance_id)
        return sum(each.is_heavy for each in here.values()) / len(here) if here else 0.0

    def _admits(self, view: InstanceView, placed: _Placed) -> bool:
        capacity = view.num_blocks * view.block_size
        here = self._at.get(view.id, {})
        if self._reserve == "static":
            return placed.num_tokens_max + sum(each.num_tokens_max for each in here.values()) <= capacity
        held = view.num_booked_tokens
        if view.num_free_blocks is not None:
            held = max(held, (view.num_blocks - view.num_free_blocks) * view.block_size)
        if held + placed.num_tokens_min > capacity:
            return False
        return self._reserve == "greedy" or _fits_when_the_first_ends(capacity, placed, _left(view, here))


def _has_little_to_do(view: InstanceView) -> bool:
    if view.num_outstanding_requests == 0 and view.num_expected_requests == 0:
        return True
    return view.role is Role.DECODE and 10 * view.num_booked_tokens < view.num_blocks * view.block_size


def _left(view: InstanceView, here: Mapping[RequestId, _Placed]) -> Sequence[tuple[int, int]]:
    """Of each request that was placed there: the tokens that it has by now, and how many it may still get."""
    known = {each.request_id: each.num_tokens for each in view.running} if here else {}
    found = []
    for request_id, each in here.items():
        num_tokens = max(each.num_tokens_min, known.get(request_id, 0))
        found.append((num_tokens, max(1, each.num_tokens_max - num_tokens)))
    return found


def _fits_when_the_first_ends(capacity: int, placed: _Placed, others: Sequence[tuple[int, int]]) -> bool:
    if not others:
        return True
    num_steps = min(left for _, left in others)
    first = min(range(len(others)), key=lambda number: others[number][1])
    num_tokens = sum(known + num_steps for number, (known, _) in enumerate(others) if number != first)
    return num_tokens + min(placed.num_tokens_min + num_steps, placed.num_tokens_max) <= capacity
