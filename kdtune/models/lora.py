"""Adapters: low-rank updates of frozen linear layers, for LoRA, DoRA and QLoRA.

Shape suffixes: O outputs, I inputs, R rank; T tokens, D embedding, V vocabulary, K the width D + R.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from kdtune.errors import ConfigError
from kdtune.models.architecture import TransformerConfig
from kdtune.models.nf4 import check_nf4_shape, dequantized, is_nf4, map_nf4, quantize_nf4
from kdtune.models.transformer import OutputHead, Transformer, soft_capped
from kdtune.tensor_types import is_dtensor

AttnModule = Literal["q_proj", "k_proj", "v_proj", "output_proj"]
ATTN_MODULES: tuple[AttnModule, ...] = ("q_proj", "k_proj", "v_proj", "output_proj")
OUTPUT = "output"


class LoRALinear(nn.Linear):
    """A frozen linear layer with a trainable low-rank update (LoRA, arXiv 2106.09685).

    It computes ``W x + alpha / rank * B A dropout(x)``. With a magnitude (DoRA, arXiv 2402.09353) each output is scaled
    by ``magnitude / |row of W + alpha / rank * B A|``, where the norm is a constant to the gradient (section 4.3 there).
    ``weight`` keeps its name and stays tied to the same parameters; the parameters ``lora_a.weight`` [R, I],
    ``lora_b.weight`` [O, R] and ``magnitude`` [O] have the weight's dtype and device. ``base`` is the layer that is adapted;
    ``use_dora`` adds the magnitude, ``quantize_base`` holds the frozen weight in NF4.
    """

    def __init__(
        self, base: nn.Linear, *, rank: int, alpha: float, dropout: float, use_dora: bool, quantize_base: bool
    ) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha, self.dropout, self.quantize_base = rank, alpha, dropout, quantize_base
        self.drop: Callable[[Tensor, float, bool], Tensor] = functional.dropout
        self.is_adapted = True
        self.lora_a = _empty_linear(base.in_features, rank, base.weight)
        self.lora_b = _empty_linear(rank, base.out_features, base.weight)
        device, dtype = base.weight.device, base.weight.dtype
        self.magnitude = nn.Parameter(torch.empty(base.out_features, device=device, dtype=dtype)) if use_dora else None
        self.train(base.training)
        self.set_base(self.weight)

    @property
    def scaling(self) -> float:
        """Factor of the low-rank update: alpha / rank."""
        return self.alpha / self.rank

    def set_base(self, weight: Tensor) -> None:
        """Set the base weight [O, I], in NF4 with ``quantize_base``, and initialize the adapter.

        The layer then computes the same as its base: A is drawn by :func:`draw_a_`, B is zero, the magnitude is the norm of
        the base's rows.
        """
        if self.quantize_base and not is_nf4(weight):
            self.weight = quantize_nf4(weight)
        elif weight is not self.weight:
            self.weight = nn.Parameter(weight, requires_grad=False)
        with torch.no_grad():
            draw_a_(self.lora_a.weight)
            nn.init.zeros_(self.lora_b.weight)
            if self.magnitude is not None:
                self.magnitude.copy_(torch.linalg.vector_norm(_widened(dequantized(self.weight)), dim=1))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [..., I] to [..., O], in the inputs' dtype."""
        if not self.is_adapted:
            return functional.linear(inputs, self.weight, self.bias)
        outputs = functional.linear(inputs, self.weight) + self.lora_b(self._low_rank(inputs))
        if self.magnitude is not None:
            outputs = outputs * self._gain(self.magnitude).to(outputs.dtype)
        return outputs if self.bias is None else outputs + self.bias

    def merged_weight(self) -> Tensor:
        """Return the weight [O, I] of a plain linear layer that computes the same, in this one's dtype; a new tensor."""
        parts: list[Any] = [self.lora_a.weight, self.lora_b.weight, self.magnitude]
        if not is_dtensor(self.weight):
            # A base in 4 bits may be a copy on every process, beside adapters that lie in shards.
            parts = [part.full_tensor() if is_dtensor(part) else part for part in parts]
        a_RI, b_OR, magnitude_O = parts
        return merged(dequantized(self.weight), a_RI, b_OR, self.scaling, magnitude_O)

    def _low_rank(self, inputs: Tensor) -> Tensor:
        """Return alpha / rank * A dropout(x), [..., R]."""
        return self.lora_a(self.drop(inputs, self.dropout, self.training)) * self.scaling

    def _gain(self, magnitude_O: Tensor) -> Tensor:
        with torch.no_grad():
            adapted_OI = _sum(dequantized(self.weight), self.lora_a.weight, self.lora_b.weight, self.scaling)
            norm_O = torch.linalg.vector_norm(adapted_OI, dim=1)
        return magnitude_O / norm_O

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if not is_nf4(self.weight):
            return super()._apply(fn, recurse)
        weight, self.weight = self.weight, nn.Parameter(torch.empty(0), requires_grad=False)
        super()._apply(fn, recurse)
        self.weight = map_nf4(weight, fn)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if is_nf4(self.weight):
            memo[id(self.weight)] = map_nf4(self.weight, torch.clone)
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        result.__setstate__(copy.deepcopy(self.__dict__, memo))
        return result


class LoRAHead(LoRALinear):
    """An output head with a low-rank update, which the loss can still use chunk by chunk: see ``OutputHead``."""

    def __init__(self, base: nn.Linear, **settings: Any) -> None:
        super().__init__(base, **settings)
        self.softcap = getattr(base, "softcap", None)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] for hidden states [..., D], in their dtype."""
        return soft_capped(super().forward(hidden), self.softcap)

    def projection(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return [T, D + R] and [V, D + R], whose product ``first @ second.T`` is the logits before the soft-cap.

        The low-rank update becomes R more columns, so that it is not lost in half precision.
        """
        if not self.is_adapted:
            return hidden_TD, dequantized(self.weight)
        weight_VK = torch.cat((dequantized(self.weight), self.lora_b.weight), dim=1)
        if self.magnitude is not None:
            weight_VK = weight_VK * self._gain(self.magnitude).to(weight_VK.dtype)[:, None]
        return torch.cat((hidden_TD, self._low_rank(hidden_TD)), dim=1), weight_VK

    def projection_problem(self) -> str | None:
        """Return "has a bias" if it has one; None: it is the product of two plain matrices."""
        return None if self.bias is None else "has a bias"


def apply_lora(
    model: Transformer,
    *,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    lora_attn_modules: Sequence[AttnModule] | None = None,
    apply_lora_to_mlp: bool | None = None,
    apply_lora_to_output: bool = False,
    use_dora: bool = False,
    quantize_base: bool = False,
    lora_modules: Sequence[str] | None = None,
) -> Transformer:
    """Add adapters to the model, in place, and freeze everything else: only the adapters are trainable.

    Only the listed modules get adapters. If neither attention modules nor the feed-forward are listed, the adapted modules are
    q_proj, v_proj, output_proj and the feed-forward.

    Args:
        model: Any decoder, with weights or on the meta device (loading then draws the adapters, from torch's seed).
        lora_rank: Columns of the low-rank update.
        lora_alpha: The update is scaled by ``lora_alpha / lora_rank``.
        lora_dropout: Probability of dropping an input of the update in training; the base sees all inputs.
        lora_attn_modules: The attention modules to adapt in every layer, of q_proj, k_proj, v_proj and output_proj. None: none
            if the feed-forward is listed, else the three above.
        apply_lora_to_mlp: Adapt the three projections of every feed-forward. None: only if lora_attn_modules is not given.
        apply_lora_to_output: Adapt the output head. A tied head stays tied; merging unties it.
        use_dora: Learn each output's magnitude separately from its direction (arXiv 2402.09353).
        quantize_base: Hold the adapted linear layers' own weights in NF4 (QLoRA, arXiv 2305.14314). The embeddings and
            the output head are not quantized: the losses read the head as a plain matrix.
        lora_modules: Of a model that transformers computes, in place of lora_attn_modules and apply_lora_to_mlp: the last parts of
            the names of the layers' linears to adapt, such as query_key_value. None: all of them.

    Returns:
        The same model.

    Raises:
        ConfigError: A value is outside its range, a module's name is unknown, none is chosen, or the model already has adapters.
    """
    _check_settings(lora_rank, lora_alpha, lora_dropout, lora_attn_modules or ())
    if has_adapters(model):
        raise ConfigError("the model has adapters already; apply_lora goes on a model without: merge them first")
    names = model.linear_names(lora_modules, lora_attn_modules, apply_lora_to_mlp)
    names += [OUTPUT] if apply_lora_to_output else []
    if not names:
        raise ConfigError(
            "no module to adapt: lora_attn_modules is empty, apply_lora_to_mlp and apply_lora_to_output are false; "
            "choose at least one"
        )
    bases = {name: _checked_base(model, name, quantize_base and name != OUTPUT) for name in names}
    model.requires_grad_(False)
    for name, base in bases.items():
        kind: type[LoRALinear] = LoRAHead if name == OUTPUT else LoRALinear
        adapted = kind(
            base,
            rank=lora_rank,
            alpha=lora_alpha,
            dropout=lora_dropout,
            use_dora=use_dora,
            quantize_base=quantize_base and name != OUTPUT,
        )
        replace_module(model, name, adapted)
    return model.train(model.training)


def _empty_linear(in_features: int, out_features: int, like: Tensor) -> nn.Linear:
    """Return a linear layer of `like`'s dtype and device with an uninitialized weight: nn.Linear's initialization is not wanted."""
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(torch.empty(out_features, in_features, device=like.device, dtype=like.dtype))
    return linear


def _checked_base(model: Transformer, name: str, quantize: bool) -> nn.Linear:
    base = model.get_submodule(name)
    weight = getattr(base, "weight", None)
    if (
        not isinstance(base, nn.Linear)
        or type(base) not in (nn.Linear, OutputHead)
        or type(weight) not in (nn.Parameter, FakeTensor)
    ):
        raise ConfigError(
            f"{name}: is a {type(base).__name__} whose weight is a {type(weight).__name__}; adapters go on a plain "
            "torch.nn.Linear: load unquantized weights"
        )
    if quantize:
        check_nf4_shape(name, base.weight.shape)
    return base


def _check_settings(rank: int, alpha: float, dropout: float, attn_modules: Sequence[str]) -> None:
    if rank < 1:
        raise ConfigError(f"lora_rank={rank}: must be 1 or more")
    if not 0 < alpha < math.inf:
        raise ConfigError(f"lora_alpha={alpha}: must be above 0")
    if not 0 <= dropout < 1:
        raise ConfigError(f"lora_dropout={dropout}: must be at least 0 and below 1")
    if isinstance(attn_modules, str) or (unknown := [name for name in attn_modules if name not in ATTN_MODULES]):
        found = attn_modules if isinstance(attn_modules, str) else unknown
        raise ConfigError(
            f"lora_attn_modules: {found!r} unknown; a list of {', '.join(ATTN_MODULES)} expected (the feed-forward has "
            "apply_lora_to_mlp, the head apply_lora_to_output)"
        )


def replace_module(model: Transformer, name: str, module: nn.Module) -> None:
    """Replace the module of this name by another one."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def adapted_linears(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the adapted layers by name, such as "layers.0.attn.q_proj"; empty for a model without adapters."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def has_adapters(model: nn.Module) -> bool:
    """Return whether any layer of the model has an adapter."""
    return any(isinstance(module, LoRALinear) for module in model.modules())


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """A context in which the adapted layers compute what their base does; nothing is drawn for a dropout."""
    linears = adapted_linears(model).values()
    for linear in linears:
        linear.is_adapted = False
    try:
        yield
    finally:
        for linear in linears:
            linear.is_adapted = True


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapters' parameters by name: training changes them, and no base checkpoint holds them."""
    return {
        f"{name}.{inner}": parameter
        for name, linear in adapted_linears(model).items()
        for inner, parameter in linear.named_parameters()
        if inner not in ("weight", "bias")
    }


def draw_a_(a_RI: Tensor) -> Tensor:
    """Fill A in place from a uniform distribution, as LoRA's own code does (kaiming, a = sqrt(5)), by torch's seed."""
    return nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5))


def _widened(weight: Tensor) -> Tensor:
    """Return the tensor in fp32, or unchanged if it is wider."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _sum(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
    """Return W + scaling * B A, in fp32 or wider."""
    wide_OI = _widened(weight_OI)
    return torch.addmm(wide_OI, b_OR.to(wide_OI.dtype), a_RI.to(wide_OI.dtype), alpha=scaling)


@torch.no_grad()
def merged(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float, magnitude_O: Tensor | None = None) -> Tensor:
    """Return the weight equivalent to base and adapter, summed in fp32 or wider, then rounded to the weight's dtype."""
    sum_OI = _sum(weight_OI, a_RI, b_OR, scaling)
    if magnitude_O is not None:
        sum_OI *= (magnitude_O.to(sum_OI.dtype) / torch.linalg.vector_norm(sum_OI, dim=1))[:, None]
    return sum_OI.to(weight_OI.dtype)


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
