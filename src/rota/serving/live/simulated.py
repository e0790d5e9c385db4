"""The simulated engine at the pace of real time: an instance machine on the live loop, with steps as long as a profile
says.

It needs no model. An answer is made of placeholder words, one a token, the same for the same prompt; its length is
drawn from a seeded stream and bounded by what the client asked for. Answers have the shape that an OpenAI server gives
them, or vLLM, where token ids are asked for or given. So an answer can go on at another such engine; how long the rest
is, is drawn anew there, but for those that are as long as they may be (`ignore_eos`).

Engines of a fleet with roles hand requests over to each other: one that is told to let go ends its part after the step
in flight, and the next one takes the rest up, as long as it would have been, when the blocks have had the time that
they take on a link of the simulator's (`Transfer`), which is theirs alone here. Where there is no room for them it
computes them anew.
"""

import asyncio
import math
from collections.abc import Callable

import msgspec

from rota.base.errors import CapabilityError, EngineError, LawBroken
from rota.base.instant import Duration, Instant, to_seconds
from rota.base.random_streams import RandomStreams, Stream
from rota.runtime.live import LiveLoop
from rota.serving.api import StepTimePredictor
from rota.serving.assemble import System, SystemConfig, build_instance, instance_name
from rota.serving.engines.engine import AnswerSink, EngineCall, EngineStatus, RequestStays
from rota.serving.engines.vllm.tickets import Ticket
from rota.serving.instance.machine import InstanceMachine
from rota.serving.live.placeholder import Placeholder, prompt_ids
from rota.serving.live.wishes import read_wishes
from rota.serving.model.capabilities import Capability
from rota.serving.model.commands import (
    InstanceCommand,
    RejectSequence,
    RoomKept,
    RoomRefused,
    RunStep,
    SequenceStopped,
    StopRefused,
)
from rota.serving.model.events import (
    RoomAsked,
    RoomGivenUp,
    SequenceAborted,
    SequenceAdopted,
    SequenceArrived,
    SequenceLeft,
    StepFinished,
    StopAsked,
)
from rota.serving.model.instance import InstanceId, InstanceReport, InstanceSpec
from rota.serving.model.request import Request, RequestId
from rota.serving.sim.migration import Transfer

_CATCH_UP_SECONDS = 0.05
"""A step that ends late, as timers do, shortens the next by up to so much: the pace is kept, not each step."""

_NOT_LIVE = {Capability.RESUME_FROM_TOKENS, Capability.HAND_OVER_KV, Capability.COPY_KV}
"""What its machine could do, and an engine inside the router does not: it is lost with it, and has no blocks."""
_NOT_HANDING_OVER = {Capability.COPY_KV}
"""The same of one that hands requests over."""
_TRANSFER = Transfer()

_MEDIAN_TOKENS = 128
_SIGMA = 0.7


class _Speaker:
    """One request in the engine: who hears it, what it says, how long it will be."""

    __slots__ = ("has_started", "most_tokens", "num_spoken", "num_tokens", "placeholder", "sink", "stream")

    def __init__(
        self,
        sink: AnswerSink,
        placeholder: Placeholder,
        num_tokens: int,
        most_tokens: int,
        *,
        stream: bool,
    ) -> None:
        self.sink = sink
        self.stream = stream
        self.placeholder = placeholder
        self.most_tokens = most_tokens
        self.num_tokens = num_tokens
        """The true length. Only the world knows it."""
        self.num_spoken = 0
        self.has_started = False


class SimulatedEngine:
    """An engine without a model, at its profile's pace."""

    def __init__(
        self,
        loop: LiveLoop,
        spec: InstanceSpec,
        machine: InstanceMachine,
        step_time: StepTimePredictor,
        lengths: Stream,
        *,
        model: str = "simulated",
        step_overhead: Duration = Duration(0),
        leaves_for_good: bool = False,
        hands_over: bool = False,
    ) -> None:
        """`leaves_for_good`: once it is stopped, its machine is driven no more. `hands_over`: it lets requests go and
        takes them up with their blocks, as others like it do."""
        self.spec = spec
        self.model = model
        self._loop = loop
        self._name = instance_name(spec.id)
        self._machine = machine
        self._step_time = step_time
        self._overhead = step_overhead
        self._lengths = lengths
        self._longest = min(spec.limits.max_model_len, spec.limits.num_blocks * spec.limits.block_size)
        self._speakers: dict[RequestId, _Speaker] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._step: RunStep | None = None
        self._due_at = 0.0
        self._ended_at: float | None = None
        """When the step before was due to end, for one that follows at once; None for one that ends idleness."""
        self._is_lost = False
        self._leaves_for_good = leaves_for_good
        self._hands_over = hands_over
        self._leaving: dict[RequestId, asyncio.Future[Ticket]] = {}
        """Who shall let go of a request, and waits for its ticket."""
        self._coming: dict[RequestId, Request] = {}
        """Whose blocks are on their way, or asked room for."""
        loop.add_machine(self._name, machine, self._carry_out)

    @property
    def id(self) -> InstanceId:
        return self.spec.id

    async def start(self) -> None:
        """Nothing: it is there."""

    async def stop(self) -> None:
        """End with every answer that is under way failed."""
        self.lose()
        if self._leaves_for_good:
            self._leaves_for_good = False
            self._loop.remove_machine(self._name)

    def lose(self) -> None:
        """Fail as a crash would: every answer breaks off, and probes fail until `come_back`."""
        self._is_lost = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        speakers, self._speakers = self._speakers, {}
        for request_id, speaker in speakers.items():
            self._forget(request_id)
            self._soon(speaker.sink.on_failed, "the simulated engine was lost")

    def come_back(self) -> None:
        """Be well again after `lose`, with the step that was under way run to its end."""
        self._is_lost = False
        flight, self._step = self._step, None
        if flight is not None:
            self._start_step(flight)

    async def probe(self) -> EngineStatus:
        if self._is_lost:
            raise EngineError(f"{self.id}: the simulated engine was lost")
        return self.status()

    async def report(self) -> InstanceReport:
        return self.load()

    def status(self) -> EngineStatus:
        """What it is."""
        model = {"id": self.model, "object": "model", "created": 0, "owned_by": "rota"}
        cannot = _NOT_HANDING_OVER if self._hands_over else _NOT_LIVE
        spec = msgspec.structs.replace(self.spec, capabilities=self.spec.capabilities - cannot)
        return EngineStatus(spec, ({**model, "max_model_len": self.spec.limits.max_model_len},))

    def load(self) -> InstanceReport:
        """What it has to do now."""
        statistics = self._machine.statistics()
        return InstanceReport(
            instance_id=self.id,
            observed_at=Instant(0),
            num_running=statistics.num_running,
            num_waiting=statistics.num_waiting,
            num_free_blocks=statistics.num_free_blocks,
            num_blocks=self.spec.limits.num_blocks,
            num_preemptions=statistics.num_preemptions,
        )

    def submit(self, call: EngineCall, sink: AnswerSink) -> None:
        if self._is_lost:
            self._soon(sink.on_failed, "the simulated engine was lost")
            return
        request = call.request
        wishes = read_wishes(call.body)
        given_ids = wishes.given_ids()
        if given_ids:
            request = msgspec.structs.replace(request, num_prompt_tokens=len(given_ids))
        prompt = given_ids or prompt_ids(bytes(wishes.messages or wishes.prompt), request.num_prompt_tokens)
        most_tokens = wishes.most_tokens(request)
        ends_at = wishes.kv_transfer_params.ends_at if self._hands_over and wishes.kv_transfer_params else None
        has_blocks = ends_at is not None and request.num_prompt_tokens > 1
        if ends_at is not None:
            num_tokens = max(1, min(most_tokens, ends_at - request.num_prompt_tokens))
        else:
            num_tokens = self._draw_length(request, most_tokens, bool(wishes.ignore_eos))
        placeholder = Placeholder(
            request.id,
            is_chat=call.path.startswith("/v1/chat"),
            model=wishes.model or self.model,
            num_choices=int(wishes.n or 1),
            num_prompt_tokens=request.num_prompt_tokens,
            finish_reason="length" if num_tokens >= most_tokens else "stop",
            include_usage=bool(wishes.stream_options and wishes.stream_options.include_usage),
            prompt=prompt,
            goes_on=bool(given_ids),
            tells_ids=bool(wishes.return_token_ids),
        )
        self._speakers[request.id] = _Speaker(sink, placeholder, num_tokens, most_tokens, stream=call.stream)
        if has_blocks:
            self._coming[request.id] = request
            self._loop.submit(self._name, RoomAsked(request.id, request.num_prompt_tokens))
        else:
            self._loop.submit(self._name, SequenceArrived(request))

    def abort(self, request_id: RequestId) -> None:
        if self._speakers.pop(request_id, None) is not None:
            self._forget(request_id)

    def pause(self, request_id: RequestId, paused: bool) -> None:
        """Ignored: a batch does not wait for one of its readers."""

    async def hand_off(self, request_id: RequestId, *, timeout_seconds: float) -> Ticket:
        """Have a stream end after the step in flight, and get the ticket with which it goes on at another engine. Its
        blocks are free at once: what the other is given is how long they travel. Raises as `LetsGo` has it."""
        speaker = self._speakers.get(request_id)
        if speaker is None or not speaker.stream:
            raise RequestStays(f"{request_id} stays: it has ended, is not here, or is not streamed")
        asked = self._leaving[request_id] = asyncio.get_running_loop().create_future()
        self._loop.submit(self._name, StopAsked(request_id))
        try:
            async with asyncio.timeout(timeout_seconds):
                return await asked
        except TimeoutError:
            raise EngineError(f"{self.id}: no step ended within {timeout_seconds:g} s") from None

    # --- the world ---------------------------------------------------------------------------------------------------

    def _draw_length(self, request: Request, most_tokens: int, ignore_eos: bool) -> int:
        natural = max(1, round(_MEDIAN_TOKENS * math.exp(self._lengths.normal(0.0, _SIGMA))))
        most = max(1, min(most_tokens, self._longest - request.num_prompt_tokens))
        return most if ignore_eos else min(natural, most)

    def _carry_out(self, name: str, command: InstanceCommand, now: Instant) -> None:
        if isinstance(command, RunStep):
            if self._is_lost:
                self._step = command
            else:
                self._start_step(command)
        elif isinstance(command, RejectSequence):
            speaker = self._speakers.pop(command.request_id, None)
            if speaker is not None:
                self._soon(self._refuse, speaker, command.reason)
        elif isinstance(command, SequenceStopped):
            self._soon(self._leave, command.request_id)
        elif isinstance(command, StopRefused):
            self._stays(command.request_id, command.reason)
        elif isinstance(command, RoomKept):
            num_bytes = command.num_tokens * _TRANSFER.kv_bytes_per_token
            seconds = to_seconds(_TRANSFER.latency) + num_bytes / _TRANSFER.bytes_per_second
            asyncio.get_running_loop().call_later(seconds, self._adopt, self._coming[command.request_id])
        elif isinstance(command, RoomRefused):
            self._loop.submit(self._name, SequenceArrived(self._coming.pop(command.request_id)))

    def _forget(self, request_id: RequestId) -> None:
        """Nobody wants a request any more: it gives up what it has here."""
        is_coming = self._coming.pop(request_id, None) is not None
        self._loop.submit(self._name, RoomGivenUp(request_id) if is_coming else SequenceAborted(request_id))
        self._stays(request_id, "it was aborted")

    def _stays(self, request_id: RequestId, reason: str) -> None:
        asked = self._leaving.pop(request_id, None)
        if asked is not None and not asked.done():
            asked.set_exception(RequestStays(f"{request_id} stays: {reason}"))

    def _leave(self, request_id: RequestId) -> None:
        """It has stopped, with all that it has said: end this engine's part, and answer with its ticket."""
        asked = self._leaving.pop(request_id, None)
        if asked is None:
            return  # It was aborted since.
        speaker = self._speakers.pop(request_id)
        self._loop.submit(self._name, SequenceLeft(request_id))
        prompt, num_spoken = speaker.placeholder.prompt, speaker.num_spoken
        block_size = self.spec.limits.block_size
        num_blocks = -(-(len(prompt) + num_spoken) // block_size)
        ticket = Ticket(
            request_id=request_id,
            prompt_token_ids=tuple(prompt),
            output_token_ids=tuple(speaker.placeholder.token_id(index) for index in range(num_spoken)),
            num_tokens_left=speaker.most_tokens - num_spoken,
            kv_transfer_params={
                "remote_block_ids": [list(range(num_blocks))],
                "ends_at": len(prompt) + speaker.num_tokens,
            },
            block_size=block_size,
            block_bytes=block_size * _TRANSFER.kv_bytes_per_token,
        )
        if not asked.done():
            asked.set_result(ticket)
        speaker.sink.on_data(speaker.placeholder.last_events(num_spoken, "length"))
        speaker.sink.on_end()

    def _adopt(self, request: Request) -> None:
        """The blocks of a request are here, but for that of its last token, which is computed with the next step."""
        if self._coming.get(request.id) is not request:
            return  # It was aborted since.
        del self._coming[request.id]
        request = msgspec.structs.replace(request, num_prompt_tokens=request.num_prompt_tokens - 1)
        self._loop.submit(self._name, SequenceAdopted(request, 1))

    def _start_step(self, step: RunStep) -> None:
        prefills: list[tuple[int, int]] = []
        num_decodes = kv_tokens = 0
        for request_id, num_tokens in step.grants:
            sequence = self._machine.sequence(request_id)
            if sequence is None:  # aborted while the engine was lost
                continue
            if num_tokens == 1:
                num_decodes += 1
                kv_tokens += sequence.num_computed_tokens
            else:
                prefills.append((num_tokens, sequence.num_computed_tokens - num_tokens))
        nanoseconds = 0
        if prefills or num_decodes:
            nanoseconds = self._overhead + self._step_time.step_time(
                prefills=prefills, num_decodes=num_decodes, decode_kv_tokens=kv_tokens
            )
        loop = asyncio.get_running_loop()
        self._step = step
        begins_at = loop.time()
        if self._ended_at is not None:
            begins_at = max(self._ended_at, begins_at - _CATCH_UP_SECONDS)
        self._due_at = begins_at + to_seconds(nanoseconds)
        self._timer = loop.call_at(self._due_at, self._end_step)

    def _end_step(self) -> None:
        step, self._step, self._timer = self._step, None, None
        if step is None:
            raise LawBroken(f"law 6: {self._name} was woken up without a step in flight")
        speaking: list[tuple[RequestId, _Speaker]] = []
        finished: list[RequestId] = []
        for request_id, _ in step.grants:
            sequence = self._machine.sequence(request_id)
            speaker = self._speakers.get(request_id)
            if sequence is None or speaker is None or sequence.num_computed_tokens != sequence.num_tokens:
                continue
            speaking.append((request_id, speaker))
            if speaker.num_spoken + 1 >= speaker.num_tokens:
                finished.append(request_id)
                del self._speakers[request_id]
        # The tokens go out first; the next step, which this starts, is planned while they are on their way.
        for _, speaker in speaking:
            self._speak(speaker)
        self._ended_at = self._due_at
        self._loop.submit(self._name, StepFinished(step.step_id, tuple(finished)))
        self._ended_at = None

    def _speak(self, speaker: _Speaker) -> None:
        sink, placeholder = speaker.sink, speaker.placeholder
        index = speaker.num_spoken
        speaker.num_spoken += 1
        is_last = speaker.num_spoken >= speaker.num_tokens
        if speaker.stream:
            if not speaker.has_started:
                speaker.has_started = True
                sink.on_head(200, [(b"content-type", b"text/event-stream; charset=utf-8")])
                sink.on_data(placeholder.first_event() + placeholder.token_event(index))
            else:
                sink.on_data(placeholder.token_event(index))
            if is_last:
                sink.on_data(placeholder.last_events(speaker.num_tokens))
                sink.on_end()
        elif is_last:
            sink.on_head(200, [(b"content-type", b"application/json")])
            sink.on_data(placeholder.answer(speaker.num_tokens))
            sink.on_end()

    def _refuse(self, speaker: _Speaker, reason: str) -> None:
        error = {"message": reason, "type": "BadRequestError", "param": None, "code": 400}
        speaker.sink.on_head(400, [(b"content-type", b"application/json")])
        speaker.sink.on_data(msgspec.json.encode({"error": error}))
        speaker.sink.on_end()

    def _soon(self, call: Callable[..., None], *arguments: object) -> None:
        asyncio.get_running_loop().call_soon(call, *arguments)


def one_more(
    loop: LiveLoop,
    config: SystemConfig,
    instance_id: InstanceId,
    step_time: StepTimePredictor,
    *,
    step_overhead: Duration = Duration(0),
) -> SimulatedEngine:
    """One more simulated engine, like the first that the system was configured with."""
    spec = msgspec.structs.replace(config.instances[0], id=instance_id)
    lengths = RandomStreams(config.seed).stream(f"output_length/{instance_id}")
    machine = build_instance(config.stack, spec)
    return SimulatedEngine(loop, spec, machine, step_time, lengths, step_overhead=step_overhead, leaves_for_good=True)


def simulated_engines(
    loop: LiveLoop,
    system: System,
    config: SystemConfig,
    step_time: StepTimePredictor,
    *,
    model: str = "simulated",
    step_overhead: Duration = Duration(0),
    hands_over: bool = False,
) -> list[SimulatedEngine]:
    """One simulated engine for each instance that the system was configured with. Raises `CapabilityError` for a stack
    that swaps: there is no host memory beside a clock that nobody turns."""
    if config.stack.swap:
        raise CapabilityError(
            "the stack swaps to host memory, which engines in real time cannot be told",
            hint="leave [swap] out, or use `rota simulate`",
        )
    streams = RandomStreams(config.seed)
    return [
        SimulatedEngine(
            loop,
            spec,
            system.instances[spec.id],
            step_time,
            streams.stream(f"output_length/{spec.id}"),
            model=model,
            step_overhead=step_overhead,
            hands_over=hands_over,
        )
        for spec in config.instances
    ]
