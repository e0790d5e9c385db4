"""Who may not go before an instant goes then: not earlier, not never, whatever happens meanwhile."""

from hypothesis import given, settings
from hypothesis import strategies as st

from rota.base.instant import Instant
from rota.serving.api import Admission, InstanceId, QueueRules, Request, RequestId
from rota.serving.cluster.delays import Delays
from rota.serving.cluster.machine import ClusterMachine
from rota.serving.model.commands import Dispatch, Hold, Reject
from rota.serving.model.events import ClientLeft, InstanceLost, InstanceStarted, RequestArrived, RequestFinished
from rota.serving.model.instance import InstanceLimits, InstanceSpec
from rota.serving.policies.dispatch.least_outstanding_tokens import LeastOutstandingTokens
from rota.serving.policies.order.fcfs import Fcfs

A, B = InstanceId("a"), InstanceId("b")


class Delaying:
    """Lets everybody in, at instants and places that the request's name says."""

    requires = frozenset()

    def __init__(self):
        self.inside = set()

    def admit(self, request, cluster, num_unfinished):
        delay, place = request.session.split()
        self.inside.add(request.id)
        not_before = Instant(cluster.now + int(delay)) if int(delay) else None
        return Admission(True, "for a reason", not_before=not_before, instance_ids=(InstanceId(place),))

    def request_ended(self, request, num_output_tokens):
        self.inside.remove(request.id)


STEPS = st.lists(
    st.tuples(st.integers(0, 40), st.sampled_from(["arrive", "arrive", "leave", "finish", "lose", "start"]),
              st.integers(0, 60), st.sampled_from("ab")),
    max_size=60,
)  # fmt: skip


@settings(max_examples=60)
@given(steps=STEPS, is_ordered=st.booleans())
def test_everybody_goes_at_his_instant_and_is_told_of_at_his_end(steps, is_ordered):
    policy = Delaying()
    most = 2 if is_ordered else 0
    rules = QueueRules(max_held=8, timeout_seconds=1e-7, max_outstanding_per_instance=most)
    machine = ClusterMachine(LeastOutstandingTokens(), policy, queue=rules, order=Fcfs())
    now, due, going, ready = 0, {}, {}, set()

    def obey(commands, at):
        for command in commands:
            if isinstance(command, Dispatch):
                request_id = command.request_id
                assert at >= due[request_id][0], "too early"
                if due[request_id][1] in ready and not is_ordered:
                    assert command.instance_id == due[request_id][1]
                going[request_id] = command.instance_id
            elif isinstance(command, Reject):
                due.pop(command.request_id)
            elif isinstance(command, Hold):
                assert command.reason

    for number, (passed, what, delay, place) in enumerate(steps):
        until = now + passed
        while (deadline := machine.next_deadline()) is not None and deadline <= until:
            now = max(now, deadline)
            obey(machine.expire(Instant(now)), now)
        now = until
        if what == "arrive":
            request = Request(RequestId(f"r{number:02}"), Instant(now), 10, 10, session=f"{delay} {place}")
            due[request.id] = now + delay, InstanceId(place)
            obey(machine.handle(RequestArrived(request), Instant(now)), now)
        elif what == "leave" and due:
            request_id = sorted(due)[delay % len(due)]
            due.pop(request_id), going.pop(request_id, None)
            obey(machine.handle(ClientLeft(request_id), Instant(now)), now)
        elif what == "finish" and going:
            request_id = sorted(going)[delay % len(going)]
            instance_id = going.pop(request_id)
            due.pop(request_id)
            obey(machine.handle(RequestFinished(request_id, instance_id, 3), Instant(now)), now)
        elif what == "lose" and not any(at == place for at in going.values()):
            ready.discard(place)
            obey(machine.handle(InstanceLost(InstanceId(place), "gone"), Instant(now)), now)
        elif what == "start":
            ready.add(place)
            spec = InstanceSpec(InstanceId(place), InstanceLimits(num_blocks=100))
            obey(machine.handle(InstanceStarted(spec), Instant(now)), now)
        machine.check()
        assert policy.inside == set(machine.unfinished()) == set(due)
    while (deadline := machine.next_deadline()) is not None:
        now = max(now, deadline)
        obey(machine.expire(Instant(now)), now)
    assert set(due) == set(going), "nobody waits for ever"


@given(
    entries=st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=60),
    now=st.integers(0, 20),
)
def test_those_who_are_due_come_in_order(entries, now):
    delays = Delays()
    for number, (at, _) in enumerate(entries):
        delays.add(RequestId(f"r{number}"), Instant(at))
    for number, (_, leaves) in enumerate(entries):
        if leaves:
            delays.discard(RequestId(f"r{number}"))
    stay = [(at, number) for number, (at, leaves) in enumerate(entries) if not leaves]
    assert len(delays) == len(stay)
    assert delays.due(Instant(now)) == [f"r{number}" for at, number in sorted(stay) if at <= now]
    assert delays.next_at() == min((at for at, _ in stay if at > now), default=None)
