"""The router's own description, OpenAPI 3.1: what `/openapi.json` answers, and what a fuzzer is let loose with."""

from typing import Any

import msgspec

from rota.serving.board.picture import Picture
from rota.serving.frontdoor.admin import DRAIN, INSTANCES, MIGRATE, UNDRAIN
from rota.serving.frontdoor.board_page import STATE, UI
from rota.serving.frontdoor.bodies import Body, ContentPart, Message, MoveBody
from rota.serving.frontdoor.http1 import HttpLimits
from rota.serving.model.instance import Role

_JSON = "application/json"
_ERROR = {"$ref": "#/components/schemas/Error"}
# Each event of a stream, as OpenAPI 3.2 describes them, which 3.1 leaves open.
_EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
_PRIORITY_MAX = 2**31 - 1


def describe(limits: HttpLimits) -> dict[str, Any]:
    """The description of a front door with these limits."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Rota router",
            "version": "1",
            "description": "The OpenAI API in front of any number of engines. Fields that are not listed pass "
            "untouched to the engine.",
        },
        "paths": {
            "/v1/chat/completions": {"post": _generation("createChatCompletion", "ChatBody", limits)},
            "/v1/completions": {"post": _generation("createCompletion", "CompletionBody", limits)},
            "/v1/models": {"get": _page("listModels", "Models of all ready instances", _JSON, "Models")},
            "/health": {
                "get": _page(
                    "health",
                    "At least one instance takes requests",
                    _JSON,
                    "Health",
                    more={"503": _answer("No instance does", _JSON, "Health")},
                )
            },
            "/metrics": {"get": _page("metrics", "Prometheus text format", "text/plain", None)},
            "/openapi.json": {"get": _page("describe", "This description", _JSON, None)},
            UI: {"get": _page("board", "What goes on now, as a page", "text/html", None, more=_administered("403"))},
            STATE: {"get": _page("boardState", "The same as JSON", _JSON, "Picture", more=_administered("403"))},
            INSTANCES: {"get": _page("listInstances", "Every instance", _JSON, "Instances", more=_administered("403"))},
            DRAIN: {"post": _instance_change("drainInstance", "It takes nothing new, and finishes what it has")},
            UNDRAIN: {"post": _instance_change("undrainInstance", "It takes requests again, once it is well")},
            MIGRATE: {"post": _move()},
        },
        "components": {"schemas": _schemas()},
    }


def _generation(operation: str, body: str, limits: HttpLimits) -> dict[str, Any]:
    problems = {
        "400": "The request is malformed; `param` names the field or header",
        "401": "The router serves who has an API key, and none that is known was given",
        "403": "The key does not grant what `param` names",
        "413": f"The body exceeds {limits.max_body_bytes} bytes",
        "415": "The body is not JSON",
        "429": "A limit of the client's own",
        "502": "Every attempt at an engine failed",
        "503": "Overloaded, or no instance is ready; see Retry-After",
    }
    return {
        "operationId": operation,
        "parameters": _identity_headers(),
        "requestBody": {
            "required": True,
            "content": {_JSON: {"schema": {"$ref": f"#/components/schemas/{body}"}}},
        },
        "responses": {
            "200": {
                "description": "The answer of an engine. A stream whose engine is lost ends with an event that has an "
                "`error`, and without `[DONE]`",
                "content": {_JSON: {"schema": {"type": "object"}}, "text/event-stream": {"schema": _EVENT}},
            },
            **{
                status: {"description": text, "content": {_JSON: {"schema": _ERROR}}}
                for status, text in problems.items()
            },
            "default": {
                "description": "Any other answer of an engine, unchanged",
                "content": {_JSON: {"schema": {"type": "object"}}},
            },
        },
    }


def _page(
    operation: str, text: str, media_type: str, schema: str | None, *, more: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"operationId": operation, "responses": {"200": _answer(text, media_type, schema), **(more or {})}}


def _answer(text: str, media_type: str, schema: str | None) -> dict[str, Any]:
    content = {"$ref": f"#/components/schemas/{schema}"} if schema else {}
    return {"description": text, "content": {media_type: {"schema": content}}}


def _instance_change(operation: str, text: str) -> dict[str, Any]:
    name = {"name": "instance_id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    return {**_page(operation, text, _JSON, "Instance", more=_administered("403", "404")), "parameters": [name]}


def _move() -> dict[str, Any]:
    name = {"name": "request_id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    problems = {"400": "The body is malformed; `param` names the field", "409": "It is not begun: the request stays"}
    answers = {status: _answer(text, _JSON, "Error") for status, text in problems.items()}
    page = _page("migrateRequest", "What came of it", _JSON, "Migration", more=answers | _administered("403", "404"))
    body = {"required": True, "content": {_JSON: {"schema": {"$ref": "#/components/schemas/MoveBody"}}}}
    return {**page, "parameters": [name], "requestBody": body}


def _administered(*statuses: str) -> dict[str, Any]:
    texts = {
        "403": "This is for the router's own machine, and not through a proxy or a page of another site",
        "404": "There is no such instance, or no such request is under way",
    }
    return {status: {"description": texts[status], "content": {_JSON: {"schema": _ERROR}}} for status in statuses}


def _identity_headers() -> list[dict[str, Any]]:
    name = {"type": "string", "pattern": "^[!-~]([ -~]{0,254}[!-~])?$"}
    whole = {"type": "integer", "minimum": -_PRIORITY_MAX, "maximum": _PRIORITY_MAX}
    milliseconds = {"type": "number", "exclusiveMinimum": 0, "maximum": 86_400_000}
    headers = [
        ("x-gateway-inference-fairness-id", name, "Tenant"),
        ("x-gateway-inference-objective", whole, "Class: higher is more urgent, negative is sheddable"),
        ("x-vllm-priority", whole, "Class: lower is more urgent"),
        ("x-session-id", name, "Session"),
        ("x-dynamo-session-id", name, "Session, if x-session-id is absent"),
        ("x-dynamo-trajectory-id", name, "Program"),
        ("x-slo-ttft-ms", milliseconds, "Target: arrival to first token"),
        ("x-slo-tpot-ms", milliseconds, "Target: mean time per output token after the first"),
        ("x-request-id", name, "Beginning of the request's id"),
    ]
    return [
        {"name": header, "in": "header", "required": False, "schema": schema, "description": text}
        for header, schema, text in headers
    ]


def _schemas() -> dict[str, Any]:
    # The structs that check a body also describe it, so that the two cannot differ.
    _, components = msgspec.json.schema_components(
        [Body, Message, ContentPart, MoveBody, Picture], ref_template="#/components/schemas/{name}"
    )
    common = components.pop("Body")["properties"]
    common["model"] = {**common["model"], "examples": ["simulated"]}
    components["ChatBody"] = {
        "type": "object",
        "required": ["messages"],
        "properties": {
            **common,
            "max_completion_tokens": common["max_tokens"],
            "messages": {"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/Message"}},
        },
    }
    ids = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": _PRIORITY_MAX}}
    components["CompletionBody"] = {
        "type": "object",
        "required": ["prompt"],
        "properties": {
            **common,
            "prompt": {
                "oneOf": [
                    {"type": "string"},
                    {"type": "array", "minItems": 1, "items": {"type": "string"}},
                    {**ids, "minItems": 1},
                    {"type": "array", "minItems": 1, "items": ids},
                ]
            },
        },
    }
    nullable = {"type": ["string", "null"]}
    components["Error"] = {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": nullable,
                    "code": {"type": ["string", "integer", "null"]},
                },
            }
        },
    }
    components["Models"] = {
        "type": "object",
        "required": ["object", "data"],
        "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": {"type": "object"}}},
    }
    components.update(_instance_schemas())
    components["Health"] = {
        "type": "object",
        "required": ["status", "num_ready", "instances"],
        "properties": {
            "status": {"enum": ["ok", "unavailable"]},
            "num_ready": {"type": "integer", "minimum": 0},
            "instances": {"type": "object"},
        },
    }
    return components


def _instance_schemas() -> dict[str, Any]:
    instance = {
        "type": "object",
        "required": ["id", "object", "state", "num_requests"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": "instance"},
            "state": {"enum": ["ready", "draining", "drained", "unavailable"]},
            "num_requests": {"type": "integer", "minimum": 0},
            "role": {"enum": [str(role) for role in Role], "description": "Where it has one."},
        },
    }
    listed = {"type": "array", "items": {"$ref": "#/components/schemas/Instance"}}
    instances = {
        "type": "object",
        "required": ["object", "data"],
        "properties": {"object": {"const": "list"}, "data": listed},
    }
    text, way = {"type": "string"}, {"enum": ["copy", "hand_off", "replay"]}
    migration = {
        "id": {"type": "integer", "minimum": 1},
        "object": {"const": "migration"},
        **dict.fromkeys(("request_id", "source", "destination", "reason"), text),
        "way": way,
        "outcome": {"enum": ["committed", "aborted"]},
        "downtime_seconds": {"type": "number", "minimum": 0},
        "num_bytes": {"type": "integer", "minimum": 0},
    }
    moved = {"type": "object", "required": list(migration), "properties": migration}
    return {"Instance": instance, "Instances": instances, "Migration": moved}
