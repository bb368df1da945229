"""The loss on heads that are cut by the vocabulary, against plain logits in float64, differentiated by autograd."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from kdtune.constants import IGNORE_INDEX, TP_DIM
from kdtune.distributed import Parallelism, full_tensor
from kdtune.errors import ConfigError
from kdtune.losses import HiddenSignal, KDLoss
from kdtune.models import OutputHead


def head_of(weight_VD: Tensor, softcap: float | None = None) -> OutputHead:
    head = OutputHead(weight_VD.shape[1], len(weight_VD), softcap=softcap, device="meta")
    head.weight = nn.Parameter(weight_VD)
    return head


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def compare(
    vocab_size: int, teacher_vocab_size: int, num_valid: int, softcap: float | None, teacher_is_cut: bool
) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    hidden, answer = torch.randn(2, 9, 6, requires_grad=True), torch.randn(2, 9, 8)
    ours, theirs = torch.randn(vocab_size, 6, requires_grad=True), torch.randn(teacher_vocab_size, 8)
    shared = min(vocab_size, teacher_vocab_size)
    labels = torch.full((18,), IGNORE_INDEX)
    labels[torch.randperm(18)[:num_valid]] = torch.randint(shared, (num_valid,))
    labels = labels.view(2, 9)

    valid = labels != IGNORE_INDEX
    logits = capped(hidden @ ours.T, softcap)[valid]
    logits_of_teacher = capped(answer @ theirs.T, softcap)[valid][:, :shared]
    logq, logp = logits.log_softmax(-1), logits_of_teacher.log_softmax(-1)
    ce, kd = -logq.gather(1, labels[valid][:, None]).sum(), (logp.exp() * (logp - logq[:, :shared])).sum()
    expected = 0.7 * ce + 0.3 * kd
    gradients = torch.autograd.grad(expected, (hidden, ours))

    with Parallelism(dp_shard=1, tp=-1).start_world(torch.device("cpu")) as world:
        mesh = init_device_mesh("cpu", (world.size,), mesh_dim_names=(TP_DIM,))

        def cut(weight: Tensor) -> Tensor:
            return distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)

        head, teacher_head = head_of(cut(ours), softcap), head_of(cut(theirs) if teacher_is_cut else theirs, softcap)
        inputs = hidden.detach().requires_grad_()
        kd_loss = KDLoss(kd_ratio=0.3, chunk_size=5)
        loss, parts = kd_loss(inputs, head, HiddenSignal(answer, teacher_head), labels)
        loss.backward()
        found = (loss, parts["class_loss"], parts["kd_loss"], inputs.grad, full_tensor(head.weight.grad))
        for one, other in zip(found, (expected, ce, kd, *gradients), strict=True):
            torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-12, atol=1e-12)
        assert parts["agreement"].item() == (logits.argmax(-1) == logits_of_teacher.argmax(-1)).sum()
        outside = {"student_mass_outside": logq[:, shared:].exp().sum().item()} if shared < vocab_size else {}
        assert {name: parts[name].item() for name in parts if "outside" in name} == pytest.approx(outside, rel=1e-12)
        if teacher_is_cut:
            with pytest.raises(ConfigError, match="give both models the same tp"):
                kd_loss(hidden, head_of(ours), HiddenSignal(answer, teacher_head), labels)


@pytest.mark.parametrize("teacher_is_cut", [True, False])
@pytest.mark.parametrize(
    ("vocab_size", "teacher_vocab_size", "num_valid", "softcap"),
    [(40, 40, 18, None), (42, 37, 13, 2.0), (18, 44, 1, None), (40, 22, 7, None), (40, 40, 0, 2.0)],
)
def test_against_plain_logits(
    vocab_size: int, teacher_vocab_size: int, num_valid: int, softcap: float | None, teacher_is_cut: bool, launch
) -> None:
    """Of other sizes than the processes divide, chunks of fewer tokens than processes, and processes with no id that counts."""
    launch.call(compare, vocab_size, teacher_vocab_size, num_valid, softcap, teacher_is_cut, ranks=4)
