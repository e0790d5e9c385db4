"""Keys that change while the router runs: its file is read anew when it has changed, or when it is told to."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from rota.base.errors import ConfigError
from rota.serving.frontdoor.keys import KeyFile, KeyRing, limits_of, load_keys, weights_of

LOOK_EVERY_SECONDS = 1.0

_log = logging.getLogger(__name__)
_Signature = tuple[int, int, int]


class KeyWatch:
    """Keeps a ring of keys as its file says. A file that is broken leaves the keys as they were.

    What is under way when its key is taken back runs to its end. Weights and limits of tenants are those of the start:
    policies were built with them.
    """

    def __init__(self, path: Path, ring: KeyRing, file: KeyFile, changed: Callable[[], None] = lambda: None) -> None:
        """`file` is what the ring was made of; `changed` is called when it is made of another."""
        self.broken: str | None = None
        """What is wrong with the file as it is now; None while the ring is what the file says."""
        self._path = path
        self._ring = ring
        self._changed = changed
        self._built_with = _shares(file)
        self._seen: _Signature | None = None
        self._told = asyncio.Event()

    def told(self) -> None:
        """Read the file at once, changed or not."""
        self._told.set()

    async def run(self, look_every_seconds: float = LOOK_EVERY_SECONDS) -> None:
        """Look for ever. The first look reads the file: it may have changed since the start."""
        while True:
            is_told = self._told.is_set()
            self._told.clear()
            await self.look(is_told=is_told)
            try:
                async with asyncio.timeout(look_every_seconds):
                    await self._told.wait()
            except TimeoutError:
                pass

    async def look(self, *, is_told: bool = False) -> None:
        """Read the file if it is not the one that was last read, or if `is_told`."""
        # Taken before the file is read, so that what is written meanwhile is seen the next time.
        signature = _signature(self._path)
        if signature == self._seen and not is_told:
            return
        self._seen = signature
        try:
            file = await asyncio.to_thread(load_keys, self._path)
        except ConfigError as error:
            self.broken = str(error)
            _log.error("the keys stay as they were, since the file cannot be used: %s", error)
            return
        self.broken = None
        if self._ring.replace(file) or is_told:
            self._changed()
            _log.warning("keys read anew: %d, of %d tenants", len(file.keys), len(self._ring.tenants()))
        if _shares(file) != self._built_with:
            _log.warning("%s: other weights and limits of tenants count from the next start", self._path)


def _shares(file: KeyFile) -> tuple[Mapping[str, float], Mapping[str, Mapping[str, int | str]]]:
    return weights_of(file), limits_of(file)


def _signature(path: Path) -> _Signature | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
