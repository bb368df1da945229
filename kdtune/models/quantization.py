"""Quantize linear weights to 8 or 4 bits by torchao, for inference.

The linears of the layers are quantized. The embedding, the norms and, unless asked for, an untied head are not
quantized: they are small compared to the layers, or they decide which token comes out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdtune.errors import ConfigError
from kdtune.models import nf4
from kdtune.models.architecture import TransformerConfig
from kdtune.models.nf4 import quiet_torchao
from kdtune.models.transformer import Transformer, on_meta_device
from kdtune.tensor_types import is_plain


@dataclass(frozen=True)
class Scheme:
    """A quantization scheme for a linear's weight."""

    description: str
    group_sizes: tuple[int, ...] = ()
    """Allowed numbers of input features that share a scale; empty: not configurable."""
    default_group_size: int | None = None
    lowest_capability: tuple[int, int] | None = None
    """Required CUDA compute capability; None: it also works on a CPU."""
    weight_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


SCHEMES: dict[str, Scheme] = {
    "int8_weight_only": Scheme("int8 weights, a scale per row; the arithmetic stays as it is"),
    "int8_dynamic": Scheme("int8 weights and, token by token, int8 inputs: integer matrix products"),
    "float8_weight_only": Scheme("float8 (e4m3) weights, a scale per row"),
    "float8_dynamic": Scheme("float8 weights and inputs: float8 matrix products", lowest_capability=(8, 9)),
    "int4_weight_only": Scheme(
        "4-bit weights, two in a byte, a scale and a zero point per group",
        (32, 64, 128, 256),
        128,
        (8, 0),
        (torch.bfloat16,),
    ),
    "intx_4bit": Scheme(
        "4-bit values held one in a byte, a scale per group: the error of 4 bits without their memory",
        (16, 32, 64, 128, 256),
        32,
    ),
    "nf4": Scheme("4-bit normal float, two in a byte, scales quantized too (QLoRA's format)"),
}
SHORT_NAMES = {"int8": "int8_weight_only", "float8": "float8_weight_only", "int4": "int4_weight_only"}


@dataclass(frozen=True)
class LayerError:
    """Quantization error of one weight."""

    name: str
    relative_error: float
    """Frobenius norm of the difference, divided by that of the weight."""


def scheme_name(name: str) -> str:
    """Return the name in SCHEMES of a scheme that a config may name shortly; any other name is unchanged."""
    return SHORT_NAMES.get(name, name)


def scheme_problems(scheme: str, device: torch.device, dtype: torch.dtype, group_size: int | None = None) -> list[str]:
    """Return why weights of `dtype` cannot be quantized with the scheme on `device`, or used there; loads nothing."""
    scheme = scheme_name(scheme)
    if scheme not in SCHEMES:
        return [f"scheme={scheme}: unknown; one of {', '.join(SCHEMES)}, or shortly {', '.join(SHORT_NAMES)}"]
    found = SCHEMES[scheme]
    problems = []
    if lack := _lack(found, device):
        works = [name for name, other in SCHEMES.items() if not _lack(other, device)]
        problems.append(f"scheme={scheme}: {lack}; here {', '.join(works)} work")
    if dtype not in found.weight_dtypes:
        names = " or ".join(str(each).removeprefix("torch.") for each in found.weight_dtypes)
        problems.append(f"scheme={scheme}: needs weights of {names}; dtype is {str(dtype).removeprefix('torch.')}")
    if group_size is not None and group_size not in found.group_sizes:
        allowed = f"one of {', '.join(map(str, found.group_sizes))}" if found.group_sizes else "null: it has no groups"
        problems.append(f"group_size={group_size}: with {scheme} {allowed}")
    return problems


def shape_problems(
    scheme: str, config: TransformerConfig, group_size: int | None = None, *, quantize_output: bool = False
) -> list[str]:
    """Return which linears of the model have a shape that the (known) scheme cannot hold; reads no weights."""
    scheme = scheme_name(scheme)
    if not isinstance(config, TransformerConfig):
        return [
            f"scheme={scheme}: a model that transformers computes is not quantized; leave it out, or give a model of a family that "
            "kdtune computes (docs/models.md)"
        ]
    if quantize_output and config.tie_embeddings:
        return ["quantize_output=true: the head is the embedding (tied), which stays as it is; set it to false"]
    with on_meta_device():
        linears = target_linears(Transformer(config), quantize_output=quantize_output)
    unit = nf4.BLOCK_SIZE if scheme == "nf4" else group_size or SCHEMES[scheme].default_group_size or 1
    for name, linear in linears.items():
        size = linear.weight.numel() if scheme == "nf4" else linear.in_features
        if size % unit:
            what = "weights" if scheme == "nf4" else "input features"
            return [f"scheme={scheme}: {name} has {size} {what}, not a multiple of {unit}; choose another "
                    f"{'scheme' if scheme == 'nf4' else 'group_size'}"]  # fmt: skip
    return []


def target_linears(model: Transformer, *, quantize_output: bool = False) -> dict[str, nn.Linear]:
    """Return the linears of the layers by name, and with `quantize_output` the head."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not quantize_output:
        del found["output"]
    return found


def quantize(
    model: Transformer,
    scheme: str,
    *,
    group_size: int | None = None,
    quantize_output: bool = False,
    progress: Callable[[str], object] | None = None,
) -> list[LayerError]:
    """Quantize the linears in place, one at a time, and freeze the model; return each one's error.

    Args:
        model: on the device it will be used on.
        scheme: one of SCHEMES, or its short name.
        group_size: input features that share a scale; None: the scheme's own.
        quantize_output: also quantize an untied head.
        progress: called with the name of each linear when it is done.

    Raises:
        ConfigError: the scheme does not work for this model, dtype or device (see `scheme_problems`,
            `shape_problems`), or left a weight unquantized.
    """
    scheme = scheme_name(scheme)
    problems = scheme_problems(scheme, model.device, model.dtype, group_size)
    if problems := problems or shape_problems(scheme, model.config, group_size, quantize_output=quantize_output):
        raise ConfigError("\n".join(problems))
    quantize_linear = linear_quantizer(scheme, group_size)
    errors = []
    for name, linear in target_linears(model, quantize_output=quantize_output).items():
        original = linear.weight.detach()
        quantize_linear(name, linear)
        errors.append(LayerError(name, _relative_error(original, linear.weight)))
        if progress is not None:
            progress(name)
    model.requires_grad_(False)
    return errors


def is_quantized(weight: Tensor) -> bool:
    """Return whether the weight is one of torchao's tensors and not plain numbers."""
    return not is_plain(weight)


def dequantized(weight: Tensor) -> Tensor:
    """Dequantize a weight to plain numbers, in the dtype it shows."""
    return nf4.dequantized(weight) if nf4.is_nf4(weight) else weight.dequantize()


def parts(weight: Tensor) -> list[Tensor]:
    """Return the plain tensors that a weight consists of, in the order of `map_parts`: itself, or its numbers and scales."""
    if not is_quantized(weight):
        return [weight]
    names, _ = weight.__tensor_flatten__()  # type: ignore[attr-defined]
    return [getattr(weight, name) for name in names]


def map_parts(weight: Tensor, function: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """Return the frozen weight with a function, such as a copy to another device, applied to each of its `parts`."""
    if nf4.is_nf4(weight):
        return nf4.map_nf4(weight, function)
    if not is_quantized(weight):
        return nn.Parameter(function(weight.detach()), requires_grad=False)
    packed: Any = weight.detach()
    names, context = packed.__tensor_flatten__()
    mapped = {name: function(part) for name, part in zip(names, parts(packed), strict=True)}
    made = type(packed).__tensor_unflatten__(mapped, context, packed.size(), packed.stride())
    return nn.Parameter(made, requires_grad=False)


def num_bytes(weight: Tensor) -> int:
    """Return the bytes that the weight takes in memory, with its scales."""
    return sum(part.nbytes for part in parts(weight))


def megabytes(model: nn.Module) -> float:
    """Return the millions of bytes that the model's weights take, a tied one once."""
    return sum(num_bytes(parameter) for parameter in model.parameters()) / 1e6


def _lack(scheme: Scheme, device: torch.device) -> str | None:
    if device.type not in ("cpu", "cuda"):
        return f"quantized weights are not supported on {device.type}"
    if scheme.lowest_capability is None:
        return None
    needed = "needs a CUDA device of compute capability {}.{} or higher".format(*scheme.lowest_capability)
    if device.type != "cuda":
        return f"{needed}; the device is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < scheme.lowest_capability:
        return f"{needed}; {torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
    return None


def linear_quantizer(scheme: str, group_size: int | None = None) -> Callable[[str, nn.Linear], None]:
    """Return a function that quantizes a linear in place, on any device (also on the meta device), given its name for errors.

    `scheme` and `group_size` have passed `scheme_problems`. The function raises ConfigError if torchao leaves a weight as it was.
    """
    scheme = scheme_name(scheme)
    with quiet_torchao():
        from torchao.quantization import quantize_
    config = None if scheme == "nf4" else _torchao_config(scheme, group_size or SCHEMES[scheme].default_group_size)

    def quantize_linear(name: str, linear: nn.Linear) -> None:
        if config is None:
            linear.weight = nf4.quantize_nf4(linear.weight)
        else:
            quantize_(linear, config, filter_fn=lambda module, _: module is linear)
        if not is_quantized(linear.weight):
            raise ConfigError(
                f"scheme={scheme}: torchao left {name}, shape {list(linear.weight.shape)}, as it was; choose another scheme"
            )
        linear.weight.requires_grad_(False)

    return quantize_linear


def _torchao_config(scheme: str, group_size: int | None) -> Any:
    from torchao import quantization
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    match scheme:
        case "int8_weight_only":
            return quantization.Int8WeightOnlyConfig()
        case "int8_dynamic":
            return quantization.Int8DynamicActivationInt8WeightConfig()
        case "float8_weight_only":
            return quantization.Float8WeightOnlyConfig()
        case "float8_dynamic":
            return quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
        case "int4_weight_only":
            # The packing that needs no package beside torch.
            packing = Int4PackingFormat.TILE_PACKED_TO_4D
            return quantization.Int4WeightOnlyConfig(group_size=group_size, int4_packing_format=packing)
        case _:
            granularity = quantization.PerGroup(group_size)
            return quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity)  # type: ignore[attr-defined]


def _relative_error(original: Tensor, quantized: Tensor) -> float:
    difference = dequantized(quantized.detach()).float() - original.float()
    return (difference.norm() / original.float().norm()).item()
