"""What a step holds in sum: all that decides how long it takes, and who gives a token for the first time."""

from typing import Protocol

from rota.serving.model.request import Request, RequestId


class GrantedSequence(Protocol):
    """A sequence as a step finds it."""

    @property
    def id(self) -> RequestId: ...
    @property
    def request(self) -> Request: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_computed_tokens(self) -> int:
        """With what the step computes."""
        ...


class StepComposition:
    """One step, by what it computes. Read only, once it is made."""

    __slots__ = ("caught_up", "num_context_tokens", "num_decodes", "prefills")

    def __init__(
        self,
        prefills: list[tuple[int, int]] | None = None,
        num_decodes: int = 0,
        num_context_tokens: int = 0,
        caught_up: list[GrantedSequence] | None = None,
    ) -> None:
        self.prefills = prefills or []
        """`(new tokens, computed before)` of each sequence that computes more than one."""
        self.num_decodes = num_decodes
        """Sequences that compute one token."""
        self.num_context_tokens = num_context_tokens
        """Tokens that these have, the new one included, in all."""
        self.caught_up: list[GrantedSequence] = caught_up or []
        """Sequences that give a token with this step: all those that may not have in the step before."""

    def add(self, sequence: GrantedSequence, num_tokens: int) -> None:
        """Put one more sequence in, while the step is being made."""
        computed = sequence.num_computed_tokens
        if num_tokens == 1:
            self.num_decodes += 1
            self.num_context_tokens += computed
        else:
            self.prefills.append((num_tokens, computed - num_tokens))
        if computed == sequence.num_tokens:
            self.caught_up.append(sequence)
