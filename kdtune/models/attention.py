"""Grouped-query causal attention (arXiv 2305.13245).

Shape suffixes: B batch, S new tokens, T tokens attended to (cached and new), D embedding, H query heads, K key/value
heads, G query heads per key head, E head dim.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdtune.models.architecture import TransformerConfig
from kdtune.models.documents import Documents
from kdtune.models.kv_cache import PART, LayerCache, SlotLayer
from kdtune.models.rope import rotate


class RMSNorm(nn.Module):
    """Root mean square normalization (arXiv 1910.07467): statistics in fp32, gain in the input's dtype.

    With ``rounds_last`` the gain is in fp32 too. The gain is the weight plus ``offset``. The result is divided by ``divisor``.
    """

    def __init__(
        self, dim: int, eps: float, *, rounds_last: bool = False, offset: float = 0.0, divisor: float = 1.0
    ) -> None:
        super().__init__()
        self.eps, self.rounds_last, self.offset, self.divisor = eps, rounds_last, offset, divisor
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - offset))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the input's shape and dtype; computed in fp32 and rounded once, before the gain or after it."""
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32)) if self.rounds_last else hidden
        gain = self.weight if self.offset == 0.0 else self.weight.to(wide.dtype) + self.offset
        normal = (functional.rms_norm(wide, (hidden.shape[-1],), None, self.eps) * gain).to(hidden.dtype)
        return normal if self.divisor == 1.0 else normal / self.divisor


def norm_of(config: TransformerConfig, dim: int, *, divisor: float = 1.0) -> RMSNorm:
    """Return a norm over ``dim`` values as the model's norms are, whose result is divided by ``divisor``."""
    rounds_last, offset = config.norm_rounds_last, config.norm_offset
    return RMSNorm(dim, config.norm_eps, rounds_last=rounds_last, offset=offset, divisor=divisor)


class Attention(nn.Module):
    """Query heads in groups that share one key and one value head.

    The switches are `TransformerConfig`'s; the window is that of layer ``index``.
    """

    def __init__(self, config: TransformerConfig, index: int) -> None:
        super().__init__()
        embed_dim, head_dim, bias = config.embed_dim, config.head_dim, config.qkv_bias
        self.head_dim, self.window, self.scale = head_dim, config.window(index), config.attention_scale
        self.rotates, self.softcap = config.is_rotated(index), config.score_softcap
        self.q_proj = nn.Linear(embed_dim, config.num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, config.num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, config.num_kv_heads * head_dim, bias=bias)
        self.output_proj = nn.Linear(config.num_heads * head_dim, embed_dim, bias=False)
        dims = config.qk_norm_dims
        self.q_norm, self.k_norm = (None if dims is None else norm_of(config, dims[of_keys]) for of_keys in (0, 1))
        self.normalizes_heads = config.qk_norm == "head"

    def forward(
        self,
        hidden_BSD: Tensor,
        rope: tuple[Tensor, ...],
        mask: Tensor | Documents | None = None,
        cache: LayerCache | SlotLayer | None = None,
        cache_length: int = 0,
    ) -> Tensor:
        """Map [B, S, D] to [B, S, D].

        ``mask`` is bool, broadcastable to [B, 1, S, T], True where a query may see a key; None is causal; `Documents` is
        causal within each, for B = 1. With a cache that already holds tokens, None is correct only for a single new token.
        The layer's window holds besides. ``rope`` is `Transformer.rope`'s.
        """
        heads = (*hidden_BSD.shape[:2], -1, self.head_dim)
        q, k = self.q_proj(hidden_BSD), self.k_proj(hidden_BSD)
        if self.normalizes_heads:
            q, k = q.view(heads), k.view(heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q_BSHE, k_BSKE = q.view(heads), k.view(heads)
        if self.rotates:
            rope = rope[-2:] if self.window is not None else rope[:2]
            q_BSHE, k_BSKE = rotate(q_BSHE, rope), rotate(k_BSKE, rope)
        v_BSKE = self.v_proj(hidden_BSD).view(heads)
        if isinstance(mask, Documents):
            out_SHE = attend_within(mask, q_BSHE[0], k_BSKE[0], v_BSKE[0], self.window, self.scale, self.softcap)
            return self.output_proj(out_SHE.flatten(1)[None])
        q_BHSE, k_BKTE, v_BKTE = q_BSHE.transpose(1, 2), k_BSKE.transpose(1, 2), v_BSKE.transpose(1, 2)
        window, num_idle = self.window, 0
        if cache is not None:
            k_BKTE, v_BKTE, mask, window = cache.attended(cache_length, k_BKTE, v_BKTE, mask, window)
            num_idle = len(q_BHSE) - len(k_BKTE)  # rows that belong to no slot
        out_BHSE = attend(q_BHSE[: len(k_BKTE)], k_BKTE, v_BKTE, mask, window, self.scale, self.softcap)
        out_BSF = out_BHSE.transpose(1, 2).flatten(2)
        return self.output_proj(functional.pad(out_BSF, (0, 0, 0, 0, 0, num_idle)) if num_idle else out_BSF)


def attend(
    q_BHSE: Tensor,
    k_BKTE: Tensor,
    v_BKTE: Tensor,
    mask: Tensor | None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute softmax attention, [B, H, S, E]; mask None is causal when S == T and unrestricted for a single query.

    The queries are the last S of the T tokens; with a window, each sees only the last ``window`` ones up to itself. Scores are
    multiplied by ``scale``, None: E**-0.5, and bounded by ``softcap``, None: unbounded.
    """
    if window is not None and window < k_BKTE.shape[2]:
        if q_BHSE.shape[2] == 1:
            k_BKTE, v_BKTE = k_BKTE[:, :, -window:], v_BKTE[:, :, -window:]
            mask = None if mask is None else mask[..., -window:]
        else:
            mask = _within(window, mask, q_BHSE.shape[2], k_BKTE.shape[2], q_BHSE.device)
    groups = q_BHSE.shape[1] // k_BKTE.shape[1]
    if groups > 1 and q_BHSE.shape[2] == 1:
        # A single query sees the same keys whatever its head: the heads that share a key are its queries.
        q_BKGE = q_BHSE.reshape(q_BHSE.shape[0], k_BKTE.shape[1], groups, -1)
        if softcap is not None:
            return _attend_capped(q_BKGE, k_BKTE, v_BKTE, mask, scale, softcap, part=PART).reshape(q_BHSE.shape)
        out_BKGE = functional.scaled_dot_product_attention(q_BKGE, k_BKTE, v_BKTE, attn_mask=mask, scale=scale)
        return out_BKGE.reshape(q_BHSE.shape)
    # Only CUDA's flash kernel reads shared heads without copying them; its other kernels would fall back to one that
    # holds all scores, and on the CPU both ways take equally long.
    shared = (
        groups > 1
        and mask is None
        and softcap is None
        and q_BHSE.is_cuda
        and q_BHSE.dtype in (torch.bfloat16, torch.float16)
    )
    if groups > 1 and not shared:
        k_BKTE = k_BKTE.repeat_interleave(groups, dim=1)
        v_BKTE = v_BKTE.repeat_interleave(groups, dim=1)
    if softcap is not None:
        if mask is None and q_BHSE.shape[2] > 1:
            mask = torch.ones(q_BHSE.shape[2], k_BKTE.shape[2], dtype=torch.bool, device=q_BHSE.device).tril()
        part = PART if q_BHSE.shape[2] == 1 else None
        return _attend_capped(q_BHSE, k_BKTE, v_BKTE, mask, scale, softcap, part=part)
    return functional.scaled_dot_product_attention(
        q_BHSE,
        k_BKTE,
        v_BKTE,
        attn_mask=mask,
        is_causal=mask is None and q_BHSE.shape[2] > 1,
        scale=scale,
        enable_gqa=shared,
    )


def _attend_capped(
    q_BHSE: Tensor,
    k_BHTE: Tensor,
    v_BHTE: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float,
    *,
    part: int | None = None,
) -> Tensor:
    """Compute attention whose scores are bounded, all [B, H, S, T] of them in memory; only flex attention has a kernel for it.

    With ``part`` the sum over tokens is one of sums over so many.
    """
    scores_BHST = q_BHSE @ k_BHTE.transpose(2, 3) * (q_BHSE.shape[-1] ** -0.5 if scale is None else scale)
    scores_BHST = torch.tanh(scores_BHST / softcap) * softcap
    if mask is not None:
        # Not -inf: a padding token that sees nothing would be NaN, and so would be all that its value is multiplied with.
        scores_BHST = scores_BHST.masked_fill(~mask, torch.finfo(scores_BHST.dtype).min)
    wide = torch.promote_types(q_BHSE.dtype, torch.float32)
    weights_BHST = functional.softmax(scores_BHST, dim=-1, dtype=wide).to(q_BHSE.dtype)
    if part is None or weights_BHST.shape[-1] <= part:
        return weights_BHST @ v_BHTE
    first, *others = zip(weights_BHST.split(part, dim=3), v_BHTE.split(part, dim=2), strict=True)
    return sum((weights @ values for weights, values in others), first[0] @ first[1])


def _within(window: int, mask: Tensor | None, num_new: int, num_tokens: int, device: torch.device) -> Tensor:
    """Return the mask [..., S, T] without the keys beyond the window; None is causal."""
    num_held = num_tokens - num_new
    if mask is None:
        mask = torch.ones(num_new, num_tokens, dtype=torch.bool, device=device).tril(num_held)
    return mask & torch.ones(num_new, num_tokens, dtype=torch.bool, device=device).triu(num_held - window + 1)


def with_block_masks(documents: Documents, config: TransformerConfig) -> Documents:
    """Return the documents with what soft-capped attention needs on their device, once for all layers; most need nothing."""
    if config.score_softcap is None or documents.positions_T.device.type != "cuda":
        return documents
    from kdtune.models import flex  # imports torch's compiler

    if not flex.is_available(config.head_dim):
        return documents
    return flex.with_block_masks(documents, {config.window(index) for index in range(config.num_layers)})


def attend_within(
    documents: Documents,
    q_SHE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute causal softmax attention within each document, [S, H, E], from queries, keys and values of all of them.

    No scores between documents exist: where the flash kernel takes the tensors it is one call with the boundaries, with a
    soft-cap and `with_block_masks` one call of flex attention, elsewhere one call a document. Window, scale and soft-cap are `attend`'s.
    """
    head_dim = q_SHE.shape[-1]
    is_plain_on_cuda = q_SHE.is_cuda and q_SHE.dtype == torch.bfloat16 and softcap is None
    if is_plain_on_cuda and head_dim % 8 == 0 and head_dim <= 256:
        from torch.nn.attention.varlen import (
            varlen_attn,  # imports torch's compiler, a second that a CPU need not wait for
        )

        starts, longest, is_shared = documents.starts_N1, documents.longest, q_SHE.shape[1] != k_SKE.shape[1]
        before = (
            -1 if window is None else window - 1
        )  # torch's convention: those to the left, -1 for all, besides itself
        return varlen_attn(  # type: ignore[return-value]  # a pair only if more is asked for
            q_SHE,
            k_SKE,
            v_SKE,
            starts,
            starts,
            longest,
            longest,
            scale=scale,
            window_size=(before, 0),
            enable_gqa=is_shared,
        )
    if softcap is not None and window in documents.block_masks:
        from kdtune.models.flex import attend_capped

        return attend_capped(documents.block_masks[window], q_SHE, k_SKE, v_SKE, scale, softcap)
    if torch.compiler.is_compiling():
        # Every other number of documents would need code of its own. As a decorator it would import the compiler in every run.
        one_by_one: Callable[..., Tensor] = torch.compiler.disable(_attend_one_by_one)
        return one_by_one(documents, q_SHE, k_SKE, v_SKE, window, scale, softcap)
    return _attend_one_by_one(documents, q_SHE, k_SKE, v_SKE, window, scale, softcap)


def _attend_one_by_one(
    documents: Documents,
    q_SHE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    def rows(tensor_SHE: Tensor) -> tuple[Tensor, ...]:
        return tensor_SHE.transpose(0, 1)[None].split(documents.lengths, dim=2)

    texts = zip(rows(q_SHE), rows(k_SKE), rows(v_SKE), strict=True)
    outs = [attend(q, k, v, None, window, scale, softcap) for q, k, v in texts]
    # In the kernel's own order of dimensions, so that what follows is no second copy.
    return torch.cat([out.transpose(1, 2) for out in outs], dim=1)[0]
