"""A teacher's layers in the CPU's memory: each goes to the device when its turn comes, the next one while it computes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdtune.models import Transformer
from kdtune.models.quantization import map_parts, parts
from kdtune.teachers.streams import side_stream

# CUDA's allocator aligns to as many bytes, and which kernel computes a product depends on it.
_ALIGNMENT = 512

_Weights = list[tuple[nn.Module, str, nn.Parameter]]


def offload_layers(model: Transformer, device: torch.device) -> Transformer:
    """Move a frozen model to a device but for its layers, in place; these stay in the CPU's memory, pinned for CUDA.

    The outputs are those of the model on the device, to the bit. At most two layers are there, in memory that is allocated once:
    while one computes, the next is copied on a stream of its own. Quantized weights are copied as they are.
    """
    for name, child in model.named_children():
        if name != "layers":
            child.to(device)
    model.tie_weights()
    model.layers = OffloadedLayers(model.layers, device)
    return model


@dataclass
class _Slot:
    """Memory for one layer on the device."""

    memory: Tensor
    layer: int | None = None
    """Index of the layer whose weights are there, or on their way."""
    ready: Any = None
    """Event after their copy."""
    free: Any = None
    """Event after the last computation with what was there before."""


class OffloadedLayers(nn.ModuleList):
    """Layers whose weights are on a device only where an iteration over them has come to; one iteration at a time.

    Args:
        layers: on the CPU, and frozen.
        device: where they compute.
    """

    def __init__(self, layers: Iterable[nn.Module], device: torch.device) -> None:
        super().__init__(layers)
        self._device, self._stream = device, side_stream(device)
        found = list(super().__iter__())
        sizes = [_packed_bytes(layer) for layer in found]
        self._slots = [_Slot(torch.empty(max(sizes), dtype=torch.uint8, device=device)) for _ in range(2)]
        if self._stream is not None:
            for slot in self._slots:
                slot.memory.record_stream(self._stream)  # a copy may be under way when the model is dropped
                slot.free = torch.cuda.current_stream(device).record_event()
        self._held: list[Tensor] = []
        self._here: list[_Weights] = []
        self._there: list[_Weights] = []
        for index, (layer, size) in enumerate(zip(found, sizes, strict=True)):
            # One copy a layer, which does not make the host wait.
            held = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
            self._there.append(_packed(layer, self._slots[index % 2].memory, fill=False))
            self._here.append(_packed(layer, held, fill=True))
            self._held.append(held)
            _set(self._here[-1])

    def __iter__(self) -> Iterator[nn.Module]:
        self._fetch(0)
        for index, layer in enumerate(super().__iter__()):
            if index + 1 < len(self):
                self._fetch(index + 1)
            with self._on_device(index):
                yield layer
        self._fetch(0)  # of the next iteration

    def _fetch(self, index: int) -> None:
        """Queue the copy of a layer to its slot, behind the computation with the layer that is there."""
        slot, held = self._slots[index % 2], self._held[index]
        if slot.layer == index:
            return
        slot.layer = index
        if self._stream is None:
            slot.memory[: len(held)].copy_(held)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(slot.free)
            slot.memory[: len(held)].copy_(held, non_blocking=True)
            slot.ready = self._stream.record_event()

    @contextmanager
    def _on_device(self, index: int) -> Iterator[None]:
        """A context in which the layer has its weights on the device."""
        slot = self._slots[index % 2]
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.ready)
        _set(self._there[index])
        try:
            yield
        finally:
            _set(self._here[index])
            if self._stream is not None:
                slot.free = torch.cuda.current_stream(self._device).record_event()


def _set(weights: _Weights) -> None:
    for module, name, parameter in weights:
        module._parameters[name] = parameter


def _weights(layer: nn.Module) -> _Weights:
    return [
        (module, name, parameter)
        for module in layer.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _packed_bytes(layer: nn.Module) -> int:
    return sum(_aligned(part.nbytes) for _, _, weight in _weights(layer) for part in parts(weight))


def _packed(layer: nn.Module, memory: Tensor, *, fill: bool) -> _Weights:
    """Return the layer's weights as views of uint8 memory, one after the other; `fill`: with their values."""
    offset = 0

    def place(part: Tensor) -> Tensor:
        nonlocal offset
        view = memory[offset : offset + part.nbytes].view(part.dtype).as_strided(part.shape, part.stride())
        offset += _aligned(part.nbytes)
        return view.copy_(part) if fill else view

    return [(module, name, map_parts(weight, place)) for module, name, weight in _weights(layer)]
