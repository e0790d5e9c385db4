"""Lengths of ShareGPT's turns without their text: CSV with `conv,turn,ctx,new,reply`, in tokens.

`ctx` is what was said before the turn and is sent with it, `new` the turn's own text, `reply` its answer. A context at
least as long as the previous prompt begins with it; a shorter one was cut at its beginning, and shares nothing. Times
are as in `sharegpt`: conversations begin at 0, think times are drawn.
"""

from collections.abc import Iterator
from pathlib import Path

from rota.base.random_streams import RandomStreams
from rota.serving.workload.arrivals import MAX_TOKENS, Arrival
from rota.serving.workload.formats.columns import CsvRow, header_fields, wrong_header
from rota.serving.workload.formats.leniency import STRICT, ZERO_HINT, Leniency, Tally
from rota.serving.workload.formats.prefixes import Numbers
from rota.serving.workload.formats.spot import data_error, shown, text_lines
from rota.serving.workload.formats.turns import Turns

COLUMNS = ("conv", "turn", "ctx", "new", "reply")
_CONVERSATION, _TURN, _CONTEXT, _NEW, _REPLY = range(len(COLUMNS))


class SharegptLengthsFormat:
    """Reads the format."""

    name = "sharegpt_lengths"
    first_line = ",".join(COLUMNS)

    def __init__(self, leniency: Leniency = STRICT) -> None:
        self._zero = leniency.zero or "refuse"
        self.tally = Tally()

    def recognises(self, head: str) -> bool:
        return len(header_fields(head) & set(COLUMNS)) >= 2

    def read(self, path: Path, streams: RandomStreams) -> Iterator[Arrival]:
        """Yield turns, conversation by conversation. Raises `DataError` at the first bad row."""
        numbers, stream = Numbers(), streams.stream("workload.think_time")
        seen: set[str] = set()
        name, turn, num_prompt_tokens, line = "", 0, 0, 1
        turns = None
        for line, text in text_lines(path):
            if line == 1:
                if tuple(text.split(",")) != COLUMNS:
                    raise wrong_header(path, text, COLUMNS)
                continue
            row = CsvRow(path, line, text, COLUMNS)
            if turns is None or row.fields[_CONVERSATION] != name:
                name = row.fields[_CONVERSATION]
                if not name:
                    raise row.error(_CONVERSATION, "expected a name, got nothing")
                if name in seen:
                    raise row.error(_CONVERSATION, f"{shown(name)} comes again; its turns stand together")
                seen.add(name)
                turns, num_prompt_tokens = Turns(name, numbers, stream), 0
                turn = row.whole(_TURN, 0, 1)
            elif row.whole(_TURN, 0, 10**9) != turn + 1:
                raise row.error(_TURN, f"{row.fields[_TURN]} where turn {turn + 1} should be")
            else:
                turn += 1
            context = row.tokens(_CONTEXT, least=0)
            lengths = self._lengths(row, context)
            shared = num_prompt_tokens if context >= num_prompt_tokens else 0
            num_prompt_tokens = context + row.tokens(_NEW, least=0)
            if lengths is not None:
                yield turns.turn(*lengths, num_shared=shared)
        if turns is None:
            raise data_error(path, line + 1, 1, "no rows after the header")

    def _lengths(self, row: CsvRow, context: int) -> tuple[int, int] | None:
        prompt, output = context + row.tokens(_NEW, least=0), row.tokens(_REPLY, least=0)
        if prompt > MAX_TOKENS:
            raise row.error(_NEW, f"a prompt of {prompt} tokens; at most {MAX_TOKENS} can be")
        if prompt and output:
            return prompt, output
        if self._zero == "refuse":
            raise row.error(_NEW if not prompt else _REPLY, "expected at least 1 token, got 0", hint=ZERO_HINT)
        return self.tally.settled(prompt, output, self._zero)
