"""What only the world knows: how long each answer will truly be. No policy, machine or predictor is given this
table."""

from rota.serving.model.instance import InstanceLimits
from rota.serving.model.request import Request, RequestId


class GroundTruth:
    """True output lengths of the requests in flight, by id."""

    def __init__(self) -> None:
        self._num_output_tokens: dict[RequestId, int] = {}

    def add(self, request: Request, num_output_tokens: int) -> None:
        """Note the truth about a request when it arrives."""
        self._num_output_tokens[request.id] = num_output_tokens

    def num_output_tokens(self, request: Request, limits: InstanceLimits) -> int:
        """The tokens this request will get on an instance with these limits: the truth, cut off by what the client
        allowed and by the longest sequence that the instance takes, as a real engine cuts it off."""
        longest = min(limits.max_model_len, limits.num_blocks * limits.block_size)
        return min(self._num_output_tokens[request.id], request.max_tokens, longest - request.num_prompt_tokens)

    def forget(self, request_id: RequestId) -> None:
        """Drop a request that has ended."""
        self._num_output_tokens.pop(request_id, None)
