"""`rota bench`: open-loop load on any OpenAI-compatible server."""

from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from rota.base.errors import ConfigError, EngineError
from rota.base.random_streams import RandomStreams
from rota.cli.flags import Json, Seed, at_least, positive
from rota.cli.output import Progress, print_json, print_table, warn
from rota.cli.targets import slo_of

if TYPE_CHECKING:
    from rota.serving.bench.plan import Planned
    from rota.serving.bench.report import LoadReport
    from rota.serving.bench.run import LoadResult
    from rota.serving.metrics.definitions import Distribution
    from rota.serving.metrics.summary import GroupSummary

INTERRUPTED = 130
DEFAULT_NUM_REQUESTS = 100
DEFAULT_PROMPT_TOKENS = "256"
DEFAULT_MAX_TOKENS = "64"


class Api(StrEnum):
    """Which of the two generating endpoints is asked."""

    CHAT = "chat"
    COMPLETIONS = "completions"


_Url = Annotated[str, typer.Argument(metavar="URL", help="The server, such as http://127.0.0.1:8000.")]
_Rate = Annotated[float | None, typer.Option("--rate", help="Requests per second, arriving at random.")]
_Burstiness = Annotated[
    float | None, typer.Option("--burstiness", help="1 is Poisson, less is burstier, more is steadier.")
]
_Trace = Annotated[Path | None, typer.Option("--trace", metavar="FILE", help="Replay a trace in place of --rate.")]
_Speedup = Annotated[float | None, typer.Option("--speedup", help="Replay the trace so many times as fast.")]
_NumRequests = Annotated[
    int | None, typer.Option("--num-requests", help="Send so many; 100 if --duration is not given either.")
]
_Duration = Annotated[
    float | None, typer.Option("--duration", metavar="SECONDS", help="Send for so long, then wait for answers.")
]
_NumWarmups = Annotated[int, typer.Option("--num-warmups", help="Leave the first so many out of the report.")]
_PromptTokens = Annotated[
    str | None,
    typer.Option("--prompt-tokens", metavar="N|QUANTILES", help="256, or 0=16,0.5=256,1=2048. Caps a trace."),
]
_MaxTokens = Annotated[str | None, typer.Option("--max-tokens", metavar="N|QUANTILES", help="Output tokens, likewise.")]
_IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Ask for all of --max-tokens (vLLM).")]
_Classes = Annotated[
    list[str] | None,
    typer.Option("--class", metavar="FACTS", help="name=high,share=0.1,priority=-1,tenant=a,ttft=500,… Repeatable."),
]
_Tenants = Annotated[
    list[str] | None, typer.Option("--tenant", metavar="NAME[=SHARE]", help="Send as this tenant. Repeatable.")
]
_Slo = Annotated[str | None, typer.Option("--slo", help="Targets in ms, such as ttft=500,tpot=50.")]
_Model = Annotated[str | None, typer.Option("--model", help="The server's first, if not given.")]
_Api = Annotated[Api, typer.Option("--api", help="Which endpoint to ask.")]
_Tokenizer = Annotated[
    Path | None, typer.Option("--tokenizer", metavar="FILE", help="A tokenizer.json, for exact prompt lengths.")
]
_Timeout = Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="Of one request.")]


def bench(
    url: _Url,
    rate: _Rate = None,
    burstiness: _Burstiness = None,
    trace: _Trace = None,
    speedup: _Speedup = None,
    num_requests: _NumRequests = None,
    duration: _Duration = None,
    num_warmups: _NumWarmups = 0,
    prompt_tokens: _PromptTokens = None,
    max_tokens: _MaxTokens = None,
    ignore_eos: _IgnoreEos = False,
    classes: _Classes = None,
    tenants: _Tenants = None,
    slo: _Slo = None,
    model: _Model = None,
    api: _Api = Api.CHAT,
    tokenizer: _Tokenizer = None,
    timeout: _Timeout = 600.0,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Load any OpenAI-compatible server and measure it.

    Open loop: every request leaves at its moment, however slow the server is, and its time counts from that moment.
    Errors count in every share. $OPENAI_API_KEY is sent if it is set.
    """
    from rota.serving.bench.prompts import FileTokenizer, Prompts
    from rota.serving.bench.run import LoadOptions, run_load

    options = LoadOptions(
        url=_base_url(url),
        model=model,
        endpoint=api.value,
        ignore_eos=ignore_eos,
        timeout_seconds=positive("--timeout", timeout),
        num_warmups=at_least("--num-warmups", num_warmups, 0),
        seed=seed,
    )
    streams = RandomStreams(seed)
    mix = _mix(classes or [], tenants or [], slo, streams)
    limit = None if num_requests is None else at_least("--num-requests", num_requests, 1)
    if limit is None and duration is None and trace is None:
        limit = DEFAULT_NUM_REQUESTS
    if trace is None:
        if speedup is not None:
            raise ConfigError("--speedup: needs --trace")
        plan = _rate_plan(rate, burstiness, prompt_tokens, max_tokens, mix, streams)
    else:
        for flag, value in (("--rate", rate), ("--burstiness", burstiness)):
            if value is not None:
                raise ConfigError(f"{flag}: the trace says when requests leave", hint="see --speedup")
        plan = _trace_plan(trace, speedup, prompt_tokens, max_tokens, mix, streams)
    # Made whole before the first byte leaves: a bad row ends the run before it began.
    planned = list(_bounded(plan, limit, duration))
    if len(planned) <= num_warmups:
        raise ConfigError(f"--num-warmups: {num_warmups} of {len(planned)} requests leave none to measure")
    prompts = Prompts(streams, None if tokenizer is None else FileTokenizer(tokenizer))
    with Progress("measuring", total=len(planned), unit="requests") as progress:
        result = run_load(planned, prompts, options, on_ended=progress.reached)
    if json:
        print_json(result.report)
    else:
        _print(result.report)
    _say_what_to_know(result.report, has_tokenizer=tokenizer is not None)
    _judge(result)


# --- what is sent -----------------------------------------------------------------------------------------------------


def _base_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        is_url = False
    if not is_url:
        raise ConfigError(f"URL: {url!r} is not the URL of a server", hint="such as http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")


def _mix(classes: Sequence[str], tenants: Sequence[str], slo: str | None, streams: RandomStreams) -> Any:
    from rota.cli.load_facts import load_class, tenant_share
    from rota.serving.bench.plan import LoadClass, Mix

    promised = slo_of("--slo", slo)
    kinds = [load_class(text, promised) for text in classes] or [LoadClass(slo=promised)]
    names = [kind.name for kind in kinds]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"--class: two classes are named {twice!r}")
    return Mix(kinds, [tenant_share(text) for text in tenants], streams)


def _rate_plan(
    rate: float | None,
    burstiness: float | None,
    prompt_tokens: str | None,
    max_tokens: str | None,
    mix: Any,
    streams: RandomStreams,
) -> "Iterator[Planned]":
    from rota.cli.load_facts import lengths
    from rota.serving.bench.plan import at_rate

    if rate is None:
        raise ConfigError("--rate or --trace: one of them is needed", hint="such as --rate 2")
    return at_rate(
        positive("--rate", rate),
        1.0 if burstiness is None else positive("--burstiness", burstiness),
        lengths("--prompt-tokens", prompt_tokens or DEFAULT_PROMPT_TOKENS),
        lengths("--max-tokens", max_tokens or DEFAULT_MAX_TOKENS),
        mix,
        streams,
    )


def _trace_plan(
    trace: Path,
    speedup: float | None,
    prompt_tokens: str | None,
    max_tokens: str | None,
    mix: Any,
    streams: RandomStreams,
) -> "Iterator[Planned]":
    from rota.cli.load_facts import cap
    from rota.serving.bench.plan import from_trace
    from rota.serving.workload.formats import read_trace

    return from_trace(
        read_trace(trace, streams),
        1.0 if speedup is None else positive("--speedup", speedup),
        mix,
        max_prompt_tokens=cap("--prompt-tokens", prompt_tokens),
        max_output_tokens=cap("--max-tokens", max_tokens),
    )


def _bounded(plan: "Iterator[Planned]", limit: int | None, duration: float | None) -> "Iterator[Planned]":
    from rota.base.instant import seconds
    from rota.serving.bench.plan import bounded

    span = None if duration is None else seconds(positive("--duration", duration))
    return bounded(plan, num_requests=limit, duration=span)


# --- what is said -----------------------------------------------------------------------------------------------------


def _say_what_to_know(report: "LoadReport", *, has_tokenizer: bool) -> None:
    from rota.serving.bench.report import LAG_WARNING_MS

    lengths, lag = report.prompt_tokens_mean, report.schedule_lag_ms
    if not has_tokenizer and lengths.asked is not None:
        counted = "" if lengths.counted is None else f"; the server counted {lengths.counted:,.0f} in the mean"
        warn(f"without --tokenizer a word counts as a token: prompts of {lengths.asked:,.0f} were asked for{counted}")
    if report.num_finished and report.token_counts != "usage":
        warn("the server did not count the output tokens of all answers; a chunk counts as one there")
    if lag.p99 is not None and lag.p99 > LAG_WARNING_MS:
        warn(f"requests left late (p99 {lag.p99:,.1f} ms): this machine could not keep the schedule")


def _judge(result: "LoadResult") -> None:
    report = result.report
    if report.is_interrupted:
        warn("interrupted; this is what was measured until then")
        raise typer.Exit(INTERRUPTED)
    if not report.num_finished:
        first = next((each for each in result.sent if each.error_kind), None)
        why = f"; the first: {first.error_kind}: {first.detail}" if first is not None else ""
        raise EngineError(f"none of {report.num_requests} requests was answered{why}")


def _print(report: "LoadReport") -> None:
    print_table(
        ("requests", "finished", "rejected", "failed", "aborted", "offered /s", "sent /s", "achieved /s", "span s"),
        [
            (
                report.num_requests,
                report.num_finished,
                report.num_rejected,
                report.num_failed,
                report.num_aborted,
                report.offered_rps,
                report.sent_rps,
                report.achieved_rps,
                report.span_seconds,
            )
        ],
    )
    print()
    latencies = (
        ("ttft, from its moment", report.ttft_ms),
        ("ttft, from sending", report.ttft_from_send_ms),
        ("tpot", report.tpot_ms),
        ("itl", report.itl_ms),
        ("e2e, from its moment", report.e2e_ms),
    )
    print_table(("ms", "mean", "p50", "p90", "p99"), [_distribution_row(name, each) for name, each in latencies])
    print()
    rows = [_group_row("all", report.num_requests, report)]
    for groups, what in ((report.by_class, "class"), (report.by_tenant, "tenant")):
        if len(groups) > 1:
            rows += [_group_row(f"{what} {name}", group.num_requests, group) for name, group in groups.items()]
    print_table(
        ("", "requests", "finished", "ttft p50 ms", "p99", "tpot p50 ms", "p99", "goodput /s", "SLO met", "tokens /s"),
        rows,
    )
    if report.errors:
        print()
        print_table(("error", "requests"), list(report.errors.items()))
    print()
    lag = report.schedule_lag_ms
    print_table(("schedule lag ms", "p50", "p99", "max"), [("sent after its moment", lag.p50, lag.p99, lag.max)])


def _distribution_row(name: str, values: "Distribution") -> tuple[object, ...]:
    return name, values.mean, values.p50, values.p90, values.p99


def _group_row(name: str, num_requests: int, group: "GroupSummary | LoadReport") -> tuple[object, ...]:
    return (
        name,
        num_requests,
        group.num_finished,
        group.ttft_ms.p50,
        group.ttft_ms.p99,
        group.tpot_ms.p50,
        group.tpot_ms.p99,
        group.goodput_rps,
        group.slo_attainment,
        group.output_tokens_per_second,
    )
