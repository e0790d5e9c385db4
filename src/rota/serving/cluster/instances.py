"""The instances that the router knows: which are ready, what each can take, and what is outstanding there."""

from collections.abc import Iterable, Sequence

from rota.base.errors import LawBroken
from rota.base.instant import Instant
from rota.serving.api import InstanceView
from rota.serving.cluster.ledger import InstanceLedger
from rota.serving.cluster.lifecycles import InstanceState, RequestState
from rota.serving.cluster.prefix_index import PrefixIndex
from rota.serving.cluster.tracked import TrackedRequest
from rota.serving.model.capabilities import Capability
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceReport, InstanceSpec
from rota.serving.model.request import RequestId

OPEN_STATES = (InstanceState.READY, InstanceState.DRAINING)
"""An instance in one of these has requests, or may get some."""


class InstanceBook:
    """One ledger for each instance, from its first start until it is forgotten."""

    def __init__(self, prefix_index: PrefixIndex | None, max_outstanding: int | None = None) -> None:
        """With `max_outstanding`, an instance that has so many requests takes no more."""
        self.ledgers: dict[InstanceId, InstanceLedger] = {}
        self.ready: tuple[InstanceLedger, ...] = ()
        """By id, as are all below."""
        self.ready_views: tuple[InstanceView, ...] = ()
        self.open_views: tuple[InstanceView, ...] = ()
        """Those that are ready, and those that drain."""
        self.is_place_free = False
        """Set when one who was resumed no longer waits for its next token; whoever looks at it resets it."""
        self.max_prompt_anywhere: int | None = None
        """Prompt tokens that the largest instance ever seen can take; None before the first."""
        self._max_prompt_everywhere = 0
        """Prompt tokens that every ready instance can take."""
        self.changed: dict[InstanceId, InstanceLedger] | None = None
        """Instances of which a report came, or a request ended or left, since whoever wants to know looked last; None
        where nobody does."""
        self._prefix_index = prefix_index
        self._max_outstanding = max_outstanding

    def start(self, spec: InstanceSpec, now: Instant) -> None:
        """An instance is ready, for the first time or again, with nothing cached."""
        ledger = self.ledgers.get(spec.id)
        if ledger is None:
            ledger = self.ledgers[spec.id] = InstanceLedger(spec.id, spec, self._prefix_index)
        ledger.start(spec, now)
        if self._prefix_index is not None:
            num_blocks = spec.limits.num_blocks if spec.limits.enable_prefix_caching else 0
            self._prefix_index.add_instance(spec.id, num_blocks, spec.limits.block_size)
        self.max_prompt_anywhere = max(self.max_prompt_anywhere or 0, ledger.max_prompt_tokens)
        self.refresh()

    def keep(self, instance_id: InstanceId) -> None:
        """An instance that drains is not to be drained after all."""
        self.ledgers[instance_id].move("kept")
        self.refresh()

    def take_report(self, report: InstanceReport, now: Instant) -> None:
        """Keep a report of an instance that is known. Raises `LawBroken` for one from the future."""
        if report.observed_at > now:
            raise LawBroken(
                f"law 5: {report.instance_id} reports what it will be at {report.observed_at}, now is {now}"
            )
        ledger = self.ledgers.get(report.instance_id)
        if ledger is not None:
            ledger.take_report(report)
            if self.changed is not None:
                self.changed[ledger.id] = ledger

    def assign(self, tracked: TrackedRequest, instance_id: InstanceId) -> None:
        """The request is this instance's from here on, with its prompt and what it has generated."""
        if tracked.decode_at is not None:
            self.unbook(tracked)
        tracked.instance_id = instance_id
        is_running = tracked.state == RequestState.RUNNING
        num_tokens = 1 if is_running else tracked.num_tokens
        is_resuming = tracked.num_resumptions > 0 and not is_running
        self.ledgers[instance_id].debit(tracked.request, num_tokens, is_resuming=is_resuming)
        if self._prefix_index is not None:
            self._prefix_index.record(tracked.request, instance_id)

    def first_token(self, tracked: TrackedRequest) -> None:
        """The next token of a request passed at its instance."""
        if tracked.instance_id is not None:
            self.is_place_free |= self.ledgers[tracked.instance_id].first_token(tracked.request.id)

    def release(self, tracked: TrackedRequest) -> None:
        """Take the request off its instance's account."""
        if tracked.decode_at is not None:
            self.unbook(tracked)
        if tracked.instance_id is not None:
            ledger = self.ledgers[tracked.instance_id]
            tracked.instance_id = None
            self.is_place_free |= ledger.credit(tracked.request) or self._max_outstanding is not None
            if self.changed is not None:
                self.changed[ledger.id] = ledger
            self.forget_if_over(ledger)

    def book(self, tracked: TrackedRequest, instance_id: InstanceId) -> None:
        """The request is to decode there when its next token has come where it is."""
        tracked.decode_at = instance_id
        self.ledgers[instance_id].expect(tracked.request)

    def unbook(self, tracked: TrackedRequest) -> None:
        """The request is expected nowhere any more, if it was."""
        if tracked.decode_at is not None:
            ledger = self.ledgers[tracked.decode_at]
            tracked.decode_at = None
            ledger.expect(tracked.request, -1)
            self.forget_if_over(ledger)

    def forget_if_over(self, ledger: InstanceLedger) -> None:
        """Forget an instance that gets no requests any more, has none left, expects none, and has none on its way,
        unless it drains to have another role."""
        if ledger.num_outstanding_requests or ledger.num_migrations or ledger.num_expected_requests:
            return
        if ledger.state == InstanceState.READY or (ledger.is_flipping and ledger.state == InstanceState.DRAINING):
            return
        if self.ledgers.get(ledger.id) is not ledger:
            return
        if ledger.state == InstanceState.DRAINING:
            ledger.move("drained")
        del self.ledgers[ledger.id]
        self.refresh()
        if self._prefix_index is not None:
            self._prefix_index.forget_instance(ledger.id)

    def refresh(self) -> None:
        """The state of an instance has changed: see anew who is ready."""
        ledgers = _by_id(self.ledgers.values())
        self.ready = tuple(ledger for ledger in ledgers if ledger.state == InstanceState.READY)
        self.ready_views = tuple(ledger.view for ledger in self.ready)
        self.open_views = tuple(ledger.view for ledger in ledgers if ledger.state in OPEN_STATES)
        self._max_prompt_everywhere = min((ledger.max_prompt_tokens for ledger in self.ready), default=0)

    def candidates(self, tracked: TrackedRequest, max_resuming: int) -> Sequence[InstanceView]:
        """Ready instances that can take the request, by id: without those that failed it while there are others, and
        where all of them did without the one that did last, which may be dead and not known to be.

        One that goes on after some tokens fits where all of its tokens do, the engine can do that, and fewer than
        `max_resuming` like it are waited for."""
        num_tokens = tracked.num_tokens
        ready: Sequence[InstanceLedger] = self.ready
        if self._max_outstanding is not None:
            ready = [ledger for ledger in ready if ledger.num_outstanding_requests < self._max_outstanding]
        elif num_tokens <= self._max_prompt_everywhere and not tracked.failures:
            return _among(self.ready_views, tracked.only)
        fitting = [ledger for ledger in ready if num_tokens <= ledger.max_prompt_tokens]
        if tracked.num_resumptions:
            able = [each for each in fitting if Capability.RESUME_FROM_TOKENS in each.spec.capabilities]
            fitting = [ledger for ledger in able if ledger.num_resuming < max_resuming]
        views = [ledger.view for ledger in fitting]
        if not tracked.failures:
            return _among(views, tracked.only)
        failed = [instance_id for instance_id, _ in tracked.failures]
        untried = [view for view in views if view.id not in failed]
        return untried or [view for view in views if view.id != failed[-1]] or views

    @property
    def has_place(self) -> bool:
        """Whether some ready instance may be given a request more."""
        limit = self._max_outstanding
        return limit is None or any(ledger.num_outstanding_requests < limit for ledger in self.ready)

    @property
    def limits(self) -> InstanceLimits:
        """Of the ready instance that has most room; one block where none is ready."""
        all_limits = (ledger.spec.limits for ledger in self.ready)
        return max(all_limits, key=lambda limits: limits.num_blocks, default=InstanceLimits(num_blocks=1))

    def is_full_for(self, tracked: TrackedRequest) -> bool:
        """Whether some ready instance could take the request, had it not as many as it may have."""
        fits = (ledger for ledger in self.ready if tracked.num_tokens <= ledger.max_prompt_tokens)
        return self._max_outstanding is not None and any(
            ledger.num_outstanding_requests >= self._max_outstanding for ledger in fits
        )

    def why_none(self, tracked: TrackedRequest) -> str:
        """Why no instance can take the request."""
        if not self.ready:
            return "none is ready"
        if self.is_full_for(tracked):
            return f"those of {len(self.ready)} that could have {self._max_outstanding} requests each"
        what = f"{tracked.num_tokens} tokens that go on" if tracked.num_resumptions else None
        return f"none of {len(self.ready)} takes {what or f'{tracked.request.num_prompt_tokens} prompt tokens'}"

    def states(self) -> dict[InstanceId, InstanceState]:
        """Every instance that is not forgotten, by id, and its state."""
        return {ledger.id: InstanceState(ledger.state) for ledger in _by_id(self.ledgers.values())}

    def check(self, requests: dict[RequestId, TrackedRequest], num_owned: int) -> None:
        """Law 1: every request that is outstanding somewhere is so at its one owner, and the sums are right."""
        expected: dict[InstanceId, list[int]] = {}
        for each in requests.values():
            if each.decode_at is not None:
                expected.setdefault(each.decode_at, []).append(each.request.num_prompt_tokens)
        for ledger in self.ledgers.values():
            recount = 0
            num_expected, num_booked = len(expected.get(ledger.id, ())), sum(expected.get(ledger.id, ()))
            for request_id in ledger.outstanding:
                tracked = requests.get(request_id)
                if tracked is None or tracked.instance_id != ledger.id:
                    owner = None if tracked is None else tracked.instance_id
                    raise LawBroken(f"law 1: {request_id} is outstanding at {ledger.id}, but its owner is {owner}")
                recount += 1 if tracked.state == RequestState.RUNNING else tracked.num_tokens
                num_booked += tracked.request.num_prompt_tokens
            if recount != ledger.num_outstanding_tokens:
                raise LawBroken(
                    f"law 1: {ledger.id} counts {ledger.num_outstanding_tokens} outstanding tokens, "
                    f"its requests {recount}"
                )
            if (num_expected, num_booked) != (ledger.num_expected_requests, ledger.num_booked_tokens):
                raise LawBroken(
                    f"law 1: {ledger.id} expects {ledger.num_expected_requests} requests and books "
                    f"{ledger.num_booked_tokens} tokens, but it is {num_expected} and {num_booked}"
                )
        # Each outstanding request is owned where it is counted, so equal numbers mean that nobody is owned uncounted.
        num_outstanding = sum(ledger.num_outstanding_requests for ledger in self.ledgers.values())
        if num_outstanding != num_owned:
            raise LawBroken(
                f"law 1: {num_outstanding} requests are outstanding at instances, but {num_owned} are owned"
            )
        if self._prefix_index is not None:
            self._prefix_index.check()


def _among(views: Sequence[InstanceView], only: Sequence[InstanceId]) -> Sequence[InstanceView]:
    """Those that a request may go to by the terms on which it was let in; all of them where none of those is there."""
    return ([view for view in views if view.id in only] or views) if only else views


def _by_id(ledgers: Iterable[InstanceLedger]) -> tuple[InstanceLedger, ...]:
    return tuple(sorted(ledgers, key=lambda ledger: ledger.id))
