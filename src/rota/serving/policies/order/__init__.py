"""Order policies, by name."""

from rota.base.registry import Registry

ORDER: Registry = Registry(
    "order",
    {
        "fcfs": "rota.serving.policies.order.fcfs:Fcfs",
        "earliest_deadline": "rota.serving.policies.order.earliest_deadline:EarliestDeadline",
        "fair_prefix": "rota.serving.policies.order.fair_prefix:FairPrefix",
        "fair_tokens": "rota.serving.policies.order.fair_tokens:FairTokens",
        "highest_response_ratio": "rota.serving.policies.order.highest_response_ratio:HighestResponseRatio",
        "least_attained_service": "rota.serving.policies.order.least_attained_service:LeastAttainedService",
        "least_slack": "rota.serving.policies.order.least_slack:LeastSlack",
        "shortest_predicted_first": "rota.serving.policies.order.shortest_predicted_first:ShortestPredictedFirst",
        "skip_join_mlfq": "rota.serving.policies.order.skip_join_mlfq:SkipJoinMlfq",
        "skip_predict": "rota.serving.policies.order.skip_predict:SkipPredict",
        "strict_priority": "rota.serving.policies.order.strict_priority:StrictPriority",
    },
    entry_point_group="rota.order",
)
