"""Admission policies, by name."""

from rota.base.registry import Registry

ADMISSION: Registry = Registry(
    "admission policy",
    {"bounded_queue": "rota.serving.policies.admission.bounded_queue:BoundedQueue"},
    entry_point_group="rota.admission",
)
