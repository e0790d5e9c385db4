"""The conformance suite of admission policies."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError

from hypothesis import given, settings
from hypothesis import strategies as st

from rota.base.errors import LawBroken
from rota.serving.api import Admission, AdmissionPolicy, Request
from rota.testing.dispatch import ClusterSample, clusters, requests

CLIENT_OR_SERVER_ERRORS = range(400, 600)


def check_admission_policy(factory: Callable[[], AdmissionPolicy], *, max_examples: int = 100) -> None:
    """Prove that an admission policy keeps the contract of its kind; raises `LawBroken` with the first example that
    does not.

    `factory` makes a fresh policy, each time alike. For any cluster and number of unfinished requests, along a series
    of arrivals with rising `now`:

    * every answer has a reason (law 11), and a refusal an HTTP status from 400 to 599;
    * a time to come back is positive, and is given only with a refusal;
    * two fresh policies that are asked the same give the same answers (law 8);
    * nothing that is shown is written to (law 13);
    * a fresh policy admits the first request when nothing is unfinished (law 7), unless it says with 400 that it never
      can, of one that no instance has the length or the blocks for.
    """

    @settings(max_examples=max_examples, deadline=None)
    @given(
        asked=st.lists(st.tuples(requests(), clusters(), st.integers(0, 20_000)), min_size=1, max_size=8),
    )
    def answers_are_sound_and_repeatable(asked: list[tuple[Request, ClusterSample, int]]) -> None:
        first, second = factory(), factory()
        for request, cluster, num_unfinished in sorted(asked, key=lambda question: question[1].now):
            admission = _ask(first, request, cluster, num_unfinished)
            _check_admission(admission)
            again = _ask(second, request, cluster, num_unfinished)
            if again != admission:
                raise LawBroken(f"law 8: asked the same, a fresh policy answered {again}, another one {admission}")

    @settings(max_examples=max_examples, deadline=None)
    @given(request=requests(), cluster=clusters())
    def an_idle_cluster_admits(request: Request, cluster: ClusterSample) -> None:
        admission = _ask(factory(), request, cluster, 0)
        num_tokens = request.num_prompt_tokens + request.max_tokens
        holds = [min(each.max_model_len, each.num_blocks * each.block_size) for each in cluster.instances]
        may_never_fit = bool(holds) and max(holds) < num_tokens
        if not admission.admitted and not (admission.status == 400 and may_never_fit):
            raise LawBroken(f"law 7: nothing is unfinished, and yet the request was refused: {admission.reason}")

    answers_are_sound_and_repeatable()
    an_idle_cluster_admits()


def _ask(policy: AdmissionPolicy, request: Request, cluster: ClusterSample, num_unfinished: int) -> Admission:
    try:
        return policy.admit(request, cluster, num_unfinished)
    except (FrozenInstanceError, AttributeError, TypeError) as error:
        raise LawBroken(f"the policy wrote to a view (law 13) or used what it does not offer: {error!r}") from error


def _check_admission(admission: Admission) -> None:
    if not admission.reason:
        raise LawBroken(f"law 11: an answer without a reason: {admission}")
    delay = admission.retry_after_seconds
    if not admission.admitted and (admission.not_before is not None or admission.instance_ids):
        raise LawBroken(f"refused, and told when or where to go: {admission}")
    if admission.admitted and delay is not None:
        raise LawBroken(f"admitted, and told to come back in {delay} s")
    if not admission.admitted and admission.status not in CLIENT_OR_SERVER_ERRORS:
        raise LawBroken(f"refused with status {admission.status}, which is not an error")
    if delay is not None and not delay > 0:
        raise LawBroken(f"told to come back in {delay} s")
