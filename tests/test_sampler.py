"""The sampler: what decides its draws, and the arguments' checks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from test_sampling import NONE, rows

from pyengine._native.sampling import Workspace
from pyengine.errors import ArgumentError, ArgumentTypeError
from pyengine.params import SamplingParams
from pyengine.sampling import Sampler


def draws(params: SamplingParams, n: int = 20, sample_index: int = 0) -> list[int]:
    sampler = Sampler(params, Workspace(600), NONE, sample_index)
    return [sampler.sample(rows(600)["normal"]).token_id for _ in range(n)]


def test_the_seed_decides() -> None:
    assert draws(SamplingParams(seed=5)) == draws(SamplingParams(seed=5))
    assert draws(SamplingParams(seed=5)) != draws(SamplingParams(seed=6))
    assert draws(SamplingParams(seed=5)) != draws(SamplingParams(seed=5), sample_index=1)
    assert draws(SamplingParams()) != draws(SamplingParams())
    assert len(set(draws(SamplingParams(seed=5)))) > 10


def test_temperature_0_is_the_largest_logit_after_penalties() -> None:
    row = rows(600)["normal"]
    order = np.argsort(-row)
    assert draws(SamplingParams(temperature=0)) == [order[0]] * 20
    best = int(order[0])
    assert draws(SamplingParams(temperature=0, logit_bias={best: -math.inf}), 1) == [order[1]]
    assert draws(SamplingParams(temperature=0, presence_penalty=100.0), 3) == order[:3].tolist()


def test_do_sample() -> None:
    best = draws(SamplingParams(temperature=0))
    assert draws(SamplingParams(do_sample=False, temperature=0.7, seed=5)) == best
    assert draws(SamplingParams(do_sample=True, seed=5)) == draws(SamplingParams(seed=5)) != best
    assert SamplingParams(num_beams=2, do_sample=True, temperature=0.7, top_k=3, top_p=0.9, min_p=0.1, seed=1).samples
    assert not SamplingParams(num_beams=2).samples and not SamplingParams(num_beams=2, do_sample=False).samples


def test_logprobs_are_of_the_models_own_distribution() -> None:
    row = rows(600)["normal"]
    exact = row - np.log(np.exp(row.astype(np.float64)).sum())
    params = SamplingParams(temperature=0.5, top_k=2, logit_bias={17: 50.0}, logprobs=3, seed=0)
    chosen = Sampler(params, Workspace(600), NONE).sample(row)
    best = np.argsort(-row)[:3]
    assert chosen.token_id == 17
    assert chosen.logprob == pytest.approx(exact[17], abs=1e-6)
    assert [token_id for token_id, _ in chosen.top] == best.tolist()
    assert [logprob for _, logprob in chosen.top] == pytest.approx(exact[best].tolist(), abs=1e-6)
    assert Sampler(SamplingParams(), Workspace(600), NONE).sample(row).top == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected 1 to .*, got 0"),
        ({"temperature": -0.5}, "temperature: expected at least 0, got -0.5"),
        ({"temperature": math.nan}, "temperature: .* got nan"),
        ({"temperature": math.inf}, "temperature: .* got inf"),
        ({"top_k": -1}, "top_k: .* got -1"),
        ({"top_p": 0.0}, "top_p: expected above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p: .* got 1.5"),
        ({"top_p": math.nan}, "top_p: .* got nan"),
        ({"min_p": 1.0}, "min_p: expected at least 0 and below 1, got 1.0"),
        ({"min_p": -0.1}, "min_p: .* got -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected above 0, got 0.0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty: .* got nan"),
        ({"presence_penalty": math.inf}, "presence_penalty: .* got inf"),
        ({"frequency_penalty": math.nan}, "frequency_penalty: .* got nan"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias: .* got -1"),
        ({"logit_bias": {1: math.nan}}, r"logit_bias\[1\]: .* got nan"),
        ({"logit_bias": {1: math.inf}}, r"logit_bias\[1\]: .* got inf"),
        ({"stop": ""}, "stop: expected strings of at least one character"),
        ({"stop": ["a", ""]}, "stop: expected strings of at least one character"),
        ({"stop_token_ids": [-1]}, "stop_token_ids: .* got -1"),
        ({"seed": -1}, "seed: expected 0 to .* got -1"),
        ({"seed": 2**64}, "seed: .* got 18446744073709551616"),
        ({"num_beams": 0}, "num_beams: .* got 0"),
        ({"length_penalty": math.nan}, "length_penalty: .* got nan"),
        ({"length_penalty": 11}, "length_penalty: .* got 11"),
        ({"early_stopping": "always"}, "early_stopping: expected True, False or 'never', got 'always'"),
        ({"num_return_sequences": 0}, "num_return_sequences: .* got 0"),
        ({"logprobs": -1}, "logprobs: .* got -1"),
        ({"num_beams": 4, "temperature": 0.7}, "temperature: .* num_beams=4, got 0.7"),
        ({"num_beams": 4, "top_k": 5}, "top_k: .* num_beams=4, got 5"),
        ({"num_beams": 4, "top_p": 0.5}, "top_p: .* num_beams=4, got 0.5"),
        ({"num_beams": 4, "min_p": 0.5}, "min_p: .* num_beams=4, got 0.5"),
        ({"num_beams": 4, "seed": 0}, "seed: .* num_beams=4, got 0"),
        ({"num_beams": 4, "stop": "x"}, "stop: .* num_beams=4, got 'x'"),
        ({"do_sample": True, "temperature": 0}, "temperature: expected above 0 with do_sample=True, got 0"),
        ({"do_sample": False, "num_beams": 4, "seed": 0}, "seed: expected None, unset or do_sample=True .*, got 0"),
        ({"num_beam_groups": 0}, "num_beam_groups: expected 1 to .*, got 0"),
        ({"num_beam_groups": 2}, "num_beam_groups: expected a divisor of num_beams=1, got 2"),
        ({"num_beams": 4, "num_beam_groups": 3}, "num_beam_groups: expected a divisor of num_beams=4, got 3"),
        ({"num_beams": 4, "num_beam_groups": 8}, "num_beam_groups: expected a divisor of num_beams=4, got 8"),
        ({"diversity_penalty": -1.0}, "diversity_penalty: expected at least 0, got -1.0"),
        ({"diversity_penalty": math.inf}, "diversity_penalty: .* got inf"),
        ({"num_beams": 4, "num_beam_groups": 2}, "diversity_penalty: expected above 0 with num_beam_groups=2, got 0.0"),
        (
            {"num_beams": 4, "diversity_penalty": 0.5},
            "diversity_penalty: expected 0 or unset with num_beam_groups=1, got 0.5",
        ),
        (
            {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "do_sample": True},
            "do_sample: expected False or unset with num_beam_groups=2, got True",
        ),
        (
            {"num_beams": 4, "num_return_sequences": 5},
            "num_return_sequences: expected at most 4 with num_beams=4, got 5",
        ),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{message}"):
        SamplingParams(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": True},
        {"max_new_tokens": 1.0},
        {"temperature": True},
        {"temperature": "1"},
        {"top_k": 1.5},
        {"top_k": None},
        {"seed": True},
        {"seed": 1.0},
        {"logit_bias": [1]},
        {"logit_bias": {"a": 1.0}},
        {"logit_bias": {True: 1.0}},
        {"logit_bias": {1: "a"}},
        {"stop": 3},
        {"stop": [3]},
        {"stop": b"x"},
        {"stop_token_ids": 3},
        {"stop_token_ids": "3"},
        {"stop_token_ids": [True]},
        {"num_beams": True},
        {"num_beam_groups": True},
        {"num_beam_groups": 2.0},
        {"diversity_penalty": "1"},
        {"do_sample": 1},
        {"do_sample": "no"},
        {"logprobs": True},
        {"ignore_eos": 1},
    ],
)
def test_arguments_of_a_wrong_type_are_refused_by_name(arguments: dict[str, Any]) -> None:
    with pytest.raises(ArgumentTypeError, match=f"^{next(iter(arguments))}"):
        SamplingParams(**arguments)


def test_numpy_numbers_are_numbers() -> None:
    params = SamplingParams(top_k=np.int64(5), temperature=np.float32(0.5), seed=np.uint64(3))  # type: ignore[arg-type]
    assert draws(params) == draws(SamplingParams(top_k=5, temperature=0.5, seed=3))


def test_arguments_are_checked_against_the_vocabulary() -> None:
    for arguments in ({"logit_bias": {600: 1.0}}, {"stop_token_ids": [600]}, {"logprobs": 601}):
        with pytest.raises(ArgumentError, match=rf"^{next(iter(arguments))}: expected .* 600 .*, got 60[01]"):
            SamplingParams(**arguments).check_vocab(600)  # type: ignore[arg-type]


def test_stop_ids() -> None:
    assert SamplingParams(stop_token_ids=[1, 2]).stop_ids([0]) == {0, 1, 2}
    assert SamplingParams(stop_token_ids=[1], ignore_eos=True).stop_ids([0]) == {1}
