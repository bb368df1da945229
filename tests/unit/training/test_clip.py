import math

import pytest
import torch

from kdtune.errors import TrainingError
from kdtune.training import check_finite, clip_grad_norm_


def parameters_with_gradients(dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape in [(5, 7), (7,), (3, 2, 4)]:
        parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        parameter.grad = (torch.randn(shape, generator=generator) * scale).to(dtype)
        parameters.append(parameter)
    return [*parameters, torch.nn.Parameter(torch.zeros(2, dtype=dtype))]  # the last one has no gradient


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e6])
def test_as_torch_clips(max_norm):
    ours, theirs = parameters_with_gradients(), parameters_with_gradients()
    norm = clip_grad_norm_(ours, max_norm)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_none_measures_and_leaves_the_gradients():
    ours, before = parameters_with_gradients(), parameters_with_gradients()
    squares = sum(float((p.grad.double() ** 2).sum()) for p in before if p.grad is not None)
    assert float(clip_grad_norm_(ours, None)) == pytest.approx(math.sqrt(squares), rel=1e-6)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours[:-1], before[:-1], strict=True))


def test_a_bf16_norm_is_not_rounded_to_bf16():
    ours = parameters_with_gradients(torch.bfloat16)
    exact = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in ours if p.grad is not None))
    norm = clip_grad_norm_(ours, None)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(exact, rel=1e-6)
    assert float(torch.tensor(exact).bfloat16()) != pytest.approx(exact, rel=1e-6)  # the witness can tell


def test_float64_stays_float64_and_no_gradient_is_zero():
    assert clip_grad_norm_(parameters_with_gradients(torch.float64), 1.0).dtype == torch.float64
    assert float(clip_grad_norm_([torch.nn.Parameter(torch.zeros(2))], 1.0)) == 0.0


def test_finite_passes():
    check_finite(torch.tensor(3.0), torch.tensor(0.0), step=1, position=(0, 0))
    check_finite(1e300, 2.0, step=1, position=(0, 0))


@pytest.mark.parametrize(
    ("loss", "norm", "named"),
    [
        (math.nan, 1.0, "loss is nan; both"),
        (1.0, math.inf, "gradient norm is inf; both"),
        (-math.inf, math.nan, "loss is -inf and gradient norm is nan"),
    ],
)
def test_non_finite_names_step_and_batch(loss, norm, named):
    with pytest.raises(TrainingError, match=named) as caught:
        check_finite(torch.tensor(loss), torch.tensor(norm), step=17, position=(2, 40))
    assert "step 17 (epoch 2, from batch 40)" in str(caught.value)
    assert "resume_from_checkpoint=true" in str(caught.value)


def test_the_norm_of_a_large_gradient_is_right():
    """Of an embedding's gradient: 8 million numbers of very different sizes, against float64."""
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(16384, 512))
    parameter.grad = torch.randn(16384, 512, generator=generator) * torch.rand(16384, 512, generator=generator) ** 8
    expected = parameter.grad.double().square().sum().sqrt().item()
    assert clip_grad_norm_([parameter], None).item() == pytest.approx(expected, rel=1e-6)
