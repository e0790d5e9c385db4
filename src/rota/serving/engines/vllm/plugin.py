"""Rota's policies inside vLLM: a thin layer over vLLM's own scheduler, which keeps its KV manager and all else.

```
python -m vllm.entrypoints.openai.api_server --model … \
    --scheduler-cls rota.serving.engines.vllm.plugin.RotaScheduler \
    --additional-config '{"rota": {"stack": "stack.toml"}}'
```

How a step is made: the budget of the batch policy is set, running requests make way for waiting ones that displace
them, vLLM's running list is put in the order of the order policy, and vLLM's own `schedule()` runs, with its waiting
queue replaced by one that walks the order policy's cursor.

Which policies can be hosted exactly: `hosting.py`. What of vLLM this rests on: `seams.py`.
"""

import importlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from rota.base.errors import CapabilityError, ConfigError
from rota.base.instant import Instant
from rota.serving.api import BatchPolicy, MemoryPolicy, OnRefusal, OrderPolicy, Pool, Refusal, SequenceView
from rota.serving.engines.vllm.control import ControlChannel
from rota.serving.engines.vllm.cpu_clock import WorkerCpuClock
from rota.serving.engines.vllm.facts import EngineFacts, FactsFile, StepRecord
from rota.serving.engines.vllm.hand_off import HandOffs, drop_unusable_ticket, exporter_of
from rota.serving.engines.vllm.hosting import VLLM_CAPABILITIES, check_hostable
from rota.serving.engines.vllm.queue import PolicyQueue
from rota.serving.engines.vllm.recorder import StepJournal
from rota.serving.engines.vllm.seams import check_exporter, check_scheduler, check_seams
from rota.serving.engines.vllm.views import VllmEngineView, VllmSequence, fact_of, limits_of
from rota.serving.instance.displacement import choose_displaced, choose_short

if TYPE_CHECKING:
    _Base = Scheduler
else:
    _Base = object

_STACK_MODULE = "rota.serving.stack"
"""Named, not imported: in vLLM's process this module is where assembly begins, though it lies below assembly."""


class PluginConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `--additional-config '{"rota": {…}}'` may hold."""

    stack: str | None = None
    """Path of a stack file; without one, the default stack."""
    facts: str | None = None
    """File that takes one line a step."""
    journal: str | None = None
    """File that takes every event and step, to be replayed into an `InstanceMachine`. Not with asynchronous
    scheduling."""
    control: str | None = None
    """Unix socket to listen at for what the engine is asked to do, e.g. to hand a request over."""


class _Step(msgspec.Struct):
    """A step between its scheduling and its update."""

    started: int
    decision_ns: int
    step_id: int
    requests: list[Any]
    num_displaced: int
    num_preempted: int
    record: dict[str, Any] | None
    cpu_at: int | None
    """What the workers' CPU clock showed."""


class RotaScheduling(_Base):
    """What the plug-in adds to a vLLM scheduler, its synchronous or its asynchronous one.

    Refuses to start (`CapabilityError`, `ConfigError`) on a vLLM that it does not know, on policies that vLLM cannot
    host exactly, and on settings that would put a second rule beside the policies'.
    """

    rota_policies: Any = None
    """Set by a subclass that brings its policies as objects with `order`, `batch` and `memory`, in place of a file."""
    rota_clock: Callable[[], int] = staticmethod(time.monotonic_ns)
    rota_wall_clock: Callable[[], int] = staticmethod(time.time_ns)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_seams()
        super().__init__(*args, **kwargs)
        check_scheduler(self)
        config = read_config(self.vllm_config.additional_config)
        limits = limits_of(self)
        policies = self.rota_policies if self.rota_policies is not None else _load_policies(config.stack)
        self.rota_order: OrderPolicy = policies.order
        self.rota_batch: BatchPolicy = policies.batch
        self.rota_memory: MemoryPolicy = policies.memory
        check_hostable(self.rota_order, self.rota_batch, self.rota_memory, limits)
        if self.rota_order.displacing:
            _check_displacement(self, "an order policy that does not displace, e.g. fcfs")
        if self.rota_memory.victim_order == "chosen":
            _check_displacement(self, "a memory policy that takes the end of the line, e.g. recompute_lowest")
            if self.num_spec_tokens:
                raise CapabilityError(
                    "speculative tokens take blocks that are not known before vLLM's pass, and victims are chosen "
                    "ahead of it",
                    hint="leave speculative decoding out, or use memory policy recompute_lowest",
                )
        self._rota_on_end = getattr(self.rota_order, "request_ended", None)
        self.rota_limits = limits
        self._rota_sequences: dict[str, VllmSequence] = {}
        self._rota_queue = PolicyQueue(self.rota_order, self._rota_sequences)
        self.waiting = self._rota_queue
        self.rota_view = VllmEngineView(self, self._rota_sequences, self._rota_queue, limits)
        self._rota_admissions = 0
        self._rota_preempted: list[str] = []
        self._rota_in_flight: deque[_Step] = deque()
        self._rota_num_steps = 0
        self._rota_facts = FactsFile(config.facts, engine=_engine_facts(self)) if config.facts else None
        self._rota_cpu_clock = WorkerCpuClock()
        self._rota_journal = None
        if config.journal:
            if isinstance(self, AsyncScheduler):
                raise ConfigError(
                    "journal: asynchronous scheduling runs steps ahead of their results; that cannot be replayed",
                    hint="add --no-async-scheduling, or leave the journal out",
                )
            self._rota_journal = StepJournal(config.journal, limits, config.stack)
        self._rota_hand_offs = None
        if config.control:
            exporter = exporter_of(self)
            check_exporter(exporter)
            self._rota_hand_offs = HandOffs(self, ControlChannel(config.control, lambda: not self.requests), exporter)

    # --- requests come and go ----------------------------------------------------------------------------------------

    def add_request(self, request: Any) -> None:
        if request.request_id not in self.requests:
            drop_unusable_ticket(request, self.block_size)
            fact = fact_of(request, Instant(self.rota_clock()), self.rota_wall_clock())
            self._rota_sequences[request.request_id] = VllmSequence(request, fact)
            if self._rota_journal is not None:
                self._rota_journal.arrived(fact, self.rota_clock())
        super().add_request(request)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: Any) -> list[Any]:
        finished = super().finish_requests(request_ids, finished_status)
        for request in finished:
            self._rota_forget(request.request_id, None)
            if self._rota_journal is not None:
                self._rota_journal.aborted(request.request_id, self.rota_clock())
        return finished

    # --- the step ----------------------------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> Any:
        started = self.rota_clock()
        begun = time.perf_counter_ns()
        if self._rota_hand_offs is not None:
            self._rota_hand_offs.begin_asked()
        view = self.rota_view
        view.refresh(Instant(started))
        queue = self._rota_queue
        queue.decision_ns = 0
        shape = self.rota_batch.shape
        assert shape is not None
        budget = self.rota_limits.max_num_batched_tokens
        if shape.token_budget is not None:
            budget = min(budget, shape.token_budget)
        self.max_num_scheduled_tokens = budget
        if self.rota_order.displacing and self.running and len(queue):
            self._rota_displace(budget)
        num_displaced = len(self._rota_preempted)
        is_short = (
            self.rota_memory.victim_order == "chosen"
            and bool(self.running)
            and self._rota_make_room(budget, shape.decodes_first)
        )
        line, cursor = self._rota_line_up(shape.decodes_first)
        queue.open_pass(view, admits=not is_short)
        decision_ns = time.perf_counter_ns() - begun

        output = super().schedule(throttle_prefills)

        begun = time.perf_counter_ns()
        grants = output.num_scheduled_tokens
        has_slot = len(self.running) + self.num_waiting_for_streaming_input < self.max_num_active_reqs
        # Where both lack, it is the budget that ends a pass of ours, before anybody is tried.
        queue.close_pass(has_slot=has_slot or output.total_num_scheduled_tokens >= budget)
        if cursor is not None:
            for sequence in line:
                num_tokens = grants.get(sequence.id)
                if num_tokens is not None:
                    cursor.granted(sequence, num_tokens)
                elif not sequence.is_queued and cursor.refused(sequence, Refusal.NO_BUDGET) is OnRefusal.STOP:
                    break
        admitted = {data.req_id for data in output.scheduled_new_reqs} | output.scheduled_cached_reqs.resumed_req_ids
        if admitted:
            for request_id in grants:
                if request_id in admitted:
                    self._rota_sequences[request_id].admitted_seq = self._rota_admissions
                    self._rota_admissions += 1
        preempted, self._rota_preempted = self._rota_preempted, []
        if grants:
            self._rota_num_steps += 1
        if self._rota_journal is not None:
            self._rota_journal.step(self._rota_num_steps, grants, preempted, view.num_free_blocks, started)
        record = self._rota_record(output, admitted) if self._rota_facts is not None and (grants or preempted) else None
        decision_ns += time.perf_counter_ns() - begun + queue.decision_ns
        requests = [self.requests[request_id] for request_id in grants]
        num_preempted = len(preempted) - num_displaced
        cpu_at = None if record is None else self._rota_cpu_clock.now()
        step = _Step(started, decision_ns, self._rota_num_steps, requests, num_displaced, num_preempted, record, cpu_at)
        self._rota_in_flight.append(step)
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        step = self._rota_in_flight.popleft()
        # A request that ended while its step ran was aborted, and heard of as such.
        alive = [request for request in step.requests if not request.is_finished()]
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        finished = [request.request_id for request in alive if request.is_finished()]
        for request_id in finished:
            self._rota_forget(request_id, self._rota_sequences[request_id].vllm.num_output_tokens)
        if step.requests and self._rota_journal is not None:
            self._rota_journal.finished(step.step_id, finished, self.rota_clock())
        if step.record is not None and self._rota_facts is not None:
            cpu_at = self._rota_cpu_clock.now()
            self._rota_facts.append(
                StepRecord(
                    step=step.step_id,
                    at=step.started,
                    unix_at=self.rota_wall_clock(),
                    step_ns=self.rota_clock() - step.started,
                    decision_ns=step.decision_ns,
                    num_displaced=step.num_displaced,
                    num_preempted=step.num_preempted,
                    num_finished=len(finished),
                    cpu_ns=None if cpu_at is None or step.cpu_at is None else cpu_at - step.cpu_at,
                    **step.record,
                )
            )
        if not self.requests:
            self._rota_flush()
        return outputs

    def shutdown(self) -> None:
        super().shutdown()
        if self._rota_facts is not None:
            self._rota_facts.close()
        if self._rota_journal is not None:
            self._rota_journal.close()
        if self._rota_hand_offs is not None:
            self._rota_hand_offs.close()

    # --- vLLM's inner seams ------------------------------------------------------------------------------------------

    def _preempt_request(self, request: Any, timestamp: float, drop_stale_output: bool = False) -> None:
        super()._preempt_request(request, timestamp, drop_stale_output)
        self._rota_preempted.append(request.request_id)
        if self._rota_hand_offs is not None:
            self._rota_hand_offs.undo(request.request_id, "it was preempted")

    def _free_request(self, request: Any, delay_free_blocks: bool = False) -> Any:
        if self._rota_hand_offs is None:
            return super()._free_request(request, delay_free_blocks)
        self._rota_hand_offs.closing(request)
        transfers = super()._free_request(request, delay_free_blocks)
        self._rota_hand_offs.closed(request, transfers[0])
        return transfers

    def _reserve_prefill_lookahead(self, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        num_tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        self._rota_queue.note_chunk(request, num_tokens)
        return num_tokens

    # --- inside ------------------------------------------------------------------------------------------------------

    def _rota_displace(self, token_budget: int) -> None:
        """Preempt running requests for waiting ones that outrank them, ahead of vLLM's pass, by the moves that vLLM
        itself makes in `reset_prefix_cache`."""
        victims = choose_displaced(
            self.rota_view,
            self.rota_order,
            self.rota_memory,
            token_budget=token_budget,
            num_blocks_to_take=self._rota_blocks_to_take,
        )
        self._rota_preempt(victims)

    def _rota_make_room(self, token_budget: int, decodes_first: bool) -> bool:
        """Preempt whom the memory policy chooses, until vLLM's pass will lack no block; says whether anybody was."""
        victims = choose_short(
            self.rota_view, self.rota_order, self.rota_memory, token_budget=token_budget, decodes_first=decodes_first
        )
        self._rota_preempt([victim for victim, _ in victims])
        return bool(victims)

    def _rota_preempt(self, victims: Sequence[SequenceView]) -> None:
        for victim in victims:
            request = self._rota_sequences[victim.id].vllm
            self.running.remove(request)
            self._preempt_request(request, time.monotonic(), drop_stale_output=True)
            self.prev_step_scheduled_req_ids.discard(request.request_id)
        if victims:
            self.rota_view.refresh(self.rota_view.now)

    def _rota_blocks_to_take(self, waiting: SequenceView, leaving: Sequence[SequenceView]) -> int:
        """By how much admitting this request with all its known tokens lowers the free blocks, as `allocate_slots`
        counts, after those leaving have let go of theirs."""
        request = self._rota_sequences[waiting.id].vllm
        blocks = self.kv_cache_manager
        hit, num_cached, _ = blocks.get_computed_blocks(request)
        num_tokens = min(request.num_tokens, self.max_model_len)
        given_back = self.rota_view.held_by_these_alone(leaving)
        num_taken_again = sum(block.block_id in given_back for group in hit.blocks for block in group)
        return num_taken_again + int(
            blocks.coordinator.get_num_blocks_to_allocate(
                request_id=request.request_id,
                num_tokens=num_tokens,
                new_computed_blocks=hit.blocks,
                num_encoder_tokens=0,
                total_computed_tokens=num_cached,
                num_local_computed_tokens=num_cached,
                num_tokens_main_model=num_tokens,
                apply_admission_cap=True,
                prefill_end=max(request.num_prompt_tokens, request.num_tokens - 1),
            )
        )

    def _rota_line_up(self, decodes_first: bool) -> tuple[list[Any], Any]:
        """Put vLLM's running list into the order in which this step serves it; returns the line and its cursor."""
        if not self.running:
            return [], None
        cursor = self.rota_order.open(self.rota_view, Pool.RUNNING)
        line: list[Any] = []
        while (sequence := cursor.next()) is not None:
            line.append(sequence)
        if decodes_first:
            line = [s for s in line if s.num_pending_tokens <= 1] + [s for s in line if s.num_pending_tokens > 1]
        running = [sequence.vllm for sequence in line]
        if running != self.running:
            if len(running) != len(self.running) or set(map(id, running)) != set(map(id, self.running)):
                raise ConfigError(
                    f"{type(self.rota_order).__name__} walked {len(running)} of {len(self.running)} running requests",
                    hint="a walk over the running pool must give each sequence once",
                )
            self.running = running
        return line, cursor

    def _rota_record(self, output: Any, admitted: set[str]) -> dict[str, Any]:
        prefills: list[tuple[int, int]] = []
        num_prefill_tokens = num_decodes = decode_kv_tokens = num_cached_tokens = 0
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            # vLLM counts this step's tokens as computed by now.
            context = self.requests[request_id].num_computed_tokens - num_tokens
            if num_tokens > 1:
                prefills.append((num_tokens, context))
                num_prefill_tokens += num_tokens
            else:
                num_decodes += 1
                decode_kv_tokens += context
            if request_id in admitted:
                num_cached_tokens += context
        return {
            "num_running": len(self.running),
            "num_waiting": len(self.waiting) + len(self.kv_holding_waiting),
            "num_free_blocks": self.rota_view.num_free_blocks,
            "num_blocks": self.rota_limits.num_blocks,
            "prefills": tuple(prefills),
            "num_prefill_tokens": num_prefill_tokens,
            "num_decodes": num_decodes,
            "decode_kv_tokens": decode_kv_tokens,
            "num_cached_tokens": num_cached_tokens,
            "num_admitted": len(admitted),
        }

    def _rota_forget(self, request_id: str, num_output_tokens: int | None) -> None:
        """A request is no longer here; with so many output tokens if it was served to its end."""
        sequence = self._rota_sequences.pop(request_id, None)
        if sequence is not None and self._rota_on_end is not None:
            self._rota_on_end(sequence.request, num_output_tokens)

    def _rota_flush(self) -> None:
        if self._rota_facts is not None:
            self._rota_facts.flush()
        if self._rota_journal is not None:
            self._rota_journal.flush()


class RotaScheduler(RotaScheduling, Scheduler):
    """vLLM's synchronous scheduler with our policies: what CPU builds use."""


class RotaAsyncScheduler(RotaScheduling, AsyncScheduler):
    """vLLM's asynchronous scheduler with our policies: what GPU builds use."""


def read_config(additional_config: Any) -> PluginConfig:
    """The plug-in's part of vLLM's additional config; raises `ConfigError` naming the key that is wrong."""
    table = additional_config.get("rota", {}) if isinstance(additional_config, dict) else {}
    try:
        return msgspec.convert(table, PluginConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"--additional-config: rota: {error}", hint=f"keys are {', '.join(PluginConfig.__struct_fields__)}"
        ) from None


def _engine_facts(scheduler: Any) -> EngineFacts:
    from vllm import __version__

    config = scheduler.vllm_config
    return EngineFacts(
        engine=f"vLLM {__version__}",
        model=str(config.model_config.served_model_name or config.model_config.model),
        device=str(config.device_config.device_type),
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        limits=limits_of(scheduler),
    )


def _load_policies(path: str | None) -> Any:
    stack = importlib.import_module(_STACK_MODULE)
    return stack.engine_policies(stack.load_stack(path), VLLM_CAPABILITIES, "vLLM 0.32")


def _check_displacement(scheduler: Any, instead: str) -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    groups = scheduler.kv_cache_config.kv_cache_groups
    if len(groups) != 1 or not isinstance(groups[0].kv_cache_spec, FullAttentionSpec):
        raise CapabilityError(
            "this model has more than full-attention blocks, and what displacing a request frees is not known exactly",
            hint=f"use {instead}",
        )
    if scheduler.connector is not None:
        raise CapabilityError(
            "a KV connector may free blocks later than a request is preempted, and displacing needs them at once",
            hint=f"leave --kv-transfer-config out, or use {instead}",
        )
