"""Roles that are remembered for a fleet lead to the picks that looking at every instance each time does."""

from dataclasses import asdict
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from rota.base.instant import Instant
from rota.base.random_streams import Stream
from rota.serving.api import InstanceId, Request, RequestId, Role
from rota.serving.policies.dispatch.by_role import ByRole
from rota.serving.policies.dispatch.pools import Pools
from rota.serving.policies.dispatch.power_of_two_by_class import PowerOfTwoByClass
from rota.serving.policies.dispatch.prefill_or_together import PrefillOrTogether
from rota.testing.dispatch import ClusterSample, InstanceSample

LOADS = st.tuples(st.integers(0, 3), st.integers(0, 400), st.integers(0, 2), st.integers(0, 1500))
FLEETS = st.lists(st.sampled_from(Role), min_size=1, max_size=6)
CALLS = st.lists(
    st.tuples(st.lists(LOADS, min_size=6, max_size=6), st.none() | FLEETS, st.integers(1, 400)), max_size=8
)


class Changing(SimpleNamespace):
    """A view that goes on to be the same while what it says changes, as the router's do."""

    def num_prefix_tokens(self, request):
        return 16 * len(request.block_hashes) if self.num_outstanding_tokens % 2 else 0


def policies():
    return [
        Pools(max_pending_tokens=500, expected_output_tokens=20),
        PowerOfTwoByClass(stream=Stream(1, "p")),
        PrefillOrTogether(balance_tokens=100),
    ]


def started(roles):
    known = {field: value for field, value in asdict(InstanceSample(InstanceId(""))).items() if field != "num_blocks"}
    return tuple(
        Changing(**known | {"id": InstanceId(f"i{number}"), "role": role, "num_blocks": 100})
        for number, role in enumerate(roles)
    )


@settings(max_examples=60)
@given(FLEETS, CALLS)
def test_what_is_remembered_of_a_fleet_changes_no_pick(roles, calls):
    quick, plain = policies(), policies()
    fleet = started(roles)
    for number, (loads, changed_to, num_prompt_tokens) in enumerate(calls):
        if changed_to is not None:
            fleet = started(changed_to)
        for view, (num_requests, num_tokens, num_expected, num_booked) in zip(fleet, loads, strict=False):
            view.num_outstanding_requests, view.num_outstanding_tokens = num_requests, num_tokens
            view.num_expected_requests, view.num_booked_tokens = num_expected, num_booked
        hashes = tuple(range(num_prompt_tokens // 16)) if number % 2 else ()
        asked = Request(RequestId(f"r{number}"), Instant(0), num_prompt_tokens, 500, block_hashes=hashes)
        remembered, anew = ClusterSample(Instant(number), fleet), ClusterSample(Instant(number), list(fleet))
        plain[0]._lent = None
        for one, other in zip(quick, plain, strict=True):
            pick = one.pick(asked, remembered)
            assert pick == other.pick(asked, anew)
            if pick.prefill_only:
                at = pick.instance_id
                assert one.pick_decode(asked, at, remembered) == other.pick_decode(asked, at, anew)


def test_a_fleet_is_looked_at_once():
    by_role = ByRole()
    fleet = started([Role.PREFILL, Role.DECODE, Role.MIXED])
    assert by_role.of(fleet) is by_role.of(fleet)
    assert by_role.of(list(fleet)) is not by_role.of(list(fleet))
    assert [view.id for view in by_role.of(fleet).not_decode] == ["i0", "i2"]
    assert by_role.of(started([Role.DECODE])).not_decode == []
