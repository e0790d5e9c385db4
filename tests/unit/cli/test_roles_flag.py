"""Roles of served engines: what is refused before an engine starts, and what is said of it."""

from pathlib import Path

import pytest
from tests.command_line import rota

from rota.base.errors import ConfigError
from rota.cli.roles_flag import roles_by_id
from rota.cli.serve import _hands_off
from rota.serving.api import Role
from rota.serving.stack import StackConfig

SPLIT = ("--roles", "prefill:1,decode:1")


@pytest.fixture
def pools(tmp_path: Path) -> str:
    path = tmp_path / "pools.toml"
    path.write_text('dispatch = "pools"\n')
    return str(path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--engine", "http://127.0.0.1:1"), "servers that run already hand no blocks over"),
        (("--on", "ray"), "engines on Ray hand no blocks over"),
        (("--stock", "fcfs"), "without the plug-in"),
        (("--no-hand-off",), "with --no-hand-off"),
        (("--instances", "3"), "gives 2 instances, and --instances says 3"),
        (("--scale", "1:4"), "scaling policy 'slo_attainment' starts mixed ones"),
    ],
)
def test_engines_that_could_not_hand_prompts_over_get_no_roles(pools: str, words: tuple[str, ...], said: str) -> None:
    done = rota("serve", *SPLIT, "--stack", pools, *words)
    assert done.code == 2
    assert said in done.stderr


@pytest.mark.parametrize("engine", ["vllm", "simulated"])
def test_a_policy_that_does_not_look_at_roles_is_refused(engine: str) -> None:
    done = rota("serve", "--engine", engine, *SPLIT)
    assert done.code == 2
    assert "dispatch policy 'prefix_then_load' does not look at roles" in done.stderr
    assert "pools" in done.stderr


def test_roles_without_the_means_to_hand_over_are_refused_and_turn_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert _hands_off(None, True, None, [Path("/tmp/a.sock")], 2, has_roles=True)
    with pytest.raises(ConfigError, match="--roles: blocks cannot go from engine to engine: 3 engines share 2 cores"):
        _hands_off(None, True, None, [Path("/tmp/a.sock")], 3, has_roles=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--roles: .*nixl"):
        _hands_off(None, True, None, [Path("/tmp/a.sock")], 2, has_roles=True)


def test_each_engine_has_the_role_of_its_place() -> None:
    fleet = (Role.PREFILL, Role.MIXED, Role.DECODE)
    assert roles_by_id("vllm", fleet, StackConfig(dispatch="pools")) == {"vllm-0": Role.PREFILL, "vllm-2": Role.DECODE}
