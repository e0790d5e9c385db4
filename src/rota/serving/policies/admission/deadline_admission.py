"""Promise a first token and a pace on arrival, or refuse."""

from collections.abc import Sequence

from rota.base.errors import ConfigError
from rota.base.instant import Duration, Instant, after, milliseconds, seconds, to_seconds
from rota.serving.api import (
    NOTHING,
    Admission,
    ClusterView,
    EngineCapabilities,
    InstanceId,
    InstanceView,
    Request,
    RequestId,
    StepTimePredictor,
)
from rota.serving.policies.admission.drain_rate import DrainRate
from rota.serving.policies.admission.fitting import why_never
from rota.serving.policies.admission.step_floors import CONTEXT_BITS, KV_BITS, StepFloors

_OUTPUTS_REMEMBERED = 512
_NEVER = 2**63

_Steps = tuple[int, int, int, int, int, int, int]
"""Of a step of the last prompt at an instance: its prefill tokens, its decodes, the context of the one and the KV of
the others. And what the first token comes after, whichever is sooner: so many steps; or a wait and so many steps."""


class DeadlineAdmission:
    """Let a request in where its targets, and those of all who were promised before, are predicted to be kept by a
    margin; refuse it at once where they are not.

    Rule: for each instance, what it would be to come last there. A step that is as full as may be takes `t`, by the
    step-time predictor: `step_tokens` of prompts and of decodes, one for each request at the instance, over all the KV
    that they will hold. The first token comes when the prompts that wait there and its own are computed, `step_tokens`
    less the decodes a step, and one step later for the one that runs: at most `steps × t`. The pace is at most `t` a
    token. Both, times 1 + `margin`, must be within the targets of whoever asks (headers, or else `ttft_seconds` and
    `tpot_ms`), and `t` within those of all at that instance; and slots and blocks must suffice for all of them to their
    ends, so that nobody is preempted. Of the instances at which all this holds the one with the earliest first token
    takes the request, and the dispatch policy may send it nowhere else.

    Classes from `sheddable_from` on (lower is more urgent; -1 in the gateway's words is class 1) are shed first: for
    them targets, slots and blocks are `sheddable_share` of what they are.

    Assumes that an engine serves prompts in the order of arrival and at most `step_tokens` a step (a batch policy with
    chunks, or the engine's own limit). How long an answer gets is guessed as the mean of the last 512, but no more than
    `max_tokens`; the guess is of blocks only. Good where a late answer is worth nothing. A promise is lost with an
    instance that fails, and to step times that are further off than the margin. Starves, under lasting overload, long
    prompts and tight targets: they are refused, while short ones pass.
    """

    requires: EngineCapabilities = NOTHING

    def __init__(
        self,
        *,
        step_time: StepTimePredictor,
        step_overhead: Duration = Duration(0),
        margin: float = 0.1,
        ttft_seconds: float = 10.0,
        tpot_ms: float | None = None,
        step_tokens: int | None = None,
        sheddable_from: int = 1,
        sheddable_share: float = 0.5,
        fit_slack: float = 0.25,
    ) -> None:
        """`step_tokens` is the token budget of a step, if the batch policy has a smaller one than the engine. Raises
        `ConfigError` naming what is out of bounds."""
        bounds = {
            "margin": (margin, 0 <= margin < float("inf")),
            "ttft_seconds": (ttft_seconds, 0 < ttft_seconds < float("inf")),
            "tpot_ms": (tpot_ms, tpot_ms is None or 0 < tpot_ms < float("inf")),
            "step_tokens": (step_tokens, step_tokens is None or step_tokens > 0),
            "sheddable_share": (sheddable_share, 0 < sheddable_share <= 1),
            "fit_slack": (fit_slack, 0 <= fit_slack < float("inf")),
        }
        for name, (value, is_within) in bounds.items():
            if not is_within:
                raise ConfigError(f"deadline_admission: {name} is out of bounds: {value}")
        self._step_time = step_time
        self._floors = StepFloors(step_time)
        self._step_overhead = step_overhead
        self._margin = margin
        self._ttft = seconds(ttft_seconds)
        self._tpot = None if tpot_ms is None else milliseconds(tpot_ms)
        self._step_tokens = step_tokens
        self._sheddable_from = sheddable_from
        self._sheddable_share = sheddable_share
        self._fit_slack = fit_slack
        self._drain = DrainRate(seconds(10))
        self._places: dict[InstanceId, _Place] = {}
        self._place_of: dict[RequestId, _Place] = {}
        self._num_outputs = 0
        self._sum_outputs = 0

    def admit(self, request: Request, cluster: ClusterView, num_unfinished: int) -> Admission:
        now = cluster.now
        never = why_never(request, cluster, self._fit_slack)
        if never is not None:
            return Admission(False, never, 400)
        if not cluster.instances:
            return Admission(True, "no instance is ready, so nothing is promised")
        share = self._sheddable_share if request.priority >= self._sheddable_from else 1.0
        best = self._best(request, cluster.instances, share, now)
        if best is None:
            first = cluster.instances[0]
            why = self._obstacle(request, first, self._forecast(request, first, now), share)
            return self._refuse(request, why or "", share, now)
        self._drain.let_in(now)
        self._promise(request, best, now)
        words = f"the first token is promised within {to_seconds(self._ttft_of(request)):.3g} s"
        return Admission(
            True,
            f"{words} and predicted in {to_seconds(best.ttft):.3g} s at {best.place.id}",
            instance_ids=(best.place.id,),
        )

    def first_token_seen(self, request: Request) -> None:
        place = self._place_of.get(request.id)
        if place is not None:
            place.computed(request.id)

    def request_ended(self, request: Request, num_output_tokens: int | None) -> None:
        place = self._place_of.pop(request.id, None)
        if place is None:
            return
        place.forget(request.id)
        if not place.promises:
            del self._places[place.id]  # Instances come and go, under ever new names.
        self._drain.ended()
        if num_output_tokens:
            self._sum_outputs += num_output_tokens - (
                self._sum_outputs // self._num_outputs if self._num_outputs == _OUTPUTS_REMEMBERED else 0
            )
            self._num_outputs = min(self._num_outputs + 1, _OUTPUTS_REMEMBERED)

    # --- the forecast ------------------------------------------------------------------------------------------------

    def _best(
        self, request: Request, instances: Sequence[InstanceView], share: float, now: Instant
    ) -> "_Forecast | None":
        """Of what it would be at the instances where nothing is in the way, the earliest first token; the first by id
        among equals.

        Forecasts are made in the order of how early it may be, until that is later than the best or than the target.
        """
        target, factor = self._ttft_of(request), (1 + self._margin) / share
        best: _Forecast | None = None
        at_best = -1
        steps, order = self._steps_at(request, instances, now)
        predicted: dict[tuple[int, int], tuple[int, int, int]] = {}
        for each in order:
            earliest, at = divmod(each, len(instances))
            if earliest * factor > target if best is None else earliest > best.ttft:
                break
            num_prefill, num_ahead, context, num_kv, num_steps, wait, num_own_steps = steps[at]
            less = predicted.get((num_prefill, num_ahead))
            if best is not None and less is not None and less[0] <= context and less[1] <= num_kv and at > at_best:
                # With more work than a step that was predicted, a step is no shorter.
                step = less[2]
                if num_steps * step >= best.ttft and wait + num_own_steps * step >= best.ttft:
                    continue
            forecast = self._forecast(request, instances[at], now)
            predicted[num_prefill, num_ahead] = context, num_kv, forecast.step
            if best is not None and (forecast.ttft, at) >= (best.ttft, at_best):
                continue
            if self._obstacle(request, instances[at], forecast, share) is None:
                best, at_best = forecast, at
        return best

    def _steps_at(
        self, request: Request, instances: Sequence[InstanceView], now: Instant
    ) -> tuple[list[_Steps], list[int]]:
        """What the steps to the first token are at each instance; and when that comes at the earliest, times the number
        of instances, plus the place of the instance among them, the earliest first. In line, for there are many."""
        num_prompt, has_hashes, budget = request.num_prompt_tokens, bool(request.block_hashes), self._step_tokens
        num_more, overhead = num_prompt + self._guess(request), self._step_overhead
        places, floors, num_instances = self._places, self._floors, len(instances)
        steps: list[_Steps] = []
        order = []
        for at, view in enumerate(instances):
            num_own = num_prompt
            if has_hashes:
                num_own -= view.num_prefix_tokens(request)
                if num_own < 1:
                    num_own = 1
            num_prefill = budget or view.max_num_batched_tokens
            place = places.get(view.id)
            num_steps, wait, num_own_steps = 0, _NEVER, 0
            if place is None:
                num_ahead, context, num_kv = 0, num_prompt // 2, num_more
                num_left = num_own
            else:
                num_ahead = len(place.promises)
                num_prefill -= num_ahead
                if num_prefill < 1:
                    num_prefill = 1
                num_left = place.num_waiting + num_own
                context = (place.num_weighted + num_own * num_prompt) // (2 * num_left)
                num_kv = place.num_kv_tokens + num_more
                if num_left > num_own and place.busy_until > now:
                    wait, num_own_steps = place.busy_until - now, (num_own - 1) // num_prefill + 2
            num_steps = (num_left - 1) // num_prefill + 2
            cell = num_prefill, context >> CONTEXT_BITS, num_ahead, num_kv >> KV_BITS
            step = overhead + (floors.known.get(cell) or floors.ask(cell))
            earliest = num_steps * step
            if wait < earliest and wait + num_own_steps * step < earliest:
                earliest = wait + num_own_steps * step
            order.append(earliest * num_instances + at)
            steps.append((num_prefill, num_ahead, context, num_kv, num_steps, wait, num_own_steps))
        order.sort()
        return steps, order

    def _forecast(self, request: Request, view: InstanceView, now: Instant) -> "_Forecast":
        """What it would be to come last at an instance."""
        place = self._places.get(view.id) or _Place(view.id)
        num_ahead = len(place.promises)
        num_kv = place.num_kv_tokens + request.num_prompt_tokens + self._guess(request)
        num_own = max(1, request.num_prompt_tokens - view.num_prefix_tokens(request))
        num_waiting, num_weighted = place.num_waiting, place.num_weighted
        budget = self._step_tokens or view.max_num_batched_tokens
        num_prefill = max(1, budget - num_ahead)
        num_weighted += num_own * request.num_prompt_tokens
        context = num_weighted // (2 * (num_waiting + num_own))
        step = self._step_overhead + self._step_time.step_time(
            prefills=[(num_prefill, context)], num_decodes=num_ahead, decode_kv_tokens=num_kv, now=now
        )
        num_steps = -(-(num_waiting + num_own) // num_prefill) + 1
        ttft = num_steps * step
        if num_waiting and place.busy_until > now:
            # The prompt at the head is computed in part already.
            own_steps = -(-num_own // num_prefill) + 1
            ttft = min(ttft, place.busy_until - now + own_steps * step)
        return _Forecast(place, Duration(ttft), Duration(step), num_own, num_kv, num_ahead >= budget)

    def _obstacle(self, request: Request, view: InstanceView, forecast: "_Forecast", share: float) -> str | None:
        """Why the targets would not be kept at an instance; None where they would."""
        place, factor = forecast.place, (1 + self._margin) / share
        if len(place.promises) + 1 > view.max_num_seqs * share or forecast.is_crowded:
            return f"{len(place.promises)} requests are at {place.id}"
        if forecast.num_kv_tokens > view.num_blocks * view.block_size * share and place.promises:
            return f"{place.id} would need blocks for {forecast.num_kv_tokens} tokens"
        ttft = self._ttft_of(request)
        if forecast.ttft * factor > ttft:
            late = f"the first token would come in {to_seconds(forecast.ttft):.3g} s"
            return f"{late}, {to_seconds(ttft):.3g} s is the target"
        own, theirs = self._tpot_of(request), place.tightest
        slow = f"a token would take {forecast.step / 1e6:.3g} ms"
        if own is not None and forecast.step * factor > own:
            return f"{slow}, {own / 1e6:.3g} ms is the target"
        if theirs is not None and forecast.step * (1 + self._margin) > theirs:
            return f"{slow}, others at {place.id} were promised {theirs / 1e6:.3g} ms"
        return None

    def _refuse(self, request: Request, why: str, share: float, now: Instant) -> Admission:
        is_idle = not self._place_of
        if is_idle and share == 1.0:
            return Admission(False, f"{why}, and nothing else is here: the targets can never be kept", 400)
        delay = self._drain.turned_away(now)
        shed = " (its class is shed first)" if share < 1.0 else ""
        return Admission(False, f"{why}{shed}; try again in {delay:.3g} s", 503, delay)

    def _promise(self, request: Request, forecast: "_Forecast", now: Instant) -> None:
        place = self._places.setdefault(forecast.place.id, forecast.place)
        num_kv = request.num_prompt_tokens + self._guess(request)
        place.remember(
            request.id, _Promise(request.num_prompt_tokens, forecast.num_own, num_kv, self._tpot_of(request))
        )
        place.busy_until = after(now, forecast.ttft)
        self._place_of[request.id] = place

    def _guess(self, request: Request) -> int:
        """How long the answer gets, for the blocks that it will need."""
        if not self._num_outputs:
            return request.max_tokens
        return min(request.max_tokens, -(-self._sum_outputs // self._num_outputs))

    def _ttft_of(self, request: Request) -> Duration:
        return self._ttft if request.slo.ttft is None else request.slo.ttft

    def _tpot_of(self, request: Request) -> Duration | None:
        return self._tpot if request.slo.tpot is None else request.slo.tpot


class _Promise:
    """What is known of one request at an instance."""

    __slots__ = ("is_waiting", "num_kv_tokens", "num_own", "num_prompt_tokens", "tpot")

    def __init__(self, num_prompt_tokens: int, num_own: int, num_kv_tokens: int, tpot: Duration | None) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.num_own = num_own
        """Prompt tokens that were not thought to be cached."""
        self.num_kv_tokens = num_kv_tokens
        self.tpot = tpot
        self.is_waiting = True
        """Its first token was not seen."""


class _Place:
    """Who was promised something at one instance."""

    __slots__ = ("busy_until", "id", "num_kv_tokens", "num_waiting", "num_weighted", "promises", "tightest")

    def __init__(self, instance_id: InstanceId) -> None:
        self.id = instance_id
        self.promises: dict[RequestId, _Promise] = {}
        self.num_kv_tokens = 0
        self.tightest: Duration | None = None
        self.busy_until = Instant(0)
        """When the last of them has its first token, as it was predicted."""
        self.num_waiting = 0
        """Prompt tokens of those whose first token was not seen."""
        self.num_weighted = 0
        """Their sum by the length of their prompts."""

    def remember(self, request_id: RequestId, promise: _Promise) -> None:
        self.promises[request_id] = promise
        self.num_kv_tokens += promise.num_kv_tokens
        self.num_waiting += promise.num_own
        self.num_weighted += promise.num_own * promise.num_prompt_tokens
        self.tightest = min((each for each in (self.tightest, promise.tpot) if each is not None), default=None)

    def computed(self, request_id: RequestId) -> None:
        """Its prompt does not wait any more."""
        promise = self.promises[request_id]
        if promise.is_waiting:
            promise.is_waiting = False
            self.num_waiting -= promise.num_own
            self.num_weighted -= promise.num_own * promise.num_prompt_tokens

    def forget(self, request_id: RequestId) -> None:
        self.computed(request_id)
        promise = self.promises.pop(request_id)
        self.num_kv_tokens -= promise.num_kv_tokens
        if promise.tpot is not None and promise.tpot == self.tightest:
            self.tightest = min((each.tpot for each in self.promises.values() if each.tpot is not None), default=None)


class _Forecast:
    """What it would be to come last at an instance."""

    __slots__ = ("is_crowded", "num_kv_tokens", "num_own", "place", "step", "ttft")

    def __init__(
        self, place: _Place, ttft: Duration, step: Duration, num_own: int, num_kv_tokens: int, is_crowded: bool
    ) -> None:
        self.place = place
        self.ttft = ttft
        """To the first token."""
        self.step = step
        """The longest step while it is there."""
        self.num_own = num_own
        self.num_kv_tokens = num_kv_tokens
        """Of all at the instance, this one with them, at their ends."""
        self.is_crowded = is_crowded
        """The decodes of those who are there leave no room for a prompt in a step."""
