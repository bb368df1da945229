"""Activations that backward needs, held elsewhere or computed again: checkpointing of layers, and offloading to the CPU."""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kdtune.models import Transformer

Checkpointed = Literal["full", "selective"] | int
"""Which activations are computed again: all of a layer, all but its costly products, or all of every n-th layer."""

# Activations of fewer bytes stay where they are: moving them saves little.
SMALLEST_BYTES = 2**20


def apply_activation_checkpointing(model: Transformer, which: Checkpointed = "full") -> None:
    """Make layers keep only their input in forward and run again in backward; the gradients stay the same.

    Replaces a layer's ``forward``, not the layer: parameter names, module types and state dicts stay as they are.
    Applying it twice is the same as once. Apply it before ``fully_shard``.

    Args:
        model: the model, in place.
        which: "full": every layer (arXiv 1604.06174). A number n: every n-th layer, the first among them. "selective": every
            layer, but the outputs of its matrix products and of attention are kept, so that only what is cheap runs again.
    """
    contexts: dict[str, Any] = {}
    if which == "selective":
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, keeps_products)
    for layer in model.layers[:: which if isinstance(which, int) else 1]:
        if "forward" not in vars(layer):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, **contexts)


def keeps_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Return what selective checkpointing does with an operation's output: it keeps those of matrix products and attention."""
    # Documents' attention on CUDA, by its name: importing it takes a while.
    is_product = operation.overloadpacket in _PRODUCTS or operation.name() == "torch_attn::_varlen_attn"
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE


_PRODUCTS = {
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.bmm,
    torch.ops.aten.linear,
    torch.ops.aten._scaled_mm,
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_efficient_attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention,
}


def apply_activation_offloading(model: Transformer, *, smallest_bytes: int = SMALLEST_BYTES) -> None:
    """Make what the layers save for backward lie in pinned CPU memory until then, in place; the numbers stay the same.

    Weights stay, and so does a tensor of fewer than `smallest_bytes` bytes. Both copies are queued on the device's own stream:
    the host does not wait, and the device's memory is free again once the copy is done. Apply it after activation checkpointing,
    of which it moves the layers' inputs, and before ``fully_shard``.
    """
    for layer in model.layers:
        layer.forward = partial(_offloaded, layer.forward, smallest_bytes)


def is_offloaded(tensor: Tensor, smallest_bytes: int) -> bool:
    """Return whether activation offloading moves a saved tensor: no weight, nor a view of one, and of at least so many bytes."""
    base = tensor if tensor._base is None else tensor._base
    return type(tensor) is Tensor and not isinstance(base, nn.Parameter) and tensor.nbytes >= smallest_bytes


def _offloaded(forward: Any, smallest_bytes: int, *args: Any, **kwargs: Any) -> Any:
    # What several operations save is moved once. The weak references keep the addresses of freed storages from being used again.
    moved: dict[tuple[Any, ...], Tensor] = {}
    storages: dict[int, StorageWeakRef] = {}

    def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if not is_offloaded(tensor, smallest_bytes):
            return tensor
        storage = StorageWeakRef(tensor.untyped_storage())
        storages[storage.cdata] = storage
        key = (storage.cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version)
        if key not in moved:
            held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            moved[key] = held.copy_(tensor, non_blocking=True)
        return tensor.device, moved[key]

    def unpack(held: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        return held if isinstance(held, Tensor) else held[1].to(held[0], non_blocking=True)

    with saved_tensors_hooks(pack, unpack):
        return forward(*args, **kwargs)
