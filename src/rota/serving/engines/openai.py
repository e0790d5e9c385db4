"""Any server that speaks the OpenAI API: vLLM, SGLang, llama.cpp, Ollama, and whatever else is like them."""

import re
from collections.abc import Callable

import msgspec

from rota.base.errors import EngineError
from rota.base.instant import Instant
from rota.serving.engines.engine import AnswerSink, EngineCall, EngineStatus
from rota.serving.engines.http_client import Call, Headers, HttpClient
from rota.serving.engines.vllm.arguments import with_arguments
from rota.serving.model.capabilities import NOTHING, Capability, EngineCapabilities
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceReport, InstanceSpec
from rota.serving.model.request import RequestId

_UNKNOWN_MODEL_LEN = 2**31 - 1
_UNKNOWN_BLOCKS = 2**17
_DROPPED = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"content-length",
    }
)

_SAMPLE = re.compile(rb"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{[^}\n]*\})? +([0-9.eE+-]+)", re.MULTILINE)
_CACHE_CONFIG = re.compile(rb"^vllm:cache_config_info\{([^\n]*)\} ", re.MULTILINE)
_VERSION = re.compile(rb'"version": ?"(\d{1,6})\.(\d{1,6})')
_FIRST_VLLM_TO_RESUME = (0, 32)
"""The first that was tried. An older one might answer a chat from its beginning."""
_LABEL = re.compile(rb'([a-z_]+)="([^"]*)"')
_RUNNING = (b"vllm:num_requests_running", b"sglang:num_running_reqs", b"llamacpp:requests_processing")
_WAITING = (b"vllm:num_requests_waiting", b"sglang:num_queue_reqs", b"llamacpp:requests_deferred")
_USAGE = (b"vllm:kv_cache_usage_perc", b"sglang:token_usage", b"llamacpp:kv_cache_usage_ratio")
_PREEMPTIONS = (b"vllm:num_preemptions_total",)
_TOKENS_HELD = (b"sglang:max_total_num_tokens",)
"""How many tokens its KV memory holds."""


class _Models(msgspec.Struct):
    data: list[dict[str, object]] | None = None
    """Ollama without a model says null."""


class _Detokenized(msgspec.Struct):
    prompt: str


_detokenized = msgspec.json.Decoder(_Detokenized).decode
_models = msgspec.json.Decoder(_Models).decode


class OpenAIEngine:
    """One server at a URL. What it serves and how much it holds is read from the server when it becomes healthy."""

    def __init__(
        self,
        instance_id: InstanceId,
        url: str,
        *,
        capabilities: EngineCapabilities = NOTHING,
        probe_timeout_seconds: float = 5.0,
        connect_timeout_seconds: float = 5.0,
    ) -> None:
        """`url` is the server's root, with or without `/v1`. Raises `ConfigError` for what is no URL."""
        self.client = HttpClient(url.rstrip("/").removesuffix("/v1"), connect_timeout_seconds=connect_timeout_seconds)
        self._connect_timeout = connect_timeout_seconds
        self._id = instance_id
        self._capabilities = capabilities
        self._timeout = probe_timeout_seconds
        self._calls: dict[RequestId, Call] = {}
        self._is_vllm = False
        """Whether its metrics are vLLM's; known once it was healthy."""
        self._status: EngineStatus | None = None
        self._health_path = "/health"
        self._reports = True

    @property
    def id(self) -> InstanceId:
        return self._id

    async def start(self) -> None:
        """Nothing: the server runs already."""

    async def stop(self) -> None:
        """Close every connection."""
        self.client.close()

    async def probe(self) -> EngineStatus:
        """Ask for its health; the first time, and whenever it was ill since, also for what it is."""
        try:
            await self._ask_health()
            if self._status is None:
                self._status = await self._ask_status()
        except EngineError:
            self._status, self._health_path = None, "/health"
            raise
        return self._status

    async def report(self) -> InstanceReport | None:
        """Its load as its own metrics have it, or None if it publishes none that are known here."""
        if not self._reports or self._status is None:
            return None
        try:
            text = await self._get("/metrics")
        except EngineError:
            return None
        values = _samples(text)
        num_running = _first(values, _RUNNING)
        num_waiting = _first(values, _WAITING)
        if num_running is None or num_waiting is None:
            self._reports = False
            return None
        num_blocks = self._status.spec.limits.num_blocks
        return InstanceReport(
            instance_id=self._id,
            observed_at=Instant(0),
            num_running=int(num_running),
            num_waiting=int(num_waiting),
            num_free_blocks=round((1.0 - min(max(_first(values, _USAGE) or 0.0, 0.0), 1.0)) * num_blocks),
            num_blocks=num_blocks,
            num_preemptions=int(_first(values, _PREEMPTIONS) or 0),
        )

    def submit(self, call: EngineCall, sink: AnswerSink) -> None:
        request_id = call.request.id
        # The dictionary must know the call before its end can be reported.
        passing = _Passing(self._calls, request_id, sink)
        lead, headers = b"", call.headers
        body: bytes | memoryview = call.body
        if self._is_vllm:
            lead, body = with_arguments(call)
        else:
            # Some servers refuse a request whose id is no UUID (llama-cpp-python answers an empty 400). vLLM takes any.
            headers = [header for header in headers if header[0] != b"x-request-id"]
        self._calls[request_id] = self.client.send("POST", call.path, headers, body, passing, lead=lead)

    def abort(self, request_id: RequestId) -> None:
        call = self._calls.pop(request_id, None)
        if call is not None:
            call.cancel()

    def pause(self, request_id: RequestId, paused: bool) -> None:
        call = self._calls.get(request_id)
        if call is not None:
            call.pause(paused)

    def moved_to(self, url: str) -> None:
        """Speak to another server from now on: whatever was known of the last one is forgotten, and answers under way
        there fail."""
        self.client.close()
        self.client = HttpClient(url, connect_timeout_seconds=self._connect_timeout)
        self._is_vllm, self._status, self._health_path, self._reports = False, None, "/health", True

    async def text_of(self, token_ids: list[int]) -> str:
        """What tokens say, by vLLM's `/detokenize`. Raises `EngineError` if the server does not tell."""
        body = msgspec.json.encode({"tokens": token_ids})
        try:
            answer = await self.client.fetch("POST", "/detokenize", timeout_seconds=self._timeout, body=body)
            return _detokenized(answer).prompt
        except msgspec.MsgspecError as error:
            raise EngineError(f"{self.client.url}/detokenize: {error}") from None

    async def _ask_health(self) -> None:
        try:
            await self._get(self._health_path)
        except EngineError as error:
            if self._health_path == "/v1/models" or "answered 404" not in error.message:
                raise
            # Not every server has the endpoint; then its list of models does.
            self._health_path = "/v1/models"
            await self._get(self._health_path)

    async def _ask_status(self) -> EngineStatus:
        try:
            models = tuple(_models(await self._get("/v1/models")).data or ())
        except msgspec.MsgspecError as error:
            raise EngineError(f"{self.client.url}/v1/models: not a list of models: {error}") from None
        if any(model.get("owned_by") == "sglang" for model in models):
            # Its /health generates a token, behind all that is computed before it: once it was well, that says how busy
            # it is. A long prompt would pass for a server that hangs.
            self._health_path = "/ping"
        num_blocks, block_size = _UNKNOWN_BLOCKS, 16
        try:
            text = await self._get("/metrics")
        except EngineError:
            self._reports = False
        else:
            self._reports = True
            config = _CACHE_CONFIG.search(text)
            self._is_vllm = config is not None
            labels = dict(_LABEL.findall(config.group(1))) if config else {}
            num_blocks = _whole(labels.get(b"num_gpu_blocks")) or num_blocks
            block_size = _whole(labels.get(b"block_size")) or block_size
            tokens_held = _first(_samples(text), _TOKENS_HELD)
            if tokens_held is not None and block_size <= tokens_held < float("inf"):
                num_blocks = int(tokens_held) // block_size
        # Prompt lengths are estimates here, so no bound on the model's length is set: the engine itself refuses what is
        # too long, by the true count.
        limits = InstanceLimits(num_blocks=num_blocks, block_size=block_size, max_model_len=_UNKNOWN_MODEL_LEN)
        capabilities = self._capabilities
        if self._is_vllm and await self._takes_token_ids():
            capabilities = capabilities | {Capability.RESUME_FROM_TOKENS}
        return EngineStatus(InstanceSpec(self._id, limits, capabilities=capabilities), models)

    async def _takes_token_ids(self) -> bool:
        """Whether it is a vLLM that tells the ids of its tokens and takes a prompt, of a chat too, as token ids."""
        try:
            found = _VERSION.search(await self._get("/version"))
        except EngineError:
            return False
        return found is not None and (int(found[1]), int(found[2])) >= _FIRST_VLLM_TO_RESUME

    async def _get(self, path: str) -> bytes:
        return await self.client.fetch("GET", path, timeout_seconds=self._timeout)


class _Passing:
    """Takes the call off the engine's list when its answer ends, and the connection's own headers off the answer."""

    __slots__ = ("_calls", "_request_id", "_sink", "on_data")

    def __init__(self, calls: dict[RequestId, Call], request_id: RequestId, sink: AnswerSink) -> None:
        self._calls = calls
        self._request_id = request_id
        self._sink = sink
        self.on_data = sink.on_data

    @property
    def on_chunks(self) -> Callable[[bytes], bool] | None:
        return self._sink.on_chunks

    def on_head(self, status: int, headers: Headers) -> None:
        self._sink.on_head(status, [header for header in headers if header[0] not in _DROPPED])

    def on_end(self) -> None:
        self._calls.pop(self._request_id, None)
        self._sink.on_end()

    def on_failed(self, reason: str) -> None:
        self._calls.pop(self._request_id, None)
        self._sink.on_failed(reason)


def _samples(text: bytes) -> dict[bytes, float]:
    """Values by name, summed over label sets."""
    wanted = {*_RUNNING, *_WAITING, *_USAGE, *_PREEMPTIONS, *_TOKENS_HELD}
    values: dict[bytes, float] = {}
    for name, value in _SAMPLE.findall(text):
        if name in wanted:
            try:
                values[name] = values.get(name, 0.0) + float(value)
            except ValueError:
                continue
    return values


def _first(values: dict[bytes, float], names: tuple[bytes, ...]) -> float | None:
    return next((values[name] for name in names if name in values), None)


def _whole(text: bytes | None) -> int | None:
    return int(text) if text is not None and text.isdigit() and int(text) > 0 else None
