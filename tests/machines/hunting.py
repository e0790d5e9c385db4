"""The search for a planted bug by a stateful test: the same one in every run, and nothing kept or shrunk."""

from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test


def hunt(rules: type[RuleBasedStateMachine], *, max_examples: int = 300, stateful_step_count: int = 30) -> None:
    """Run a stateful test until it fails or so many examples have passed; raises what it raises."""
    quick = settings(
        max_examples=max_examples,
        stateful_step_count=stateful_step_count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    run_state_machine_as_test(rules, settings=quick)
