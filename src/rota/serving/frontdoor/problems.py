"""What a client is told when something is wrong: OpenAI's error shape, everywhere the same."""

import msgspec

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Problem(Exception):
    """An answer that is an error. `param` names the field, header or query parameter at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_seconds = retry_after_seconds

    def value(self) -> dict[str, object]:
        """The error object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def body(self) -> bytes:
        """The error object as JSON."""
        return msgspec.json.encode(self.value())

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers of the answer."""
        headers = [(b"content-type", b"application/json")]
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if self.retry_after_seconds is not None:
            headers.append((b"retry-after", b"%d" % self.retry_after_seconds))
        return headers

    def as_event(self) -> bytes:
        """The error object as the last event of a stream that began well."""
        return b"data: " + self.body() + b"\n\n"
