"""The losses a user names: means of plain logits, and KDLoss, which takes hidden states and returns a sum.

Labels are already shifted (labels[b, t] is the target of position t) and IGNORE_INDEX where there is none.
Shapes: B batch, S sequence, N valid tokens, V vocabulary, D embedding.
"""

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from kdtune.constants import IGNORE_INDEX, TP_DIM
from kdtune.errors import ConfigError, DataError, TrainingError
from kdtune.losses.contract import Divergence, one_a_token, over_student_ids
from kdtune.losses.divergences import forward_kl
from kdtune.losses.fused_linear import Projection, Task, fused_linear_kd
from kdtune.losses.signal import Signal
from kdtune.losses.vocab_shards import VocabShards


class CrossEntropyLoss:
    """Cross entropy of plain logits with the labels: the mean over valid tokens in nats, 0 if there are none."""

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits [B, S, V] or [N, V]; labels of the same leading shape. The softmax is in fp32 or wider."""
        valid = _valid_tokens(labels, logits.shape, logits.shape[-1])
        return F.cross_entropy(_raised(logits[valid]), labels[valid], reduction="sum") / valid.sum().clamp(min=1)


class ForwardKLLoss:
    """KL(teacher || student) of plain logits: the mean over valid tokens in nats, 0 if there are none.

    See `kdtune.losses.forward_kl`. The teacher is a constant: no gradient reaches its logits.
    """

    divergence: Divergence = staticmethod(forward_kl)

    def __call__(self, logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Both logits [B, S, V] or [N, V]; their V may differ.

        The teacher's are cut to the student's ids before its softmax, and it gives no probability to ids that it lacks.
        """
        vocab_size, num_shared = logits.shape[-1], min(logits.shape[-1], teacher_logits.shape[-1])
        valid = _valid_tokens(labels, logits.shape, num_shared)
        _check_positions("teacher logits", teacher_logits.shape, labels)
        divergence = over_student_ids(self.divergence, vocab_size, num_shared)
        student_NV = _raised(logits[valid]).log_softmax(-1)
        teacher_NV = _raised(teacher_logits.detach()[valid][:, :num_shared]).log_softmax(-1)
        teacher_NV = F.pad(teacher_NV, (0, vocab_size - num_shared), value=-torch.inf)
        values_N = one_a_token(divergence(student_NV, teacher_NV), len(student_NV), divergence)
        return values_N.sum() / valid.sum().clamp(min=1)


class DivergenceLoss(Protocol):
    """A loss whose divergence KDLoss can use: `divergence(student_logp_NV, teacher_logp_NV) -> [N]`."""

    divergence: Divergence


def divergence_name(loss: DivergenceLoss) -> str:
    """Display name of the divergence: "KL" for the forward KL alone, else the class's name."""
    if loss.divergence is forward_kl:
        return "KL"
    name = getattr(loss, "__name__", type(loss).__name__)
    return name.removesuffix("Loss") or name


_FORWARD_KL = ForwardKLLoss()


class KDLoss:
    """Cross entropy and distillation from hidden states, summed over valid tokens: (1 - kd_ratio) * ce + kd_ratio * kd.

    Neither model's [B, S, V] logits ever exist (see `kdtune.losses.fused_linear`). Divide by the number of valid tokens
    of the whole optimizer step, over micro-batches and ranks, before backward.

    Args:
        kd_loss: gives the divergence, in its `divergence` attribute.
        kd_ratio: weight of the divergence, 0 to 1. At 0 the teacher is not computed and may be missing.
        chunk_size: tokens projected at a time; None: as many as fit a fixed number of bytes.
    """

    def __init__(
        self, kd_loss: DivergenceLoss = _FORWARD_KL, *, kd_ratio: float = 0.5, chunk_size: int | None = None
    ) -> None:
        if not 0.0 <= kd_ratio <= 1.0:
            raise ConfigError(
                f"kd_ratio is outside its range: {kd_ratio}; allowed is 0 (cross entropy only) to 1 (distillation only)"
            )
        if chunk_size is not None and chunk_size < 1:
            raise ConfigError(
                f"chunk_size is not a number of tokens: {chunk_size}; allowed is 1 or more; null chooses it by memory"
            )
        self.divergence = kd_loss.divergence
        self.kd_ratio = kd_ratio
        self.chunk_size = chunk_size
        self._over: dict[tuple[int, int], Divergence] = {}

    def __call__(
        self, hidden_BSD: Tensor, output: nn.Linear, signal: Signal | None, labels_BS: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts, detached sums over the same tokens: "class_loss" and, with a teacher, the others.

        These are "kd_loss", the divergence; "agreement", the number of tokens to which both models give the same most
        likely id; and, where the student's head has ids that the teacher's has not, "student_mass_outside", the
        probability that the student gives to them. Its softmax is over all of its ids, with a teacher as without one; see
        `kdtune.losses.covers_extra_ids` for what the divergence is taken over. Softmax and sums are in fp32 (float64 for
        float64 hidden states).
        """
        student = _projection("student", hidden_BSD, output)
        teacher = None
        if self.kd_ratio > 0:
            if signal is None:
                raise ConfigError(f"a teacher is missing: kd_ratio is {self.kd_ratio}; without a teacher it must be 0")
            _check_positions("teacher hidden states", signal.hidden_BSD.shape, labels_BS)
            with torch.no_grad():
                teacher = _projection("teacher", signal.hidden_BSD, signal.output)
            if teacher.shards and not student.shards:
                raise ConfigError(
                    "the teacher's head is cut by the vocabulary, the student's is not; allowed are both, or the student's "
                    "alone: give both models the same tp"
                )
        num_shared = min(head.vocab_size for head in (student, teacher) if head)
        valid_BS = _valid_tokens(labels_BS, hidden_BSD.shape, num_shared)
        task = Task(
            positions_N=valid_BS.flatten().nonzero().squeeze(1),
            labels_N=labels_BS[valid_BS],
            teacher=teacher,
            divergence=self._divergence_over(student.vocab_size, num_shared),
            kd_ratio=self.kd_ratio,
            chunk_size=self.chunk_size,
        )
        sums = fused_linear_kd(student, task)
        parts = {
            "class_loss": sums.ce,
            "kd_loss": sums.kd,
            "agreement": sums.agreement,
            "student_mass_outside": sums.outside,
        }
        return sums.total, {name: part for name, part in parts.items() if part is not None}

    def _divergence_over(self, vocab_size: int, num_shared: int) -> Divergence:
        """`over_student_ids`, found out once."""
        sizes = (vocab_size, num_shared)
        if sizes not in self._over:
            self._over[sizes] = over_student_ids(self.divergence, vocab_size, num_shared)
        return self._over[sizes]


def _raised(logits: Tensor) -> Tensor:
    """The logits in fp32, or as they are if they are wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _valid_tokens(labels: Tensor, shape: torch.Size, vocab_size: int) -> Tensor:
    """Where labels are not IGNORE_INDEX (bool, labels' shape), once they are known to fit the model's output."""
    _check_positions("student logits or hidden states", shape, labels)
    valid = labels != IGNORE_INDEX
    wrong = labels[valid & ((labels < 0) | (labels >= vocab_size))]
    if wrong.numel():
        raise DataError(
            f"a label is not an id of the vocabulary: {wrong[0].item()}; allowed are 0 to {vocab_size - 1}, which all "
            f"models of this loss have, and {IGNORE_INDEX} (ignored); use the tokenizer that belongs to the models"
        )
    return valid


def _check_positions(name: str, shape: torch.Size, labels: Tensor) -> None:
    if shape[:-1] != labels.shape:
        raise TrainingError(
            f"{name} do not belong to the labels: shape {tuple(shape)} for labels of {tuple(labels.shape)}; all but "
            "the last dimension must be the labels' shape; make both from the same batch"
        )


@runtime_checkable
class FactoredHead(Protocol):
    """An output head that is more than one weight, such as one with an adapter, but still one product of two matrices."""

    def projection(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """[T, K] and [V, K], whose product ``first @ second.T`` is what the head gives for the hidden states."""


def _projection(owner: str, hidden_BSD: Tensor, output: nn.Module) -> Projection:
    hidden_TD = hidden_BSD.flatten(0, 1)
    weight = getattr(output, "weight", None)
    mesh = weight.device_mesh if isinstance(weight, DTensor) else None
    if isinstance(output, FactoredHead):
        if mesh is not None:
            hidden_TD = DTensor.from_local(hidden_TD, mesh, [Replicate()], run_check=False)
        hidden_TD, weight_VD = output.projection(hidden_TD)
    else:
        weight_VD = _head_weight(owner, output)
    if mesh is None:
        return Projection(hidden_TD, weight_VD)
    if mesh.mesh_dim_names != (TP_DIM,):
        raise ConfigError(
            f"the {owner}'s output head cannot be fused with the loss: it is in shards over {mesh.mesh_dim_names}; allowed is "
            f"({TP_DIM!r},), and a head that FSDP has made whole: call the model's forward first"
        )
    shards = VocabShards(mesh.get_group(), len(weight_VD))
    hidden_TD, weight_VD = (one.to_local() if isinstance(one, DTensor) else one for one in (hidden_TD, weight_VD))
    return Projection(hidden_TD, weight_VD, shards)


def check_head(owner: str, output: nn.Module) -> None:
    """Raise, before the first batch, if the head cannot be fused with the loss.

    Args:
        owner: whose head it is, for the message, such as "student".
        output: the head.

    Raises:
        ConfigError: it is not a plain weight [V, D], nor a product of two, such as a quantized head or one with a bias.
    """
    if not isinstance(output, FactoredHead):
        _head_weight(owner, output)


def _head_weight(owner: str, output: nn.Module) -> Tensor:
    """The head's weight [V, D], if its product with the hidden states is all that the head does."""
    plain = isinstance(output, nn.Linear) and type(output).forward is nn.Linear.forward
    if not plain:
        found = f"a {type(output).__name__}"
    elif output.bias is not None:
        found = f"a {type(output).__name__} with a bias"
    elif not isinstance(output.weight, DTensor) and type(output.weight) not in (Tensor, nn.Parameter):
        found = f"a {type(output).__name__} whose weight is a {type(output.weight).__name__}"
    else:
        return output.weight
    raise ConfigError(
        f"the {owner}'s output head cannot be fused with the loss: it is {found}; allowed is a torch.nn.Linear without "
        "bias whose weight is a plain matrix; leave the head out of quantization and sharding"
    )
