"""Matrix products of a trained model in float8, by torchao; its weights, their gradients and the optimizer's state stay as they are."""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from kdtune.errors import ConfigError
from kdtune.models.lora import has_adapters
from kdtune.models.nf4 import quiet_torchao
from kdtune.models.transformer import Transformer

Float8Recipe = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]
"""torchao's recipes: a scale per tensor, a scale per row, or that with the products for the weights' gradients in their own dtype."""

# The CUDA compute capability that a recipe's products need: 8.9 is Ada, 9.0 Hopper.
_CAPABILITIES: dict[Float8Recipe, tuple[int, int]] = {
    "tensorwise": (8, 9),
    "rowwise": (9, 0),
    "rowwise_with_gw_hp": (9, 0),
}
# What the products need sizes to be a multiple of; the number of tokens is padded to it.
_MULTIPLE = 16


def float8_problems(recipe: Float8Recipe, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return why a model that computes in `dtype` cannot be trained by the recipe on the device; loads nothing."""
    needed, advice = _CAPABILITIES[recipe], "; leave it out"
    if device.type != "cuda":
        return [f"needs a CUDA device of compute capability {_text(needed)} or newer, not {device.type}{advice}"]
    found = torch.cuda.get_device_capability(device)
    if found < needed:
        if found >= _CAPABILITIES["tensorwise"]:
            advice = "; use tensorwise"
        return [f"needs compute capability {_text(needed)}, {torch.cuda.get_device_name(device)} has {_text(found)}{advice}"]  # fmt: skip
    if recipe != "tensorwise" and dtype != torch.bfloat16:
        return [f"its products are in bf16, the model computes in {str(dtype).removeprefix('torch.')}; use dtype=bf16"]
    return []


def apply_float8(model: Transformer, recipe: Float8Recipe) -> None:
    """Make the linears of the layers multiply in float8 (e4m3, in backward also e5m2), with scales found anew in each product.

    In place; weights and their names stay. The head, the embedding and linears with a size that is no multiple of 16 are left
    out. Apply it before activation checkpointing, compilation and ``fully_shard``, which then gathers weights in their own dtype.

    Raises:
        ConfigError: the model has adapters, whose base is frozen, or no linear of a size that fits.
    """
    if has_adapters(model):
        raise ConfigError(
            f"float8_training={recipe}: the model has adapters, and linears with one are not converted; leave it out"
        )
    fitting = {module for module in model.layers.modules() if _fits(module)}
    if not fitting:
        raise ConfigError(
            f"float8_training={recipe}: no linear of the model's layers has sizes that are multiples of {_MULTIPLE}; leave it out"
        )
    with quiet_torchao():
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    config = replace(Float8LinearConfig.from_recipe_name(recipe), pad_inner_dim=True)
    convert_to_float8_training(model, module_filter_fn=lambda module, _: module in fitting, config=config)


def _fits(module: nn.Module) -> bool:
    return type(module) is nn.Linear and all(size % _MULTIPLE == 0 for size in module.weight.shape)


def _text(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
