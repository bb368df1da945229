"""The losses of other tools as `loss.py` calls them, each in an environment of its own, where nothing of kdtune is imported.

Each takes both heads' weights and gives a function of hidden states, the teacher's hidden states and labels that computes loss
and gradients. As their users run them, with their own sizes of chunks.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[[Tensor, Tensor, Tensor], None]

# The weight of the mixture that TRL and Liger call beta; at its ends they take the two KLs.
BETA = {"ForwardKL": 0.0, "ReverseKL": 1.0, "JensenShannon": 0.5}


def torchtune(weight: Tensor, teacher_weight: Tensor, trainable: bool, _: int | None, divergence: str) -> Call:
    """Torchtune 0.6.1's losses as its recipe calls them: eight chunks of logits; cross entropy and forward KL, half and half."""
    from torchtune.modules.loss import CEWithChunkedOutputLoss, ForwardKLWithChunkedOutputLoss

    cross_entropy, kl = CEWithChunkedOutputLoss(), ForwardKLWithChunkedOutputLoss()
    _known(divergence, {"ForwardKL": 0.0})
    weight.requires_grad_(trainable)

    def call(hidden: Tensor, teacher_hidden: Tensor, labels: Tensor) -> None:
        logits = [F.linear(chunk, weight) for chunk in hidden.tensor_split(8, dim=1)]
        with torch.no_grad():
            teacher_logits = [F.linear(chunk, teacher_weight) for chunk in teacher_hidden.tensor_split(8, dim=1)]
        (0.5 * cross_entropy(logits, labels) + 0.5 * kl(logits, teacher_logits, labels)).backward()
        weight.grad = None

    return call


def trl(weight: Tensor, teacher_weight: Tensor, trainable: bool, _: int | None, divergence: str) -> Call:
    """TRL's chunked divergence. It has no cross entropy."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    beta = _known(divergence, BETA)
    weight.requires_grad_(trainable)

    def call(hidden: Tensor, teacher_hidden: Tensor, labels: Tensor) -> None:
        student, teacher = hidden.flatten(0, 1), teacher_hidden.flatten(0, 1)
        values, _ = ChunkedDivergenceFunction.apply(student, weight, None, teacher, teacher_weight, None, beta)
        values.mean().backward()
        weight.grad = None

    return call


def liger(weight: Tensor, teacher_weight: Tensor, trainable: bool, chunk_size: int | None, divergence: str) -> Call:
    """Liger's chunked loss in torch, compiled, as its default is; its Triton kernels need a GPU."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss_fn = LigerFusedLinearJSDLoss(beta=_known(divergence, BETA), chunk_size=chunk_size or 1024)
    weight.requires_grad_(trainable)

    def call(hidden: Tensor, teacher_hidden: Tensor, labels: Tensor) -> None:
        student, teacher = hidden.flatten(0, 1), teacher_hidden.flatten(0, 1)
        loss_fn(student, weight, teacher, teacher_weight, labels.flatten()).backward()
        weight.grad = None

    return call


def _known(divergence: str, allowed: dict[str, float]) -> float:
    if divergence not in allowed:
        raise SystemExit(f"divergence {divergence}: this tool has {', '.join(allowed)}")
    return allowed[divergence]


CALLS = {"torchtune": torchtune, "trl": trl, "liger": liger}
