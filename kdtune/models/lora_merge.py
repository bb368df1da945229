"""Adapters merged into the weights, for good, for a while, or only into what is saved."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from kdtune.errors import ConfigError
from kdtune.models.lora import OUTPUT, LoRALinear, adapted_linears, adapter_parameters, replace_module
from kdtune.models.transformer import Transformer, TransformerConfig

_MERGED_FROM = "_merged_from"


def merge_adapters(model: Transformer, *, keep_base: bool = False) -> Transformer:
    """Folds the adapters into the weights, in place: plain linear layers that compute the same.

    The sums are made in fp32 or wider and rounded to the weights' dtype once. An NF4 base becomes a plain weight of the
    model's dtype. A tied head that was adapted gets a weight of its own, and the model's config says so.

    Args:
        model: Loses its adapters; what was frozen stays frozen.
        keep_base: Keep base weights and adapters aside, so that :func:`unmerge_adapters` can bring them back bit for
            bit. This costs the memory of the adapted layers once more, on the device where they are.

    Raises:
        ConfigError: The model has no adapters.
    """
    linears = _checked(model)
    config, model.config = model.config, merged_config(model)
    for name, linear in linears.items():
        replace_module(model, name, _plain(linear))
    if keep_base:
        # A plain attribute: not among the parameters, nor in the state dict.
        object.__setattr__(model, _MERGED_FROM, (config, linears))
    return model


def unmerge_adapters(model: Transformer) -> Transformer:
    """Undoes ``merge_adapters(model, keep_base=True)``: base weights, adapters and tie are what they were, bit for bit.

    What was done to the merged weights since then is lost.

    Raises:
        ConfigError: The model was not merged, or without ``keep_base``.
    """
    if _MERGED_FROM not in vars(model):
        raise ConfigError(
            "the model cannot be unmerged: no base was kept; merge with merge_adapters(model, keep_base=True)"
        )
    config, linears = vars(model).pop(_MERGED_FROM)
    for name, linear in linears.items():
        replace_module(model, name, linear)
    model.config = config
    return model


@contextmanager
def merged_adapters(model: Transformer) -> Iterator[Transformer]:
    """The model with its adapters merged while the block lasts, such as for generating faster; afterwards as before."""
    merge_adapters(model, keep_base=True)
    try:
        yield model
    finally:
        unmerge_adapters(model)


def merged_config(model: Transformer) -> TransformerConfig:
    """The config of the model with its adapters merged: a tied head that is adapted is untied."""
    return replace(model.config, tie_embeddings=False) if OUTPUT in adapted_linears(model) else model.config


def merged_weights(model: Transformer) -> dict[str, Callable[[], Tensor]]:
    """The weights of the model with its adapters merged, by name, each computed when called; the model stays as it is.

    For a model without adapters its own weights. A tied head is left out.
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
    """Gives a tied output head a copy of the weight of its own, in place; the config says so."""
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
        plain = nn.Linear(linear.in_features, linear.out_features, bias=False)
    plain.weight = nn.Parameter(linear.merged_weight(), requires_grad=False)
    plain.bias = linear.bias
    return plain.train(linear.training)
