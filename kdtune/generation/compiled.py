"""The forward of one new token of each text, compiled: always as many rows, and keys and values are written and read within the graph.

Shape suffixes: B rows, S new tokens (one), D embedding.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kdtune.models import Transformer, TransformerConfig
from kdtune.models.kv_cache import PART, FixedLayer, SlotCache
from kdtune.tensor_types import is_fsdp_module, is_plain

Step = Callable[[Transformer, Tensor, Tensor, Sequence[FixedLayer]], Tensor]


# A CUDA graph has the addresses of its tensors: another cache would be another graph.
_KEPT: "WeakKeyDictionary[Transformer, tuple[SlotCache, list[FixedLayer]]]" = WeakKeyDictionary()


def can_compile(model: Transformer) -> bool:
    """Return whether the forward of a model's new tokens can be compiled: its own decoder, whole, with plain weights."""
    is_own = isinstance(model.config, TransformerConfig) and not is_fsdp_module(model)
    return is_own and all(map(is_plain, model.parameters()))


def step(
    model: Transformer,
    tokens_BS: Tensor,
    positions_BS: Tensor,
    caches: Sequence[FixedLayer],
    of_layer: Callable[[nn.Module, Tensor, tuple[Tensor, ...], FixedLayer], Tensor] | None = None,
) -> Tensor:
    """Return the hidden states [B, S, D] after the final norm, as `Transformer.forward` does with a cache of slots.

    Args:
        model: its layers are called past their own compiled form, if they have one from training.
        tokens_BS: the next token of each row.
        positions_BS: its position in its text.
        caches: of each layer.
        of_layer: computes a layer; None: `layer_step`.
    """
    hidden_BSD, rope = model.embed(tokens_BS, positions_BS)
    for layer, cached in zip(model.layers, caches, strict=True):
        hidden_BSD = (of_layer or layer_step)(layer, hidden_BSD, rope, cached)
    normal: Tensor = model.norm(hidden_BSD)
    return normal


def layer_step(layer: nn.Module, hidden_BSD: Tensor, rope: tuple[Tensor, ...], cached: FixedLayer) -> Tensor:
    """Return a `layer`'s output for its input, `hidden_BSD`, the rotary tables `rope` and its keys and values in `cached`."""
    # Not what activation offloading or checkpointing has put in its place for the backward, of which there is none.
    output: Tensor = type(layer).forward(layer, hidden_BSD, rope, None, cached, 0)
    return output


@cache
def compiled_step(device_type: str) -> Step:
    """Return `step`, compiled at its first call and again where the number of rows or places changes.

    On CUDA it is one graph, replayed as a CUDA graph; its kernels are then launched at once. On a CPU one layer is compiled, whose code
    serves all: it is as fast as one graph, whose compilation takes five times as long.
    """
    if device_type != "cuda":
        return partial(step, of_layer=torch.compile(layer_step, fullgraph=True))
    whole = torch.compile(step, fullgraph=True, mode="reduce-overhead")

    def replayed(model: Transformer, tokens_BS: Tensor, positions_BS: Tensor, caches: Sequence[FixedLayer]) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return whole(model, tokens_BS, positions_BS, caches).clone()  # the next replay overwrites it

    return replayed


def fixed_cache(model: Transformer, num_slots: int, longest: int) -> tuple[SlotCache, list[FixedLayer]]:
    """Return a cache of `num_slots` texts of up to `longest` tokens for compiled forwards of a `model`, and its layers for them.

    On CUDA it is kept for the next writing, in place of one that is smaller, and the places that are attended to are used by 512: there is
    code, and a graph, for each number of them. On a CPU the code for a second number serves all others.
    """
    on_cpu = model.device.type == "cpu"
    kept = _KEPT.get(model)
    if kept is not None and kept[0].num_slots == num_slots and kept[0].max_seq_len >= longest:
        return kept
    _KEPT.pop(model, None)
    config = model.config
    made = SlotCache(config, num_slots, longest) if on_cpu else SlotCache(config, num_slots, longest, block=PART)
    layers = made.fixed(torch.empty(1, config.num_kv_heads, 1, config.head_dim, dtype=model.dtype, device=model.device))
    if not on_cpu:
        for layer in layers:
            torch._dynamo.mark_static_address(layer.keys_RKCE)
            torch._dynamo.mark_static_address(layer.values_RKCE)
        _KEPT[model] = made, layers
    return made, layers
