"""A lifecycle as data: every legal move is a line of a table, every other move raises."""

from collections.abc import Collection, Mapping

from rota.base.errors import IllegalMove, LawBroken


class TransitionTable:
    """Which events move a thing from which state to which. States and events are strings (a `StrEnum` will do).

    Construction raises `LawBroken` when the table cannot be right: a move to a state without a row, a final state with
    a way out, a state that cannot be reached or from which no end can be.
    """

    def __init__(
        self, name: str, transitions: Mapping[str, Mapping[str, str]], initial: str, final: Collection[str]
    ) -> None:
        self.name = name
        self.initial = initial
        self.final = frozenset(final)
        self.transitions = {state: dict(moves) for state, moves in transitions.items()}
        for state in sorted(self.final):
            self.transitions.setdefault(state, {})
        self._validate()

    def move(self, state: str, event: str) -> str:
        """The state that `event` leads to. Raises `IllegalMove` if the table does not list the pair."""
        try:
            return self.transitions[state][event]
        except KeyError:
            legal = ", ".join(sorted(self.transitions.get(state, {}))) or "none, it is final"
            if state not in self.transitions:
                legal = f"none, no such state; states are {', '.join(sorted(self.transitions))}"
            raise IllegalMove(f"{self.name}: {event!r} is not legal in state {state!r} (legal: {legal})") from None

    def reachable(self, start: str | None = None) -> frozenset[str]:
        """Every state that can be reached from `start` (the initial one, if not given), itself included."""
        first = self.initial if start is None else start
        seen = {first}
        frontier = [first]
        while frontier:
            for target in self.transitions[frontier.pop()].values():
                if target not in seen:
                    seen.add(target)
                    frontier.append(target)
        return frozenset(seen)

    def diagram(self) -> str:
        """The table as a mermaid state diagram."""
        lines = ["stateDiagram-v2", f"    [*] --> {self.initial}"]
        lines += [
            f"    {state} --> {target}: {event}"
            for state, moves in self.transitions.items()
            for event, target in moves.items()
        ]
        lines += [f"    {state} --> [*]" for state in self.transitions if state in self.final]
        return "\n".join(lines) + "\n"

    def _validate(self) -> None:
        if self.initial not in self.transitions:
            raise LawBroken(f"{self.name}: the initial state {self.initial!r} has no row")
        for state, moves in self.transitions.items():
            if state in self.final and moves:
                raise LawBroken(f"{self.name}: the final state {state!r} has a way out")
            for event, target in moves.items():
                if target not in self.transitions:
                    raise LawBroken(f"{self.name}: {event!r} leads from {state!r} to {target!r}, which has no row")
        unreachable = self.transitions.keys() - self.reachable()
        if unreachable:
            raise LawBroken(f"{self.name}: unreachable: {', '.join(sorted(unreachable))}")
        if not self.final:
            return
        endless = [state for state in self.transitions if not self.reachable(state) & self.final]
        if endless:
            raise LawBroken(f"{self.name}: no final state can be reached from: {', '.join(sorted(endless))}")
