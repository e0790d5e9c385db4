"""Formats keep what a trace says, and stop with file, line and column at what they cannot read."""

import json
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.workload.samples import AGENTS, SHAREGPT, SHAREGPT_LENGTHS

from rota.base.errors import ConfigError, DataError
from rota.base.instant import Duration
from rota.base.random_streams import RandomStreams
from rota.serving.model.request import TenantId, shared_prefix_blocks
from rota.serving.workload.arrivals import Arrival
from rota.serving.workload.formats import FORMATS, read_trace, recognise, spot
from rota.serving.workload.formats.agents import AgentsFormat
from rota.serving.workload.formats.azure import AzureFormat
from rota.serving.workload.formats.burstgpt import BurstgptFormat
from rota.serving.workload.formats.mooncake import MooncakeFormat
from rota.serving.workload.formats.rota import RotaFormat
from rota.testing.formats import check_format

AZURE_HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
AZURE_ROW = "2023-11-16 18:15:46.6805900,374,44"
MOONCAKE_ROW = '{"timestamp": 5, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}'


@st.composite
def traces(draw: st.DrawFn, unit: int, prefixes: bool) -> list[Arrival]:
    gaps = draw(st.lists(st.integers(0, 10**6), min_size=3, max_size=8))
    gaps[0] = 0
    gaps[-1] += 1
    at, rows = 0, []
    for gap in gaps:
        at += gap * unit
        num_prompt_tokens = draw(st.integers(1, 5000))
        num_blocks = -(-num_prompt_tokens // 512) if prefixes else 0
        hashes = tuple(draw(st.integers(0, 2**53 - 1)) for _ in range(num_blocks))
        session = draw(st.none() | st.text(min_size=1, alphabet=st.characters(codec="utf-8"))) if prefixes else None
        rows.append(
            Arrival(
                Duration(at),
                num_prompt_tokens,
                draw(st.integers(1, 2**31 - 1)),
                hashes,
                session=session,
                tenant=TenantId(draw(st.sampled_from(["default", "a", "ü"]))) if prefixes else TenantId("default"),
                priority=draw(st.integers(-9, 9)) if prefixes else 0,
            )
        )
    return rows


@st.composite
def programs(draw: st.DrawFn) -> list[Arrival]:
    """Open rows in order, each followed by rows that wait for any of those since."""
    at, rows = 0, []
    for _ in range(draw(st.integers(1, 4))):
        at += draw(st.integers(0, 10**12))
        names: list[str] = []
        for number in range(draw(st.integers(1, 4))):
            after = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)) if names else []
            prefix = draw(st.lists(st.integers(0, 2**64 - 1), max_size=4))
            rows.append(
                Arrival(
                    Duration(at + number),
                    draw(st.integers(64, 5000)),
                    draw(st.integers(1, 2**31 - 1)),
                    tuple(prefix),
                    16,
                    session=draw(st.none() | st.sampled_from(["s", "ü"])),
                    tenant=TenantId(draw(st.sampled_from(["default", "a"]))),
                    priority=draw(st.integers(-9, 9)),
                    program=draw(st.none() | st.just("p")),
                    id=str(number),
                    after=tuple(after),
                    gap=Duration(draw(st.integers(0, 10**12)) if after else 0),
                )
            )
            names.append(str(number))
    return rows


@settings(max_examples=20, deadline=None)
@given(traces(unit=7, prefixes=False))
def test_azure_conforms(sample: list[Arrival]) -> None:
    check_format(AzureFormat(), AzureFormat(), sample)


@settings(max_examples=20, deadline=None)
@given(traces(unit=1_000_000, prefixes=True))
def test_mooncake_conforms(sample: list[Arrival]) -> None:
    check_format(MooncakeFormat(), MooncakeFormat(), sample)


@settings(max_examples=20, deadline=None)
@given(traces(unit=7, prefixes=False), st.data())
def test_burstgpt_conforms(sample: list[Arrival], data: st.DataObject) -> None:
    sessions = st.none() | st.text(min_size=1, alphabet="abc-ü 7")
    sample = [msgspec.structs.replace(arrival, session=data.draw(sessions)) for arrival in sample]
    check_format(BurstgptFormat(), BurstgptFormat(), sample)


@settings(max_examples=20, deadline=None)
@given(traces(unit=7, prefixes=True))
def test_rota_conforms(sample: list[Arrival]) -> None:
    check_format(RotaFormat(), RotaFormat(), sample)


@settings(max_examples=30, deadline=None)
@given(programs())
def test_rota_holds_everything(tmp_path_factory: pytest.TempPathFactory, sample: list[Arrival]) -> None:
    path = tmp_path_factory.mktemp("rota") / "trace"
    assert RotaFormat().write(path, sample) == len(sample)
    assert list(read_trace(path, RandomStreams(0))) == sample


@pytest.mark.parametrize("text", [AGENTS, SHAREGPT, SHAREGPT_LENGTHS])
def test_a_trace_of_sessions_goes_through_rota_unchanged(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    rows = list(read_trace(path, RandomStreams(0)))
    RotaFormat().write(path, rows)
    assert list(read_trace(path, RandomStreams(1))) == rows


def test_agents_go_out_and_in(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(AGENTS)
    rows = list(read_trace(path, RandomStreams(0)))
    assert [row.after for row in rows] == [(), ("0",), (), ("0",)]
    assert [row.gap for row in rows] == [0, 2_334_000_000, 0, 3_681_000_000]
    assert [row.at for row in rows] == [0, 2_334_000_000, 0, 3_681_000_000]
    assert shared_prefix_blocks(rows[0].prefix_hashes, rows[1].prefix_hashes) == 1257 // 16
    assert shared_prefix_blocks(rows[1].prefix_hashes, rows[2].prefix_hashes) == 0
    AgentsFormat().write(path, rows)
    assert list(read_trace(path, RandomStreams(0))) == rows


def test_turns_of_sharegpt_share_their_history_and_wait_for_each_other(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(SHAREGPT)
    first, second, other = read_trace(path, RandomStreams(0))
    assert (first.num_prompt_tokens, first.num_output_tokens) == (9, 14)
    assert (second.num_prompt_tokens, second.num_output_tokens) == (9 + 14 + 2, 4)
    assert second.after == (first.id,) and second.gap > 0 and not other.after
    assert second.prefix_hashes[: len(first.prefix_hashes)] == first.prefix_hashes
    assert not set(other.prefix_hashes) & set(second.prefix_hashes)
    assert (first.session, other.session) == ("a", "b")


AZURE_LINES = (
    "2023-11-16 18:15:46.6805900,374,44",
    "2023-11-16 18:15:46,1,1",
    "2023-11-16 18:59:59.999999999,2147483647,1",
    "2024-02-29 00:00:00.5,7,7",
    "2023-02-29 00:00:00.5,7,7",
    "2023-11-16 18:60:00,7,7",
    "2023-11-16 18:15:61,7,7",
    "2023-11-16 18:15:46Z,7,7",
    "2023-11-16 18:15:46+00:00,7,7",
    "2023-11-16 18:15:46,0,7",
    "2023-11-16 18:15:46,007,7",
    "2023-11-16 18:15:46,2147483648,7",
    "",
    "x",
)
MOONCAKE_LINES = (
    '{"timestamp": 5, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}',
    '{"timestamp": 5, "input_length": 600, "output_length": 5, "hash_ids": [1,2]}',
    '{"timestamp": 6, "input_length": 1, "output_length": 5, "hash_ids": [9007199254740991]}',
    '{"timestamp": 7, "input_length": 1, "output_length": 5, "hash_ids": [9007199254740992]}',
    '{"timestamp": 7, "input_length": 600, "output_length": 5, "hash_ids": [1]}',
    '{"timestamp": 7, "input_length": 600, "output_length": 5, "hash_ids": [1, 02]}',
    '{"timestamp": 7, "input_length": 1, "output_length": 5, "hash_ids": [1,]}',
    '{"timestamp": 7, "input_length": 1, "output_length": 5, "hash_ids": [1], "tenant": "a"}',
    '{"output_length": 5, "timestamp": 9, "input_length": 1, "hash_ids": [1]}',
    '{"timestamp": 7, "input_length": 2147483648, "output_length": 5, "hash_ids": [1]}',
    "",
    "x",
)


@pytest.mark.parametrize(
    ("head", "lines"), [(AZURE_HEAD + AZURE_ROW + "\n", AZURE_LINES), ("", MOONCAKE_LINES)], ids=["azure", "mooncake"]
)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_block_taken_at_once_gives_what_its_lines_give(
    tmp_path_factory: pytest.TempPathFactory, head: str, lines: tuple[str, ...], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("blocks") / "trace"
    rows = data.draw(st.lists(st.sampled_from(lines), min_size=1, max_size=4))
    end = data.draw(st.sampled_from(["\n", "\r\n"]))
    path.write_text(head + end.join(rows) + data.draw(st.sampled_from(["", end])), newline="")
    name = "azure" if head else "mooncake"
    outcomes = []
    for num_bytes in (1, 16 * 1024):  # of the first block: a line at a time, or all lines
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(spot, "FIRST_BLOCK_BYTES", num_bytes)
            patch.setattr(spot, "BLOCK_BYTES", num_bytes)
            if num_bytes == 1:
                patch.setattr(f"rota.serving.workload.formats.{name}._Reading.at_once", lambda *_: None)
            got: list[object] = []
            try:
                got.extend(read_trace(path, RandomStreams(0), format_name=name))
            except DataError as error:
                got.append(error.message)
        outcomes.append(got)
    assert outcomes[0] == outcomes[1]


def bad_azure(row: str) -> bytes:
    return (AZURE_HEAD + AZURE_ROW + "\r\n" + row + "\r\n").encode()


def bad_mooncake(**changes: object) -> bytes:
    row = json.loads(MOONCAKE_ROW) | changes
    return (MOONCAKE_ROW + "\n" + json.dumps({key: value for key, value in row.items() if value != "DROP"})).encode()


T = "2023-11-16 18:15:47"
BAD: list[tuple[str, bytes, str]] = [
    # name, content of the file, what the message must hold after the file's name
    ("azure no rows", AZURE_HEAD.encode(), ":2:1: no rows"),
    ("azure header misspelt", b"TIMESTAMP,ContextToken,GeneratedTokens\n", ":1:11: expected the header TIMESTAMP,"),
    ("azure header cut", b"TIMESTAMP,ContextTokens\n", ":1:24: expected the header"),
    ("azure missing column", bad_azure(f"{T},374"), ":3:24: GeneratedTokens: missing"),
    ("azure column too many", bad_azure(f"{T},374,44,9"), ":3:28: 4 columns"),
    ("azure empty line", bad_azure(""), ":3:1: an empty line"),
    ("azure float", bad_azure(f"{T},374.0,44"), ":3:21: ContextTokens: expected a whole number"),
    ("azure text", bad_azure(f"{T},374,many"), ":3:25: GeneratedTokens: expected"),
    ("azure nan", bad_azure(f"{T},nan,44"), ":3:21: ContextTokens: expected"),
    ("azure negative", bad_azure(f"{T},-3,44"), ":3:21: ContextTokens: expected"),
    ("azure zero prompt", bad_azure(f"{T},0,44"), ":3:21: ContextTokens: expected"),
    ("azure zero output", bad_azure(f"{T},374,0"), ":3:25: GeneratedTokens: expected"),
    ("azure huge", bad_azure(f"{T},374,{10**30}"), ":3:25: GeneratedTokens: expected"),
    ("azure thousands of digits", bad_azure(f"{T},374,{'9' * 9000}"), ":3:25: GeneratedTokens: expected"),
    ("azure underscore", bad_azure(f"{T},3_4,44"), ":3:21: ContextTokens: expected"),
    ("azure other digits", bad_azure(f"{T},٣,44"), ":3:21: ContextTokens: expected"),
    ("azure blank", bad_azure(f"{T}, 374,44"), ":3:21: ContextTokens: expected"),
    ("azure backwards", bad_azure("2023-11-16 18:15:46.6805899,374,44"), ":3:1: TIMESTAMP: 2023"),
    ("azure float time", bad_azure("1700158546.68,374,44"), ":3:1: TIMESTAMP: expected a time"),
    ("azure no such day", bad_azure("2023-02-30 18:15:46,374,44"), ":3:1: TIMESTAMP: expected"),
    ("azure year 0", bad_azure("0000-01-01 18:15:46,374,44"), ":3:1: TIMESTAMP: expected"),
    ("azure hour 24", bad_azure("2023-11-17 24:00:00,374,44"), ":3:1: TIMESTAMP: expected"),
    ("azure ten digits", bad_azure(f"{T}.1234567890,374,44"), ":3:1: TIMESTAMP: expected"),
    ("azure not utf-8", bad_azure(T).replace(b"2023-11-16 18:15:47", b"2023-\xff"), ":3:6: byte 0xff is not UTF-8"),
    ("azure bom", b"\xef\xbb\xbf" + bad_azure(f"{T},374,44"), ":1:1: byte order mark"),
    ("azure nul", bad_azure(f"{T},374\0,44"), ":3:24: a NUL byte"),
    ("mooncake no timestamp", bad_mooncake(timestamp="DROP"), ":2:61: timestamp: missing"),
    ("mooncake unknown key", bad_mooncake(outputlength=3), ":2:79: 'outputlength': unknown key"),
    ("mooncake float time", bad_mooncake(timestamp=6.5), ":2:2: timestamp: expected a whole number"),
    ("mooncake backwards", bad_mooncake(timestamp=4), ":2:2: timestamp: 4 is earlier than 5"),
    ("mooncake bool", bad_mooncake(output_length=True), ":2:39: output_length: expected"),
    ("mooncake string", bad_mooncake(input_length="600"), ":2:18: input_length: expected"),
    ("mooncake null", bad_mooncake(input_length=None), ":2:18: input_length: expected"),
    ("mooncake zero", bad_mooncake(output_length=0), ":2:39: output_length: expected"),
    ("mooncake negative", bad_mooncake(input_length=-600), ":2:18: input_length: expected"),
    ("mooncake huge", bad_mooncake(input_length=10**40), ":2:18: input_length: expected"),
    ("mooncake too few hashes", bad_mooncake(hash_ids=[1]), ":2:59: hash_ids: 1 ids for an input_length of 600"),
    ("mooncake too many hashes", bad_mooncake(hash_ids=[1, 2, 3]), ":2:59: hash_ids: 3 ids"),
    ("mooncake hash text", bad_mooncake(hash_ids=[1, "2"]), ":2:59: hash_ids: item 1: expected"),
    ("mooncake hash negative", bad_mooncake(hash_ids=[1, -2]), ":2:59: hash_ids: item 1: expected"),
    ("mooncake hashes no list", bad_mooncake(hash_ids={"1": 2}), ":2:59: hash_ids: expected a list"),
    ("mooncake empty tenant", bad_mooncake(tenant=""), ":2:79: tenant: expected a text"),
    ("mooncake tenant number", bad_mooncake(tenant=4), ":2:79: tenant: expected a text"),
    ("mooncake cut", bad_mooncake()[:-10], ":2:"),
    ("mooncake nan", bad_mooncake(timestamp=float("nan")), ":2:15: NaN is not JSON"),
    ("mooncake infinity", bad_mooncake(input_length=float("-inf")), ":2:34: -Infinity is not JSON"),
    ("mooncake array", MOONCAKE_ROW.encode() + b"\n[1, 2]", ":2:1: expected a JSON object"),
    (
        "mooncake two keys",
        MOONCAKE_ROW.encode() + b'\n{"timestamp": 6, "timestamp": 7}',
        ":2:2: timestamp: given twice",
    ),
    (
        "mooncake digits",
        MOONCAKE_ROW.encode() + b'\n{"timestamp": ' + b"9" * 9000 + b"}",
        ":2:1: a number of thousands",
    ),
    ("mooncake deep", MOONCAKE_ROW.encode() + b'\n{"timestamp": ' + b"[" * 99999, ":2:1: not JSON of a trace: nested"),
    ("mooncake trailing text", MOONCAKE_ROW.encode() + b" x", ":1:79: not JSON"),
    ("empty", b"", ":1:1: the file is empty"),
    ("blank", b"\n\n", ":1:1: the file is empty"),
    ("binary", bytes(range(256)), ":1:1: not a trace of a known format"),
    ("other csv", b"Date,Time,prompt,output\n1,2,3,4\n", ":1:1: not a trace of a known format"),
]


@pytest.mark.parametrize(("content", "expected"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_bad_file_is_answered_with_its_spot(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "trace.data"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_trace(path, RandomStreams(0)))
    assert caught.value.message.startswith(f"{path}{expected}"), caught.value.message
    assert len(caught.value.message) < len(str(path)) + 300
    caught.value.message.encode()


SYNTHETIC = """\
num_requests = 50
[arrivals]
rate = 6.0
[prompt]
quantiles = {"0" = 16, "0.5" = 512, "1" = 4096}
[output]
quantiles = {"0" = 1, "1" = 64}
"""

BAD_SYNTHETIC: list[tuple[str, str, str, str]] = [
    ("rate zero", "rate = 6.0", "rate = 0", ":2: arrivals: rate must be positive"),
    ("rate text", "rate = 6.0", 'rate = "6"', ":3: arrivals.rate"),
    ("rate nan", "rate = 6.0", "rate = nan", ":3: arrivals.rate"),
    ("unknown key", "rate = 6.0", "rate = 6.0\ncvv = 2", ":4: arrivals.cvv: unknown key"),
    ("no rate", "rate = 6.0", "", ":2: arrivals: "),
    ("not TOML", "rate = 6.0", "rate = = 6", ":3:8: "),
    ("no end", '"1" = 64', '"0.9" = 64', ":6: output"),
    ("falling", '"1" = 4096', '"1" = 100', ":4: prompt"),
    ("quantile above 1", '"1" = 64', '"1" = 64, "2" = 65', ":6: output"),
    ("length zero", '"0" = 1,', '"0" = 0,', ":6: output"),
    ("no requests", "num_requests = 50", "num_requests = 0", ": "),
    ("share above 1", "[output]", "[prefix]\nnum_groups = 2\nnum_tokens = 2\nshare = 1.5\n[output]", ":6: prefix"),
]


@pytest.mark.parametrize(
    ("old", "new", "expected"), [bad[1:] for bad in BAD_SYNTHETIC], ids=[b[0] for b in BAD_SYNTHETIC]
)
def test_bad_description_is_answered_with_its_line(tmp_path: Path, old: str, new: str, expected: str) -> None:
    path = tmp_path / "load.toml"
    assert old in SYNTHETIC
    path.write_text(SYNTHETIC.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        list(read_trace(path, RandomStreams(0)))
    assert caught.value.message.startswith(f"{path}{expected}"), caught.value.message


@pytest.mark.parametrize(
    ("content", "name"),
    [(AZURE_HEAD, "azure"), ("ContextTokens,GeneratedTokens\n", "azure"), ("{", "mooncake"), (SYNTHETIC, "synthetic")],
)
def test_format_is_recognised_by_content(tmp_path: Path, content: str, name: str) -> None:
    path = tmp_path / "anything.parquet"
    path.write_text(content)
    assert recognise(path).name == name


def test_absent_file_and_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match=re.escape(str(path))):
            recognise(path)


def test_format_can_be_named_and_a_wrong_name_hints(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(AZURE_HEAD + AZURE_ROW)
    assert list(read_trace(path, RandomStreams(0), format_name="azure")) == [Arrival(Duration(0), 374, 44)]
    with pytest.raises(ConfigError) as caught:
        read_trace(path, RandomStreams(0), format_name="azur")
    assert "azure" in (caught.value.hint or "")


def test_every_format_of_the_table_loads() -> None:
    for name in FORMATS.names():
        assert FORMATS.create(name).name == name


@pytest.mark.parametrize(
    ("writer", "arrivals"),
    [
        (AzureFormat(), [Arrival(Duration(5), 1, 1)]),
        (AzureFormat(), [Arrival(Duration(0), 1, 1, (1,))]),
        (AzureFormat(), [Arrival(Duration(0), 1, 1, priority=1)]),
        (MooncakeFormat(), [Arrival(Duration(5), 1, 1, (1,))]),
        (MooncakeFormat(), [Arrival(Duration(0), 1, 1)]),
        (MooncakeFormat(), [Arrival(Duration(0), 1, 1, (1,), hash_block_tokens=16)]),
    ],
)
def test_writer_refuses_what_its_format_would_lose(
    tmp_path: Path, writer: AzureFormat, arrivals: list[Arrival]
) -> None:
    with pytest.raises(DataError, match="row 1"):
        writer.write(tmp_path / "trace", arrivals)
