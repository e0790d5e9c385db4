"""What a ranker of lengths goes by: numbers that are known of a request when it arrives."""

from hashlib import blake2b

from rota.serving.api import TEXT_COUNTS, Request

REQUEST_FEATURES = ("prompt_tokens", "max_tokens", "declares_max_tokens", "priority", "tenant", "program", "in_session")
"""Names of the numbers that every request has, in order. A limit that nobody declared is 0; tenant and program are one
of 256 buckets of a hash, the same in every process, and no program is -1."""

TEXT_FEATURES = REQUEST_FEATURES + TEXT_COUNTS
"""The same, and what was counted of the prompt's text, where that was asked for."""

NUM_BUCKETS = 256


def features_of(request: Request) -> list[float]:
    """The numbers of a request: `TEXT_FEATURES` of one whose text was counted, else `REQUEST_FEATURES`."""
    return [
        request.num_prompt_tokens,
        request.max_tokens if request.declares_max_tokens else 0,
        request.declares_max_tokens,
        request.priority,
        _bucket(request.tenant),
        -1 if request.program is None else _bucket(request.program),
        request.session is not None,
        *request.text_counts,
    ]


def _bucket(name: str) -> int:
    return blake2b(name.encode("utf-8", "surrogatepass"), digest_size=1).digest()[0]
