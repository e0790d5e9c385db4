"""`rota trace fit`: a description of a trace, and how well it describes."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from rota.base.errors import ConfigError
from rota.cli.flags import Json, Seed, writing
from rota.cli.output import print_json, print_table, say, warn
from rota.cli.trace import File, Out, SkipUnfinished, Source, Zero

if TYPE_CHECKING:
    from rota.serving.workload.goodness import Comparison


def fit(
    file: File,
    output: Out,
    holdout: Annotated[
        float, typer.Option(metavar="F", help="Part of the trace, its end, that is not fitted to and judged by.")
    ] = 0.3,
    zero: Zero = None,
    skip_unfinished: SkipUnfinished = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Fit a description (TOML) to a trace: rate over time, gaps, lengths, waits, sessions, sharing of prefixes.

    Any verb that takes a trace takes the description, and draws from it. As many rows are drawn from it as the part has
    that it was not fitted to, and compared with that part. How far the two parts of the trace are from each other
    stands beside: no description can be expected to do better. A trace without times is parted by drawing sessions.
    """
    from rota.base.random_streams import RandomStreams
    from rota.serving.workload.fitting import fit as fitted
    from rota.serving.workload.generator import generate, sized
    from rota.serving.workload.goodness import Columns, compare
    from rota.serving.workload.shaping import split_at_random, split_in_time
    from rota.serving.workload.toml_text import toml_of

    if not 0 < holdout < 1:
        raise ConfigError(f"--holdout: must be between 0 and 1, not {holdout:g}")
    source = Source(file, seed, zero, skip_unfinished)
    last = max((arrival.at for arrival in source.read() if not arrival.after), default=0)

    def part(*, is_first: bool) -> Any:
        if last:
            return split_in_time(source.read(), round((1 - holdout) * last), is_first=is_first)
        return split_at_random(source.read(), 1 - holdout, seed, is_first=is_first)

    train, other = Columns(part(is_first=True)), Columns(part(is_first=False))
    if not other.num_rows:
        raise ConfigError("--holdout: no row is left to judge by", hint="ask for a larger part")
    workload = fitted(part(is_first=True))
    with writing("--output", output):
        output.write_text(f"# Fitted to {train.num_rows} rows of {file.name}.\n{toml_of(workload)}", encoding="utf-8")
    comparison = compare(train, other, Columns(generate(sized(workload, other.num_rows), RandomStreams(seed))))
    for what, count in source.not_taken.items():
        warn(f"{count:,} {what}")
    if json:
        print_json(comparison)
    else:
        _print(comparison)
        say(f"description: {output}")


def _print(comparison: "Comparison") -> None:
    rows = [
        (name, each.ks, comparison.noise[name].ks, each.wasserstein, comparison.noise[name].wasserstein)
        for name, each in comparison.distances.items()
    ]
    print_table(
        ("distance from the holdout", "KS", "of the fitted part", "Wasserstein / mean", "of the fitted part"),
        rows,
        title=f"fitted to {comparison.num_train:,} rows, judged by {comparison.num_holdout:,} others",
    )
    print()
    print_table(
        ("", "holdout", "drawn", "fitted part"),
        [
            (name, value, comparison.drawn.get(name), comparison.train.get(name))
            for name, value in comparison.holdout.items()
        ],
    )
