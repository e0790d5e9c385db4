"""Every scaling policy keeps the contract of its kind, and policies that break it are caught."""

import itertools

import pytest

from rota.base.errors import ConfigError, LawBroken
from rota.serving.api import NOTHING, Start, Stop
from rota.serving.policies.scaling import SCALING
from rota.serving.predictors.demand import DEMAND
from rota.testing import check_scaling_policy

PARAMETERS = {
    "forecast": [{"rate_per_instance": 2.0}, {"rate_per_instance": 0.1, "bin_seconds": 10.0}],
    "freeness_band": [{}, {"min_steps": 20.0, "max_steps": 80.0, "whole_queue": True}],
    "none": [{}],
    "queue_reactive": [{}, {"target_requests": 20.0, "counts": "waiting", "downscale_delay_seconds": 60.0}],
    "slo_attainment": [{}, {"target": 0.9, "calm_seconds": 60.0}],
}
SOUND = [(name, parameters) for name, all_parameters in PARAMETERS.items() for parameters in all_parameters]


def create(name, parameters):
    services = {"predictor": DEMAND.create("seasonal_naive")} if name == "forecast" else {}
    return SCALING.create(name, parameters, services=services)


def test_every_policy_is_here():
    assert set(PARAMETERS) == set(SCALING.table)


@pytest.mark.parametrize(("name", "parameters"), SOUND, ids=[f"{name}-{len(each)}" for name, each in SOUND])
def test_keeps_the_contract(name, parameters):
    check_scaling_policy(lambda: create(name, parameters), max_examples=40)


class Broken:
    """Sound, but for what a subclass changes."""

    requires = NOTHING
    interval_seconds = 10.0

    def plan(self, fleet):
        return []


class StopsWhoIsNotThere(Broken):
    def plan(self, fleet):
        return [Stop("elsewhere", "x")]


class StopsTheDraining(Broken):
    def plan(self, fleet):
        return [Stop(view.id, "x") for view in fleet.instances if view.is_draining]


class StopsTwice(Broken):
    def plan(self, fleet):
        return [Stop(view.id, "x") for view in fleet.instances if not view.is_draining] * 2


class Silent(Broken):
    def plan(self, fleet):
        return [Start("")]


class BothAtOnce(Broken):
    def plan(self, fleet):
        return [Start("x"), *(Stop(view.id, "x") for view in fleet.instances if not view.is_draining)]


class WithoutBound(Broken):
    def plan(self, fleet):
        return [Start("x")] * 1000


class SharesItsMemory(Broken):
    counter = itertools.count()

    def plan(self, fleet):
        return [Start(f"number {next(self.counter)}")]


class ByTheDateOfRelease(Broken):
    def plan(self, fleet):
        return [Start("x")] if fleet.now > 2 * 10**15 else []


class WritesToViews(Broken):
    def plan(self, fleet):
        fleet.num_held = 0
        return []


class ToAndFro(Broken):
    def plan(self, fleet):
        views = [view for view in fleet.instances if not view.is_draining]
        return [Stop(views[0].id, "x")] if len(views) > 3 else [Start("x")]


class SaysNothingThatCounts(Broken):
    def plan(self, fleet):
        return ["more"]


class NeverSaysWhen(Broken):
    interval_seconds = -1.0


class MagicNeeded(Broken):
    requires = frozenset({"magic"})


BROKEN = {
    StopsWhoIsNotThere: "not among",
    StopsTheDraining: "drains already",
    StopsTwice: "second of the same",
    Silent: "law 11",
    BothAtOnce: "at once",
    WithoutBound: "law 12",
    SharesItsMemory: "law 8: asked the same, a fresh",
    ByTheDateOfRelease: "law 8: asked the same a month later",
    WritesToViews: "law 13",
    ToAndFro: "law 7",
    SaysNothingThatCounts: "neither Start nor Stop",
    NeverSaysWhen: "interval_seconds",
    MagicNeeded: "Capability values",
}


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize(
    "broken", [pytest.param(each, marks=[pytest.mark.slow] * (each is ToAndFro)) for each in BROKEN]
)
def test_a_broken_policy_is_caught(broken):
    with pytest.raises(LawBroken, match=BROKEN[broken]):
        check_scaling_policy(broken, max_examples=300)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("queue_reactive", {"target_requests": 0}),
        ("queue_reactive", {"upscale_delay_seconds": -1}),
        ("queue_reactive", {"counts": "others"}),
        ("freeness_band", {"min_steps": 5, "max_steps": 5}),
        ("slo_attainment", {"target": 1.0}),
        ("forecast", {}),
        ("forecast", {"rate_per_instance": 1.0, "bin_seconds": 0}),
    ],
)
def test_parameters_that_cannot_be_are_refused(name, parameters):
    with pytest.raises(ConfigError):
        create(name, parameters)
