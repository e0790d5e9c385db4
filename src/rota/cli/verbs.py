"""Every verb: where it lives, and its line in `rota --help`. A table, so that help imports none of them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Verb(NamedTuple):
    """One verb of the command line, or a word before several."""

    target: str
    """`module:function`; the function's signature is the verb's flags, its docstring the verb's help."""
    summary: str
    parts: "Mapping[str, Verb]" = MappingProxyType({})
    """Verbs that stand behind this word; it has no target then."""


TRACE = {
    "describe": Verb("rota.cli.trace:describe", "Say what a trace is like: rates, lengths, prefixes, sessions"),
    "sample": Verb("rota.cli.trace:sample", "Take a random part of a trace, sessions whole"),
    "scale": Verb("rota.cli.trace:scale", "Make a trace faster or slower, its requests longer or shorter"),
    "split": Verb("rota.cli.trace:split", "Split a trace in two, to fit on one part and check on the other"),
    "convert": Verb("rota.cli.trace:convert", "Write a trace in another format, saying what that loses"),
    "fit": Verb("rota.cli.trace_fit:fit", "Fit a description to a trace, and say how well it fits"),
}


TRAIN = {
    "length": Verb("rota.cli.train:length", "Fit a ranker of output lengths to a journal, and say how well it does")
}


KEYS = {"new": Verb("rota.cli.keys:new", "Draw an API key, and write its hash into a file of keys")}


VERBS = {
    "simulate": Verb("rota.cli.simulate:simulate", "Play a trace through simulated instances, in virtual time"),
    "compare": Verb(
        "rota.cli.compare:compare", "Say which stack serves a workload better, and which differences are real"
    ),
    "size": Verb("rota.cli.size:size", "Find the smallest fleet that keeps a promise, and say how sure that is"),
    "sweep": Verb("rota.cli.sweep:sweep", "Run all combinations of some parameters, on all cores or a cluster"),
    "serve": Verb("rota.cli.serve:serve", "Serve the OpenAI API in front of engines"),
    "top": Verb("rota.cli.top:top", "Look at what goes on: a router, a simulation as it runs, or a journal"),
    "keys": Verb("", "API keys and their tenants, for `rota serve --keys`", KEYS),
    "deploy": Verb("rota.cli.deploy:deploy", "Write a Ray cluster file, or a RayService for Kubernetes"),
    "bench": Verb("rota.cli.bench:bench", "Load any OpenAI-compatible server, open loop, and measure it"),
    "calibrate": Verb("rota.cli.calibrate:calibrate", "Fit step times to a live engine, with their error inside"),
    "train": Verb("", "Fit predictors to what was recorded", TRAIN),
    "trace": Verb("", "Describe, sample, scale, split, convert and fit traces", TRACE),
    "replay": Verb("rota.cli.replay:replay", "Feed a journal into fresh machines and compare what they decide"),
    "explain": Verb("rota.cli.explain:explain", "Say why a request ran where and when it did"),
    "export": Verb("rota.cli.export:export", "Turn a journal into a Perfetto trace or a CSV file"),
    "policies": Verb("rota.cli.policies:policies", "List the policies, what they need and who can host them"),
    "doctor": Verb("rota.cli.doctor:doctor", "Check this machine and this installation"),
}
