"""The cluster machine under moves and fail-over, against a plain model and an adversarial host; and a bug for each law,
to see that it would be found."""

import pytest
from hypothesis import settings
from tests.machines.hunting import hunt
from tests.machines.moves_model import INTERVAL, MigrationRules

from rota.base.errors import IllegalMove, LawBroken
from rota.base.instant import Instant
from rota.serving.cluster.instances import InstanceBook
from rota.serving.cluster.ledger import InstanceLedger
from rota.serving.cluster.migration import MigrationBook
from rota.serving.cluster.migration_rounds import MigrationRounds
from rota.serving.cluster.retries import RetryRule
from rota.serving.model.commands import Commit, Way
from rota.serving.model.events import HandedOver

TestMigrationRules = MigrationRules.TestCase
TestMigrationRules.settings = settings(max_examples=250, stateful_step_count=50, deadline=None)


_take, _way_of, _close = MigrationBook.take, MigrationBook._way_of, MigrationBook._close
_candidates = InstanceBook.candidates


def believe_any_hand_over(self, event, now):
    if isinstance(event, HandedOver) and event.migration_id in self._open:
        migration = self._open[event.migration_id]
        del self._in_state[migration.state][migration.id]
        return (self._commit(migration, event),)
    return _take(self, event, now)


def forget_one_side(self, migration):
    _close(self, migration)
    migration.destination.num_coming += 1


def commit_without_moving(self, migration, event):
    self._close(migration)
    return Commit(migration.id, migration.request_id)


def commit_twice_owned(self, migration, event):
    self._instances.assign(migration.tracked, migration.destination.id)
    self._close(migration)
    return Commit(migration.id, migration.request_id)


def move_anything(self, move, tracked, *asked, **others):
    way = _way_of(self, move, tracked, *asked, **others)
    return Way.COPY if way in ("pinned", "moving", "source_busy", "destination_busy") else way


def no_budget(self, tracked, max_resuming):
    return _candidates(self, tracked, 10**6)


PLANTED = {
    "a hand-over that was not ordered is believed": (MigrationBook, "take", believe_any_hand_over),
    "a side keeps the migration on its account": (MigrationBook, "_close", forget_one_side),
    "the owner does not change": (MigrationBook, "_commit", commit_without_moving),
    "the source stays an owner": (MigrationBook, "_commit", commit_twice_owned),
    "a move goes on when its request ends": (MigrationBook, "abort_of", lambda self, *facts: []),
    "a move goes on when an instance goes": (MigrationBook, "abort_at", lambda self, *facts, as_source: []),
    "a state lasts for ever": (MigrationBook, "expire", lambda self, now: []),
    "a deadline is forgotten": (MigrationBook, "next_deadline", lambda self: None),
    "what may not move is moved": (MigrationBook, "_way_of", move_anything),
    "those who come back have no budget": (InstanceBook, "candidates", no_budget),
    "a place that came free is not used": (InstanceLedger, "_resumed", lambda self, request_id: False),
    "the asking goes on without work": (
        MigrationRounds,
        "keep_asking",
        lambda self, event, has_work, now: setattr(self, "ask_at", Instant(now + INTERVAL)),
    ),
    "resumptions have no bound": (RetryRule, "refusal", lambda self, tracked, event, max_prompt_anywhere: None),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(monkeypatch, bug):
    owner, method, planted = PLANTED[bug]
    monkeypatch.setattr(owner, method, planted)
    with pytest.raises((LawBroken, IllegalMove, AssertionError, KeyError)):
        hunt(MigrationRules, max_examples=400, stateful_step_count=40)
