"""As long as the client allows."""

from rota.base.instant import Duration
from rota.serving.api import Request


class Declared:
    """An answer has `max_tokens` tokens, which is what the client allows and all that it says of it.

    Never too low. Good where clients ask for what they need; worth nothing where all ask for the same. Costs nothing.
    """

    cost = Duration(0)

    def predict(self, request: Request) -> float:
        return float(request.max_tokens)

    def request_ended(self, request: Request, num_output_tokens: int | None) -> None:
        pass
