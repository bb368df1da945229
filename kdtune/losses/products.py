"""Matrix products of the fused loss: logits, and the gradients of hidden states and head.

The result has the precision of the sums, fp32 or float64. Four ways to get it there, by device and dtype (`form_of`):

    raised       operands in the dtype of the sums; a bf16 head is raised tile by tile
    accumulated  bf16 operands, fp32 result: `torch.mm(out_dtype=)`, CUDA only
    two products bf16 operands on a CPU with bf16 units. z = a @ b is a sum in fp32 that is rounded to bf16 at the end; z's rounding
                 error is another such product, addmm(z, a, b, beta=-1), which is small, so that its own rounding hardly
                 counts: together they are exact to about 18 bits.
    rounded      bf16 operands, logits rounded to bf16: only as asked for, by `logits_dtype`

With bf16 operands the gradient of the logits is rounded to bf16 once, in all forms: each number by 2^-9 at most, as the gradients of
hidden states and head are that are made of it. Those are sums in fp32, on a CPU with bf16 units rounded to bf16 after each chunk.

Logits are a tuple of tensors that add up to them: one, or two bf16 ones, product and rounding error.
Shapes: C tokens of a chunk, V ids, D embedding width.
"""

import functools
import math
import mmap
import sys
from collections.abc import Iterator
from typing import ClassVar, Literal, Self, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from kdtune.log import get_logger
from kdtune.losses.heads import Projection

log = get_logger(__name__)

# On a CPU, softmax and divergence run on blocks of a chunk's rows, small enough for their temporaries to stay in cache.
CPU_BLOCK_BYTES = 2 * 2**20
# A head is raised to fp32, and its gradient computed, by tiles of ids.
TILE_BYTES = 16 * 2**20
# Logits and their rounding errors, for the same reason as blocks, by smaller ones.
PRODUCT_BYTES = 2 * 2**20

Form = Literal["raised", "accumulated", "two products", "rounded"]
Logits: TypeAlias = tuple[Tensor, ...]
"""Tensors [C, V] whose sum is the logits."""


def sum_dtype(hidden_TD: Tensor) -> torch.dtype:
    """Return fp32, or the wider dtype of the hidden states."""
    return torch.promote_types(hidden_TD.dtype, torch.float32)


def form_of(hidden: Tensor, weight: Tensor, logits_dtype: torch.dtype) -> Form:
    """Return how hidden states and head are multiplied for logits in a dtype."""
    is_half = hidden.dtype == weight.dtype == torch.bfloat16
    if logits_dtype == torch.bfloat16:
        return "rounded"
    if not is_half or logits_dtype != torch.float32:
        return "raised"
    if hidden.is_cuda and torch.version.hip is None:
        return "accumulated"
    return "two products" if hidden.device.type == "cpu" and cpu_multiplies_bf16() else "raised"


@functools.cache
def cpu_multiplies_bf16() -> bool:
    """Return whether this CPU has bf16 units, and torch's products there leave their rounding error to a second one.

    The second is tried, for it rests on sums in fp32 and on `beta` being applied before the result is rounded.
    """
    cpu = torch.cpu
    if not (cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()):
        return False
    with unset_fake_temporarily(), torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        a, b = (
            (torch.arange(rows * 256, dtype=torch.float32, device="cpu") * step).sin().view(rows, 256).bfloat16()
            for rows, step in ((32, 1.7), (64, 2.3))
        )
        exact = a.double() @ b.double().T
        product, rest = _with_rounding_error(a, b.T)
        works = bool((product.double() + rest.double() - exact).norm() < 1e-5 * exact.norm())
    log.info("the loss multiplies bf16 %s", "in bf16, two products for each that fp32 takes" if works else "in fp32")
    return works


class Buffers:
    """Memory of a chunk's logits, given out by `logits`; on a CPU kept for the next call of the loss when a `with` block ends.

    Freed in between, blocks of this size would be cut up by smaller ones, and the next call would find no room there.
    """

    _spare: ClassVar[dict[torch.dtype, list[Tensor]]] = {}

    def __enter__(self) -> Self:
        self._taken: list[Tensor] = []
        return self

    def __exit__(self, *_: object) -> None:
        for flat in self._taken:
            self._spare.setdefault(flat.dtype, []).append(flat)

    def logits(self, head: Projection, rows: int, num_ids: int, dtype: torch.dtype) -> Logits:
        """Return uninitialized logits [rows, ids] of a head for `project`, which add up to them in a dtype."""
        # A head in shards exchanges its logits: one tensor.
        is_pair = form_of(head.hidden_TD, head.weight_VD, dtype) == "two products" and not head.shards
        dtypes = [torch.bfloat16] * 2 if is_pair else [dtype]
        return tuple(self._empty(head.hidden_TD, rows * num_ids, dtype).view(rows, num_ids) for dtype in dtypes)

    def _empty(self, like: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        if like.device.type != "cpu" or like.is_meta or isinstance(like, FakeTensor):
            return like.new_empty(size, dtype=dtype)
        spare = self._spare.get(dtype)
        flat: Tensor | None = spare.pop() if spare else None
        if flat is None or len(flat) < size:
            del flat
            # Not from the C library's heap, where a buffer that is outgrown leaves a gap.
            with torch.inference_mode(False):
                flat = torch.frombuffer(_mapped(max(1, size) * dtype.itemsize), dtype=dtype)
        self._taken.append(flat)
        return flat[:size]


def _mapped(num_bytes: int) -> mmap.mmap:
    """Return memory of its own. Private: Python's default is the same memory in every forked process."""
    if sys.platform == "win32":  # which has neither
        return mmap.mmap(-1, num_bytes)
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def project(hidden_CD: Tensor, head: Projection, buffers: Logits) -> Logits:
    """Return logits [C, V] of a chunk, in the first rows of the buffers and in their dtype."""
    logits = tuple(buffer[: len(hidden_CD)] for buffer in buffers)
    first_CV, *rest = logits
    weight_VD = head.weight_VD[: first_CV.shape[1]]
    form = form_of(hidden_CD, weight_VD, first_CV.dtype)
    if rest:
        _with_rounding_error(hidden_CD, weight_VD.T, first_CV, rest[0])
    elif form == "rounded":
        torch.mm(hidden_CD, weight_VD.T, out=first_CV)
    elif form == "two products":
        for tile in slices(len(weight_VD), max(1, PRODUCT_BYTES // (2 * max(1, len(hidden_CD))))):
            product, error = _with_rounding_error(hidden_CD, weight_VD[tile].T)
            first_CV[:, tile].copy_(product).add_(error)
    else:
        dtype = torch.bfloat16 if form == "accumulated" else first_CV.dtype
        hidden_CD = hidden_CD.to(dtype)
        # On a CPU also without a copy: 342 tokens by 16 MiB of rows take 0.85 to 0.93 of the time that they take by all rows.
        for tile, weight in _tiles(weight_VD, dtype, in_tiles=hidden_CD.device.type == "cpu"):
            _mm(hidden_CD, weight.T, out=first_CV[:, tile])
    if head.softcap is not None:
        for block in slices(len(first_CV), block_size(first_CV)):
            _cap_(rows_of(logits, block), head.softcap)
    return logits


def rows_of(logits: Logits, rows: slice) -> Logits:
    """Return some rows of the tensors that add up to logits."""
    return tuple(part[rows] for part in logits)


def joined(logits: Logits) -> Tensor:
    """Return the sum, in fp32 or wider: a tensor of its own, unless it is a single one of that dtype."""
    first, *rest = logits
    total = first.to(torch.promote_types(first.dtype, torch.float32))
    return total.add_(rest[0]) if rest else total


def _cap_(logits: Logits, softcap: float) -> None:
    capped = joined(logits).div_(softcap).tanh_().mul_(softcap)
    for part in logits:
        if part is not capped:
            part.copy_(capped)
            capped = capped - part


def hidden_gradient(grad_logits_CV: Tensor, hidden_CD: Tensor, head: Projection) -> Tensor:
    """Return the gradient [C, D] of the hidden states, in their dtype, from that of the logits."""
    weight_VD = head.weight_VD[: grad_logits_CV.shape[1]]
    form = form_of(hidden_CD, weight_VD, grad_logits_CV.dtype)
    if form in ("two products", "rounded"):
        grad_CD = grad_logits_CV.bfloat16() @ weight_VD
    else:
        dtype = torch.bfloat16 if form == "accumulated" else grad_logits_CV.dtype
        grad_CD = torch.zeros_like(hidden_CD, dtype=grad_logits_CV.dtype)
        for tile, weight in _tiles(weight_VD, dtype):
            _addmm_(grad_CD, grad_logits_CV[:, tile].to(dtype), weight)
    if head.shards:
        grad_CD = head.shards.sum_(grad_CD.to(sum_dtype(hidden_CD)))
    return grad_CD.to(hidden_CD.dtype)


def new_weight_gradient(weight_VD: Tensor, dtype: torch.dtype, num_tokens: int) -> Tensor:
    """Return memory for a head's gradient, in the dtype of its sum over chunks of so many tokens: zeros if there are none."""
    return (torch.empty_like if num_tokens else torch.zeros_like)(weight_VD, dtype=dtype)


def add_weight_gradient_(
    sum_VD: Tensor, grad_logits_CV: Tensor, hidden_CD: Tensor, weight_VD: Tensor, *, is_first: bool
) -> None:
    """Add a chunk's share to the gradient of the head's rows, from that of the logits; the first overwrites what was there."""
    form = form_of(hidden_CD, weight_VD, grad_logits_CV.dtype)
    dtype = sum_VD.dtype if form == "raised" else torch.bfloat16
    hidden_CD = hidden_CD.to(dtype)
    if is_first:
        sum_VD[grad_logits_CV.shape[1] :].zero_()  # rows without a logit
    for tile in slices(grad_logits_CV.shape[1], _tile_rows(sum_VD, sum_VD.dtype)):
        total, grad = sum_VD[tile], grad_logits_CV[:, tile].T.to(dtype)
        if form in ("two products", "rounded"):
            share = grad @ hidden_CD
            total.copy_(share) if is_first else total.add_(share)
        elif is_first:
            _mm(grad, hidden_CD, out=total)
        else:
            _addmm_(total, grad, hidden_CD)


def scaled_weight_gradient_(sum_VD: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum times a 0-d scale in a dtype, in the sum's own memory if that has the dtype."""
    if dtype == sum_VD.dtype:
        return sum_VD.mul_(scale)
    scaled_VD = torch.empty_like(sum_VD, dtype=dtype)
    for tile in slices(len(sum_VD), _tile_rows(sum_VD, sum_VD.dtype)):
        scaled_VD[tile] = sum_VD[tile].mul_(scale)  # in place: autograd then refuses a second backward
    return scaled_VD


def slices(length: int, size: int) -> Iterator[slice]:
    """Return consecutive slices of about equal length, none longer than size, that cover range(length)."""
    count = math.ceil(length / size)
    return (slice(i * length // count, (i + 1) * length // count) for i in range(count))


def block_size(logits_CV: Tensor) -> int:
    """Return the rows of a chunk that softmax and divergence process at once: all, except on a CPU, where each thread takes rows."""
    if logits_CV.device.type != "cpu":
        return max(1, len(logits_CV))  # with a head in shards, a process may have none of a short chunk's rows
    itemsize = max(logits_CV.element_size(), torch.float32.itemsize)
    return max(torch.get_num_threads(), CPU_BLOCK_BYTES // (logits_CV.shape[1] * itemsize))


def _with_rounding_error(
    a: Tensor, b: Tensor, product: Tensor | None = None, error: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return a @ b in bf16, and in bf16 what rounding took from it; in the tensors given, if any."""
    product = torch.mm(a, b, out=product)
    return product, torch.addmm(product, a, b, beta=-1, out=error)


def _mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Return the product of two matrices, computed to the precision of out's dtype."""
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else torch.mm(a, b, out_dtype=out.dtype, out=out)


def _addmm_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add the product of two matrices to out, computed to the precision of out's dtype."""
    return out.addmm_(a, b) if a.dtype == out.dtype else out.add_(torch.mm(a, b, out_dtype=out.dtype))


def _tiles(weight_VD: Tensor, dtype: torch.dtype, *, in_tiles: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """Yield a head's rows in `dtype`, and their slice: all at once if that takes no copy, unless in_tiles, else by tiles."""
    vocab_size, rows = len(weight_VD), _tile_rows(weight_VD, dtype)
    if weight_VD.dtype == dtype:
        for tile in slices(vocab_size, rows if in_tiles else vocab_size):
            yield tile, weight_VD[tile]
        return
    buffer = weight_VD.new_empty(min(rows, vocab_size), weight_VD.shape[1], dtype=dtype)
    for tile in slices(vocab_size, rows):
        yield tile, buffer[: tile.stop - tile.start].copy_(weight_VD[tile])


def _tile_rows(weight_VD: Tensor, dtype: torch.dtype) -> int:
    """Return the number of rows of a head that take TILE_BYTES in `dtype`."""
    return max(1, TILE_BYTES // (weight_VD.shape[1] * dtype.itemsize))
