"""Tensor parallelism: each process holds some heads, part of the feed-forward and part of the vocabulary (arXiv 1909.08053).

A layer's first projections are sharded by outputs (column-wise) and its last ones by inputs (row-wise), so attention and
feed-forward each need one all-reduce in forward and one in backward. Between the linear layers all tensors are local.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.nn import functional

from kdtune.constants import TP_DIM
from kdtune.models import LoRALinear, Transformer
from kdtune.models.transformer import TransformerLayer


@dataclass(frozen=True)
class _Style:
    """Placement of a module's parameters, input and output on the processes."""

    parameters: Mapping[str, Placement]
    inputs: Placement
    outputs: Placement
    input_gradients: Placement | None = None
    """None: as the inputs, which takes an all-reduce."""


_BY_OUTPUTS = {
    "weight": Shard(0),
    "bias": Shard(0),
    "lora_a.weight": Replicate(),
    "lora_b.weight": Shard(0),
    "magnitude": Shard(0),
}
_BY_INPUTS = {"weight": Shard(1), "lora_a.weight": Shard(1), "lora_b.weight": Replicate(), "magnitude": Replicate()}
# Several of them share an input, whose gradient is summed once, where it came from (`_share_inputs`).
_COLUMN = _Style(_BY_OUTPUTS, Replicate(), Shard(-1), input_gradients=Partial())
_ROW = _Style(_BY_INPUTS, Shard(-1), Replicate())
_VOCABULARY = _Style(_BY_OUTPUTS, Replicate(), Replicate())

# A norm of this process's heads; its gradient, a part of the sum, is reduced with the other gradients.
_HEADS = _Style({"weight": Replicate()}, Shard(2), Shard(2))
_STYLES = {"by_outputs": _COLUMN, "by_inputs": _ROW, "by_heads": _HEADS}


def apply_tensor_parallel(model: Transformer, mesh: DeviceMesh | None) -> None:
    """Shard the model's matrices over the mesh's dimension `tp`, in place; nothing without one.

    Embeddings and head are sharded along the vocabulary. Norms are replicated. Logits are replicated too; the losses read the
    head's weight as a shard. The dimension's size must divide the model's sizes (`tensor_parallel_problem`).
    """
    if mesh is None or TP_DIM not in (mesh.mesh_dim_names or ()):
        return
    mesh = mesh[TP_DIM]
    for layer in model.layers:
        modules = dict(layer.named_modules())
        for name, style in TransformerLayer.TENSOR_PARALLEL.items():
            if style == "shared":
                modules[name].register_forward_hook(partial(_share_inputs, mesh))
            elif name in modules:
                _distribute(modules[name], mesh, _STYLES[style])
    _distribute(model.tok_embeddings, mesh, _VOCABULARY)
    _distribute(model.output, mesh, _VOCABULARY)
    model.tie_weights()


def _share_inputs(mesh: DeviceMesh, _: nn.Module, __: tuple[Tensor, ...], hidden: Tensor) -> Tensor:
    """Pass the hidden states through in forward; all-reduce their gradient in backward, where each process has a part."""
    return DTensor.from_local(hidden, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def _distribute(module: nn.Module, mesh: DeviceMesh, style: _Style) -> None:
    gradients = None if style.input_gradients is None else [style.input_gradients]
    distribute_module(
        module,
        mesh,
        partial(_cut_parameters, style.parameters),
        # Torch's annotation says None; the hook's result takes the place of the inputs.
        lambda _, inputs, mesh: DTensor.from_local(  # type: ignore[arg-type]
            inputs[0], mesh, [style.inputs], run_check=False, grad_placements=gradients
        ),
        lambda _, outputs, __: outputs.redistribute(placements=[style.outputs]).to_local(),
    )
    if isinstance(module, LoRALinear) and module.dropout:
        module.drop = _drop


def _cut_parameters(placements: Mapping[str, Placement], prefix: str, module: nn.Module, mesh: DeviceMesh) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        placement = placements[f"{prefix}.{name}".lstrip(".")]
        # Every process has the same weights, or none yet: no communication is needed.
        cut = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(cut, requires_grad=parameter.requires_grad))


def _drop(inputs: Tensor, probability: float, training: bool) -> Tensor:
    """Apply the dropout that a single process would: every process draws the full mask from the same seed and takes its part."""
    if not training:
        return inputs
    assert isinstance(inputs, DTensor)
    kept = functional.dropout(torch.ones(inputs.shape, dtype=inputs.dtype, device=inputs.device), probability)
    return inputs * distribute_tensor(kept, inputs.device_mesh, inputs.placements, src_data_rank=None)
