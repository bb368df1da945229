"""Gradient norm and clipping, and the check that stops a run before a bad step."""

from collections.abc import Iterable

import torch

from kdtune.errors import TrainingError


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[torch.Tensor], max_norm: float | None) -> torch.Tensor:
    """Scale the gradients in place to a total norm of at most `max_norm` (None: leave them) and return the norm before.

    The norm is the Euclidean norm over all gradients, summed in float32 at least (torch's own rounds the norm of bf16
    gradients to bf16, 0.4 %), as a 0-d tensor on the gradients' device; 0 if there is none.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    norms = [torch.linalg.vector_norm(gradient, dtype=dtype).to(gradients[0].device) for gradient in gradients]
    total_norm = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm is not None:
        # Never above 1, and without a branch on the norm's value, which would wait for the device.
        scale = torch.clamp(max_norm / (total_norm + 1e-6), max=1.0)
        for gradient in gradients:
            gradient.mul_(scale.to(gradient.device))
    return total_norm


def check_finite(
    loss: torch.Tensor | float, grad_norm: torch.Tensor | float, step: int, position: tuple[int, int]
) -> None:
    """Pass if both are finite; call it before the optimizer step, so that no weight is touched by a bad gradient.

    `step` is the optimizer step about to be made, `position` the (epoch, batch) of its first micro-batch.

    Raises:
        TrainingError: naming the step and the batch.
    """
    values = {"loss": float(loss), "gradient norm": float(grad_norm)}
    bad = [f"{name} is {value}" for name, value in values.items() if value - value != 0.0]
    if bad:
        epoch, batch = position
        raise TrainingError(
            f"step {step} (epoch {epoch}, from batch {batch}): {' and '.join(bad)}; both must be finite, so the "
            "weights were left as they are. Lower optimizer.lr, lengthen the warm-up, set clip_grad_norm=1.0, use "
            "dtype=fp32 or look at these examples; then go on from the last checkpoint with resume_from_checkpoint=true"
        )
