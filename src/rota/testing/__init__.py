"""Suites that prove a plug-in, ours or a third party's, with one call each: a policy of any kind, a trace format, a
predictor of step times. They need hypothesis (`pip install hypothesis`)."""

from rota.testing.admission import check_admission_policy
from rota.testing.batch import check_batch_policy
from rota.testing.dispatch import check_dispatch_policy
from rota.testing.formats import check_format
from rota.testing.memory import check_memory_policy
from rota.testing.migration import check_migration_policy
from rota.testing.order import check_order_policy
from rota.testing.scaling import check_scaling_policy
from rota.testing.step_time import check_step_time

__all__ = [
    "check_admission_policy",
    "check_batch_policy",
    "check_dispatch_policy",
    "check_format",
    "check_memory_policy",
    "check_migration_policy",
    "check_order_policy",
    "check_scaling_policy",
    "check_step_time",
]
