"""Every verb: where it lives, and its line in `rota --help`. A table, so that help imports none of them."""

from typing import NamedTuple


class Verb(NamedTuple):
    """One verb of the command line."""

    target: str
    """`module:function`; the function's signature is the verb's flags, its docstring the verb's help."""
    summary: str


VERBS = {
    "simulate": Verb("rota.cli.simulate:simulate", "Play a trace through simulated instances, in virtual time"),
    "compare": Verb(
        "rota.cli.compare:compare", "Say which stack serves a workload better, and which differences are real"
    ),
    "serve": Verb("rota.cli.serve:serve", "Serve the OpenAI API in front of engines"),
    "bench": Verb("rota.cli.bench:bench", "Load any OpenAI-compatible server, open loop, and measure it"),
    "calibrate": Verb("rota.cli.calibrate:calibrate", "Fit step times to a live engine, with their error inside"),
    "replay": Verb("rota.cli.replay:replay", "Feed a journal into fresh machines and compare what they decide"),
    "explain": Verb("rota.cli.explain:explain", "Say why a request ran where and when it did"),
    "export": Verb("rota.cli.export:export", "Turn a journal into a Perfetto trace or a CSV file"),
    "policies": Verb("rota.cli.policies:policies", "List the policies, what they need and who can host them"),
    "doctor": Verb("rota.cli.doctor:doctor", "Check this machine and this installation"),
}
