"""Admission policies, by name."""

from rota.base.registry import Registry

ADMISSION: Registry = Registry(
    "admission policy",
    {
        "bounded_queue": "rota.serving.policies.admission.bounded_queue:BoundedQueue",
        "deadline_admission": "rota.serving.policies.admission.deadline_admission:DeadlineAdmission",
        "tenant_limits": "rota.serving.policies.admission.tenant_limits:TenantLimits",
    },
    entry_point_group="rota.admission",
)
