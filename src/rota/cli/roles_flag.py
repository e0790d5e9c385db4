"""`--roles` of `rota serve`: which engines compute prompts, and which decode."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from rota.base.errors import ConfigError

if TYPE_CHECKING:
    from rota.serving.model.instance import InstanceId, Role
    from rota.serving.stack import StackConfig

Roles = Annotated[
    str | None, typer.Option(metavar="ROLE:NUM,…", help="The engines' roles, such as prefill:1,decode:1.")
]


def refuse_roles_without_hand_off(
    roles: str | None, *, runs_already: bool, is_on_ray: bool, stock: str | None, hand_off: bool | None
) -> None:
    """Raise `ConfigError` where engines shall have roles, and cannot pass a prompt's blocks on."""
    if roles is None:
        return
    if runs_already:
        raise ConfigError(
            "--roles: servers that run already hand no blocks over",
            hint="give roles to --engine vllm or simulated, which Rota starts",
        )
    if is_on_ray:
        raise ConfigError("--roles: engines on Ray hand no blocks over to each other", hint="leave --on or --roles out")
    if stock is not None:
        raise ConfigError(
            "--roles: --stock runs vLLM without the plug-in that lets go of requests", hint="leave --stock out"
        )
    if hand_off is False:
        raise ConfigError(
            "--roles: with --no-hand-off no blocks get from where a prompt is computed to where it is decoded",
            hint="leave --no-hand-off or --roles out",
        )


def roles_by_id(prefix: str, fleet: "Sequence[Role]", stack: "StackConfig") -> "dict[InstanceId, Role]":
    """The roles of engines `prefix-0`, `prefix-1`, …, without those that are for both. Raises `ConfigError` for a stack
    that does not go by roles."""
    from rota.serving.assemble import refuse_roles
    from rota.serving.model.instance import InstanceId, Role

    roles: dict[InstanceId, Role]
    roles = {InstanceId(f"{prefix}-{index}"): role for index, role in enumerate(fleet) if role is not Role.MIXED}
    refuse_roles(stack, roles)
    return roles
