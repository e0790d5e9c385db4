"""The dispatch policies that look at roles: their rules, case by case."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rota.base.errors import ConfigError, DataError
from rota.base.instant import Instant
from rota.base.random_streams import Stream
from rota.serving.api import InstanceId, Request, RequestId, Role, SequenceReport
from rota.serving.policies.dispatch.pools import Pools
from rota.serving.policies.dispatch.power_of_two_by_class import PowerOfTwoByClass
from rota.serving.policies.dispatch.prefill_or_together import PrefillOrTogether
from rota.serving.policies.heat_map import load_heat_map
from rota.serving.policies.observed_lengths import ObservedLengths
from rota.testing.dispatch import ClusterSample, InstanceSample

P, M, D = Role.PREFILL, Role.MIXED, Role.DECODE


def request(num_prompt_tokens=1000, max_tokens=512, name="r", tenant="t"):
    return Request(RequestId(name), Instant(0), num_prompt_tokens, max_tokens, tenant=tenant)


def instance(name, role, *, pending=0, booked=0, requests=None, **others):
    """`requests` are as many as make the numbers possible, unless said."""
    num_requests = (1 if pending or booked else 0) if requests is None else requests
    return InstanceSample(
        InstanceId(name), num_requests, pending, role=role, num_booked_tokens=booked, num_blocks=1000, **others
    )


def cluster(*instances):
    return ClusterSample(Instant(10**9), instances)


def places(pick):
    return pick.instance_id, pick.decode_at


# --- pools ------------------------------------------------------------------------------------------------------------


def test_pools_sends_prompts_to_the_shortest_queue_and_decodes_to_the_least_memory():
    shown = cluster(
        instance("a", P, pending=3000), instance("b", P, pending=2000),
        instance("c", D, booked=5000), instance("d", D, booked=4000),
    )  # fmt: skip
    pick = Pools().pick(request(), shown)
    assert places(pick) == ("b", "d")
    assert "fewest pending tokens (2000)" in pick.reason and "fewest booked tokens (4000)" in pick.reason


def test_pools_takes_an_instance_into_the_mixed_pool_when_prefill_queues_are_full_and_gives_it_back():
    policy = Pools()
    full = instance("a", P, pending=8000)
    idle, busy = instance("b", D), instance("c", D, pending=1, booked=900)
    assert places(policy.pick(request(), cluster(full, idle, busy))) == ("b", None), "b joins, and does both"
    at_work = instance("b", D, pending=1000, booked=1000)
    assert places(policy.pick(request(), cluster(full, at_work, busy)))[0] == "b", "the mixed pool comes first"
    free = instance("a", P)
    assert places(policy.pick(request(), cluster(free, at_work, busy))) == ("a", "c"), "b is mixed: c decodes"
    assert places(policy.pick(request(), cluster(free, instance("b", D), busy))) == ("a", "b"), "b is idle: it is home"


def test_pools_has_a_prefill_instance_decode_where_decode_memory_is_full():
    policy = Pools(expected_output_tokens=0)
    full = instance("c", D, booked=15_500)
    assert places(policy.pick(request(), cluster(instance("a", P), instance("b", P), full))) == ("a", None)
    assert places(policy.pick(request(100), cluster(instance("a", P), instance("b", P), full))) == ("a", "c")


def test_pools_takes_a_prompt_that_is_longer_than_any_queue_where_nobody_waits():
    pick = Pools(max_pending_tokens=100).pick(request(5000), cluster(instance("a", P), instance("b", D)))
    assert places(pick) == ("a", "b")


def test_pools_runs_both_phases_at_the_shortest_queue_where_everything_is_full():
    full = [instance(name, M, pending=9000 + number, booked=15_900) for number, name in enumerate("ba")]
    pick = Pools().pick(request(), cluster(*full, instance("c", D, booked=15_900, pending=1, requests=9)))
    assert places(pick) == ("c", None) and "every pool is full" in pick.reason


def test_pools_books_no_more_than_the_client_allows():
    policy = Pools(expected_output_tokens=4000)
    shown = cluster(instance("a", P), instance("b", D, requests=0, booked=12_000))
    assert places(policy.pick(request(1000, 4096), shown)) == ("a", None)
    assert places(policy.pick(request(1000, 100), shown)) == ("a", "b")


@given(
    roles=st.lists(st.just(M), min_size=1, max_size=4), pending=st.lists(st.integers(0, 9000), min_size=4, max_size=4)
)
def test_pools_without_roles_is_least_outstanding_tokens(roles, pending):
    shown = cluster(*[instance(f"i{number}", M, pending=pending[number]) for number, _ in enumerate(roles)])
    assert places(Pools().pick(request(), shown)) == (
        min(shown.instances, key=lambda view: view.num_outstanding_tokens).id,
        None,
    )


# --- power of two by class --------------------------------------------------------------------------------------------


def by_class(**parameters):
    return PowerOfTwoByClass(stream=Stream(7, "dispatch"), **parameters)


def place(policy, each, at, *instances):
    return policy.pick_decode(each, InstanceId(at), cluster(*instances)).instance_id


def test_prompts_go_to_the_least_loaded_prefill_instance_and_decode_later():
    shown = cluster(instance("a", P, pending=10), instance("b", P), instance("c", D))
    pick = by_class().pick(request(), shown)
    assert pick.instance_id == "b" and pick.prefill_only and pick.decode_at is None
    together = by_class().pick(request(), cluster(instance("a", M, pending=10), instance("b", M)))
    assert together.instance_id == "b" and not together.prefill_only
    alone = by_class().pick(request(), cluster(instance("a", P)))
    assert not alone.prefill_only, "nobody else could decode"


def test_a_decode_goes_where_the_share_of_heavy_ones_is_smaller():
    policy = by_class(guess_tokens=50, reserve="greedy")
    shown = [instance("a", P), instance("c", D), instance("d", D)]
    for number in range(8):
        policy.request_ended(request(100, name=f"light {number}"), 10)
        policy.request_ended(request(1000, name=f"heavy {number}"), 400)
    first = place(policy, request(1000, name="h1"), "a", *shown)
    second = place(policy, request(1000, name="h2"), "a", *shown)
    assert {first, second} == {"c", "d"}, "the second heavy one keeps away from the first"
    policy.request_ended(request(1000, name="h1"), 400)
    assert place(policy, request(1000, name="h3"), "a", *shown) == first, "where it ended, nothing is heavy"


def test_reserve_says_when_an_instance_admits():
    seen = SequenceReport(RequestId("x"), 9_000, 563)
    empty = instance("c", D)
    one = instance("c", D, pending=1, booked=8_000, observed_at=Instant(1), num_free_blocks=437, running=(seen,))
    placed = {"guess_tokens": 2000, "bucket_tokens": 2000}
    for reserve, admits in {"greedy": True, "dynamic": True, "static": False}.items():
        policy = by_class(reserve=reserve, **placed)
        x = request(8_000, 4_000, name="x")
        assert place(policy, x, "a", instance("a", P), empty) == "c", "an idle one admits"
        # It may come to 12,000 tokens; of 16,000, 7,000 are free; the first ends in 3,000 steps.
        y = request(5_000, 4_000, name="y")
        assert (place(policy, y, "a", instance("a", P), one) == "c") is admits, reserve
    # Two that both grow until the first ends do not fit, where one does.
    policy = by_class(reserve="dynamic", **placed)
    for name in ("x", "z"):
        place(policy, request(4_500, 4_000, name=name), "a", instance("a", P), empty)
    both = instance("c", D, pending=2, booked=9_000, requests=2)
    assert place(policy, request(5_000, 4_000, name="y"), "a", instance("a", P), both) == "a", "it stays"
    assert place(by_class(reserve="greedy"), request(5_000, name="y"), "a", instance("a", P), both) == "c"


def test_what_is_known_must_fit_now():
    full = instance("c", D, pending=1, booked=1_000, observed_at=Instant(1), num_free_blocks=10)
    assert place(by_class(reserve="greedy"), request(500), "a", instance("a", P), full) == "a"
    assert place(by_class(reserve="greedy"), request(150), "a", instance("a", P), full) == "c"


def test_nothing_is_kept_of_requests_that_ended():
    policy = by_class(reserve="greedy")
    shown = [instance("a", P), instance("c", D), instance("d", D)]
    for number in range(50):
        place(policy, request(name=f"r{number}"), "a", *shown)
    for number in range(50):
        policy.request_ended(request(name=f"r{number}"), None)
    assert not policy._placed and not policy._at


def test_lengths_are_those_of_like_prompts_and_bounded():
    lengths = ObservedLengths(guess_tokens=77, num_kept=3, num_kinds=2)
    assert lengths.predict(request(1000)) == 77
    assert lengths.predict(request(1000, max_tokens=5)) == 5, "no more than the client allows"
    for num_tokens in (1, 900, 10, 30, 20):
        lengths.learn(request(1000), num_tokens)
    assert lengths.predict(request(1023)) == 20, "the median of the last three"
    assert lengths.predict(request(1024)) == 77 and lengths.predict(request(1000, tenant="other")) == 77
    lengths.learn(request(10), 1)
    lengths.learn(request(100), 2)
    assert lengths.predict(request(1000)) == 77, "forgotten: two other kinds came since"


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: Pools(max_pending_tokens=0), "max_pending_tokens"),
        (lambda: Pools(expected_output_tokens=-1), "expected_output_tokens"),
        (lambda: by_class(heavy_tokens=0), "heavy_tokens"),
        (lambda: by_class(reserve="some"), "reserve"),
        (lambda: PrefillOrTogether(balance_tokens=-1), "balance_tokens"),
        (lambda: PrefillOrTogether(guess_tokens=0), "guess_tokens"),
    ],
)
def test_bad_parameters_are_refused(make, what):
    with pytest.raises(ConfigError, match=what):
        make()


def test_who_has_had_little_to_do_for_long_takes_the_role_of_those_who_have_more():
    policy = by_class(flip_after_seconds=60.0)

    def flip(at_seconds, *views):
        return policy.flip(ClusterSample(Instant(at_seconds * 10**9), views))

    idle, busy = instance("a", P), instance("b", P, pending=900, booked=900)
    decode, light = instance("c", D, booked=8_000), instance("d", D, booked=1_000)
    assert flip(0, idle, busy, decode) is None
    assert flip(59, idle, busy, decode) is None
    found = flip(60, idle, busy, decode)
    assert (found.instance_id, found.role) == ("a", D)
    assert flip(61, idle, busy, decode) is None, "it begins to count anew"
    assert flip(200, idle, decode) is None, "the last of its role"
    assert flip(300, idle, busy, decode, light) is None, "somebody of the other role has as little to do"
    assert flip(300, busy, decode, light) is None and flip(360, busy, decode, light).instance_id == "d"
    assert by_class().flip(cluster(idle, busy, decode)) is None, "off unless asked for"


# --- prefill or together ----------------------------------------------------------------------------------------------


def heat_map(tmp_path, gain):
    """A map in which prompts of 1,000 tokens gain, those of 100 lose, and those of 10 do neither."""
    path = tmp_path / "map.json"
    gains = [[[0.0, 0.0]], [[-gain, -gain]], [[gain, gain]]]
    cells = {"prompt_tokens": [10, 100, 1000], "ratios": [1.0], "loads": [0.3, 0.6], "gains": gains}
    path.write_text(json.dumps({"source": "test", **cells}), encoding="utf-8")
    return str(path)


def test_lengths_that_gain_are_split_and_others_are_not(tmp_path):
    policy = PrefillOrTogether(heat_map=heat_map(tmp_path, 0.2))
    shown = cluster(instance("m", M), instance("p", P), instance("x", D, booked=90), instance("y", D, booked=80))
    apart = policy.pick(request(1000), shown)
    assert apart.instance_id == "p" and apart.prefill_only and "+0.40" in apart.reason
    together = policy.pick(request(100), shown)
    assert together.instance_id == "m" and not together.prefill_only and "-0.40" in together.reason
    assert policy.pick_decode(request(1000), InstanceId("p"), shown).instance_id == "y"


def test_where_there_is_only_the_one_kind_it_is_taken(tmp_path):
    policy = PrefillOrTogether(heat_map=heat_map(tmp_path, 0.2))
    assert policy.pick(request(1000), cluster(instance("m", M), instance("n", M, pending=9))).instance_id == "m"
    assert policy.pick(request(100), cluster(instance("p", P), instance("x", D))).prefill_only
    assert not policy.pick(request(1000), cluster(instance("p", P))).prefill_only
    assert policy.pick_decode(request(1000), InstanceId("p"), cluster(instance("p", P))).instance_id == "p"
    alone = cluster(instance("p", P), instance("m", M))
    assert policy.pick(request(1000), alone).instance_id == "m", "nobody decodes apart"


@given(
    roles=st.lists(st.sampled_from([P, M]), min_size=1, max_size=5),
    pending=st.lists(st.integers(0, 6000), min_size=5, max_size=5),
    cached=st.lists(st.integers(0, 8), min_size=5, max_size=5),
)
def test_a_map_of_zeros_is_prefix_then_least_load(tmp_path_factory, roles, pending, cached):
    policy = PrefillOrTogether(heat_map=heat_map(tmp_path_factory.getbasetemp(), 0.0), balance_tokens=2000)
    views = [
        instance(f"i{number}", role, pending=pending[number], num_cached_blocks=cached[number])
        for number, role in enumerate(roles)
    ]
    each = Request(RequestId("r"), Instant(0), 1000, 100, block_hashes=tuple(range(60)))
    loads = pending[: len(roles)]
    longest = max(cached[: len(roles)])
    if longest and max(loads) - min(loads) <= 2000:
        views_left = [view for view in views if view.num_cached_blocks == longest]
    else:
        views_left = views
    expected = min(views_left, key=lambda view: view.num_outstanding_tokens).id
    assert policy.pick(each, cluster(*views, instance("x", D))).instance_id == expected


def test_the_shipped_map_says_that_short_outputs_to_long_prompts_gain():
    shipped = load_heat_map("llama-3.1-8b-a100")
    assert shipped.gain(2048, 128) > 0 > shipped.gain(2048, 2048)
    assert shipped.gain(1, 1) == shipped.gain(128, 128), "the nearest cell"
    assert shipped.gain(10**6, 10**9) == shipped.gain(8192, 8192 * 4)


@pytest.mark.parametrize(
    "text",
    ["", "{}", '{"source": "x", "prompt_tokens": [2, 1], "ratios": [1], "loads": [1], "gains": [[[0]], [[0]]]}',
     '{"source": "x", "prompt_tokens": [1], "ratios": [1], "loads": [1], "gains": [[[0, 0]]]}'],
)  # fmt: skip
def test_a_file_that_is_no_heat_map_is_refused(tmp_path, text):
    path = tmp_path / "map.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="not a heat map"):
        load_heat_map(str(path))


def test_a_heat_map_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        load_heat_map(str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="unknown heat map 'llama'") as raised:
        load_heat_map("llama")
    assert "llama-3.1-8b-a100" in raised.value.hint
