"""Bytes of a model, its gradients and its optimizer state on one rank, from the real sharding without weights."""

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from kdtune.config import instantiate
from kdtune.distributed import Parallelism, World, to_local
from kdtune.errors import ConfigError
from kdtune.models import Transformer, TransformerConfig, dtype_from_name
from kdtune.models.nf4 import BY_ROWS, is_nf4, map_nf4, nf4_parts, quantize_nf4
from kdtune.models.quantization import is_quantized, num_bytes
from kdtune.parallel import shard_model
from kdtune.planner.meta_device import MemoryTracker

# Sizes that no optimizer has of its own, so that what has them in its state has them from the parameter.
_PROBE = (29, 31, 37, 41)


@dataclass(frozen=True)
class FSDPUnit:
    """Parameters that FSDP gathers together (an FSDP unit); bytes on one rank unless stated otherwise."""

    stored: int = 0
    """This rank's shards of the parameters."""
    gradients: int = 0
    """Its shards of their gradients."""
    state: int = 0
    """Its shards of the optimizer's state."""
    whole: int = 0
    """The all-gathered parameters, in the compute dtype; 0 if nothing is gathered."""
    whole_gradients: int = 0
    """The gradients before they are reduced."""
    reduced: int = 0
    """The input of reduce-scatter; 0 without one."""
    all_stored: int = 0
    """The parameters on all ranks, each once."""
    all_trained: int = 0
    """The trained ones among those."""
    all_state: int = 0
    """The optimizer's state on all ranks, each entry once."""

    def plus(self, other: Self, times: int = 1) -> "FSDPUnit":
        """Return the sum of this unit and the other one, times a factor."""
        return FSDPUnit(*(getattr(self, field.name) + times * getattr(other, field.name) for field in fields(FSDPUnit)))


@dataclass(frozen=True)
class ModelSizes:
    """A model on one rank: its layers are alike, the rest (embeddings, norm, head) is another unit."""

    pieces: Transformer
    """One layer and the rest, on the meta device, with a rank's compute shapes and dtypes."""
    num_layers: int
    layer: FSDPUnit
    rest: FSDPUnit
    is_sharded: bool
    """True if FSDP gathers it."""
    parallelism: Parallelism
    layout: tuple[int, ...]
    """Sizes of the mesh: dp_replicate, dp_shard, and any further dimension."""

    @property
    def total(self) -> FSDPUnit:
        """Sum of all units."""
        return self.rest.plus(self.layer, self.num_layers)

    @property
    def num_shards(self) -> int:
        """Number of ranks that a gathered parameter is sharded over."""
        return self.layout[1] if self.is_sharded else 1

    @property
    def reshards(self) -> bool:
        """Return whether a layer's all-gathered parameters are freed after its forward."""
        return self.parallelism.reshard_after_forward

    @property
    def is_offloaded(self) -> bool:
        """Return whether the shards are in CPU memory."""
        return self.is_sharded and self.parallelism.cpu_offload


@dataclass(frozen=True)
class Packed:
    """A state tensor of few bits, as torchao's optimizers have: bytes of a block of values and, besides, of the tensor."""

    block_size: int
    block_bytes: int
    fixed_bytes: int

    def bytes_of(self, num_values: int) -> int | None:
        """Return its bytes for a parameter's local values; None where the optimizer keeps plain state: few, or no whole blocks."""
        if num_values < _LEAST_PACKED or num_values % self.block_size:
            return None
        return num_values // self.block_size * self.block_bytes + self.fixed_bytes


# torchao.optim's own limit, below which state is not quantized.
_LEAST_PACKED = 4096


@dataclass(frozen=True)
class StateTensor:
    """A tensor of a parameter's optimizer state."""

    pattern: tuple[int, ...]
    """For each dimension its size, or -1 - d for the size of the parameter's dimension d."""
    itemsize: int
    packed: Packed | None = None

    def bytes_of(self, shape: Sequence[int]) -> int:
        """Return its bytes for a parameter's (local) shape."""
        size = math.prod(size if size >= 0 else shape[-1 - size] for size in self.pattern)
        is_whole = self.packed is not None and size == math.prod(shape)
        found = self.packed.bytes_of(size) if self.packed is not None and is_whole else None
        return self.itemsize * size if found is None else found


State = dict[str, list[StateTensor]]


def model_sizes(
    model: Transformer, parallelism: Parallelism, world: World, optimizer: Any = None, weight_update: str = "nearest"
) -> ModelSizes:
    """Return the sizes on a rank of a model on the meta device; the model is modified and unusable afterwards.

    Args:
        model: as a run builds it, before it is sharded.
        parallelism: how it is parallelized.
        world: the rank; for several ranks, `fake_world`'s.
        optimizer: component node of its optimizer; None: it is not trained.
        weight_update: how bf16 weights are updated, as in a training config.

    Raises:
        ConfigError: another library computes the model.
    """
    if not isinstance(model.config, TransformerConfig):
        raise ConfigError(
            "plan: a model that transformers computes (family=kdtune.models.hf_model) is not estimated; plan with a model of like sizes "
            "that kdtune computes (docs/models.md)"
        )
    num_layers, model.layers = len(model.layers), model.layers[:1]
    state = {} if optimizer is None else state_shapes(optimizer, _trained(model), weight_update)
    # torchao quantizes an NF4 weight again to copy it.
    pieces = copy.deepcopy(model, {id(one): map_nf4(one, torch.clone) for one in model.parameters() if is_nf4(one)})
    shard_model(model, parallelism, world)
    is_sharded = isinstance(model, FSDPModule)
    shards = parallelism.sizes(world.size)["dp_shard"] if is_sharded else 0
    dtypes = _DTypes(parallelism, is_sharded)
    _take_shapes(pieces, model, dtypes)
    units = {True: FSDPUnit(), False: FSDPUnit()}
    for name, parameter in model.named_parameters():
        unit = _unit(parameter, shards, dtypes, state.get(name, []))
        in_layer = name.startswith("layers.")
        units[in_layer] = units[in_layer].plus(unit)
    layout = tuple(parallelism.sizes(world.size).values())
    return ModelSizes(pieces, num_layers, units[True], units[False], is_sharded, parallelism, layout)


@dataclass(frozen=True)
class _DTypes:
    """Dtypes in which FSDP gathers and reduces."""

    parallelism: Parallelism
    is_sharded: bool

    def compute(self, dtype: torch.dtype) -> torch.dtype:
        name = self.parallelism.param_dtype if self.is_sharded else None
        return dtype_from_name(name) if name and dtype.is_floating_point else dtype

    def reduce(self, dtype: torch.dtype) -> torch.dtype:
        name = self.parallelism.reduce_dtype
        return dtype_from_name(name) if name else torch.promote_types(dtype, torch.float32)


def _unit(parameter: Tensor, shards: int, dtypes: _DTypes, state: list[StateTensor]) -> FSDPUnit:
    own, dtype, trained = to_local(parameter), parameter.dtype, parameter.requires_grad
    senders = shards if isinstance(parameter, DTensor) else 0
    gathered = senders * _num_padded(parameter)
    whole = math.prod(shape_in_use(parameter))
    return FSDPUnit(
        stored=num_bytes(own),
        gradients=_bytes(own) * trained,
        state=sum(one.bytes_of(own.shape) for one in state),
        whole=senders * _rows_bytes(own) if is_nf4(own) else gathered * dtypes.compute(dtype).itemsize,
        whole_gradients=whole * dtypes.compute(dtype).itemsize * trained,
        reduced=gathered * dtypes.reduce(dtype).itemsize * trained,
        all_stored=parameter.numel() * dtype.itemsize,
        all_trained=parameter.numel() * dtype.itemsize * trained,
        all_state=sum(one.bytes_of(parameter.shape) for one in state),
    )


def _rows_bytes(weight: Tensor) -> int:
    """Return the bytes that are sent of an NF4 weight."""
    return sum(_bytes(part) for name, part in nf4_parts(weight).items() if name in BY_ROWS)


def _num_padded(parameter: Tensor) -> int:
    """Return the number of values of a parameter's largest shard, which every rank sends."""
    rows = shape_in_use(parameter)[0]
    shards = _ranks(parameter, "dp_shard") if isinstance(parameter, DTensor) else 1
    return -(-rows // shards) * math.prod(to_local(parameter).shape[1:])


def _ranks(parameter: DTensor, name: str) -> int:
    mesh = parameter.device_mesh
    names = mesh.mesh_dim_names or ()
    return mesh.size(names.index(name)) if name in names else 1


def shape_in_use(parameter: Tensor) -> torch.Size:
    """Return the parameter's shape in computation: gathered by FSDP, still sharded by tensor parallelism."""
    shape = list(parameter.shape)
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for index, (name, placement) in enumerate(zip(mesh.mesh_dim_names or (), parameter.placements, strict=True)):
            if not name.startswith("dp_") and placement.is_shard():
                dimension = placement.dim  # type: ignore[attr-defined]
                shape[dimension] = -(-shape[dimension] // mesh.size(index))
    return torch.Size(shape)


def _take_shapes(pieces: nn.Module, sharded: nn.Module, dtypes: _DTypes) -> None:
    """Give the pieces the shapes and dtypes that the sharded model's parameters have in computation."""
    made: dict[Tensor, nn.Parameter] = {}
    for name, parameter in sharded.named_parameters(remove_duplicate=False):
        if parameter not in made:
            if not is_nf4(parameter) and is_quantized(to_local(parameter)):
                continue  # it is not divided, and the pieces have it
            # torchao gathers NF4 weights quantized and dequantizes them in their own dtype, whatever FSDP's compute dtype is.
            dtype = parameter.dtype if is_nf4(parameter) else dtypes.compute(parameter.dtype)
            empty = torch.empty(shape_in_use(parameter), dtype=dtype, device="meta")
            made[parameter] = (
                quantize_nf4(empty) if is_nf4(parameter) else nn.Parameter(empty, requires_grad=parameter.requires_grad)
            )
        path, _, leaf = name.rpartition(".")
        setattr(pieces.get_submodule(path), leaf, made[parameter])


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def state_shapes(optimizer: Any, trained: Sequence[tuple[str, nn.Parameter]], weight_update: str = "nearest") -> State:
    """Return an optimizer's state per parameter, from a step on small ones of the same names and dtypes.

    weight_update: how bf16 weights are updated: not to nearest, they have state of fp32, and with fp32_master a copy.
    """
    instance, small = _stepped(optimizer, trained, weight_update)
    packed = _packed(optimizer) if hasattr(instance, "block_size") else None
    found: State = {}
    for (name, parameter), (_, real) in zip(small.items(), trained, strict=True):
        found[name] = [
            StateTensor(_pattern(value.shape, parameter.shape), value.element_size(), packed if value.ndim else None)
            for value in _tensors(instance, parameter)
        ]
        if weight_update == "fp32_master" and real.dtype == torch.bfloat16:
            found[name].append(StateTensor(tuple(-1 - index for index in range(real.ndim)), torch.float32.itemsize))
    return found


def _packed(optimizer: Any) -> Packed | None:
    """Return the form of torchao's quantized state, from steps on two parameters that are large enough to have it."""
    sizes, block_size = [], 0
    for rows in (64, 128):
        parameter = nn.Parameter(torch.ones(rows, 4096))
        instance, small = _stepped(optimizer, [("layers.0.weight", parameter)], resize=False)
        block_size = instance.block_size  # type: ignore[attr-defined]
        sizes.append(num_bytes(next(value for value in _tensors(instance, small["layers.0.weight"]) if value.ndim)))
    block_bytes = (sizes[1] - sizes[0]) // (64 * 4096 // block_size)
    return Packed(block_size, block_bytes, sizes[0] - 64 * 4096 // block_size * block_bytes)


def update_bytes(
    optimizer: Any, sizes: ModelSizes, device_type: str, weight_update: str = "nearest", *, in_backward: bool = False
) -> int:
    """Estimate the temporary bytes of the optimizer's step, from a step on small parameters.

    weight_update: how bf16 weights are updated: not to nearest, each is in fp32 meanwhile, with its gradient. in_backward: one
    parameter is updated at a time.
    """
    trained = _trained(sizes.pieces)
    instance, small = _stepped(optimizer, trained, weight_update)
    group = instance.param_groups[0]
    is_widened = weight_update != "nearest" and any(one.dtype == torch.bfloat16 for _, one in trained)
    # Of plain tensors on a GPU, torch updates all at once unless told not to.
    at_once = (
        not in_backward
        and not is_widened
        and (
            group.get("foreach")
            or (device_type == "cuda" and not sizes.is_sharded and "foreach" in group and not group.get("fused"))
        )
    )
    live = MemoryTracker()
    live.ignore(*small.values(), *(parameter.grad for parameter in small.values()))
    live.ignore(*(value for parameter in small.values() for value in _tensors(instance, parameter)))
    with live:
        instance.step()
    if at_once:
        return sizes.total.gradients * live.peak // sum(map(_bytes, small.values()))
    widest = max(parameter.numel() for _, parameter in trained) // max(1, sizes.num_shards)
    largest = max(small.values(), key=_bytes)
    # Of a widened weight, itself, its gradient and, while it is rounded, its random bits.
    widened = 3 * torch.float32.itemsize * widest if is_widened else 0
    return widened + widest * live.peak // largest.numel()


def _stepped(
    optimizer: Any, trained: Sequence[tuple[str, nn.Parameter]], weight_update: str = "nearest", *, resize: bool = True
) -> tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]:
    """Return the optimizer after a step on small parameters of the same names and dtypes, and these parameters."""
    small = {name: _small(parameter, weight_update) if resize else parameter for name, parameter in trained}
    instance: torch.optim.Optimizer = instantiate(optimizer, params=list(small.items()))
    for parameter in small.values():
        parameter.grad = torch.ones_like(parameter)
    # torchao would compile the step for each shape.
    with torch.compiler.set_stance("force_eager") if hasattr(instance, "block_size") else nullcontext():
        instance.step()
    return instance, small


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _small(parameter: Tensor, weight_update: str) -> nn.Parameter:
    is_widened = weight_update != "nearest" and parameter.dtype == torch.bfloat16
    return nn.Parameter(torch.ones(_PROBE[: parameter.ndim], dtype=torch.float32 if is_widened else parameter.dtype))


def _tensors(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    return [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]


def _pattern(shape: Sequence[int], parameter_shape: Sequence[int]) -> tuple[int, ...]:
    sizes = list(parameter_shape)
    return tuple(-1 - sizes.index(size) if size in sizes else size for size in shape)
