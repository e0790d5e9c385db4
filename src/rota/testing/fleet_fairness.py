"""How fairly tenants are served over several instances: inside them by an order policy, between them by a dispatch
policy, both in the real machines over random overloads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from rota.base.errors import LawBroken
from rota.base.instant import Instant, after
from rota.runtime.simulation import SimulationLoop
from rota.serving.api import ClusterView, DispatchPolicy, OrderPolicy, Pick, Request, RequestId, TenantId
from rota.serving.assemble import CLUSTER
from rota.serving.cluster.machine import ClusterMachine
from rota.serving.cluster.prefix_index import PrefixIndex
from rota.serving.instance.machine import InstanceMachine
from rota.serving.model.commands import Abort, ClusterCommand, Dispatch
from rota.serving.model.events import ClientLeft, FirstTokenSeen, InstanceStarted, RequestArrived, RequestFinished
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec
from rota.serving.policies.admission.bounded_queue import BoundedQueue
from rota.serving.policies.batch.vllm_default import VllmDefault
from rota.serving.policies.memory.recompute_last import RecomputeLast
from rota.serving.sim.ground_truth import GroundTruth
from rota.serving.sim.instance import RANK_ARRIVAL, RANK_STEP, SequenceState, SimulatedInstance
from rota.testing.fairness import COMPUTED, Account, Counting, Gap, credit_bound_of, overload_with_prefixes
from rota.testing.worlds import RANK_CLIENT_LEAVES, Job, Pace, Workload

_SHARE_OF_NEWEST = 0.2


@dataclass(frozen=True, slots=True)
class FleetRule:
    """Who decides, and what of their parameters the promises depend on. All in tokens."""

    order: Callable[[], OrderPolicy]
    dispatch: Callable[[], DispatchPolicy]
    quantum_tokens: float
    """Of the order policy."""
    dispatch_quantum_tokens: float
    expected_output_tokens: float
    """What the dispatch policy expects of a tenant before its first answer."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Of the order policy; a tenant that is not named has 1."""


@dataclass(frozen=True, slots=True)
class FleetRun:
    """What a fleet did with a workload. All in tokens."""

    gap: Gap
    """The widest that the services of two tenants drifted apart while both waited at every instance."""
    bound: float
    """What is promised of it: the sum of what is promised at each instance."""
    gap_anywhere: Gap
    """The same while both waited at some instance, of which nothing is promised."""
    spread: float
    """The most by which what one tenant had sent to two instances differed; who is under way counts as expected."""
    spread_bound: float
    """What is promised of it."""


def check_fleet_fairness(rule: FleetRule, *, num_workloads: int = 60, num_jobs: int = 50) -> tuple[float, float]:
    """Prove on random overloads of two and three instances, with shared prefixes and clients who leave, what deficit
    longest prefix match promises inside of instances and between them; raises `LawBroken` with the first overload in
    which it does not hold. Returns the largest shares of the two bounds that were seen. `num_jobs` is for each
    instance.

    * **Service.** What is computed for two tenants who wait at every instance all through an interval differs by at
      most the sum over the instances of 2 × (Q + (L + M) / w): Q the quantum inside, L the longest prompt, M the tokens
      that the instance's blocks hold, w the smaller of their weights. Every step of an instance in the interval, and
      the one before it, leaves both waiting there, so that the instance's own bound holds for its part.
    * **Spread.** What a tenant has sent to two instances differs by at most q + c + e: q the quantum between them, c
      the most that one request costs, e what was expected wrongly of its requests under way at the two. Both were
      given the same. Neither owns more than a quantum when quanta are given, and after that only what is put right
      adds to it; neither owes more than the last request that it was sent, and what is put right.

    Both are counted here, from what the machines did, and not asked of the policies.
    """
    service = spread = 0.0
    for seed in range(num_workloads):
        num_instances = 2 + seed % 2
        workload = overload_with_prefixes(seed, num_jobs=num_jobs * num_instances)
        run = play_fleet(workload, specs_like(workload.limits, num_instances), rule)
        if run.gap.service > run.bound:
            raise LawBroken(
                f"law 16: overload {seed}: {run.gap.tenants} drifted {run.gap.service:g} tokens apart while both "
                f"waited at all {num_instances} instances, and at most {run.bound:g} were promised"
            )
        if run.spread > run.spread_bound:
            raise LawBroken(
                f"law 16: overload {seed}: a tenant sent {run.spread:g} tokens more to one of {num_instances} "
                f"instances than to another, and at most {run.spread_bound:g} were promised"
            )
        service = max(service, run.gap.service / run.bound)
        spread = max(spread, run.spread / run.spread_bound)
    return service, spread


def specs_like(limits: InstanceLimits, num_instances: int) -> list[InstanceSpec]:
    """Instances with these settings, each with a little more room than the one before."""
    rooms = [msgspec.structs.replace(limits, num_blocks=limits.num_blocks + 2 * n) for n in range(num_instances)]
    return [InstanceSpec(InstanceId(f"i{number}"), room) for number, room in enumerate(rooms)]


def play_fleet(workload: Workload, specs: Sequence[InstanceSpec], rule: FleetRule) -> FleetRun:
    """Play a workload through a router and these instances to its end, and measure."""
    sent = _Sent(rule.dispatch(), workload.jobs, rule.expected_output_tokens)
    world = _Fleet(workload, specs, rule, sent)
    world.loop.run()
    if world.unfinished:
        raise LawBroken(f"law 1: {sorted(world.unfinished)} never ended")
    longest = max(job.request.num_prompt_tokens for job in workload.jobs)
    least = min(rule.weights.get(job.request.tenant, 1.0) for job in workload.jobs)
    bounds = [credit_bound_of(spec.limits, longest, rule.quantum_tokens, least_weight=least) for spec in specs]
    return FleetRun(
        world.everywhere.widest(),
        sum(bounds),
        world.anywhere.widest(),
        sent.spread,
        rule.dispatch_quantum_tokens + sent.dearest + sent.most_wrong(),
    )


class _Sent:
    """A dispatch policy, and an account of what each tenant has sent where."""

    def __init__(self, inner: DispatchPolicy, jobs: Sequence[Job], expected: float) -> None:
        self._inner = inner
        self.requires = inner.requires
        self._true = {job.request.id: job.num_output_tokens for job in jobs}
        self._first_expected = expected
        self._expected: dict[TenantId, float] = {}
        self._sent: dict[TenantId, dict[InstanceId, float]] = {}
        self._wrong: dict[TenantId, dict[InstanceId, float]] = {}
        """Of those under way: by how much less or more they will have got than was expected."""
        self._most_wrong: dict[TenantId, dict[InstanceId, float]] = {}
        self._flying: dict[RequestId, tuple[InstanceId, float]] = {}
        self.spread = self.dearest = 0.0

    def pick(self, request: Request, cluster: ClusterView) -> Pick:
        pick = self._inner.pick(request, cluster)
        tenant, chosen = request.tenant, pick.instance_id
        nothing = dict.fromkeys([each.id for each in cluster.instances], 0.0)
        sent = self._sent.setdefault(tenant, dict(nothing))
        wrong = self._wrong.setdefault(tenant, dict(nothing))
        most_wrong = self._most_wrong.setdefault(tenant, dict(nothing))
        expected = min(self._expected.get(tenant, self._first_expected), float(request.max_tokens))
        num_cached = next(each.num_prefix_tokens(request) for each in cluster.instances if each.id == chosen)
        cost = request.num_prompt_tokens - num_cached + expected
        sent[chosen] += cost
        self.dearest = max(self.dearest, cost)
        self._flying[request.id] = (chosen, expected)
        wrong[chosen] += abs(self._true[request.id] - expected)
        most_wrong[chosen] = max(most_wrong[chosen], wrong[chosen])
        self._look(tenant)
        return pick

    def request_ended(self, request: Request, num_output_tokens: int | None) -> None:
        told = getattr(self._inner, "request_ended", None)
        if told is not None:
            told(request, num_output_tokens)
        chosen, expected = self._flying.pop(request.id)
        tenant = request.tenant
        self._wrong[tenant][chosen] -= abs(self._true[request.id] - expected)
        if num_output_tokens is not None:
            self._sent[tenant][chosen] += num_output_tokens - expected
            before = self._expected.get(tenant, self._first_expected)
            self._expected[tenant] = before + _SHARE_OF_NEWEST * (num_output_tokens - before)
        self._look(tenant)

    def most_wrong(self) -> float:
        """The most that was expected wrongly at one time of one tenant's requests under way at two instances."""
        return max(sum(sorted(worst.values())[-2:]) for worst in self._most_wrong.values())

    def _look(self, tenant: TenantId) -> None:
        sent = self._sent[tenant].values()
        self.spread = max(self.spread, max(sent) - min(sent))


class _Fleet:
    """A router and its instances in virtual time, and the clients who hear from them."""

    def __init__(
        self, workload: Workload, specs: Sequence[InstanceSpec], rule: FleetRule, dispatch: DispatchPolicy
    ) -> None:
        self.loop = SimulationLoop(Instant(0))
        self._truth = GroundTruth()
        self._requests = {job.request.id: job.request for job in workload.jobs}
        self.unfinished = set(self._requests)
        cluster = ClusterMachine(dispatch, BoundedQueue(max_unfinished=10**6), prefix_index=PrefixIndex())
        self.loop.add_machine(CLUSTER, cluster, self._carry_out)
        self.everywhere = Account(rule.weights, COMPUTED, num_places=len(specs))
        self.anywhere = Account(rule.weights, COMPUTED)
        self._instances = {spec.id: self._start(spec, number, rule.order()) for number, spec in enumerate(specs)}
        for job in workload.jobs:
            self._schedule(job)

    def _start(self, spec: InstanceSpec, number: int, order: OrderPolicy) -> SimulatedInstance:
        batch = Counting(Counting(VllmDefault(), self.everywhere, number), self.anywhere, number)
        machine = InstanceMachine(spec.limits, order=order, batch=batch, memory=RecomputeLast(), steady=False)
        rank = RANK_STEP - number
        instance = SimulatedInstance(self.loop, spec, machine, Pace(), self._truth, self, rank=rank)
        self.loop.deliver(CLUSTER, InstanceStarted(spec))
        return instance

    def _schedule(self, job: Job) -> None:
        request = job.request

        def arrive(now: Instant) -> None:
            self._truth.add(request, job.num_output_tokens)
            self.loop.deliver(CLUSTER, RequestArrived(request))

        def leave(now: Instant) -> None:
            if request.id in self.unfinished:
                self.unfinished.remove(request.id)
                self.loop.deliver(CLUSTER, ClientLeft(request.id))

        self.loop.call_at(request.arrived_at, arrive, RANK_ARRIVAL)
        if job.leaves_after is not None:
            self.loop.call_at(after(request.arrived_at, job.leaves_after), leave, RANK_CLIENT_LEAVES)

    def _carry_out(self, name: str, command: ClusterCommand, now: Instant) -> None:
        if isinstance(command, Dispatch):
            self._instances[command.instance_id].submit(self._requests[command.request_id])
        elif isinstance(command, Abort):
            self._instances[command.instance_id].abort(command.request_id)
        else:
            raise LawBroken(f"law 1: the router had no reason for {command}")

    def on_first_token(self, instance_id: InstanceId, request_id: RequestId, at: Instant) -> None:
        self.loop.deliver(CLUSTER, FirstTokenSeen(request_id, instance_id))

    def on_finished(
        self, instance_id: InstanceId, at: Instant, sequence: SequenceState, num_output_tokens: int
    ) -> None:
        self.unfinished.remove(sequence.request.id)
        self.loop.deliver(CLUSTER, RequestFinished(sequence.request.id, instance_id, num_output_tokens))

    def on_rejected(self, instance_id: InstanceId, request_id: RequestId, at: Instant, reason: str) -> None:
        raise LawBroken(f"law 1: {request_id} was rejected: {reason}")

    def on_step(self, instance_id: InstanceId, at: Instant) -> None: ...
