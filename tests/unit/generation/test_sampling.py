"""The filters before a draw against brute force, one token at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdtune.errors import CheckpointError
from kdtune.generation import Sampling, sample_token, sample_tokens


def brute_force(logits, temperature, top_k, top_p) -> dict[int, float]:
    """The ids that may be drawn, with their probabilities, by Python floats and sorting."""
    weights = [torch.tensor(logit / temperature, dtype=torch.float64).exp().item() for logit in logits]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])[:top_k]
    total = sum(weights[i] for i in order)
    kept, held = [], 0.0
    for i in order:
        kept.append(i)
        held += weights[i] / total
        if top_p is not None and held >= top_p:
            break
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept}


def draws(logits, number=4000, **settings) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return [sample_token(torch.tensor(logits), Sampling(**settings), generator) for _ in range(number)]


LOGITS = [2.0, 0.1, -1.0, 1.0, 1.7, -3.0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, 0.5), (None, 0.9), (3, None), (4, 0.7), (None, 1.0), (100, None)])
def test_draws_have_the_filtered_softmax(temperature, top_k, top_p):
    expected = brute_force(LOGITS, temperature, top_k, top_p)
    found = torch.bincount(torch.tensor(draws(LOGITS, temperature=temperature, top_k=top_k, top_p=top_p)), minlength=6)
    for i in range(6):
        # Four standard deviations of a binomial share with 4000 draws are at most 0.032.
        assert found[i].item() / 4000 == pytest.approx(expected.get(i, 0.0), abs=0.032)
        assert i in expected or found[i] == 0


@given(
    st.lists(st.integers(-40, 40), min_size=2, max_size=12, unique=True),
    st.one_of(st.none(), st.integers(1, 12)),
    st.floats(0.01, 0.99),
)
def test_nothing_outside_the_nucleus_is_drawn(tenths, top_k, top_p):
    logits = [tenth / 10 for tenth in tenths]
    allowed = brute_force(logits, 1.0, top_k, top_p)
    # A share that a token's sum meets to the last digit may fall on either side in fp32.
    wider = brute_force(logits, 1.0, top_k, min(top_p + 1e-5, 1.0))
    assert set(draws(logits, 60, temperature=1.0, top_k=top_k, top_p=top_p)) <= set(allowed) | set(wider)


def test_the_most_likely_token_always_stays():
    assert set(draws(LOGITS, 200, temperature=1.0, top_p=1e-6)) == {0}


def test_each_sequence_draws_with_its_own_generator():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    for settings in ({"temperature": 1.0}, {"temperature": 1.0, "top_k": 9, "top_p": 0.8}, {"temperature": 0.0}):
        together = sample_tokens(logits, Sampling(**settings), [torch.Generator().manual_seed(i) for i in range(3)])
        alone = [
            sample_token(row, Sampling(**settings), torch.Generator().manual_seed(i)) for i, row in enumerate(logits)
        ]
        assert together == alone


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_not_numbers_are_told(bad, temperature):
    logits_BV = torch.tensor([LOGITS, LOGITS])
    logits_BV[1, 2] = bad
    generators = [torch.Generator(), torch.Generator()]
    with pytest.raises(CheckpointError, match=f"logits are not numbers .found {bad}.: its weights hold NaN"):
        sample_tokens(logits_BV, Sampling(temperature), generators)
    with pytest.raises(CheckpointError, match="logits are not numbers"):
        sample_token(logits_BV[1], Sampling(temperature, top_k=3), generators[1])


@pytest.mark.parametrize(
    "settings", [{"temperature": 1e-40}, {"temperature": 5e-324}, {"temperature": 1.0, "top_p": 1e-300}]
)
def test_in_the_limit_the_most_likely_is_taken(settings):
    assert set(draws(LOGITS, 20, **settings)) == {0}
    assert set(draws([1e38, -1e38, 0.0], 20, **settings)) == {0}


def test_a_ban_is_no_fault():
    """Minus infinity is a logit: of a token that is not to come."""
    assert set(draws([float("-inf"), 1.0, float("-inf")], 20, temperature=1.0)) == {1}


def test_a_draw_of_a_whole_vocabulary_is_where_the_sums_of_probabilities_reach_it():
    """The first id up to which the probabilities, summed one by one in fp64, are more than the drawn number."""
    logits = 3 * torch.randn(300, 1000, generator=torch.Generator().manual_seed(1))
    logits[:, 100:600] = -torch.inf  # whole blocks without a probability
    generators = [torch.Generator().manual_seed(seed) for seed in range(300)]
    found = sample_tokens(logits, Sampling(1.0), generators)
    uniforms = torch.stack(
        [torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(300)]
    )
    sums = logits.double().softmax(-1).cumsum(-1)
    expected = (sums <= uniforms[:, None]).sum(-1).tolist()
    near = (sums - uniforms[:, None]).abs().amin(-1) < 1e-6  # either side is as right
    assert all(one == other or is_near for one, other, is_near in zip(found, expected, near.tolist(), strict=True))
    assert near.sum() < 5 and len(set(found)) > 100
    assert all(logits[row, token] > -torch.inf for row, token in enumerate(found))
