"""What a simulated engine heeds of a body that the front door has checked."""

import msgspec

from rota.serving.model.request import Request


class Wishes(msgspec.Struct):
    """What the placeholder answer heeds of a body."""

    class StreamOptions(msgspec.Struct):
        include_usage: bool | None = None

    class Transfer(msgspec.Struct):
        prompt_token_ids: list[int] | None = None
        ends_at: int | None = None
        """With how many tokens, those of the prompt included, an answer ends whose blocks another engine has."""

    model: str | None = None
    n: int | float | None = None
    ignore_eos: bool | None = None
    stream_options: StreamOptions | None = None
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    kv_transfer_params: Transfer | None = None
    max_tokens: int | float | None = None
    max_completion_tokens: int | float | None = None
    return_token_ids: bool | None = None

    def given_ids(self) -> list[int] | None:
        """The prompt, where it comes as token ids: that of a chat as one engine hands it on to another."""
        if self.kv_transfer_params is not None and self.kv_transfer_params.prompt_token_ids is not None:
            return self.kv_transfer_params.prompt_token_ids
        try:
            return _ids(self.prompt) if self.prompt else None
        except msgspec.DecodeError:
            return None

    def most_tokens(self, request: Request) -> int:
        """How many tokens the client wants at most, less what it has got of another engine."""
        declared = self.max_completion_tokens or self.max_tokens
        return request.max_tokens if declared is None else min(request.max_tokens, int(declared))


read_wishes = msgspec.json.Decoder(Wishes).decode
_ids = msgspec.json.Decoder(list[int]).decode
