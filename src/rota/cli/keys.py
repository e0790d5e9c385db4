"""`rota keys`, and `--keys FILE` of `rota serve`: who may ask."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from rota.base.errors import ConfigError
from rota.cli.flags import Json, writing
from rota.cli.output import print_json, say

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rota.serving.frontdoor.keys import KeyFile
    from rota.serving.stack import StackConfig

Keys = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Serve only who has a key of this file (TOML); see `rota keys new`."),
]


class Tenancy(NamedTuple):
    """Who may ask, and the stack that knows of it."""

    keys: "KeyFile | None"
    stack: "StackConfig"
    stack_path: Path | None
    """The stack as engines that are processes of their own read it."""
    keys_path: Path | None = None
    """Where the keys were read."""


def new(
    tenant: Annotated[str, typer.Option(metavar="NAME", help="Who asks with the key.")],
    keys: Annotated[Path, typer.Option(metavar="FILE", help="Where its hash goes; made if it is not there.")] = Path(
        "keys.toml"
    ),
    operator: Annotated[bool, typer.Option(help="Let the key read /metrics and all of /health.")] = False,
    json: Json = False,
) -> None:
    """Draw an API key of 256 random bits, print it, and add its hash to a file of keys.

    The key is shown this once: the file holds its SHA-256 alone. A router that runs reads the file when it changes: to
    take a key back, delete its lines.
    """
    from rota.base.config import parse_toml
    from rota.serving.frontdoor.keys import KeyFile, new_key

    key, digest = new_key()
    lines = f'[[keys]]\ntenant = {_quoted(tenant)}\nsha256 = "{digest}"\n' + "operator = true\n" * operator
    with writing("--keys", keys):
        before = keys.read_text(encoding="utf-8") if keys.exists() else ""
        text = f"{before.rstrip()}\n\n{lines}" if before.strip() else lines
        parse_toml(text, KeyFile, str(keys))  # What would break the file is not written.
        with os.fdopen(os.open(keys, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
    say(f"a key of tenant {tenant}, shown this once; its hash is in {keys}:")
    if json:
        print_json({"tenant": tenant, "key": key, "keys": str(keys)})
    else:
        print(key)


def _quoted(text: str) -> str:
    """A TOML string: one of JSON is one too."""
    from json import dumps

    return dumps(text)


def tenancy(keys: Path | None, stack: "StackConfig", stack_path: Path | None, run_dir: Path) -> Tenancy:
    """The keys of a file, and the stack with the weights and limits of their tenants in it."""
    if keys is None:
        return Tenancy(None, stack, stack_path)
    from rota.serving.frontdoor.keys import granted_stack, load_keys, weights_of

    known = load_keys(keys)
    granted = granted_stack(stack, known)
    if stack_path is not None and granted.parameters.order != stack.parameters.order:
        stack_path = _written(stack_path, weights_of(known), granted, run_dir)
    return Tenancy(known, granted, stack_path, keys)


def _written(stack_path: Path, weights: "Mapping[str, float]", granted: "StackConfig", run_dir: Path) -> Path:
    """The stack file with the weights of the order policy in it, beside the logs of the engines that read it."""
    from rota.base.config import parse_toml
    from rota.serving.stack import StackConfig

    shares = "".join(f"{_quoted(tenant)} = {weight!r}\n" for tenant, weight in weights.items())
    text = f"{stack_path.read_text(encoding='utf-8-sig').rstrip()}\n\n[parameters.order.weights]\n{shares}"
    try:
        is_whole = parse_toml(text, StackConfig, str(stack_path)).parameters.order == granted.parameters.order
    except ConfigError:
        is_whole = False
    if not is_whole:
        raise ConfigError(
            f"{stack_path}: the tenants' weights cannot be put in",
            hint="write [parameters.order] as a table of its own",
        )
    path = run_dir / "stack.toml"
    with writing("--run-dir", run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path
