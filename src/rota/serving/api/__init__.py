"""Everything a policy imports, and all it imports (beside `rota.base`)."""

from rota.serving.api.admitting import admit_waiting
from rota.serving.api.cursors import InOrder
from rota.serving.api.decisions import Admission, Move, OnRefusal, Pick, Pool, Refusal
from rota.serving.api.policies import (
    AdmissionPolicy,
    BatchDraft,
    BatchPolicy,
    BatchShape,
    Cursor,
    DispatchPolicy,
    MemoryPolicy,
    MigrationPolicy,
    OrderPolicy,
    StepTimePredictor,
)
from rota.serving.api.views import ClusterView, EngineView, InstanceView, SequenceView, WaitingView
from rota.serving.model.capabilities import EVERYTHING, NOTHING, Capability, EngineCapabilities
from rota.serving.model.instance import InstanceId, InstanceLimits, Role, SequenceReport
from rota.serving.model.request import SLO, ProgramId, Request, RequestId, TenantId

__all__ = [
    "EVERYTHING",
    "NOTHING",
    "SLO",
    "Admission",
    "AdmissionPolicy",
    "BatchDraft",
    "BatchPolicy",
    "BatchShape",
    "Capability",
    "ClusterView",
    "Cursor",
    "DispatchPolicy",
    "EngineCapabilities",
    "EngineView",
    "InOrder",
    "InstanceId",
    "InstanceLimits",
    "InstanceView",
    "MemoryPolicy",
    "MigrationPolicy",
    "Move",
    "OnRefusal",
    "OrderPolicy",
    "Pick",
    "Pool",
    "ProgramId",
    "Refusal",
    "Request",
    "RequestId",
    "Role",
    "SequenceReport",
    "SequenceView",
    "StepTimePredictor",
    "TenantId",
    "WaitingView",
    "admit_waiting",
]
