"""Every reader on every kind of broken file: refused by file, line and column, or read in full; nothing is dropped."""

import gzip
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.workload.samples import (
    AGENTS,
    AZURE,
    AZURE_2024,
    BURSTGPT,
    BURSTGPT_SESSIONS,
    LINES_BEFORE_ROWS,
    MOONCAKE,
    ROTA,
    SHAREGPT,
    SHAREGPT_LENGTHS,
    TEXTS,
    journal_bytes,
)

from rota.base.errors import DataError
from rota.base.random_streams import RandomStreams
from rota.serving.workload.arrivals import Arrival
from rota.serving.workload.formats import read_trace, recognise
from rota.serving.workload.formats.leniency import Leniency

HUGE = "9" * 9000
LONG = "x" * (16 * 1024 * 1024 + 1)


def read(path: Path, **leniency: object) -> list[Arrival]:
    return list(read_trace(path, RandomStreams(0), leniency=Leniency(**leniency)))  # type: ignore[arg-type]


def once(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, old
    return text.replace(old, new)


def broken(name: str, text: str, old: str, new: str, expected: str) -> tuple[str, str, str]:
    return name, once(text, old, new), expected


CASES: list[tuple[str, str, str]] = [
    # what is wrong, content, what follows the file's name in the answer
    broken(
        "azure 2024: a zone is missing",
        AZURE_2024,
        "01+00:00",
        "01",
        ":4:1: TIMESTAMP: 2024-05-10 00:00:01 has no zone",
    ),
    broken(
        "azure: a zone comes up",
        AZURE,
        "50.9951690",
        "50.9951690Z",
        ":3:1: TIMESTAMP: 2023-11-16 18:15:50.9951690Z has a",
    ),
    broken("azure 2024: no such zone", AZURE_2024, "01+00:00", "01+25:00", ":4:1: TIMESTAMP: expected a time"),
    broken("azure 2024: time goes back", AZURE_2024, "00:00:01+", "00:00:00+", ":4:1: TIMESTAMP: "),
    broken("azure: a span of centuries", AZURE, "2023-11-16 18:15:51", "2323-11-16 18:15:51", ":4:1: TIMESTAMP: "),
    broken(
        "azure: seconds for a time", AZURE, "2023-11-16 18:15:51.2225670", "51.2", ":4:1: TIMESTAMP: expected a time"
    ),
    broken("azure: cut inside a row", AZURE, ",879,55\r\n", "", ":4:28: ContextTokens: missing"),
    broken("azure: a quote", AZURE, ",396,", ',"396",', ":3:29: ContextTokens: expected a whole number"),
    broken("burstgpt: cut inside a row", BURSTGPT, "17,276,693,API log\n", "17", ":4:14: Response tokens: missing"),
    broken("burstgpt: a column less", BURSTGPT, ",Total tokens", "", ":1:48: expected the header"),
    broken("burstgpt: a column more", BURSTGPT, "Log Type\n", "Log Type,Cost\n", ":1:70: expected the header"),
    broken("burstgpt: a field more", BURSTGPT, "API log", "API log,1", ":4:31: 7 columns"),
    broken("burstgpt: milliseconds", BURSTGPT, "118,", "1700158546000,", ":4:1: Timestamp: '1700158546000' s are more"),
    broken("burstgpt: twenty years", BURSTGPT, "118,", "1700158546,", ":4:1: Timestamp: 1700158546 s lie more"),
    broken("burstgpt: unsorted", BURSTGPT, "118,", "44,", ":4:1: Timestamp: 44 is earlier"),
    broken("burstgpt: negative time", BURSTGPT, "118,", "-1,", ":4:1: Timestamp: expected seconds"),
    broken("burstgpt: no time", BURSTGPT, "118,", "nan,", ":4:1: Timestamp: expected seconds"),
    broken("burstgpt: an exponent", BURSTGPT, "118,", "1e9,", ":4:1: Timestamp: expected seconds"),
    broken("burstgpt: too fine", BURSTGPT, "118,", "118.0000000001,", ":4:1: Timestamp: expected seconds"),
    broken("burstgpt: negative length", BURSTGPT, ",276,", ",-276,", ":4:15: Response tokens: expected"),
    broken("burstgpt: huge length", BURSTGPT, ",276,", f",{HUGE},", ":4:15: Response tokens: expected"),
    broken("burstgpt: a total that is none", BURSTGPT, ",693,", ",694,", ":4:19: Total tokens: 694 is not 417 + 276"),
    broken("burstgpt: a failure", BURSTGPT, ",276,693,", ",0,417,", ":4:15: Response tokens: expected a whole number"),
    broken(
        "burstgpt with sessions: names swapped",
        BURSTGPT_SESSIONS,
        "Session ID,Elapsed time",
        "Elapsed time,Session ID",
        ":1:11: expected the header Timestamp,Session ID",
    ),
    broken("agents: cut inside a row", AGENTS, ",97,7,32\n", ",97,7", ":5:32: common_prefix_tokens_with_prev: missing"),
    broken("agents: a column less", AGENTS, ",common_prefix_tokens_with_prev", "", ":1:75: expected the header"),
    broken("agents: a call twice", AGENTS, "swe,06392522,1", "swe,06392522,0", ":3:14: call: 0 where call 1"),
    broken("agents: a call is missing", AGENTS, "swe,06392522,1", "swe,06392522,2", ":3:14: call: 2 where call 1"),
    broken(
        "agents: a session begins late", AGENTS, "tau,06392522,0,0.0,0", "tau,x,1,0.0,0", ":4:7: call: 1 where call 0"
    ),
    (
        "agents: a session comes again",
        AGENTS + "swe,06392522,0,0.0,0,1258,89,0\n",
        ":6:5: session: '06392522' comes again",
    ),
    broken(
        "agents: time goes back",
        AGENTS,
        "3.681,3.681",
        "3.681,4.681",
        ":5:22: gap_since_prev_call_s: 4.681 s do not lead",
    ),
    broken(
        "agents: milliseconds", AGENTS, "3.681,3.681", "3.681,3681", ":5:22: gap_since_prev_call_s: 3681 s do not lead"
    ),
    broken(
        "agents: negative gap", AGENTS, "3.681,3.681", "3.681,-3.681", ":5:22: gap_since_prev_call_s: expected seconds"
    ),
    broken(
        "agents: more shared than sent",
        AGENTS,
        ",97,7,32",
        ",97,7,89",
        ":5:33: common_prefix_tokens_with_prev: expected",
    ),
    broken("agents: negative length", AGENTS, ",97,7,32", ",-97,7,32", ":5:28: input_tokens: expected"),
    broken("agents: no name", AGENTS, "tau,06392522,0", ",06392522,0", ":4:1: kind: expected a name"),
    broken("lengths: cut", SHAREGPT_LENGTHS, "1,0,0,433,550\n", "1,0,0", ":4:6: new: missing"),
    broken("lengths: a turn twice", SHAREGPT_LENGTHS, "0,1,279", "0,0,279", ":3:3: turn: 0 where turn 1"),
    broken("lengths: a turn of 5", SHAREGPT_LENGTHS, "1,0,0,433", "1,5,0,433", ":4:3: turn: expected"),
    (
        "lengths: comes again",
        SHAREGPT_LENGTHS + "0,2,9,9,9\n",
        ":5:1: conv: '0' comes again",
    ),
    broken("lengths: no answer", SHAREGPT_LENGTHS, "433,550", "433,0", ":4:11: reply: expected at least 1 token"),
    broken("lengths: no prompt", SHAREGPT_LENGTHS, "0,433,", "0,0,", ":4:7: new: expected at least 1 token"),
    broken("lengths: negative", SHAREGPT_LENGTHS, "279,50", "279,-50", ":3:9: new: expected"),
    broken("lengths: too long", SHAREGPT_LENGTHS, "279,50", "2147483647,50", ":3:16: new: a prompt of"),
    broken(
        "mooncake: microseconds",
        MOONCAKE,
        '{"timestamp": 0,',
        '{"timestamp": 1700158546000000,',
        ":1:2: timestamp: expected",
    ),
    broken(
        "mooncake: seconds",
        MOONCAKE,
        '{"timestamp": 0,',
        '{"timestamp": 0.5,',
        ":1:2: timestamp: expected a whole number",
    ),
    broken(
        "mooncake: negative", MOONCAKE, '{"timestamp": 0,', '{"timestamp": -3,', ":1:2: timestamp: expected a whole"
    ),
    broken(
        "mooncake: half a character", MOONCAKE, "[0]}", '[0], "session": "\\ud800"}', ":2:79: session: expected a text"
    ),
    broken("rota: another version", ROTA, '"version":1', '"version":2', ":1:1: expected {"),
    broken("rota: unknown key", ROTA, '"gap"', '"gaps"', ":3:80: 'gaps': unknown key"),
    broken("rota: a text for a number", ROTA, '"at":900', '"at":"900"', ":4:2: at: expected `int`, got `str`"),
    broken("rota: a fraction", ROTA, '"at":900', '"at":900.5', ":4:2: at: expected `int`, got `float`"),
    broken("rota: cut", ROTA, '"priority":-1}\n', '"prio', ":4:87: not JSON"),
    broken("rota: given twice", ROTA, '"at":900', '"at":800,"at":900', ":4:11: at: given twice"),
    broken(
        "rota: unsorted",
        ROTA + '{"at":800,"num_prompt_tokens":9,"num_output_tokens":8}\n',
        '"num_output_tokens":8}',
        '"num_output_tokens":8}',
        ":5:2: at: 800 is earlier than 900",
    ),
    broken("rota: before the start", ROTA, '"at":0,', '"at":-1,', ":2:2: at: -1 is before the start"),
    broken("rota: waits for nobody", ROTA, '["a"]', '["c"]', ":3:66: after: 'c' is no row since"),
    broken("rota: waits across programs", ROTA, '"priority":-1', '"after":["b"],"gap":1},{', ":4:105: not JSON"),
    broken(
        "rota: waits for an older program",
        ROTA + '{"at":950,"num_prompt_tokens":9,"num_output_tokens":8,"after":["a"]}\n',
        '"tenant":"t"',
        '"tenant":"t"',
        ":5:55: after: 'a' is no row since",
    ),
    broken("rota: an id twice", ROTA, '"id":"b"', '"id":"a"', ":3:57: id: 'a' is the id of a row before"),
    broken("rota: a gap without a wait", ROTA, '"after":["a"],', "", ":3:66: gap: a row that waits for none"),
    broken("rota: a negative gap", ROTA, '"gap":2000', '"gap":-1', ":3:80: gap: expected"),
    broken("rota: earlier than what it waits for", ROTA, '{"at":2000', '{"at":-2', ":3:2: at: -2 is earlier"),
    broken("rota: more ids than blocks", ROTA, "[7,8]", "[7,8,9,10]", ":2:54: prefix_hashes: 4 ids for a prompt of 3"),
    broken("rota: a negative id", ROTA, "[7,8]", "[7,-8]", ":2:54: prefix_hashes: expected whole numbers"),
    broken(
        "rota: no tokens", ROTA, '"num_output_tokens":9', '"num_output_tokens":0', ":4:33: num_output_tokens: expected"
    ),
    broken("rota: an empty name", ROTA, '"session":"s"', '"session":""', ":4:55: session: expected a text"),
    broken("rota: a missing key", ROTA, '"num_prompt_tokens":9,', "", ":4:"),
    broken("rota: huge", ROTA, '"at":900', f'"at":{HUGE}', ":4:"),
    broken("sharegpt: cut", SHAREGPT, "Hallo ☺", "☺☺☺\n", ":1:1: not JSON")
    if False
    else ("sharegpt: cut", SHAREGPT[:-40], ":"),
    broken("sharegpt: no array", SHAREGPT, '[\n {\n  "id": "a"', '{"id": "a"', ":1:"),
    broken(
        "sharegpt: a speaker of no kind",
        SHAREGPT,
        '"from": "human",\n    "value": "Thanks."',
        '"from": "alien", "value": "T"',
        ":4:3: conversations[2].from: expected human or gpt",
    ),
    broken("sharegpt: no text", SHAREGPT, '"Thanks."', "7", ":4:3: conversations[2].value: expected a text, got 7"),
    broken(
        "sharegpt: an answer of no text",
        SHAREGPT,
        '"You are welcome."',
        '""',
        ":2:2: conversations[3].value: an answer",
    ),
    broken("sharegpt: an id twice", SHAREGPT, '"id": "b"', '"id": "a"', ":24:3: id: 'a' comes twice"),
    broken(
        "sharegpt: no messages",
        SHAREGPT,
        '"id": "b",\n  "conversations"',
        '"id": "b",\n  "items"',
        ":23:2: conversations: expected",
    ),
    broken("sharegpt: no comma", SHAREGPT, '"Thanks."', '"Thanks." "x"', ":15:24: not JSON"),
    broken(
        "sharegpt: an element that is none",
        SHAREGPT,
        '\n {\n  "id": "b"',
        ' 5, {"id": "b"',
        ":22:5: expected a conversation, got 5",
    ),
    ("sharegpt: a comma too many", SHAREGPT[:-2] + ",\n]", ":"),
    ("sharegpt: text after its end", SHAREGPT + " x", ":36:3: text after the end of the array"),
    ("sharegpt: an empty array", "[ ]", ":1:1: no conversations"),
    ("sharegpt: nothing in it", "[", ":1:2: the file is cut short"),
    broken(
        "rota: blocks beyond all", ROTA, ":16,", ":2147483647,", ":2:76: hash_block_tokens: expected a whole number"
    ),
    broken("mooncake: a prompt beyond all", MOONCAKE, ": 600", ": 16777217", ":1:18: input_length: expected a whole"),
]


@pytest.mark.parametrize(("content", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_it_is_answered_with_its_spot(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content.encode())
    with pytest.raises(DataError) as caught:
        read(path)
    said = caught.value.message.removeprefix(str(path))
    assert said.startswith(expected), said
    assert re.match(r":\d+:\d+: .", said), said
    assert len(said) < 400


@pytest.mark.parametrize("name", TEXTS)
def test_it_is_good_before_it_is_broken(tmp_path: Path, name: str) -> None:
    path = tmp_path / "trace"
    path.write_bytes(TEXTS[name].encode())
    rows = read(path)
    num_lines = TEXTS[name].count("\n")
    assert len(rows) == (num_lines - LINES_BEFORE_ROWS[name] if name in LINES_BEFORE_ROWS else 3)
    assert recognise(path).name == name.split(" 2024")[0].split(" with")[0].replace(" ", "_")


def damaged(name: str, content: bytes) -> list[tuple[str, bytes, str]]:
    """What can happen to a file of any format, and the spot that the answer must name."""
    num_head = LINES_BEFORE_ROWS.get(name, 0)
    lines = content.splitlines(keepends=True)
    row = num_head + 2
    before, good, rest = b"".join(lines[: row - 1]), lines[row - 1], b"".join(lines[row:])
    return [
        ("empty", b"", ":1:1: the file is empty"),
        ("blank", b" \n\n", ":1:1: the file is empty"),
        ("a byte order mark", b"\xef\xbb\xbf" + content, ":1:1: byte order mark"),
        ("a NUL byte", before + b"\0" + good + rest, f":{row}:1: a NUL byte"),
        ("NUL bytes at the end, as after a crash", content + b"\0" * 512, ":"),
        ("Latin-1", before + b"\xe9" + good + rest, f":{row}:1: "),
        ("UTF-16", content.decode().encode("utf-16"), ":1:1: "),
        ("an empty line", before + b"\n" + good + rest, f":{row}:1: an empty line"),
        ("a line beyond all", before + b"x" * (16 * 1024 * 1024 + 1) + b"\n" + rest, f":{row}:1: a line of more"),
        ("a row cut short", before + good[: len(good) // 2] + b"\n" + rest, f":{row}:"),
        ("a row of another file", before + b"<html>\n" + good + rest, f":{row}:"),
        ("packed and cut short", gzip.compress(content)[:-9], ":"),
        ("packed and damaged", gzip.compress(content)[:20] + b"\xff" * 9 + gzip.compress(content)[29:], ":"),
    ]


@pytest.mark.parametrize("name", LINES_BEFORE_ROWS)
def test_damage_of_any_kind_is_answered_with_its_spot(tmp_path: Path, name: str) -> None:
    path = tmp_path / "trace"
    for what, content, expected in damaged(name, TEXTS[name].encode()):
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            read(path)
        said = caught.value.message.removeprefix(str(path))
        assert said.startswith(expected), (what, said)
        assert re.match(r":\d+:\d+: .", said), (what, said)


@pytest.mark.parametrize("name", TEXTS)
def test_a_packed_file_reads_as_the_file_in_it(tmp_path: Path, name: str) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    plain.write_bytes(TEXTS[name].encode())
    packed.write_bytes(gzip.compress(TEXTS[name].encode()))
    assert read(packed) == read(plain)


@pytest.mark.parametrize("name", LINES_BEFORE_ROWS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_with_any_byte_changed_is_refused_or_read_in_full(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("changed") / "trace"
    content = bytearray(TEXTS[name].encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        byte = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789,.:-"{}[]\r'))
        content[place : place + data.draw(st.integers(0, 2))] = bytes([byte])
    path.write_bytes(content)
    rows = 0
    try:
        for _ in read_trace(path, RandomStreams(0)):
            rows += 1
    except DataError as error:
        assert re.match(re.escape(str(path)) + r":\d+:\d+: .", error.message), error.message
    else:
        num_lines = content.count(b"\n") + (not content.endswith(b"\n"))
        assert rows == num_lines - LINES_BEFORE_ROWS[name], "a row was dropped or made up"


# --- journals ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return journal_bytes(tmp_path_factory.mktemp("journal"))


def test_a_journal_that_was_touched_is_refused(tmp_path: Path, journal: bytes) -> None:
    path = tmp_path / "run.jsonl"
    lines = journal.splitlines(keepends=True)
    path.write_bytes(journal)
    num_requests = len(read(path))
    assert num_requests == sum(b'"RequestArrived"' in line for line in lines) == 60
    last = len(lines)
    for what, content, expected in (
        ("empty", b"", ":1:1: the file is empty"),
        ("a row is missing", b"".join(lines[:5] + lines[6:]), ":6:1: row 5 where row 4"),
        ("a row is cut", b"".join(lines[:5]) + lines[5][:40] + b"\n", ":6:1: not a journal row"),
        ("the last line is cut", b"".join(lines[:5]) + lines[5][:40], ":6:41: the last line is cut short"),
        ("a number was changed", journal.replace(b'"at":0', b'"at":1', 1), f":{last}:1: the end mark does not match"),
        ("a line after the end", journal + lines[1], f":{last + 1}:1: a line after the end mark"),
        ("no text", b"".join(lines[:5]) + b"\xff" + lines[5], ":6:1: not a journal row"),
        ("no router in it", lines[0] + b'{"seq":0,"machine":"x","at":0,"kind":"deadline","event":null,"commands":[]}\n',
         ":3:1: no request arrives"),
        ("another version", lines[0].replace(b'"version":2', b'"version":9'), ":1:1: a journal of version 9"),
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            read(path)
        said = caught.value.message.removeprefix(str(path))
        assert said.startswith(expected), (what, said)


def test_requests_that_never_showed_their_length_are_refused_or_counted(tmp_path: Path, journal: bytes) -> None:
    path = tmp_path / "run.jsonl"
    lines = journal.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]))
    with pytest.raises(DataError, match="its output length is not known, as the journal ends before it does") as caught:
        read(path)
    assert "--skip-unfinished" in (caught.value.hint or "")
    reader = recognise(path, Leniency(skip_unfinished=True))
    rows = list(reader.read(path, RandomStreams(0)))
    num_arrived = sum(b'"RequestArrived"' in line for line in lines[: len(lines) // 2])
    assert 0 < len(rows) < num_arrived
    assert reader.tally.counts == {"rows left out": num_arrived - len(rows)}


# --- what may pass when asked for -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        (AZURE, "396,109", "396,0"),
        (BURSTGPT, "1087,230,1317", "1087,0,1087"),
        (AGENTS, "1273,200,1257", "1273,0,1257"),
        (SHAREGPT_LENGTHS, "50,3", "50,0"),
        (MOONCAKE, '512, "output_length": 7', '512, "output_length": 0'),
    ],
    ids=["azure", "burstgpt", "agents", "lengths", "mooncake"],
)
def test_a_length_of_0_is_refused_raised_or_left_out_as_asked(tmp_path: Path, text: str, old: str, new: str) -> None:
    path = tmp_path / "trace"
    path.write_text(once(text, old, new), newline="")
    with pytest.raises(DataError, match=r"got 0|got '0'") as caught:
        read(path, zero="refuse")
    assert "--zero" in (caught.value.hint or "")
    raised, skipping = recognise(path, Leniency(zero="one")), recognise(path, Leniency(zero="skip"))
    rows, fewer = list(raised.read(path, RandomStreams(0))), list(skipping.read(path, RandomStreams(0)))
    assert rows[1].num_output_tokens == 1
    assert [len(rows) - 1, rows[0].num_prompt_tokens] == [len(fewer), fewer[0].num_prompt_tokens]
    assert raised.tally.counts == {"rows with a length of 0 read as 1": 1}
    assert skipping.tally.counts == {"rows left out": 1}
