"""Costs of a micro-batch on one rank, measured on the meta device: activations, the loss, floating-point operations."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy

from kdtune.data.micro_batches import is_padding_free
from kdtune.losses import Divergence, HiddenSignal, HiddenStateLoss, Signal
from kdtune.losses.contract import over_student_ids
from kdtune.losses.fused_linear import Task, chunk_tokens, fused_linear_kd
from kdtune.losses.heads import Projection, project
from kdtune.losses.products import sum_dtype
from kdtune.models import Documents, Transformer
from kdtune.parallel.activations import SMALLEST_BYTES, is_offloaded, keeps_products
from kdtune.planner.meta_device import Cost, FakeDevice, measure

DEFAULT_SEQ_LEN = 2048


@dataclass(frozen=True)
class MicroBatch:
    """Examples of equal length, all of whose tokens are valid: the most expensive micro-batch."""

    batch_size: int
    seq_len: int
    device_type: str
    is_padded: bool = True
    """False: the examples are end to end in one row."""

    @property
    def num_tokens(self) -> int:
        """Number of its tokens."""
        return self.batch_size * self.seq_len


def hidden_bytes(pieces: Transformer, batch: MicroBatch) -> int:
    """Return the bytes of one hidden state [B, S, D]."""
    return batch.num_tokens * pieces.config.embed_dim * pieces.dtype.itemsize


def fixed_bytes(pieces: Transformer, batch: MicroBatch) -> int:
    """Return the bytes allocated throughout a forward: the embedded tokens, the rotary tables, the micro-batch itself."""
    tokens_and_labels = 2 * batch.num_tokens * torch.int64.itemsize
    tables = _rope(pieces, batch.seq_len if batch.is_padded else batch.num_tokens)
    return hidden_bytes(pieces, batch) + sum(table.nbytes for table in tables) + tokens_and_labels


def longest_batch(cfg: Any, context: int, device_type: str, seq_len: int | None) -> tuple[MicroBatch, str]:
    """Return the micro-batch of a recipe's config with the longest possible examples, and the source of their length.

    With `tokens_per_micro_batch` it is as large as that allows, of examples that are alike.

    Args:
        cfg: config of a recipe that trains.
        context: context length of the trained model, in tokens.
        device_type: type of the compute device.
        seq_len: another length, in tokens; None: the config's.
    """
    longest = cfg.tokenizer.get("max_seq_len")
    length, source = min(context, DEFAULT_SEQ_LEN), "assumed: tokenizer.max_seq_len is not set; --seq-len gives another"
    if seq_len is not None:
        length, source = seq_len, "as asked for"
    elif longest is not None:
        length, source = longest, "tokenizer.max_seq_len, the longest there can be"
    rows = cfg.batch_size
    if cfg.tokens_per_micro_batch is not None:
        num_tokens = max(length, min(cfg.tokens_per_micro_batch, length * rows * cfg.gradient_accumulation_steps))
        rows = -(-num_tokens // length)
        if num_tokens < rows * length:
            length, source = num_tokens // rows, "as many tokens as tokens_per_micro_batch allows"
    return MicroBatch(rows, length, device_type, is_padded=not is_padding_free(cfg)), source


def micro_batches(cfg: Any, batch: MicroBatch) -> int:
    """Return the micro-batches of a step on one process, if they are all as `longest_batch` says for this config."""
    return -(-cfg.batch_size * cfg.gradient_accumulation_steps // batch.batch_size)


def layer_cost(pieces: Transformer, batch: MicroBatch, *, backward: bool) -> Cost:
    """Return the cost of a layer; see `Cost`."""
    layer, (hidden_BSD, rope, documents) = pieces.layers[0], _layer_inputs(pieces, batch, backward=backward)
    held: list[Tensor] = [hidden_BSD, *rope, *layer.parameters()]
    return measure(lambda: layer(hidden_BSD, rope, documents), held, batch.device_type, backward=backward)


def _layer_inputs(
    pieces: Transformer, batch: MicroBatch, *, backward: bool
) -> tuple[Tensor, tuple[Tensor, ...], Documents | None]:
    hidden_BSD = _hidden(pieces, batch, backward=backward)
    # On a GPU, attention of documents is one call, as that of padded rows is.
    if batch.is_padded or batch.device_type == "cuda":
        return hidden_BSD, _rope(pieces, batch.seq_len), None
    documents = Documents.of_lengths([batch.seq_len] * batch.batch_size)
    return (
        hidden_BSD.flatten(0, 1)[None].detach().requires_grad_(backward),
        _rope(pieces, batch.num_tokens),
        documents,
    )


def saved_products(pieces: Transformer, batch: MicroBatch) -> int:
    """Return the bytes of what selective checkpointing keeps of a layer besides its input: outputs of products and attention."""
    inputs = _layer_inputs(pieces, batch, backward=True)
    with FakeDevice(batch.device_type), _ProductOutputs() as found:
        pieces.layers[0](*inputs)
    return found.total


class _ProductOutputs(TorchDispatchMode):
    """Add up the bytes of outputs that selective checkpointing keeps."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if keeps_products(None, func) == CheckpointPolicy.MUST_SAVE:
            self.total += sum(one.nbytes for one in tree_leaves(result) if isinstance(one, Tensor))
        return result


def offloaded_bytes(pieces: Transformer, batch: MicroBatch) -> int:
    """Return the bytes of a layer's saved tensors that activation offloading moves to the CPU, shared ones once."""
    inputs = _layer_inputs(pieces, batch, backward=True)
    moved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if is_offloaded(tensor, SMALLEST_BYTES):
            storage = tensor.untyped_storage()
            moved[storage._cdata] = storage.nbytes()
        return tensor

    with FakeDevice(batch.device_type), saved_tensors_hooks(pack, lambda tensor: tensor):
        output = pieces.layers[0](*inputs)  # what autograd saves is freed with it
    del output
    return sum(moved.values())


def norm_kept(pieces: Transformer, batch: MicroBatch) -> int:
    """Return the bytes that the final norm saves for backward, and the hidden states it outputs."""
    hidden_BSD = _hidden(pieces, batch, backward=True)
    held: list[Tensor] = [hidden_BSD, *pieces.norm.parameters()]
    return measure(lambda: pieces.norm(hidden_BSD), held, batch.device_type, backward=True).kept


def loss_cost(
    student: Transformer,
    teacher: Transformer | Signal | None,
    batch: MicroBatch,
    *,
    divergence: Divergence,
    kd_ratio: float,
    chunk_size: int | None,
    logits_dtype: torch.dtype | None = None,
) -> tuple[Cost, int]:
    """Return the cost of the loss from hidden states, see `Cost`, and the bytes of a chunk's logits, which a CPU keeps.

    The head's products are counted for every token. `teacher`: its model, or the signal that is read from a file.
    """
    hidden_TD = _hidden(student, batch, backward=True).flatten(0, 1).detach().requires_grad_()
    with torch.no_grad():
        ours, theirs = _projection(student, hidden_TD), _teacher_input(teacher, batch)
    vocab_size = len(ours.weight_VD)
    num_shared = vocab_size if theirs is None else min(vocab_size, theirs.vocab_size)
    # A chunk is alike the next.
    dtype = logits_dtype or sum_dtype(hidden_TD)
    rows = min(chunk_tokens(vocab_size, dtype, chunk_size), batch.num_tokens)
    positions = torch.empty(rows, dtype=torch.int64, device="meta")
    task = Task(
        positions,
        positions,
        theirs,
        over_student_ids(divergence, vocab_size, num_shared),
        kd_ratio,
        chunk_size,
        logits_dtype=logits_dtype,
    )
    theirs_held = [] if theirs is None else [one for one in vars(theirs).values() if isinstance(one, Tensor)]
    held = [hidden_TD, positions, *student.output.parameters(), *theirs_held]
    cost = measure(
        lambda: fused_linear_kd(_projection(student, hidden_TD), task).total, held, batch.device_type, backward=True
    )
    flops = _head_flops(student, ours, vocab_size, kd_ratio)
    if isinstance(theirs, Projection):
        flops += 2 * num_shared * theirs.weight_VD.shape[1]
    chunk_bytes = rows * vocab_size * dtype.itemsize * (2 if isinstance(theirs, Projection) else 1)
    return replace(cost, forward_flops=flops * batch.num_tokens, backward_flops=0), chunk_bytes


def hidden_loss_cost(
    hidden_loss: HiddenStateLoss, student: Transformer, num_layers: int, teacher: Transformer, batch: MicroBatch
) -> tuple[Cost, int]:
    """Return the cost of a term on hidden states, see `Cost`, and the bytes of its learned maps; num_layers: the student's."""
    widths = (student.config.embed_dim, teacher.config.embed_dim)
    hidden_loss.attach(num_layers, widths, dtype=torch.promote_types(student.dtype, torch.float32), device="meta")
    own, theirs = (
        [_hidden(model, batch, backward=model is student) for _ in hidden_loss.fractions]
        for model in (student, teacher)
    )
    positions, maps = torch.empty(batch.num_tokens, dtype=torch.int64, device="meta"), list(hidden_loss.parameters())
    held = [*own, *theirs, positions, *maps]
    cost = measure(lambda: hidden_loss(own, theirs, positions), held, batch.device_type, backward=True)
    return cost, sum(one.nbytes for one in maps)


def _head_flops(student: Transformer, head: Projection, vocab_size: int, kd_ratio: float) -> int:
    """Return the operations per token of the student's head: logits, and gradients of the hidden state and a trained weight."""
    is_trained = any(parameter.requires_grad for parameter in student.output.parameters())
    return (6 if is_trained else 4) * vocab_size * head.weight_VD.shape[1]


def _projection(model: Transformer, hidden_TD: Tensor) -> Projection:
    return Projection(*model.output.projection(hidden_TD), softcap=model.output.softcap)


def _teacher_input(teacher: Transformer | Signal | None, batch: MicroBatch) -> Projection | Signal | None:
    """Return what the loss reads of a teacher."""
    if isinstance(teacher, HiddenSignal):
        return project("teacher", teacher.hidden_BSD, teacher.output)
    if isinstance(teacher, Transformer):
        return _projection(teacher, _hidden(teacher, batch, backward=False).flatten(0, 1))
    return teacher


def _rope(pieces: Transformer, num_positions: int) -> tuple[Tensor, ...]:
    return pieces.rope(torch.empty(num_positions, dtype=torch.int64, device="meta"), pieces.dtype)


def _hidden(pieces: Transformer, batch: MicroBatch, *, backward: bool) -> Tensor:
    shape = (batch.batch_size, batch.seq_len, pieces.config.embed_dim)
    return torch.empty(shape, dtype=pieces.dtype, device="meta", requires_grad=backward)
