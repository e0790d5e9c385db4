"""Prompts of a wanted length that no two requests share, unless their trace says so.

Text is made of short common words, most of which are one token to most tokenizers. So a length is approximate, unless a
tokenizer is at hand to count with.
"""

from pathlib import Path
from typing import Protocol

from rota.base.errors import ConfigError
from rota.base.random_streams import RandomStreams

_TEXT = """
    the of and to in is that for it was on are as with they at be this from have or by one had not but what all were
    when we there can an your which their said if do will each about how up out them then she many some so these
    would other into has more her two like him see time could no make than first been its who now people my made
    over did down only way find use may water long little very after words called just where most know get through
    back much before go good new write our used me man too any day same right look think also around another came
    come work three word must because does part even place well such here take why things help put years different
    away again off went old number great tell men say small every found still between name should home big give air
    line set own under read last never us left end along while might next sound below saw something thought both few
    those always looked show large often together asked house world going want school important until form food keep
    children feet land side without boy once animals life enough took four head above kind began almost live page
    got earth need far hand high year mother light country father let night picture being study second book carry
    science eat room friend idea fish mountain north base hear horse cut sure watch color face wood main open seem
    white begin paper group run
"""
WORDS = tuple(_TEXT.split())
NUM_POOL_WORDS = 65_536
_NUM_NAME_WORDS = 6
"""Words that spell a number at the head of a text: 256 ** 6 different heads."""


class Tokenizer(Protocol):
    """What counts tokens, and cuts text to a number of them."""

    def cut(self, text: str, num_tokens: int) -> str:
        """The longest beginning of the text with at most so many tokens."""
        ...


class FileTokenizer:
    """A `tokenizer.json`, read with the package `tokenizers`."""

    def __init__(self, path: Path) -> None:
        """Raises `ConfigError` if the package or the file is missing, or the file holds no tokenizer."""
        try:
            import tokenizers
        except ImportError:
            raise ConfigError(
                "--tokenizer: needs the package tokenizers",
                hint="pip install tokenizers, or leave the flag out and have lengths approximated",
            ) from None
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(f"--tokenizer: {file}: no such file", hint="name a tokenizer.json or its folder")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises bare exceptions
            raise ConfigError(f"--tokenizer: {file}: holds no tokenizer: {error}") from None

    def cut(self, text: str, num_tokens: int) -> str:
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return text if len(offsets) <= num_tokens else text[: offsets[num_tokens - 1][1]]


class Prompts:
    """Makes the text of every request of a run; the same seed makes the same texts."""

    def __init__(self, streams: RandomStreams, tokenizer: Tokenizer | None = None) -> None:
        stream = streams.stream("bench.words")
        self._pool = [stream.choice(WORDS) for _ in range(NUM_POOL_WORDS)]
        self._stream = streams.stream("bench.prompts")
        self._tokenizer = tokenizer

    def text(
        self, index: int, num_tokens: int, prefix_hashes: tuple[int, ...] = (), hash_block_tokens: int = 512
    ) -> str:
        """The prompt of request number `index`. Requests with equal prefix hashes begin with equal text."""
        # The whole is cut to length, so a block of words must hold a block of tokens at least.
        blocks = [self._block(number, hash_block_tokens) for number in prefix_hashes]
        num_left = num_tokens - len(blocks) * hash_block_tokens
        if num_left > 0:
            blocks.append(self._words(index, self._stream.integers(0, NUM_POOL_WORDS), num_left))
        text = " ".join(blocks)
        if self._tokenizer is not None:
            return self._tokenizer.cut(text, num_tokens)
        return " ".join(text.split(" ", num_tokens)[:num_tokens])

    def _block(self, number: int, num_words: int) -> str:
        return self._words(number, number * 7919 % NUM_POOL_WORDS, num_words)

    def _words(self, number: int, start: int, num_words: int) -> str:
        name = [WORDS[number // 256**place % 256] for place in range(_NUM_NAME_WORDS)][:num_words]
        rest = num_words - len(name)
        words = self._pool[start : start + rest]
        while len(words) < rest:
            words = words + self._pool[: rest - len(words)]
        return " ".join(name + words)
