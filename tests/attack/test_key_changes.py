"""Keys that change while the router runs: one taken back opens nothing, a broken file locks nobody out."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path

import pytest
from tests.attack.wire import ALICE, BOB, GOOD, OPERATOR, answer_to, get, post

from rota.base.errors import ConfigError
from rota.serving.frontdoor.key_watch import KeyWatch
from rota.serving.frontdoor.keys import KeyFile, KeyLine, KeyRing, load_keys
from rota.serving.frontdoor.serve import ServeConfig
from rota.testing.router import RunningRouter, running_router


def lines(*keys: str, more: str = "") -> str:
    """A file of keys; each is of the tenant that it is named for."""
    text = "".join(
        f'[[keys]]\ntenant = "{key.removeprefix("rota-")}"\nsha256 = "{sha256(key.encode()).hexdigest()}"\n'
        f"operator = {str(key == OPERATOR).lower()}\n"
        for key in keys
    )
    return more + text


@asynccontextmanager
async def router_with(path: Path) -> AsyncIterator[RunningRouter]:
    serve = ServeConfig(port=0, keys=load_keys(path), keys_path=path)
    async with running_router(num_simulated=1, serve=serve) as running:
        yield running


async def until(port: int, sent: bytes, holds: Callable[[int, bytes], bool]) -> None:
    async with asyncio.timeout(20):
        while True:
            status, _, body = await answer_to(port, sent)
            if holds(status, body):
                return
            await asyncio.sleep(0.02)


@pytest.mark.asyncio
async def test_a_key_that_is_taken_back_opens_nothing_and_what_is_under_way_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(lines(ALICE, BOB, more="[tenants.alices]\nrequests_per_minute = 100\n"))
    async with router_with(path) as running:
        door = running.router.door
        port, watch = door.server.port, door.key_watch
        assert watch is not None
        assert (await answer_to(port, post(b"{")))[0] == 400
        assert "alices" in door._paces
        assert "alices" in door._rate._buckets
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=10_000_000)
        writer.write(post({**GOOD, "max_tokens": 400, "stream": True, "ignore_eos": True}))
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        path.write_text(lines(BOB, OPERATOR))
        watch.told()
        await until(port, post(GOOD), lambda status, _: status == 401)
        assert (await answer_to(port, post(GOOD, key=BOB)))[0] == 200
        assert (await answer_to(port, post(GOOD, key=OPERATOR)))[0] == 200
        assert "alices" not in door._paces, "nothing is kept of who has no key"
        assert "alices" not in door._rate._buckets
        assert b"[DONE]" in await asyncio.wait_for(reader.readuntil(b"[DONE]"), 20)
        writer.write(post(GOOD))
        assert b" 401 " in await asyncio.wait_for(reader.readuntil(b"HTTP/1.1 401 Unauthorized\r\n"), 20)
        writer.close()


@pytest.mark.parametrize(
    "broken",
    ["[[keys]", "", lines(ALICE, ALICE), lines(BOB, more="[tenants.alices]\n"), None],
    ids=["no TOML", "empty", "twice", "terms without a key", "gone"],
)
@pytest.mark.asyncio
async def test_a_broken_file_leaves_the_keys_as_they_were_and_is_told_of(
    tmp_path: Path, broken: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(lines(ALICE))
    async with router_with(path) as running:
        port, watch = running.router.door.server.port, running.router.door.key_watch
        assert watch is not None
        if broken is None:
            path.unlink()
        else:
            path.write_text(broken)
        watch.told()
        await until(port, get("/metrics"), lambda _, page: b"\nrota:key_file_broken 1.0" in page)
        assert (await answer_to(port, post(GOOD)))[0] == 200
        assert "stay as they were" in caplog.text
        assert str(path) in (await answer_to(port, get("/health")))[2].decode()
        assert b"keys" not in (await answer_to(port, get("/health", "x-forwarded-for: 9.9.9.9")))[2]
        path.write_text(lines(BOB))
        watch.told()
        await until(port, get("/metrics"), lambda _, page: b"\nrota:key_file_broken 0.0" in page)
        assert [(await answer_to(port, post(GOOD, key=key)))[0] for key in (ALICE, BOB)] == [401, 200]


@pytest.mark.asyncio
async def test_a_file_is_read_when_it_has_changed_and_not_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, num_read = tmp_path / "keys.toml", 0
    path.write_text(lines(ALICE))

    def counted(path: Path) -> KeyFile:
        nonlocal num_read
        num_read += 1
        return load_keys(path)

    monkeypatch.setattr("rota.serving.frontdoor.key_watch.load_keys", counted)
    ring = KeyRing(load_keys(path))
    watch = KeyWatch(path, ring, load_keys(path))
    for _ in range(5):
        await watch.look()
    assert num_read == 1
    path.write_text(lines(ALICE, BOB))
    for _ in range(5):
        await watch.look()
    assert num_read == 2
    assert ring.tenants() == {"alices", "bobs"}
    await watch.look(is_told=True)
    assert num_read == 3


def test_a_ring_takes_all_of_a_file_or_nothing() -> None:
    digest = sha256(ALICE.encode()).hexdigest()
    ring = KeyRing(KeyFile(keys=[KeyLine("alice", digest)]))
    with pytest.raises(ConfigError):
        ring.replace(KeyFile(keys=[KeyLine("bob", "0" * 64), KeyLine("bob", "0" * 64)]))
    assert ring.find(ALICE.encode()) is not None
    assert not ring.replace(KeyFile(keys=[KeyLine("alice", digest)]))
    assert ring.replace(KeyFile(keys=[KeyLine("bob", "0" * 64)]))
    assert ring.find(ALICE.encode()) is None


@pytest.mark.slow
def test_a_router_reads_its_keys_when_it_is_hung_up_on(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(lines(ALICE))
    command = [str(Path(sys.executable).with_name("rota")), "serve", "--engine", "simulated", "--port", "0", "--json"]
    command += ["--keys", str(path), "--run-dir", str(tmp_path)]
    router = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert router.stdout is not None
        url = next(line for line in router.stdout if "127.0.0.1:" in line)
        port = int(url.split("127.0.0.1:")[1].split("/")[0])

        async def changed() -> None:
            assert (await answer_to(port, post(GOOD)))[0] == 200
            path.write_text(lines(BOB))
            os.kill(router.pid, signal.SIGHUP)
            await until(port, post(GOOD), lambda status, _: status == 401)
            assert (await answer_to(port, post(GOOD, key=BOB)))[0] == 200

        asyncio.run(changed())
    finally:
        router.terminate()
        router.communicate(timeout=60)
    assert router.returncode == 0
