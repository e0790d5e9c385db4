"""`rota top`: what goes on in a router, in a simulation as it runs, or in a journal, in the terminal or as a page."""

import asyncio
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from rota.base.errors import ConfigError, EngineError
from rota.cli.flags import Json, positive
from rota.cli.output import print_json, print_lines, say, shown

if TYPE_CHECKING:
    from rich.table import Table

    from rota.base.journal import Row
    from rota.serving.board.picture import Picture
    from rota.serving.frontdoor.exchange import Exchange

ROUTER = "http://127.0.0.1:8000"
TIMEOUT_SECONDS = 5.0
ROWS_AT_ONCE = 256
NUM_TENANTS_SHOWN = 15
NUM_REFUSALS_SHOWN = 8


class Source(Protocol):
    """Where pictures come from."""

    is_over: bool
    """Nothing more will happen."""

    def look(self, seconds: float) -> "Picture":
        """The present picture; takes `seconds` at most where there is much to catch up on."""
        ...


def top(
    source: Annotated[str, typer.Argument(metavar="URL|JOURNAL", help="A running router, or a journal file.")] = ROUTER,
    every: Annotated[float, typer.Option(metavar="SECONDS", help="How often to look.")] = 1.0,
    ui: Annotated[
        int | None, typer.Option(metavar="PORT", help="Show a journal as a web page; 0 lets the system choose.")
    ] = None,
    json: Json = False,
) -> None:
    """Look at what goes on, until Ctrl-C: instances, tenants, classes, and the last refusals with their reasons.

    A journal is followed while it grows, be it a router's (`rota serve --journal`) or a simulation's (`rota simulate
    --journal`). Where stdout is no terminal, or with `--json`, one picture is printed: of a router the present one,
    of a journal that after its last row. A router shows the same as a page, at `/ui`.
    """
    positive("--every", every)
    if ui is not None and not 0 <= ui <= 65535:
        raise ConfigError(f"--ui: must be from 0 to 65535, not {ui}")
    if "://" in source:
        if ui is not None:
            raise ConfigError(
                "--ui: this is for journals", hint=f"the router has its own page: {source.rstrip('/')}/ui"
            )
        watched: Source = _RouterSource(source)
    else:
        watched = _JournalSource(Path(source))
    if ui is not None:
        asyncio.run(_serve_page(watched, ui, every))
    elif json:
        print_json(_latest(watched))
    elif not sys.stdout.isatty():
        from rich.console import Console

        console = Console(file=sys.stdout, width=140, highlight=False)
        with console.capture() as capture:
            for part in _drawn(_latest(watched), source):
                console.print(part)
        print_lines([line.rstrip() for line in capture.get().splitlines()])
    else:
        _follow(watched, source, every)


# --- sources ---------------------------------------------------------------------------------------------------------


class _RouterSource:
    is_over = False

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/").removesuffix("/v1") + "/ui/state"

    def look(self, seconds: float) -> "Picture":
        import urllib.error
        import urllib.request

        import msgspec

        from rota.serving.board.picture import Picture

        try:
            with urllib.request.urlopen(self._url, timeout=TIMEOUT_SECONDS) as answer:
                return msgspec.json.decode(answer.read(), type=Picture)
        except urllib.error.HTTPError as error:
            hint = "is this a router of Rota, of this version, and on this machine?"
            raise EngineError(f"{self._url} answers {error.code} {error.reason}", hint=hint) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise EngineError(f"{self._url} is not reached: {reason}", hint="start one with `rota serve`") from None


class _JournalSource:
    def __init__(self, path: Path) -> None:
        from rota.cli.journals import open_journal
        from rota.serving.board.board import Board

        self.is_over = False
        self._board = Board()
        self._rows: Iterator[Row | None] = open_journal(path).follow()
        self.is_behind = True
        """There is more to read at once."""

    def look(self, seconds: float) -> "Picture":
        until = time.monotonic() + seconds
        self.is_behind = True
        while self.is_behind and not self.is_over and time.monotonic() < until:
            for _ in range(ROWS_AT_ONCE):
                try:
                    row = next(self._rows)
                except StopIteration:
                    self.is_over = True
                    break
                if row is None:
                    self.is_behind = False
                    break
                self._board.on_row(row)
        return self._board.picture()


def _latest(source: Source) -> "Picture":
    picture = source.look(TIMEOUT_SECONDS)
    while isinstance(source, _JournalSource) and source.is_behind and not source.is_over:
        picture = source.look(TIMEOUT_SECONDS)
    return picture


# --- the terminal ----------------------------------------------------------------------------------------------------


def _follow(source: Source, name: str, every: float) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    picture = source.look(every)
    with Live(Group(*_drawn(picture, name)), screen=True, auto_refresh=False) as live:
        trouble = ""
        while True:
            over = "over; Ctrl-C leaves" if source.is_over else "Ctrl-C leaves"
            live.update(Group(*_drawn(picture, name), Text(trouble or over, "red" if trouble else "dim")), refresh=True)
            began = time.monotonic()
            try:
                picture, trouble = source.look(every), ""
            except EngineError as error:  # It may come back.
                trouble = error.message
            time.sleep(max(every - (time.monotonic() - began), 0.05))


def _drawn(now: "Picture", name: str) -> "Iterator[Table]":
    """What a picture looks like in a terminal, part by part."""
    yield _table(
        f"{name}, {now.seconds:,.0f} s",
        ("under way", "finished per second", "finished", "refused", "failed"),
        [(now.num_unfinished, _short(now.finished_per_second), now.num_finished, now.num_refused, now.num_failed)],
    )
    has_roles = ["role"] if any(each.role != "mixed" for each in now.instances) else []
    yield _table(
        "instances",
        ("instance", *has_roles, "state", "running", "waiting", "KV held", "preemptions", "prefill/step", "decode/step",
         "step ms"),
        [
            (each.id, *(str(each.role) for _ in has_roles), each.state, each.num_running, each.num_waiting,
             _percent(each.kv_use), each.num_preemptions, _short(each.prefill_tokens_per_step),
             _short(each.decode_tokens_per_step), _short(each.step_ms))
            for each in now.instances
        ],
    )  # fmt: skip
    yield _table(
        "tenants",
        ("tenant", "under way", "finished", "refused", "service", "service per second", "lag"),
        [
            (each.id, each.num_unfinished, each.num_finished, each.num_refused, round(each.service),
             round(each.service_per_second), round(each.lag))
            for each in now.tenants[:NUM_TENANTS_SHOWN]
        ],
    )  # fmt: skip
    yield _table(
        "classes",
        ("priority", "under way", "no token yet", "oldest s", "finished", "TTFT ms", "p99", "SLO ms", "kept"),
        [
            (each.priority, each.num_unfinished, each.num_waiting, each.oldest_seconds, each.num_finished,
             each.ttft_p50_ms, each.ttft_p99_ms, each.slo_ms, _percent(each.slo_attainment))
            for each in now.classes
        ],
    )  # fmt: skip
    if now.refusals:
        yield _table(
            "last refusals",
            ("s ago", "request", "tenant", "priority", "status", "retry after s", "reason"),
            [
                (round(each.ago_seconds, 1), each.request_id, each.tenant, each.priority, each.status,
                 each.retry_after_seconds, each.reason)
                for each in now.refusals[:NUM_REFUSALS_SHOWN]
            ],
        )  # fmt: skip


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[object, ...]]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", title=title, title_style="bold")
    table.title_justify = "left"
    for index, name in enumerate(columns):
        is_text = any(isinstance(value := row[index], str) and not value.endswith(" %") for row in rows)
        table.add_column(Text(name), justify="left" if is_text else "right", overflow="ellipsis", no_wrap=not is_text)
    for row in rows:
        # Names come from clients: whatever could move a cursor is not passed on.
        table.add_row(*(Text("".join(char if char.isprintable() else "?" for char in shown(value))) for value in row))
    return table


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.0f} %"


# --- the page --------------------------------------------------------------------------------------------------------


async def _serve_page(source: Source, port: int, every: float) -> None:
    """Show a journal as the page that a router shows of itself, until SIGINT or SIGTERM."""
    from rota.serving.frontdoor.board_page import STATE, UI, BoardPage
    from rota.serving.frontdoor.http1 import HttpServer
    from rota.serving.frontdoor.problems import Problem

    picture = source.look(every)
    page = BoardPage(lambda: picture, lambda exchange, status: None)
    routes = {UI: page.page, STATE: page.state}

    def answer(exchange: "Exchange") -> None:
        try:
            route = routes.get(exchange.request.path)
            if route is None or exchange.request.method not in ("GET", "HEAD"):
                raise Problem(404, f"there is nothing but {UI} here", code="not_found")
            route(exchange)
        except Problem as problem:
            exchange.respond(problem.status, problem.headers(), problem.body())

    server = HttpServer(answer)
    try:
        await server.start("127.0.0.1", port)
    except OSError as error:
        raise ConfigError(f"--ui: cannot listen on port {port}: {error.strerror or error}") from None
    say(f"http://127.0.0.1:{server.port}{UI}  (Ctrl-C ends it)")
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    while not stopping.is_set():
        picture = source.look(every / 4)  # In slices: whoever asks in between is answered.
        try:
            async with asyncio.timeout(0.01 if isinstance(source, _JournalSource) and source.is_behind else every):
                await stopping.wait()
        except TimeoutError:
            continue
    server.close()
