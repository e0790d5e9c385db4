"""Targets with and without units, and promises with a share."""

import pytest

from rota.base.errors import ConfigError
from rota.base.instant import milliseconds
from rota.cli.targets import promise_of, roles_of, slo_of
from rota.serving.model.instance import Role
from rota.serving.model.request import SLO


@pytest.mark.parametrize(
    ("text", "slo"),
    [
        ("ttft=500,tpot=50", SLO(ttft=milliseconds(500), tpot=milliseconds(50))),
        ("ttft=500ms, tpot=0.05s", SLO(ttft=milliseconds(500), tpot=milliseconds(50))),
        ("e2e=10s", SLO(e2e=milliseconds(10_000))),
    ],
)
def test_units_are_milliseconds_unless_said(text: str, slo: SLO) -> None:
    assert slo_of("--slo", text) == slo


@pytest.mark.parametrize("value", ["5m", "s", "ms", "5sm", "5 hours", "-1s", "nan", "infms", "0"])
def test_what_is_no_duration_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="--slo: ttft must be a number of milliseconds above 0"):
        slo_of("--slo", f"ttft={value}")


@pytest.mark.parametrize(("said", "share"), [("", 0.99), (",attainment=95%", 0.95), (",attainment=0.5", 0.5)])
def test_a_promise_has_a_share(said: str, share: float) -> None:
    assert promise_of("--slo", f"ttft=1s{said}") == (SLO(ttft=milliseconds(1000)), share)


def test_roles_are_one_an_instance_in_the_order_given():
    assert roles_of("--roles", "prefill:2, decode:1") == (Role.PREFILL, Role.PREFILL, Role.DECODE)
    assert roles_of("--roles", "mixed:3") == (Role.MIXED,) * 3


@pytest.mark.parametrize(
    "text", ["", "prefil:1", "prefill", "prefill:0", "prefill:-1", "decode:99999", "mixed:1,mixed:2"]
)
def test_roles_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match=r"^--roles"):
        roles_of("--roles", text)
