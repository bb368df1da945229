"""Updates of the weights in the middle of backward (arXiv 2306.09782), so that gradients are never in memory together."""

import weakref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kdtune.training.clip import clip_grad_norm_

_NORMS = "norms_in_backward"


def step_in_backward(optimizer: Optimizer) -> None:
    """Make the optimizer update each of its parameters once its gradient of the whole backward is there, and drop the gradient.

    An optimizer skips what has no gradient, so its step in the hook of one parameter updates that one, and its step after backward
    updates nothing: a schedule, the saved state and the training loop stay as they are. With FSDP2, gradients are summed over the
    processes before.
    """
    norms: list[Tensor] = []
    setattr(optimizer, _NORMS, norms)

    # A parameter's hooks are not seen by the garbage collector: they must not hold what holds the parameter.
    reference = weakref.ref(optimizer)

    def update(parameter: Tensor) -> None:
        owner = reference()
        assert owner is not None, "the optimizer that updates in backward was dropped"
        norms.append(clip_grad_norm_([parameter], None))
        owner.step()
        parameter.grad = None

    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert isinstance(parameter, nn.Parameter)
            parameter.register_post_accumulate_grad_hook(update)


def is_in_backward(optimizer: Optimizer) -> bool:
    """Return whether `step_in_backward` was applied."""
    return hasattr(optimizer, _NORMS)


def pop_grad_norm(optimizer: Optimizer) -> Tensor:
    """Return the Euclidean norm of the gradients that were used since the last call, and forget them; 0 if there were none."""
    norms: list[Tensor] = getattr(optimizer, _NORMS)
    total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    norms.clear()
    return total
