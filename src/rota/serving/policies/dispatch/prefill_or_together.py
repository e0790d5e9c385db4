"""Split a request between two instances where that is faster for its lengths, and not where it is slower."""

from collections.abc import Sequence

from rota.base.errors import ConfigError
from rota.serving.api import NOTHING, ClusterView, EngineCapabilities, InstanceId, InstanceView, Pick, Request, Role
from rota.serving.policies.dispatch.by_role import ByRole
from rota.serving.policies.dispatch.scoring import least_booked, least_loaded, load_scores
from rota.serving.policies.heat_map import load_heat_map
from rota.serving.policies.observed_lengths import ObservedLengths
from rota.serving.policies.parameters import at_least_one


class PrefillOrTogether:
    """By a heat map of lengths, a request goes to a prefill instance and decodes elsewhere, or to a mixed one that does
    both; among those, to the longest cached prefix while their loads are alike, else to the least load.

    Rule: DeepFlow (2025). The heat map says for each prompt length, and each ratio of output to prompt, how much longer
    a request takes together than apart, added up over several loads: above 0 it is split, below 0 it is not, at 0
    either will do. Loads are alike where the fewest and the most outstanding tokens differ by at most
    `balance_tokens`. Who is split decodes at the decode instance with the fewest booked tokens. Where there is no
    instance for the one, it is the other.

    Published: the rule. The map is ours, made by our simulator for one model and two fleets (`benchmarks/heat_map.py`
    makes others). Ours too: `balance_tokens`, which was never published, and the predicted length: the median of the
    answers that ended lately for like prompts, where the paper has a learned predictor in ranges of 128 tokens.

    Good in a fleet of both kinds whose requests differ much. Starves nobody; but it keeps to its map however full one
    kind is, so the sizes of the two must fit the load.
    """

    requires: EngineCapabilities = NOTHING
    reads_roles = True

    def __init__(
        self, *, heat_map: str = "llama-3.1-8b-a100", balance_tokens: int = 2048, guess_tokens: int = 256
    ) -> None:
        """`heat_map` is the name of a shipped one or the path of a JSON file. `balance_tokens` is at least 0;
        `guess_tokens`, at least 1, are predicted before any answer ended. Raises `ConfigError` outside of that, and
        `DataError` for a file that is no heat map."""
        if balance_tokens < 0:
            raise ConfigError(f"prefill_or_together: balance_tokens must be at least 0, not {balance_tokens}")
        at_least_one("prefill_or_together", guess_tokens=guess_tokens)
        self._map = load_heat_map(heat_map)
        self._balance_tokens = balance_tokens
        self._lengths = ObservedLengths(guess_tokens=guess_tokens)
        self._by_role = ByRole()

    def pick(self, request: Request, cluster: ClusterView) -> Pick:
        instances = cluster.instances
        roles = self._by_role.of(instances)
        num_output_tokens = self._lengths.predict(request)
        gain = self._map.gain(request.num_prompt_tokens, num_output_tokens)
        takers = roles.not_decode or instances
        if gain > 0.0 and roles.decode:
            takers = roles.prefill or takers
        elif gain < 0.0:
            takers = roles.mixed or takers
        chosen, why = self._best(request, takers)
        is_split = chosen.role is Role.PREFILL and bool(roles.not_prefill)
        reason = f"{num_output_tokens} tokens expected, gain of splitting {gain:+.2f}: {why}"
        return Pick(chosen.id, reason, load_scores(takers), prefill_only=is_split)

    def pick_decode(self, request: Request, at: InstanceId, cluster: ClusterView) -> Pick:
        roles = self._by_role.of(cluster.instances)
        takers = roles.decode or roles.mixed
        if not takers:
            return Pick(at, "no other instance decodes")
        chosen = least_booked(takers)
        return Pick(chosen.id, f"fewest booked tokens ({chosen.num_booked_tokens}) of {len(takers)} that decode")

    def request_ended(self, request: Request, num_output_tokens: int | None) -> None:
        if num_output_tokens is not None:
            self._lengths.learn(request, num_output_tokens)

    def _best(self, request: Request, takers: Sequence[InstanceView]) -> tuple[InstanceView, str]:
        loads = [view.num_outstanding_tokens for view in takers]
        fewest = min(loads)
        if request.block_hashes and max(loads) - fewest <= self._balance_tokens:
            cached = [view.num_prefix_tokens(request) for view in takers]
            longest = max(cached)
            if longest:
                chosen = least_loaded([view for view, each in zip(takers, cached, strict=True) if each == longest])
                return chosen, f"longest cached prefix ({longest} tokens) of {len(takers)}"
        return takers[loads.index(fewest)], f"fewest outstanding tokens ({fewest}) of {len(takers)}"
