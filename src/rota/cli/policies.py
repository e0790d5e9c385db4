"""`rota policies`: what there is, what it needs, and who can host it."""

import inspect
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import typer

from rota.base.errors import CapabilityError, ConfigError
from rota.base.nearest import did_you_mean
from rota.cli.flags import Json
from rota.cli.output import print_json, print_lines, print_table
from rota.serving.engines.vllm.hosting import check_hostable
from rota.serving.predictors.length.declared import Declared
from rota.serving.stack import REGISTRIES, StackConfig

ROUTER_KINDS = ("dispatch", "admission", "migration", "scaling")
_HOST_SIMULATOR, _HOST_VLLM, _HOST_ROUTER = "simulator", "vLLM 0.32", "router"
_SERVICES = {"stream", "predictor", "lengths", "quick_lengths", "step_time", "step_overhead"}
"""Constructor parameters that assembly fills in, never a user."""
_PREDICTORS = {"lengths": Declared(), "quick_lengths": Declared()}
"""For orders that predict: which predictor they get makes no difference to who can host them."""


class ParameterFacts(msgspec.Struct, frozen=True):
    """One constant of a policy."""

    name: str
    type: str
    default: Any


class PolicyFacts(msgspec.Struct, frozen=True):
    """One policy, as the table and the page show it."""

    kind: str
    name: str
    summary: str
    requires: tuple[str, ...]
    hosts: tuple[str, ...]
    parameters: tuple[ParameterFacts, ...]
    description: str


def policies(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show all of one policy.")] = None,
    json: Json = False,
) -> None:
    """List the policies of every kind: what each needs of an engine, and which hosts can run it.

    With a NAME, show that policy's rule, when it is good, whom it can starve, and its parameters with their defaults.
    """
    known = [policy_facts(kind, each) for kind, registry in REGISTRIES.items() for each in registry.names()]
    if name is not None:
        known = [facts for facts in known if facts.name == name]
        if not known:
            names = {each for registry in REGISTRIES.values() for each in registry.names()}
            raise ConfigError(f"NAME: unknown policy {name!r}", hint=did_you_mean(name, names))
    if json:
        print_json({"policies": known})
    elif name is None:
        rows = [
            (facts.kind, facts.name, ", ".join(facts.requires) or None, ", ".join(facts.hosts), facts.summary)
            for facts in known
        ]
        print_table(("kind", "name", "needs", "hosts", "rule"), rows)
    else:
        for facts in known:
            print_lines(_page(facts))


def policy_facts(kind: str, name: str) -> PolicyFacts:
    """What there is to say about a policy. Raises `ConfigError` if it cannot be imported."""
    cls = REGISTRIES[kind].load(name)
    description = inspect.cleandoc(cls.__doc__ or "")
    return PolicyFacts(
        kind=kind,
        name=name,
        summary=" ".join(description.partition("\n\n")[0].split()).rstrip("."),
        requires=tuple(sorted(map(str, getattr(cls, "requires", ())))),
        hosts=_hosts(kind, name),
        parameters=_parameters(cls),
        description=description,
    )


def _hosts(kind: str, name: str) -> tuple[str, ...]:
    if kind in ROUTER_KINDS:
        return _HOST_SIMULATOR, _HOST_ROUTER
    outside = (_HOST_SIMULATOR, _HOST_ROUTER) if kind == "order" else (_HOST_SIMULATOR,)  # As the order of its queue.
    # Asked beside the default stack: a policy is hosted by vLLM if it is so in the plainest company.
    stack = {each: getattr(StackConfig(), each) for each in ("order", "batch", "memory")} | {kind: name}
    try:
        check_hostable(**{each: REGISTRIES[each].create(chosen) for each, chosen in stack.items()})
    except (CapabilityError, ConfigError):
        return outside
    return *outside, _HOST_VLLM


def _parameters(cls: type[Any]) -> tuple[ParameterFacts, ...]:
    found = []
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.name in _SERVICES or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        default = "required" if parameter.default is parameter.empty else parameter.default
        annotation = parameter.annotation
        found.append(ParameterFacts(parameter.name, getattr(annotation, "__name__", str(annotation)), default))
    return tuple(found)


def _page(facts: PolicyFacts) -> list[str]:
    lines = [f"{facts.kind} policy {facts.name}", "", *facts.description.splitlines(), ""]
    lines.append(f"needs   {', '.join(facts.requires) or 'nothing of an engine'}")
    lines.append(f"hosts   {', '.join(facts.hosts)}")
    if facts.parameters:
        lines += ["", f"[parameters.{facts.kind}]"]
        lines += [_parameter_line(parameter) for parameter in facts.parameters]
    return lines


def _parameter_line(parameter: ParameterFacts) -> str:
    default: Any = parameter.default
    if default is None:
        return f"# {parameter.name} =    {parameter.type}, left out by default"
    text: Mapping[bool, str] = {True: "true", False: "false"}
    shown = text[default] if isinstance(default, bool) else repr(default).replace("'", '"')
    return f"{parameter.name} = {shown}    # {parameter.type}"
