"""Merge adapters into the weights: in the model, or only in saved files."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from kdtune.errors import ConfigError
from kdtune.models.architecture import TransformerConfig
from kdtune.models.lora import OUTPUT, LoRAHead, LoRALinear, adapted_linears, adapter_parameters, replace_module
from kdtune.models.transformer import OutputHead, Transformer


def merge_adapters(model: Transformer) -> Transformer:
    """Merge the adapters into the weights, in place: plain linear layers that compute the same.

    The sums are computed in fp32 or wider and rounded once to the weights' dtype. An NF4 base becomes a plain weight of the
    model's dtype. A tied head that was adapted gets a weight of its own, and the model's config says so.

    Args:
        model: Loses its adapters; frozen parameters stay frozen.

    Raises:
        ConfigError: The model has no adapters.
    """
    linears = _checked(model)
    model.config = merged_config(model)
    for name, linear in linears.items():
        replace_module(model, name, _plain(linear))
    return model


def merged_config(model: Transformer) -> TransformerConfig:
    """Return the config of the model with its adapters merged: a tied head that is adapted is untied."""
    return replace(model.config, tie_embeddings=False) if OUTPUT in adapted_linears(model) else model.config


def merged_weights(model: Transformer) -> dict[str, Callable[[], Tensor]]:
    """Return functions that compute the weights of the model with merged adapters, by name; the model is unchanged.

    For a model without adapters they return its own weights. A tied head is omitted.
    """
    linears = adapted_linears(model)
    adapters = adapter_parameters(model)
    tied = merged_config(model).tie_embeddings
    weights: dict[str, Callable[[], Tensor]] = {}
    for name, tensor in model.state_dict().items():
        linear = linears.get(name.removesuffix(".weight"))
        if linear is not None:
            weights[name] = linear.merged_weight
        elif name not in adapters and not (tied and name == f"{OUTPUT}.weight"):
            weights[name] = tensor.detach
    return weights


def untie_head(model: Transformer) -> Transformer:
    """Give a tied output head its own copy of the weight, in place, and record it in the config."""
    if model.config.tie_embeddings:
        shared = model.output.weight
        model.output.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
        model.config = replace(model.config, tie_embeddings=False)
    return model


def _checked(model: Transformer) -> dict[str, LoRALinear]:
    linears = adapted_linears(model)
    if not linears:
        raise ConfigError("the model has no adapters to merge; apply_lora or an adapter_dir gives it some")
    return linears


def _plain(linear: LoRALinear) -> nn.Linear:
    with torch.device("meta"):
        if isinstance(linear, LoRAHead):
            plain: nn.Linear = OutputHead(linear.in_features, linear.out_features, softcap=linear.softcap)
        else:
            plain = nn.Linear(linear.in_features, linear.out_features, bias=False)
    plain.weight = nn.Parameter(linear.merged_weight(), requires_grad=False)
    plain.bias = linear.bias
    return plain.train(linear.training)
