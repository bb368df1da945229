"""Tensor parallelism: each process holds some heads, part of the feed-forward and part of the vocabulary (arXiv 1909.08053).

A layer's first projections are sharded by outputs (column-wise) and its last ones by inputs (row-wise), so attention and
feed-forward each need one all-reduce in forward and one in backward. Between the linear layers all tensors are local.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

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
    gathers: bool = False
    """Gather the inputs first: every process computes all of the outputs, and goes on with its own."""


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
# A norm over the heads of all processes. DTensor has no norm over a sharded dimension.
_OVER_HEADS = _Style({"weight": Replicate()}, Shard(-1), Shard(-1), gathers=True)
_STYLES = {"by_outputs": _COLUMN, "by_inputs": _ROW, "by_heads": _HEADS, "over_heads": _OVER_HEADS}


def apply_tensor_parallel(model: Transformer, mesh: DeviceMesh | None) -> None:
    """Shard the model's matrices over the mesh's dimension `tp`, in place; nothing without one.

    Embeddings and head are sharded along the vocabulary. Norms are replicated. Logits are replicated too; the losses read the
    head's weight as a shard. The dimension's size must divide the model's sizes (`tensor_parallel_problem`).
    """
    if mesh is None or TP_DIM not in (mesh.mesh_dim_names or ()):
        return
    mesh = mesh[TP_DIM]
    for layer in model.layers:
        modules, styles = dict(layer.named_modules()), dict(TransformerLayer.TENSOR_PARALLEL)
        if model.config.qk_norm:
            styles |= dict.fromkeys(
                ("attn.q_norm", "attn.k_norm"), TransformerLayer.QK_NORM_PARALLEL[model.config.qk_norm]
            )
        for name, style in styles.items():
            if style == "shared":
                modules[name].register_forward_pre_hook(partial(_share_inputs, mesh))
            else:
                _distribute(modules[name], mesh, _STYLES[style])
    _distribute(model.tok_embeddings, mesh, _VOCABULARY)
    _distribute(model.output, mesh, _VOCABULARY)
    model.tie_weights()


def _share_inputs(mesh: DeviceMesh, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pass the first input, the hidden states, through in forward; all-reduce their gradient in backward, each process's part."""
    hidden = DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)
    return (hidden.to_local(grad_placements=[Partial()]), *inputs[1:])


def _distribute(module: nn.Module, mesh: DeviceMesh, style: _Style) -> None:
    gradients = None if style.input_gradients is None else [style.input_gradients]

    def inputs_of(_: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> DTensor:
        hidden = DTensor.from_local(inputs[0], mesh, [style.inputs], run_check=False, grad_placements=gradients)
        return hidden.redistribute(placements=[Replicate()]) if style.gathers else hidden

    distribute_module(
        module,
        mesh,
        partial(_cut_parameters, style.parameters),
        inputs_of,  # type: ignore[arg-type]  # torch's annotation says None; the hook's result takes the place of the inputs
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
