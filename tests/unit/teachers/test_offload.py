"""A teacher whose layers are in the CPU's memory, against the same model on its device; the device is the CPU, or one without values."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdtune.data import Batch
from kdtune.models import Transformer, llama
from kdtune.models.quantization import megabytes, quantize
from kdtune.parallel import apply_compile
from kdtune.teachers import OnlineTeacher
from kdtune.teachers.offload import offload_layers

TOKENS = torch.arange(24).reshape(2, 12)
BATCH = Batch.from_labels(TOKENS, TOKENS)
CPU, META = torch.device("cpu"), torch.device("meta")


def model(num_layers: int = 3, dtype: torch.dtype = torch.float32, scheme: str | None = None) -> Transformer:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "embed_dim": 128, "num_heads": 4, "intermediate_dim": 256, "max_seq_len": 32}
    made = llama(num_layers=num_layers, tie_embeddings=True, **sizes)
    made = made.to(dtype).requires_grad_(False)
    if scheme:
        quantize(made, scheme)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", [None, "int8", "int8_dynamic", "float8", "intx_4bit", "nf4"])
def test_its_outputs_are_those_of_the_whole_model_to_the_bit(scheme: str | None, dtype: torch.dtype) -> None:
    plain = OnlineTeacher(model(dtype=dtype, scheme=scheme), layers=(1, 3))
    held = OnlineTeacher(offload_layers(model(dtype=dtype, scheme=scheme), CPU), layers=(1, 3))
    for _ in range(2):
        expected, found = plain(BATCH), held(BATCH)
        for ours, theirs in zip(
            (found.hidden_BSD, *found.layers), (expected.hidden_BSD, *expected.layers), strict=True
        ):
            assert torch.equal(ours, theirs)
    assert held.generate([1, 2], max_new_tokens=4, stop_ids=[]) == plain.generate([1, 2], max_new_tokens=4, stop_ids=[])
    assert megabytes(held.model) == megabytes(plain.model)
    assert held.model.output.weight is held.model.tok_embeddings.weight


@pytest.mark.slow("compiles a layer with a C++ compiler, twice")
def test_compiled_layers_are_those_of_the_whole_model() -> None:
    plain, held = model(), model()
    for one in (plain, held):
        apply_compile(one)
    offload_layers(held, CPU)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(held(TOKENS), plain(TOKENS))


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_a_forward_that_ended_early_leaves_no_trace(num_layers: int) -> None:
    held, expected = offload_layers(model(num_layers), CPU), model(num_layers)(TOKENS)
    for stop_after in range(num_layers):
        for index, _ in enumerate(held.layers):
            if index == stop_after:
                break
        assert torch.equal(held(TOKENS), expected)
    assert [name for name, _ in held.named_parameters()] == [name for name, _ in model(num_layers).named_parameters()]


class DeviceMemory(TorchDispatchMode):
    """Count the bytes of the storages that live on a device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.live, self.peak = device, 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == self.device.type:
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._drop, key, size)
        return result

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def forward_peak(place: Callable[[Transformer], Transformer], num_layers: int) -> int:
    """Peak bytes on a device without values of a model that is put there and runs."""
    with DeviceMemory(META) as memory:
        made = place(model(num_layers))
        made(TOKENS.to(META), return_hidden=True)
    return memory.peak


def test_two_layers_are_on_the_device() -> None:
    layer = sum(parameter.nbytes for parameter in model(1).layers.parameters())
    offloaded = [forward_peak(lambda one: offload_layers(one, META), count) for count in (2, 3, 8)]
    whole = [forward_peak(lambda one: one.to(META), count) for count in (2, 3, 8)]
    # Norms are aligned as the allocator would.
    assert offloaded[0] == offloaded[1] == offloaded[2] <= whole[0] + 2 * 4 * 512
    assert whole[2] - whole[0] == 6 * layer


def test_a_layer_waits_for_its_copy_and_its_copy_for_the_layer_before_the_last(stream_log: list[str]) -> None:
    held = offload_layers(model(3), META)
    stream_log.clear()
    for index, layer in enumerate(held.layers):
        stream_log.append(f"layer {index} on {layer.attn.q_proj.weight.device}")
    found = [line for line in stream_log if "enter" not in line and "exit" not in line]
    # `main 1` and `main 2` are those of the allocations.
    assert found == [
        "side: wait for main 1", "side: event 1",  # layer 0 to the first slot
        "side: wait for main 2", "side: event 2",  # layer 1 to the second, while layer 0 computes
        "main: wait for side 1", "layer 0 on meta", "main: event 3",
        "side: wait for main 3", "side: event 3",  # layer 2 to the first, after layer 0
        "main: wait for side 2", "layer 1 on meta", "main: event 4",
        "main: wait for side 3", "layer 2 on meta", "main: event 5",
        "side: wait for main 5", "side: event 4",  # layer 0 of the next forward to the first, after layer 2
    ]  # fmt: skip
    assert held.layers[0].attn.q_proj.weight.device == CPU
