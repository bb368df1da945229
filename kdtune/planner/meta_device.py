"""Measure a part of the model on the meta device: bytes and floating-point operations.

The real code runs without data: its tensors have only shapes and dtypes. Operations that behave differently on the run's
device are replaced by that device's versions.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from kdtune.models.nf4 import is_nf4, nf4_parts


@dataclass(frozen=True)
class Cost:
    """Cost of a forward and a backward pass. Bytes count only tensors that the pass itself allocates."""

    kept: int
    """Bytes after forward: the tensors saved for backward, and the output."""
    forward_peak: int
    """Peak bytes in forward."""
    backward_peak: int
    """Peak bytes in backward, with the saved tensors and the parameters' gradients, without the output's gradient."""
    forward_flops: int
    backward_flops: int


class FakeDevice(TorchFunctionMode):
    """A mode in which meta tensors report this device type, and operations behave as on it."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device = torch.device(device_type)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return the operation's result."""
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return self.device
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return self.device.type == "cuda"
        if kwargs.get("device") == self.device:
            kwargs["device"] = "meta"
        if func is functional.scaled_dot_product_attention:
            # On the meta device torch would take the kernel that holds all scores; no device does.
            query, key, value = args
            return torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, 0.0, kwargs.get("is_causal", False)
            )[0]
        if func is functional.rms_norm and self.device.type == "cuda":
            return _FusedRMSNorm.apply(args[0])
        if func is torch.mm and "out_dtype" in kwargs:
            return _mm(*args, **kwargs)
        return func(*args, **kwargs)


class _FusedRMSNorm(torch.autograd.Function):
    """Stand-in for CUDA's `rms_norm` kernel, which saves its input unchanged and one number per row."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, inputs.new_empty(inputs.shape[:-1], dtype=torch.float32))
        return torch.empty_like(inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.empty_like(gradient)


def _mm(a: Tensor, b: Tensor, out_dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return a product in a wider dtype: the meta device lacks it, so the operands are treated as having that dtype."""
    one = torch.empty(1, dtype=out_dtype, device="meta")
    return torch.mm(one.expand(a.shape), one.expand(b.shape), out=out)


class MemoryTracker(TorchDispatchMode):
    """Count the live bytes of storages that operations allocate, and floating-point operations as torch counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.flops = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return the operation's result."""
        result = func(*args, **(kwargs or {}))
        if operation := flop_registry.get(func.overloadpacket):
            self.flops += operation(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not is_nf4(leaf):  # which is made of others, and has none of its own
                self._add(leaf.untyped_storage())
        return result

    def ignore(self, *tensors: Tensor | None) -> None:
        """Do not count these tensors: others hold them."""
        for tensor in tensors:
            if tensor is not None:
                parts = nf4_parts(tensor).values() if is_nf4(tensor) else [tensor]
                self._known.update(part.untyped_storage()._cdata for part in parts)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def measure(function: Callable[[], Tensor], held: list[Tensor], device_type: str, *, backward: bool) -> Cost:
    """Return the cost of a function of meta tensors, as on that type of device.

    Args:
        function: returns the output; it holds its inputs and parameters.
        held: its inputs and parameters, which are not counted; their gradients are cleared.
        device_type: such as "cuda".
        backward: also run a backward pass.
    """
    live = MemoryTracker()
    live.ignore(*held)
    with torch.set_grad_enabled(backward), FakeDevice(device_type), live:
        output = function()
        kept, forward_peak, forward_flops = live.live, live.peak, live.flops
        backward_peak = 0
        if backward:
            gradient = torch.empty_like(output)
            live.peak = live.live
            torch.autograd.backward(output, gradient)
            # The output's gradient belongs to what comes after, which has counted it.
            backward_peak = live.peak - gradient.untyped_storage().nbytes()
        del output
    for tensor in held:
        tensor.grad = None
    return Cost(kept, forward_peak, backward_peak, forward_flops, live.flops - forward_flops)
