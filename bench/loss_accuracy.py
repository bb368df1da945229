"""Relative error of the gradient that reaches bf16 hidden states, beside float64 on the same bf16 numbers.

    python bench/loss_accuracy.py --teacher models/SmolLM2-135M-Instruct       # real hidden states
    python bench/loss_accuracy.py                                              # random ones, at Llama 3 sizes

The student is 12 of the teacher's 30 layers. Ways to compute the same loss: kdtune's fused one; logits in bf16 and the softmax in fp32
(`plain`); the softmax in bf16 too (`plain bf16`); Liger's chunked JSD, where liger-kernel is installed (beta 0 and 1 are its two KLs).
The error is the norm of the difference over the norm of the exact gradient.

Expected before measuring: a gradient in bf16 is rounded by 2^-9 of each entry, 0.17 % in the norm, and the fused loss has
hardly more; rounding the logits adds 2^-9 of a logit of 20, or 4 % of a probability, so that the others have some percent where the
models nearly agree.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from kdtune import losses
from kdtune.checkpoint import load_model
from kdtune.pruning.prune import keep_layers

STUDENT_LAYERS = [*range(6), *range(24, 30)]
DIVERGENCES: dict[str, tuple[Callable[..., Tensor], float]] = {  # and Liger's beta
    "forward KL": (losses.ForwardKL(), 0.0),
    "JSD 0.1": (losses.JensenShannon(0.1), 0.1),
    "JSD 0.5": (losses.JensenShannon(0.5), 0.5),
    "reverse KL": (losses.ReverseKL(), 1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Error of the gradient of bf16 hidden states.")
    parser.add_argument("--teacher", type=Path, help="folder of SmolLM2-135M-Instruct; default: random hidden states")
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    student, weight, teacher, teacher_weight = (
        real_inputs(args.teacher, args.tokens) if args.teacher else random_inputs(args.tokens)
    )
    labels = torch.randint(len(weight), (len(student),), generator=torch.Generator().manual_seed(1))
    ways = {"fused": fused, "plain": plain, "plain bf16": plain_bf16}
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # noqa: F401
    except ImportError:
        print("liger-kernel is not installed")
    else:
        ways["liger"] = liger
    print(
        f"{len(student)} tokens, hidden {student.shape[1]}/{teacher.shape[1]}, vocabulary {len(weight):,}, torch {torch.__version__}"
    )
    print(f"{'divergence':>12} " + " ".join(f"{name:>11}" for name in ways))
    for name, (divergence, beta) in DIVERGENCES.items():
        exact = gradient(lambda h, d=divergence: exact_loss(d, h, weight, teacher, teacher_weight), student.double())
        found = []
        for way in ways.values():
            got = gradient(
                lambda h, w=way, d=divergence, b=beta: w(d, b, h, weight, teacher, teacher_weight, labels), student
            )
            # The scale is not at issue: Liger's loss is a mean.
            got = got.double() * (len(student) if way is liger else 1)
            found.append(float((got - exact).norm() / exact.norm()))
        print(f"{name:>12} " + " ".join(f"{100 * error:>9.2f} %" for error in found), flush=True)


def gradient(loss: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    hidden = hidden.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(hidden), hidden)
    return found


def exact_loss(
    divergence: Callable[..., Tensor], hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor
) -> Tensor:
    logp = (teacher.double() @ teacher_weight.double().T).log_softmax(-1)
    return divergence((hidden @ weight.double().T).log_softmax(-1), logp).sum()


def fused(
    divergence: Callable[..., Tensor], _: float, h: Tensor, w: Tensor, th: Tensor, tw: Tensor, labels: Tensor
) -> Tensor:
    signal = losses.HiddenSignal(th[None], linear(tw))
    return losses.KDLoss(divergence, kd_ratio=1.0)(h[None], linear(w), signal, labels[None])[0]


def plain(
    divergence: Callable[..., Tensor], _: float, h: Tensor, w: Tensor, th: Tensor, tw: Tensor, labels: Tensor
) -> Tensor:
    return divergence((h @ w.T).float().log_softmax(-1), (th @ tw.T).float().log_softmax(-1)).sum()


def plain_bf16(
    divergence: Callable[..., Tensor], _: float, h: Tensor, w: Tensor, th: Tensor, tw: Tensor, labels: Tensor
) -> Tensor:
    return divergence((h @ w.T).log_softmax(-1), (th @ tw.T).log_softmax(-1)).sum()


def liger(
    divergence: Callable[..., Tensor], beta: float, h: Tensor, w: Tensor, th: Tensor, tw: Tensor, labels: Tensor
) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)
    return loss(h, w, th, tw, labels)


def linear(weight: Tensor) -> nn.Linear:
    module = nn.Linear(*weight.T.shape, bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def random_inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states of a random student and teacher of Llama 3.2 1B's and 3.1 8B's sizes."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    student, teacher = draw(tokens, 2048), draw(tokens, 4096)
    return (
        student.bfloat16(),
        (0.05 * draw(128256, 2048)).bfloat16(),
        teacher.bfloat16(),
        (0.05 * draw(128256, 4096)).bfloat16(),
    )


@torch.no_grad()
def real_inputs(folder: Path, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states of SmolLM2 and of 12 of its layers, on a text that it wrote."""
    teacher = load_model(folder, dtype=torch.float32)
    generator, ids = torch.Generator().manual_seed(0), torch.ones(1, 1, dtype=torch.int64)
    while ids.shape[1] <= tokens:
        ids = torch.cat([ids, teacher(ids)[:, -1].softmax(-1).multinomial(1, generator=generator)], dim=1)
    teacher.bfloat16()
    student, theirs = (
        model(ids[:, :-1], return_hidden=True)[0] for model in (keep_layers(teacher, STUDENT_LAYERS), teacher)
    )
    return student, teacher.output.weight, theirs, teacher.output.weight


if __name__ == "__main__":
    main()
