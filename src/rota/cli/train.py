"""`rota train`: fit predictors to what was recorded."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rota.base.errors import ConfigError, DataError
from rota.cli.flags import Json, Seed, refuse_unwritable, writing
from rota.cli.journals import open_journal
from rota.cli.output import Progress, print_json, print_table, say

if TYPE_CHECKING:
    from rota.serving.calibration.length_ranker import TrainingReport


def length(
    journal: Annotated[Path, typer.Argument(metavar="JOURNAL", help="Journal of rota serve or rota simulate.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the ranker, replacing what is there.")],
    holdout: Annotated[
        float, typer.Option(metavar="F", help="Part of the requests, the latest, to judge it by and not learn from.")
    ] = 0.3,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Fit a ranker of output lengths to a journal, for `length = "ranked"` of a stack.

    It learns from the requests that came first and is judged by those that came later: how well it ranks them
    (Kendall's tau), whether lengths are as long as it says (calibration), and whether it gets worse with time (drift).
    A journal holds no text; `rota serve --text-counts` has it hold counts of each prompt's text, which tell more.
    """
    from rota.serving.calibration.answered import read_answered
    from rota.serving.calibration.length_ranker import train
    from rota.serving.predictors.length.ranker_file import save_ranker

    if not 0 < holdout < 1:
        raise ConfigError(f"--holdout: must be between 0 and 1, not {holdout:g}")
    opened = open_journal(journal)
    refuse_unwritable("--output", output)
    with Progress(f"reading {journal.name}", total=None, unit="rows") as progress:
        found = read_answered(opened, progress.reached)
    try:
        with Progress("training", total=None, unit="trees") as progress:
            ranker, report = train(
                found.answered, found.left_out, holdout=holdout, seed=seed, reached=progress.reached_of
            )
    except DataError as error:
        raise DataError(f"{journal}: {error.message}", hint=error.hint) from None
    with writing("--output", output):
        save_ranker(output, ranker)
    if json:
        print_json(report)
    else:
        _print(report)
        say(f"ranker: {output}")


def _print(report: "TrainingReport") -> None:
    print_table(
        ["predictor", "Kendall's tau", "mean error", "bias"],
        [(name, each.kendall_tau, each.mean_absolute_error, each.bias) for name, each in report.predictors.items()],
        title=f"{report.num_trained:,} requests to learn from, {report.num_holdout:,} later ones to judge by",
    )
    print_table(
        ["predicted", "requests", "mean predicted", "mean true"],
        [
            (name, each.num_requests, each.mean_predicted, each.mean_true)
            for name, each in zip(
                ("shortest fifth", "second", "third", "fourth", "longest fifth"), report.calibration, strict=True
            )
        ],
        title="calibration of ranked",
    )
    print_table(
        ["later", "requests", "Kendall's tau", "bias", "mean true"],
        [
            (name, each.num_requests, each.kendall_tau, each.bias, each.mean_true)
            for name, each in zip(("first quarter", "second", "third", "last quarter"), report.drift, strict=True)
        ],
        title="drift of ranked",
    )
    for why, count in report.left_out.items():
        say(f"left out: {count:,} requests, {why}")
    if not report.num_counted_texts:
        say("no text was counted; `rota serve --text-counts` has the next journal say more")
