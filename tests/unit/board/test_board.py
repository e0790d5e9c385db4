"""A board's picture against what is known of the run by other ways."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from rota.base.instant import Duration, Instant, milliseconds, seconds
from rota.base.journal import Row
from rota.serving.board.board import NUM_CLASSES, NUM_REFUSALS, NUM_TENANTS, Board
from rota.serving.model.commands import Dispatch, Fail, Reject
from rota.serving.model.events import (
    ClientLeft,
    FirstTokenSeen,
    InstanceDraining,
    InstanceLost,
    InstanceReported,
    InstanceStarted,
    InstanceStopped,
    RequestArrived,
    RequestFailed,
    RequestFinished,
)
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceReport, InstanceSpec, SequenceReport
from rota.serving.model.request import SLO, Request, RequestId, TenantId

I0 = InstanceId("i0")


class Router:
    """Writes the rows of a router by hand."""

    def __init__(self) -> None:
        self.board = Board()
        self.at = seconds(100)
        self.num_rows = 0

    def row(self, event: object, *commands: object, after: float = 0.0) -> None:
        self.at = Instant(self.at + seconds(after))
        self.board.on_row(Row(self.num_rows, "cluster", self.at, "event", event, commands))
        self.num_rows += 1

    def arrives(
        self, name: str, *, tenant: str = "a", prompt: int = 100, priority: int = 0, ttft: Duration | None = None
    ) -> RequestId:
        request_id = RequestId(name)
        request = Request(request_id, self.at, prompt, 50, priority, TenantId(tenant), slo=SLO(ttft=ttft))
        self.row(RequestArrived(request), Dispatch(request_id, I0, "the only one"))
        return request_id


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.integers(1, 500),
            st.integers(0, 40),
            st.sampled_from(["ends", "leaves", "fails"]),
        ),
        max_size=40,
    )
)
def test_everybody_is_counted_once_and_service_is_what_was_served(requests: list[tuple[str, int, int, str]]) -> None:
    router = Router()
    names = [
        router.arrives(f"r{index}", tenant=tenant, prompt=prompt)
        for index, (tenant, prompt, _, _) in enumerate(requests)
    ]
    assert router.board.picture().num_unfinished == len(requests)
    service: Counter[str] = Counter()
    for name, (tenant, prompt, output, end) in zip(names, requests, strict=True):
        if output:
            router.row(FirstTokenSeen(name, I0), after=0.01)
            service[tenant] += prompt + 2
        if end == "ends" and output:
            router.row(RequestFinished(name, I0, output), after=0.1)
            service[tenant] += 2 * (output - 1)
        elif end == "fails":
            router.row(RequestFailed(name, I0, "it burns"), Fail(name, "it burns"))
        else:
            router.row(ClientLeft(name))
    now = router.board.picture()
    ends = Counter("leaves" if end == "ends" and not output else end for _, _, output, end in requests)
    assert (now.num_unfinished, now.num_finished, now.num_failed) == (0, ends["ends"], ends["fails"])
    assert {tenant.id: tenant.service for tenant in now.tenants if tenant.service} == dict(service)
    assert all(tenant.lag == 0 for tenant in now.tenants), "who has nothing under way is owed nothing"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 100)), max_size=60))
def test_what_one_tenant_is_ahead_the_others_are_behind(served: list[tuple[int, int]]) -> None:
    """As long as the same tenants have something under way, lags add up to nothing."""
    router = Router()
    for tenant in range(4):
        for index in range(len(served) + 1):
            router.arrives(f"{tenant}-{index}", tenant=f"t{tenant}")
    for index, (tenant, output) in enumerate(served):
        router.row(RequestFinished(RequestId(f"{tenant}-{index}"), I0, output), after=0.1)
    lags = {tenant.id: tenant.lag for tenant in router.board.picture().tenants}
    assert abs(sum(lags.values())) < 1e-6
    total = {tenant.id: tenant.service for tenant in router.board.picture().tenants}
    fair = sum(total.values()) / 4
    assert all(abs(lags[tenant] - (fair - total[tenant])) < 1e-6 for tenant in lags)


def test_a_tenant_that_comes_back_is_owed_nothing_for_the_time_between() -> None:
    router = Router()
    router.arrives("late", tenant="idle", prompt=1)
    router.row(RequestFinished(RequestId("late"), I0, 1))
    busy = [router.arrives(f"b{index}", tenant="busy", prompt=1000) for index in range(3)]
    for name in busy[:2]:
        router.row(RequestFinished(name, I0, 10), after=1.0)
    router.arrives("back", tenant="idle")
    assert {each.id: each.lag for each in router.board.picture().tenants} == {"busy": 0.0, "idle": 0.0}


def test_classes_show_latency_promises_and_who_waits() -> None:
    router = Router()
    promised = Duration(milliseconds(500))
    for index in range(4):
        router.arrives(f"r{index}", priority=-1, ttft=promised)
        router.row(FirstTokenSeen(RequestId(f"r{index}"), I0), after=0.1 if index else 2.0)
    router.arrives("waits", priority=5)
    router.row(InstanceDraining(I0), after=3.0)
    high, low = router.board.picture().classes
    assert (high.priority, high.num_unfinished, high.num_waiting, high.oldest_seconds) == (-1, 4, 0, None)
    assert (high.ttft_p50_ms, high.ttft_p99_ms) == (100.0, 2000.0)
    assert (high.slo_ms, high.slo_attainment) == (500.0, 0.75)
    assert (low.num_waiting, low.oldest_seconds, low.slo_ms, low.slo_attainment) == (1, 3.0, None, None)


def test_instances_show_what_they_said_last_and_how_old_that_is() -> None:
    router = Router()
    router.row(InstanceStarted(InstanceSpec(I0, InstanceLimits(num_blocks=100))))
    (shown,) = router.board.picture().instances
    assert (shown.state, shown.num_running, shown.kv_use) == ("ready", None, None)
    name = router.arrives("r", prompt=100)
    router.row(FirstTokenSeen(name, I0))
    running = (SequenceReport(name, 112, 7),)
    router.row(InstanceReported(InstanceReport(I0, router.at, 1, 3, 25, 100, 2, running)))
    (tenant,) = router.board.picture().tenants
    assert tenant.service == 100 + 2 * 12, "what a report tells of a stream is served already"
    router.row(InstanceLost(I0, "it burns"), after=4.0)
    (shown,) = router.board.picture().instances
    assert (shown.state, shown.num_running, shown.num_waiting, shown.kv_use) == ("lost", 1, 3, 0.75)
    assert (shown.num_preemptions, shown.report_age_seconds) == (2, 4.0)
    router.row(InstanceStarted(InstanceSpec(I0, InstanceLimits(num_blocks=100))))
    assert router.board.picture().instances[0].num_running is None, "it came back with nothing"


def test_steps_that_rows_do_not_tell_of_are_means_since_the_last_look() -> None:
    board = Board()
    board.steps_were(I0, 10, seconds(1), 1000, 50)
    board.steps_were(I0, 20, seconds(1.5), 1000, 250)
    (shown,) = board.picture().instances
    assert (shown.prefill_tokens_per_step, shown.decode_tokens_per_step, shown.step_ms) == (0.0, 20.0, 50.0)
    board.steps_were(I0, 4, seconds(0.4), 8, 4)
    (shown,) = board.picture().instances
    assert (shown.prefill_tokens_per_step, shown.step_ms) == (2.0, 100.0), "it was started anew"


def test_refusals_are_shown_with_their_reason_the_latest_first() -> None:
    router = Router()
    for index in range(NUM_REFUSALS + 5):
        name = router.arrives(f"r{index}", tenant="b", priority=2)
        router.row(None, Reject(name, f"full {index}", 429, Duration(seconds(3))), after=1.0)
    now = router.board.picture(Instant(router.at + seconds(2)))
    assert (now.num_refused, now.num_unfinished, len(now.refusals)) == (NUM_REFUSALS + 5, 0, NUM_REFUSALS)
    latest = now.refusals[0]
    assert (latest.reason, latest.status, latest.retry_after_seconds) == (f"full {NUM_REFUSALS + 4}", 429, 3.0)
    assert (latest.ago_seconds, latest.tenant, latest.priority) == (2.0, "b", 2)


def test_what_is_kept_is_bounded_whatever_clients_call_themselves() -> None:
    router = Router()
    for index in range(3 * NUM_TENANTS):
        name = router.arrives(f"r{index}", tenant=f"t{index}", priority=index)
        if index % 3:
            router.row(RequestFinished(name, I0, 1))
    for index in range(500):
        router.row(InstanceStopped(InstanceId(f"gone-{index}")))
    board = router.board
    now = board.picture(num_tenants=10**6)
    assert len(now.tenants) <= NUM_TENANTS + 1
    assert len(now.classes) == NUM_CLASSES
    assert now.num_unfinished == NUM_TENANTS == sum(each.num_unfinished for each in now.tenants)
    assert sum(each.num_unfinished for each in now.classes) == NUM_TENANTS
    assert len(now.instances) < 100
