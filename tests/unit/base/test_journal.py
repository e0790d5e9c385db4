"""A journal survives the round trip through a file, and everything that happened to the file since is noticed."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rota.base.errors import DataError
from rota.base.journal import Header, Journal, Row, header_for, read_journal


class Came(msgspec.Struct, frozen=True, tag=True):
    name: str
    weights: frozenset[str] = frozenset()


class Left(msgspec.Struct, frozen=True, tag=True):
    name: str


class Serve(msgspec.Struct, frozen=True, tag=True):
    name: str
    count: int = 1


TYPES = {"shop": (Came | Left, Serve), "shop/annex": (Left, Serve)}

texts = st.text(max_size=6)
came = st.builds(Came, texts, st.frozensets(texts, max_size=3))
rows = st.lists(
    st.tuples(
        st.sampled_from(["shop", "shop/1"]),
        st.integers(0, 2**60),
        came | st.builds(Left, texts) | st.none(),
        st.lists(st.builds(Serve, texts, st.integers(-9, 9)), max_size=3),
    ),
    max_size=8,
)


def write(journal, rows):
    for machine, at, event, commands in rows:
        journal.append(machine, at, "deadline" if event is None else "event", event, commands)


def some_rows(count=5):
    return [("shop", number, Came(f"c{number}"), [Serve(f"c{number}")]) for number in range(count)]


@given(rows=rows)
def test_what_is_read_is_what_was_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("journal") / "run.jsonl"
    with Journal(header_for({"a": [1]}, 42), path=path, keep_rows=True) as journal:
        write(journal, rows)
    file = read_journal(path, TYPES)
    assert (file.header.seed, file.header.config) == (42, {"a": [1]})
    assert list(file) == journal.rows == list(file)
    assert (file.end.end, file.end.num_rows, file.end.digest) == ("closed", len(rows), journal.digest)


@given(rows=rows, other=rows)
def test_the_digest_is_of_the_rows_and_of_nothing_else(rows, other):
    def digest(header, rows):
        journal = Journal(header)
        write(journal, rows)
        return journal.digest

    assert digest(header_for(None, 1), rows) == digest(Header(2, "x", "y", rota_version="z"), rows)
    assert (digest(header_for(None, 1), rows) == digest(header_for(None, 1), other)) == (rows == other)


def test_the_digest_is_pinned():
    # Stored journals stay comparable only as long as the encoding of rows stays what it is.
    journal = Journal(header_for(None, 1))
    write(journal, [("shop", 3, Came("ä", frozenset("hgfedcba")), [Serve("ä", 2)]), ("shop", 4, None, [])])
    assert journal.digest[:16] == "67e602bfdd4a5102"


def test_the_longest_prefix_names_the_types(tmp_path):
    path = tmp_path / "run.jsonl"
    with Journal(header_for(None, 1), path=path) as journal:
        journal.append("shop/annex/2", 1, "event", Came("x"), [])
    with pytest.raises(DataError, match=r"run.jsonl:2: not an event of 'shop/annex/2'"):
        list(read_journal(path, TYPES))


def test_a_row_is_on_its_way_before_it_is_flushed_and_safe_after(tmp_path):
    path = tmp_path / "run.jsonl"
    journal = Journal(header_for(None, 1), path=path)
    write(journal, some_rows(2))
    journal.flush()
    file = read_journal(path, TYPES)
    assert len(list(file)) == 2
    assert file.end is None
    journal.close()
    journal.close()
    assert list(file)
    assert file.end.end == "closed"


def test_a_full_journal_says_so_and_the_digest_goes_on(tmp_path):
    path = tmp_path / "run.jsonl"
    whole = Journal(header_for(None, 1))
    write(whole, some_rows(100))
    with Journal(header_for(None, 1), path=path, keep_rows=True, max_bytes=1_000) as journal:
        write(journal, some_rows(100))
    assert journal.is_full
    assert journal.digest == whole.digest
    file = read_journal(path, TYPES)
    assert list(file) == journal.rows
    assert 0 < len(journal.rows) < 100
    assert file.end.end == "full"
    assert path.stat().st_size < 1_500


def spoil_row(lines):
    lines[2] = lines[2].replace(b'"at":1', b'"at":"x"')


def spoil_event(lines):
    lines[2] = lines[2].replace(b'"Came"', b'"Flew"')


def spoil_command(lines):
    lines[2] = lines[2].replace(b'"commands":[', b'"commands":[3,')


def spoil_name(lines):
    lines[2] = lines[2].replace(b'"shop"', b'"ship"')


def spoil_utf8(lines):
    lines[2] = b'{"seq":1,"machine":"\xff"}\n'


def spoil_value(lines):
    lines[2] = lines[2].replace(b'"c1"', b'"c9"')


SPOILERS = [
    (spoil_row, ":3: not a journal row", None),
    (spoil_event, ":3: not an event of 'shop'", None),
    (spoil_command, ":3: not commands of 'shop'", None),
    (spoil_name, ":3: unknown machine 'ship'", "known: shop"),
    (spoil_utf8, ":3: not a journal row", None),
    (spoil_value, ":7: the end mark speaks of 5 rows", "changed"),
    (lambda lines: lines.pop(2), ":3: row 2 where row 1 should be", None),
    (lambda lines: lines.insert(2, b"\n"), ":3: not a journal row", None),
    (lambda lines: lines.append(lines[1]), ":8: a line after the end mark", None),
    (lambda lines: lines.__setitem__(6, lines[6].replace(b"closed", b"opened")), ":7: not an end mark", None),
    (lambda lines: lines.__setitem__(slice(4, None), [lines[4][:20]]), ":5: the last line is cut short", "delete"),
    (lambda lines: lines.__setitem__(0, b"{}\n"), ":1: not the header of a journal", None),
    (lambda lines: lines.__setitem__(0, b"a,b,c\n"), ":1: not the header of a journal", None),
    (lambda lines: lines.clear(), ":1: not the header of a journal", None),
    (
        lambda lines: lines.__setitem__(0, lines[0].replace(b'"version":2', b'"version":9')),
        "version 9, not",
        "written by",
    ),
]


@pytest.mark.parametrize(("spoil", "message", "hint"), SPOILERS)
def test_a_spoilt_file_names_file_and_line(tmp_path, spoil, message, hint):
    path = tmp_path / "run.jsonl"
    with Journal(header_for(None, 1), path=path) as journal:
        write(journal, some_rows(5))
    lines = path.read_bytes().splitlines(keepends=True)
    spoil(lines)
    path.write_bytes(b"".join(lines))
    with pytest.raises(DataError) as caught:
        list(read_journal(path, TYPES))
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    if hint is not None:
        assert hint in caught.value.hint


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_journal(tmp_path / "none.jsonl", TYPES)
    with pytest.raises(DataError, match="cannot be written"):
        Journal(header_for(None, 1), path=tmp_path)


def test_a_row_is_a_value():
    row = Journal(header_for(None, 1)).append("shop", 5, "event", Left("a"), [Serve("a")])
    assert row == Row(0, "shop", 5, "event", Left("a"), (Serve("a"),))
