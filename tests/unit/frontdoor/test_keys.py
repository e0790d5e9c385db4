"""The file of keys, and how `rota keys` and `--keys` go with it."""

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.command_line import rota

from rota.base.errors import ConfigError
from rota.cli.keys import tenancy
from rota.serving.frontdoor.keys import KeyFile, KeyLine, KeyRing, TenantTerms, granted_stack, load_keys, new_key
from rota.serving.stack import Parameters, StackConfig, load_stack

FAIR = StackConfig(order="fair_tokens")


def made(path: Path, *words: str) -> str:
    ran = rota("keys", "new", *words, "--keys", path)
    assert ran.code == 0, ran.stderr
    return ran.stdout.strip()


@given(keys=st.lists(st.binary(max_size=40), unique=True, max_size=20), other=st.binary(max_size=40))
def test_a_ring_finds_its_keys_and_no_others(keys: list[bytes], other: bytes) -> None:
    from hashlib import sha256

    ring = KeyRing(KeyFile(keys=[KeyLine(f"t{i}", sha256(key).hexdigest()) for i, key in enumerate(keys)]))
    for index, key in enumerate(keys):
        holder = ring.find(key)
        assert holder is not None
        assert holder.tenant == f"t{index}"
    assert (ring.find(other) is not None) == (other in keys)


def test_two_keys_whose_hashes_begin_alike_are_told_apart() -> None:
    key, digest = new_key()
    near = digest[:-1] + ("0" if digest[-1] != "0" else "1")
    ring = KeyRing(KeyFile(keys=[KeyLine("near", near), KeyLine("true", digest)]))
    holder = ring.find(key.encode())
    assert holder is not None
    assert holder.tenant == "true"
    assert KeyRing(KeyFile(keys=[KeyLine("near", near)])).find(key.encode()) is None


def test_new_prints_a_key_once_and_writes_its_hash_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    first, second = made(path, "--tenant", 'a "quoted" one'), made(path, "--tenant", "ops", "--operator")
    text = path.read_text()
    assert first.startswith("rota-")
    assert len(first) > 40
    assert first not in text
    assert second not in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    ring = KeyRing(load_keys(path))
    holder, operator = ring.find(first.encode()), ring.find(second.encode())
    assert holder is not None
    assert operator is not None
    assert (holder.tenant, holder.operator, operator.operator) == ('a "quoted" one', False, True)


def test_a_file_that_would_break_is_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    for words, text in ((["--tenant", "é"], ""), (["--tenant", "x" * 300], ""), (["--tenant", "a"], "keys = 3\n")):
        path.write_text(text)
        ran = rota("keys", "new", *words, "--keys", path)
        assert (ran.code, ran.stdout, path.read_text()) == (2, "", text), ran.stderr
        assert str(path) in ran.stderr
    assert rota("keys", "new", "--tenant", "a", "--keys", tmp_path / "no" / "keys.toml").code == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no key"),
        ("[tenants.a]\nweight = 0\n", "weight"),
        ("[tenants.a]\nwieght = 1\n", "wieght"),
        ("[tenants.a]\ntokens_per_minute = 0\n", "tokens_per_minute"),
        ('[[keys]]\ntenant = "a"\nsha256 = "abc"\n', "sha256"),
        ('[[keys]]\ntenant = "a"\nkey = "rota-in-the-clear"\n', "key"),
        (f'[[keys]]\ntenant = "a"\nsha256 = "{"0" * 64}"\n' * 2, "twice"),
        (f'[tenants.b]\n[[keys]]\ntenant = "a"\nsha256 = "{"0" * 64}"\n', "tenants.b"),
    ],
)
def test_a_bad_file_is_refused_with_the_spot(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_keys(path)
    assert words in raised.value.message


def test_weights_reach_the_order_policy_and_nowhere_are_they_lost() -> None:
    file = KeyFile({"a": TenantTerms(weight=3.0), "b": TenantTerms()})
    assert granted_stack(FAIR, file).parameters.order == {"weights": {"a": 3.0}}
    assert granted_stack(StackConfig(), KeyFile({"b": TenantTerms()})) == StackConfig()
    with pytest.raises(ConfigError, match="weight of its own"):
        granted_stack(StackConfig(), file)
    twice = StackConfig(order="fair_tokens", parameters=Parameters(order={"weights": {"a": 2.0}}))
    with pytest.raises(ConfigError, match="the keys say this"):
        granted_stack(twice, file)


def test_engines_read_the_weights_in_a_stack_file_of_their_own(tmp_path: Path) -> None:
    keys, stack, run_dir = tmp_path / "keys.toml", tmp_path / "stack.toml", tmp_path / "runs"
    made(keys, "--tenant", "a.b")
    keys.write_text('[tenants."a.b"]\nweight = 2.5\n' + keys.read_text())
    stack.write_text('order = "fair_tokens"\n[parameters.order]\noutput_weight = 4.0\n')
    known = tenancy(keys, load_stack(stack), stack, run_dir)
    assert known.stack_path == run_dir / "stack.toml"
    assert known.stack.parameters.order == {"output_weight": 4.0, "weights": {"a.b": 2.5}}
    assert load_stack(known.stack_path) == known.stack
    stack.write_text('order = "fair_tokens"\nparameters = { order = { output_weight = 4.0 } }\n')
    with pytest.raises(ConfigError, match="cannot be put in"):
        tenancy(keys, load_stack(stack), stack, run_dir)
