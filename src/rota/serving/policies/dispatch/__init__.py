"""Dispatch policies, by name.

A policy that draws chance names a parameter `stream` in its constructor; whoever assembles the stack gives it one.
"""

from rota.base.registry import Registry

DISPATCH: Registry = Registry(
    "dispatch policy",
    {
        "least_outstanding_tokens": "rota.serving.policies.dispatch.least_outstanding_tokens:LeastOutstandingTokens",
        "pools": "rota.serving.policies.dispatch.pools:Pools",
        "power_of_two": "rota.serving.policies.dispatch.power_of_two:PowerOfTwo",
        "power_of_two_by_class": "rota.serving.policies.dispatch.power_of_two_by_class:PowerOfTwoByClass",
        "prefill_or_together": "rota.serving.policies.dispatch.prefill_or_together:PrefillOrTogether",
        "prefix_by_credit": "rota.serving.policies.dispatch.prefix_by_credit:PrefixByCredit",
        "prefix_then_load": "rota.serving.policies.dispatch.prefix_then_load:PrefixThenLoad",
        "round_robin": "rota.serving.policies.dispatch.round_robin:RoundRobin",
        "virtual_usage": "rota.serving.policies.dispatch.virtual_usage:VirtualUsage",
    },
    entry_point_group="rota.dispatch",
)
