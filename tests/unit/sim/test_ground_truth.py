"""How long an answer will be: the truth, cut off as a real engine cuts it off."""

import pytest

from rota.base.instant import Instant
from rota.serving.model.instance import InstanceLimits
from rota.serving.model.request import Request, RequestId
from rota.serving.sim.ground_truth import GroundTruth


def request(num_prompt_tokens, max_tokens):
    return Request(RequestId("r"), Instant(0), num_prompt_tokens, max_tokens)


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "truth", "expected"),
    [
        (10, 50, 7, 7),
        (10, 5, 7, 5),
        (10, 1000, 900, 54),
        (63, 1000, 900, 1),
    ],
)
def test_the_shortest_of_truth_wish_and_room(num_prompt_tokens, max_tokens, truth, expected):
    limits = InstanceLimits(num_blocks=16, block_size=4)
    table = GroundTruth()
    asked = request(num_prompt_tokens, max_tokens)
    table.add(asked, truth)
    assert table.num_output_tokens(asked, limits) == expected


def test_the_longest_sequence_of_the_model_counts_too():
    table = GroundTruth()
    table.add(request(10, 100), 100)
    assert table.num_output_tokens(request(10, 100), InstanceLimits(num_blocks=16, max_model_len=30)) == 20


def test_what_has_ended_is_forgotten():
    table = GroundTruth()
    table.add(request(10, 100), 100)
    table.forget(RequestId("r"))
    table.forget(RequestId("r"))
    with pytest.raises(KeyError):
        table.num_output_tokens(request(10, 100), InstanceLimits(num_blocks=16))
