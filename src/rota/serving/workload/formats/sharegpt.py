"""ShareGPT: a JSON array of conversations, `[{"id": …, "conversations": [{"from": "human", "value": …}, …]}, …]`.

Every answer is a request; its prompt is all that was said before it. The next turn comes when the previous one has
ended and a think time has passed. The file has neither times nor token counts: conversations all begin at 0
(`rota simulate --rate` spreads them), think times are drawn from a seeded exponential distribution with a mean of
ten seconds, and a message has a token for every four bytes, begun ones counted, as the router estimates. Other
keys of a conversation or a message are not looked at.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from rota.base.random_streams import RandomStreams
from rota.serving.workload.arrivals import MAX_TOKENS, Arrival
from rota.serving.workload.formats.json_array import Element, array_elements
from rota.serving.workload.formats.leniency import STRICT, ZERO_HINT, Leniency, Tally
from rota.serving.workload.formats.prefixes import Numbers
from rota.serving.workload.formats.spot import data_error, is_text, shown
from rota.serving.workload.formats.turns import Turns

BYTES_PER_TOKEN = 4
ANSWERS = ("gpt", "assistant", "chatgpt", "bing", "bard", "model")
PROMPTS = ("human", "user", "system", "tool", "function", "function_response", "observation")


class SharegptFormat:
    """Reads the format."""

    name = "sharegpt"
    first_line = '[{"id": …, "conversations": […'

    def __init__(self, leniency: Leniency = STRICT) -> None:
        self._leniency = leniency
        self.tally = Tally()

    def recognises(self, head: str) -> bool:
        # A TOML file may begin with a bracket too; there a bare name follows.
        return re.match(r"\s*\[\s*([\[{\]\"0-9]|$)", head) is not None

    def read(self, path: Path, streams: RandomStreams) -> Iterator[Arrival]:
        """Yield requests, conversation by conversation. Raises `DataError` at the first that is none."""
        numbers, stream = Numbers(), streams.stream("workload.think_time")
        seen: set[str] = set()
        element = None
        for number, element in enumerate(array_elements(path)):
            conversation = _Conversation(path, element)
            name = conversation.name(f"#{number}")
            if name in seen:
                conversation.fail(f"id: {shown(name)} comes twice", "id")
            seen.add(name)
            yield from self._requests(conversation, Turns(name, numbers, stream))
        if element is None:
            raise data_error(path, 1, 1, "no conversations in the array")

    def _requests(self, conversation: "_Conversation", turns: Turns) -> Iterator[Arrival]:
        num_before, num_new = 0, 0
        num_requests = 0
        for place, (speaker, num_tokens) in enumerate(conversation.messages()):
            if speaker in PROMPTS:
                num_new += num_tokens
            elif num_before + num_new == 0:
                num_before += num_tokens  # an answer to what was cut away is history, and no request
            else:
                lengths: tuple[int, int] | None = (num_before + num_new, num_tokens)
                if num_tokens == 0:
                    zero = self._leniency.zero or "refuse"
                    if zero == "refuse":
                        conversation.fail(f"conversations[{place}].value: an answer of no text", hint=ZERO_HINT)
                    lengths = self.tally.settled(num_before + num_new, num_tokens, zero)
                if lengths is not None:
                    if sum(lengths) > MAX_TOKENS:
                        conversation.fail(f"a conversation of more than {MAX_TOKENS} tokens")
                    yield turns.turn(*lengths, num_shared=num_before)
                    num_requests += 1
                num_before += num_new + num_tokens
                num_new = 0
        if not num_requests:
            self.tally.num_without_requests += 1


class _Conversation:
    """One element of the array, checked key by key."""

    def __init__(self, path: Path, element: Element) -> None:
        self._path, self._element = path, element
        try:
            self._text = element.source.decode("utf-8")
        except UnicodeDecodeError as error:
            line, column = self._spot(element.source[: error.start].decode("utf-8", "replace"))
            raise data_error(path, line, column, f"byte 0x{element.source[error.start]:02x} is not UTF-8") from None
        self._value = self._parse()

    def name(self, default: str) -> str:
        value = self._value.get("id", default)
        if type(value) not in (str, int) or value == "" or not is_text(str(value)):
            self.fail(f"id: expected a text, got {shown(value)}", "id")
        return str(value)

    def messages(self) -> Iterator[tuple[str, int]]:
        """Who spoke, and how many tokens."""
        messages = self._value.get("conversations")
        if type(messages) is not list:
            self.fail("conversations: expected a list of messages", "conversations")
        for place, message in enumerate(messages):
            spot = f"conversations[{place}]"
            if type(message) is not dict:
                self.fail(f"{spot}: expected a message, got {shown(message)}", "conversations")
            speaker, text = message.get("from"), message.get("value")
            if speaker not in ANSWERS and speaker not in PROMPTS:
                self.fail(f"{spot}.from: expected human or gpt, got {shown(speaker)}", "conversations")
            if type(text) is not str:
                self.fail(f"{spot}.value: expected a text, got {shown(text)}", "conversations")
            yield speaker, -(-len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN)

    def fail(self, problem: str, key: str = "", *, hint: str | None = None) -> NoReturn:
        """Raise an error that points at the key, or else at the beginning of the element."""
        before = self._text[: max(0, self._text.find(json.dumps(key)))] if key else ""
        raise data_error(self._path, *self._spot(before), problem, hint=hint)

    def _parse(self) -> dict[str, Any]:
        try:
            value = json.loads(self._text, parse_constant=self._constant)
        except json.JSONDecodeError as error:
            raise data_error(self._path, *self._spot(self._text[: error.pos]), f"not JSON: {error.msg}") from None
        except RecursionError:
            self.fail("not JSON of a conversation: nested too deeply")
        except ValueError:  # Python reads no integer of thousands of digits.
            self.fail("a number of thousands of digits")
        if type(value) is not dict:
            self.fail(f"expected a conversation, got {shown(value)}")
        return value

    def _constant(self, name: str) -> NoReturn:
        self.fail(f"{name} is not JSON")

    def _spot(self, before: str) -> tuple[int, int]:
        num_lines = before.count("\n")
        column = len(before) - before.rfind("\n") if num_lines else self._element.column + len(before)
        return self._element.line + num_lines, column
