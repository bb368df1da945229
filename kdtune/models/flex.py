"""Soft-capped attention of documents end to end by torch's flex attention, whose kernel holds no scores (arXiv 2412.05496).

For CUDA: on a CPU flex attention has no backward. Importing this file imports torch's compiler. Shape suffixes are those of
`kdtune.models.attention`; N is the number of blocks of tokens.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from kdtune.models.documents import Documents

BLOCK = 128
"""Tokens of a block, of queries as of keys: flex attention skips whole blocks."""
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
_plain: Callable[..., Any] = flex_attention
_compiled = torch.compile(_plain, dynamic=True)


def is_available(head_dim: int) -> bool:
    """Return whether the kernel can be made on a CUDA device: Triton is installed, and ``head_dim`` is one that it takes."""
    return MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM and find_spec("triton") is not None


def with_block_masks(documents: Documents, windows: Iterable[int | None]) -> Documents:
    """Return the documents with a block mask for each of the windows of a model's layers, None: all of a document."""
    return replace(documents, block_masks={window: block_mask(documents, window) for window in windows})


def block_mask(documents: Documents, window: int | None) -> BlockMask:
    """Return which blocks of keys each block of queries sees, wholly or in part; no [T, T] mask is made, and no device waited for.

    A token sees the keys from the first one of its document, or of the window of so many tokens up to itself. That first key
    never goes back from one token to the next, so the blocks that a block of queries sees are neighbours.
    """
    device, num_tokens = documents.positions_T.device, len(documents.positions_T)
    tokens_T = torch.arange(num_tokens, device=device)
    first_T = tokens_T - documents.positions_T
    if window is not None:
        first_T = torch.maximum(first_T, tokens_T - (window - 1))
    ends_N = (tokens_T[::BLOCK] + (BLOCK - 1)).clamp(max=num_tokens - 1)
    keys_N = torch.arange(len(ends_N), device=device)
    queries_N1 = keys_N[:, None]
    is_seen_NN = (keys_N <= queries_N1) & (keys_N >= first_T[::BLOCK, None] // BLOCK)
    is_whole_NN = (keys_N < queries_N1) & (keys_N * BLOCK >= first_T[ends_N][:, None])
    if num_tokens % BLOCK:
        is_whole_NN[-1] = False  # the last block has fewer queries

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first_T[query]) & (key <= query)

    return BlockMask.from_kv_blocks(
        *_listed(is_seen_NN & ~is_whole_NN),
        *_listed(is_whole_NN),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(num_tokens, num_tokens),
    )


def _listed(blocks_NN: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks each row has, int32 [1, 1, N], and their indices before all others, int32 [1, 1, N, N]."""
    indices_NN = blocks_NN.int().argsort(dim=1, descending=True, stable=True)
    return blocks_NN.sum(1, dtype=torch.int32)[None, None], indices_NN.int()[None, None].contiguous()


def soft_cap(softcap: Tensor) -> Callable[..., Tensor]:
    """Return the function of flex attention that bounds a scaled score (Gemma 2, arXiv 2408.00118).

    ``softcap`` is a scalar on the device of the scores: torch 2.13 compiles no float here once shapes are dynamic.
    """

    def bounded(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap

    return bounded


def attend_capped(
    mask: BlockMask, q_SHE: Tensor, k_SKE: Tensor, v_SKE: Tensor, scale: float | None, softcap: float
) -> Tensor:
    """Compute attention of bounded scores, [S, H, E], where ``mask`` lets a query see a key; heads share keys without copies.

    ``scale`` and ``softcap`` are `kdtune.models.attention.attend`'s. Scores are in fp32 whatever the dtype.
    """
    q_BHSE, k_BKSE, v_BKSE = (tensor.transpose(0, 1)[None] for tensor in (q_SHE, k_SKE, v_SKE))
    # Within compiled layers it is part of their code.
    run = _plain if torch.compiler.is_compiling() else _compiled
    is_shared = q_SHE.shape[1] != k_SKE.shape[1]
    bounded = soft_cap(q_SHE.new_full((), softcap, dtype=torch.promote_types(q_SHE.dtype, torch.float32)))
    out_BHSE: Tensor = run(q_BHSE, k_BKSE, v_BKSE, bounded, mask, scale, is_shared)
    return out_BHSE[0].transpose(0, 1)
