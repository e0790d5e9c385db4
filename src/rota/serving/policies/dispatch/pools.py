"""Prompts in one pool of instances, decodes in another, and between them those that do both for a while."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rota.base.errors import ConfigError
from rota.serving.api import NOTHING, ClusterView, EngineCapabilities, InstanceId, InstanceView, Pick, Request, Role
from rota.serving.policies.dispatch.by_role import ByRole, FleetRoles, place_of
from rota.serving.policies.dispatch.scoring import least_booked, least_loaded, load_scores
from rota.serving.policies.parameters import at_least_one

_InPools = dict[Role, list[InstanceView]]


class Pools:
    """A prefill instance with the fewest pending tokens computes the prompt, a decode instance with the least memory
    booked generates; where a pool is full, instances of the other one do both until they are idle.

    Rule: Splitwise (ISCA 2024), as its simulator has it. The prompt goes to the fewest pending tokens in the prefill
    pool, unless those and the prompt are more than `max_pending_tokens`; then likewise in the mixed pool; then one of
    the decode pool, with the fewest pending tokens, joins the mixed pool and takes it. The decode goes to the fewest
    booked tokens in the decode pool, unless the request does not fit into what is left of its memory; then likewise in
    the mixed pool; then one of the prefill pool joins the mixed pool. Where that leads nowhere, both phases run where
    the fewest tokens are pending. An instance that joined goes home when it has nothing to do. Both places are chosen
    with the dispatch, so that blocks can travel while the prompt is computed; a move that cannot be begun leaves the
    request where it is.

    Instances of role `mixed` are in the mixed pool for good; with such instances alone all run together.

    Published: `max_pending_tokens`, and 10 of a prompt's tokens for each of output in nothing: Splitwise books the true
    length of each answer, which nobody knows. Ours: `expected_output_tokens`, so many are booked for each request, or
    fewer where the client allows fewer; and a queue counts as empty where the instance owes no prompt.

    Good where prompts disturb decodes more than a transfer costs, and where one phase runs well on cheaper hardware.
    Starves nobody, but a decode that shares its instance with prompts of the mixed pool waits for them.
    """

    requires: EngineCapabilities = NOTHING
    reads_roles = True

    def __init__(self, *, max_pending_tokens: int = 8192, expected_output_tokens: int = 256) -> None:
        """`max_pending_tokens` bounds a prefill queue, at least 1; `expected_output_tokens` is booked for each request,
        at least 0. Raises `ConfigError` outside of that."""
        at_least_one("pools", max_pending_tokens=max_pending_tokens)
        if expected_output_tokens < 0:
            raise ConfigError(f"pools: expected_output_tokens must be at least 0, not {expected_output_tokens}")
        self._max_pending_tokens = max_pending_tokens
        self._expected_output_tokens = expected_output_tokens
        self._joined: set[InstanceId] = set()
        self._by_role = ByRole()
        self._lent: tuple[FleetRoles, list[InstanceView], _InPools] | None = None
        """The pools as they were when some had joined the mixed one, and who had."""

    def pick(self, request: Request, cluster: ClusterView) -> Pick:
        roles = self._by_role.of(cluster.instances)
        if not roles.prefill and not roles.decode:
            chosen = least_loaded(cluster.instances)
            return Pick(chosen.id, f"no roles; fewest pending tokens ({_num_pending(chosen)})")
        pools = self._pools(cluster.instances, roles)
        prefill, why_prefill = self._place(request, pools, _PREFILL)
        decode, why_decode = self._place(request, pools, _DECODE)
        scores = load_scores(cluster.instances)
        if prefill is None or decode is None:
            chosen = least_loaded(cluster.instances)
            return Pick(chosen.id, f"every pool is full: both phases where {_num_pending(chosen)} tokens pend", scores)
        if prefill is decode:
            return Pick(prefill.id, f"both phases: {why_prefill}; {why_decode}", scores)
        return Pick(prefill.id, f"{why_prefill}; then {decode.id}: {why_decode}", scores, decode_at=decode.id)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _pools(self, instances: Sequence[InstanceView], roles: FleetRoles) -> _InPools:
        """The instances by the pool that they are in, each by id. Those that joined and are idle go home."""
        joined = []
        for instance_id in sorted(self._joined):
            place = place_of(instance_id, instances)
            if place is not None and (
                instances[place].num_outstanding_requests or instances[place].num_expected_requests
            ):
                joined.append(instances[place])
        self._joined = {view.id for view in joined}
        if not joined:
            return {Role.PREFILL: roles.prefill, Role.MIXED: roles.mixed, Role.DECODE: roles.decode}
        if self._lent is None or self._lent[:2] != (roles, joined):
            self._lent = roles, joined, _lend(roles, joined)
        return self._lent[2]

    def _place(self, request: Request, pools: _InPools, phase: "_Phase") -> tuple[InstanceView | None, str]:
        """Where a phase of the request runs, and why there."""
        for role in (phase.home, Role.MIXED):
            chosen = phase.least(pools[role]) if pools[role] else None
            if chosen is not None and phase.has_room(self, chosen, request):
                return chosen, f"fewest {phase.counted} tokens ({phase.load(chosen)}) of the {role} pool"
        chosen = phase.least(pools[phase.lender]) if pools[phase.lender] else None
        if chosen is not None:
            self._joined.add(chosen.id)
        return chosen, f"the {phase.home} and mixed pools are full: one of the {phase.lender} pool does both"

    def _has_short_queue(self, view: InstanceView, request: Request) -> bool:
        num_pending = _num_pending(view)
        return num_pending == 0 or num_pending + request.num_prompt_tokens <= self._max_pending_tokens

    def _has_memory(self, view: InstanceView, request: Request) -> bool:
        """Whether the request fits, with the output that is expected of it and of all who are booked there."""
        num_requests = view.num_outstanding_requests + view.num_expected_requests
        expected = num_requests * self._expected_output_tokens + min(self._expected_output_tokens, request.max_tokens)
        return _num_booked(view) + request.num_prompt_tokens + expected < view.num_blocks * view.block_size


def _num_pending(view: InstanceView) -> int:
    """Prompt tokens that wait for their first token."""
    return view.num_outstanding_tokens


def _num_booked(view: InstanceView) -> int:
    return view.num_booked_tokens


def _lend(roles: FleetRoles, joined: Sequence[InstanceView]) -> _InPools:
    away = {view.id for view in joined}
    mixed = [view for view in roles.mixed if view.id not in away]
    return {
        Role.PREFILL: [view for view in roles.prefill if view.id not in away],
        Role.MIXED: sorted([*mixed, *joined], key=lambda view: view.id),
        Role.DECODE: [view for view in roles.decode if view.id not in away],
    }


class _Phase(NamedTuple):
    """What the two phases of a request differ in."""

    home: Role
    lender: Role
    """The pool of which one joins the mixed pool where there is no room."""
    counted: str
    load: Callable[[InstanceView], int]
    least: Callable[[Sequence[InstanceView]], InstanceView]
    has_room: Callable[[Pools, InstanceView, Request], bool]


_PREFILL = _Phase(Role.PREFILL, Role.DECODE, "pending", _num_pending, least_loaded, Pools._has_short_queue)
_DECODE = _Phase(Role.DECODE, Role.PREFILL, "booked", _num_booked, least_booked, Pools._has_memory)
