"""How files say the frequencies of rotary embeddings: config.json as transformers 4 and 5 write it, and GGUF metadata."""

import math
import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdtune.errors import CheckpointError
from kdtune.models.architecture import TransformerConfig
from kdtune.models.file_configs import FULL_ATTENTION, WINDOW_ATTENTION, Settings
from kdtune.models.rope import AnyScaling, LinearRope, LongRope, RopeScaling, YarnRope, inverse_frequencies

_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_BY_WAVELENGTH = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": _BY_WAVELENGTH,
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "truncate",
    ),
    "longrope": ("short_factor", "long_factor", "factor", "attention_factor", "original_max_position_embeddings"),
}
_LONGEST_LIST = 2**16


def rope_from_hf(found: Settings, max_seq_len: int) -> tuple[float, AnyScaling | None]:
    """Return base and scaling of the frequencies in a ``config.json``.

    Reads ``rope_theta`` with ``rope_scaling`` (transformers 4) and ``rope_parameters`` (transformers 5).

    Args:
        found: The file's settings.
        max_seq_len: Context length of the model.

    Raises:
        CheckpointError: A setting is missing, or one that the decoder does not compute.
    """
    old, new = found.section("rope_scaling"), found.section("rope_parameters")
    for key in old.keys() & new.keys():
        if old[key] != new[key]:
            raise CheckpointError(
                f"config.json: rope_scaling.{key}={reprlib.repr(old[key])} and rope_parameters.{key}={reprlib.repr(new[key])} disagree"
            )
    rope = {**new, **old}
    read = Settings(rope, found.file)
    base = read.number("rope_theta", found.number("rope_theta", 10_000.0, kind=float), kind=float)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in list(_TYPES):
        raise CheckpointError(
            f"config.json: rope_type={reprlib.repr(rope_type)} is not supported; want {' or '.join(map(repr, _TYPES))}"
        )
    if rope.get("partial_rotary_factor") not in (1.0, None):
        raise CheckpointError(
            f"config.json: partial_rotary_factor={reprlib.repr(rope['partial_rotary_factor'])} is not supported; want 1.0"
        )
    allowed = _COMMON | {*_TYPES[rope_type]}
    if unknown := sorted(rope.keys() - allowed):
        raise CheckpointError(f"config.json: unknown rope settings {unknown}; {rope_type!r} has {sorted(allowed)}")
    # Beside the others in some models' files: transformers takes that one then.
    original = found.number("original_max_position_embeddings") if rope_type == "longrope" else None
    rope["original_max_position_embeddings"] = (
        original or read.number("original_max_position_embeddings") or max_seq_len
    )
    if rope_type == "linear":
        return base, LinearRope(read.size("factor", kind=float))
    if rope_type == "llama3":
        return base, _by_wavelength(read)
    if rope_type == "yarn":
        return base, _yarn_from_hf(read)
    return base, _long_from_hf(read, max_seq_len) if rope_type == "longrope" else None


def _by_wavelength(read: Settings) -> RopeScaling:
    if missing := [key for key in _BY_WAVELENGTH if read.values.get(key) is None]:
        raise CheckpointError(f"config.json: rope_type 'llama3' without {missing}")
    factor, low, high, original = (read.number(key, kind=float) for key in _BY_WAVELENGTH)
    if not low < high:
        raise CheckpointError(
            f"config.json: low_freq_factor={low} and high_freq_factor={high}; want a lower and a higher one"
        )
    return RopeScaling(factor, low, high, int(original))


def _yarn_from_hf(read: Settings) -> YarnRope:
    factor = read.size("factor", kind=float)
    usual = _yarn_attention_factor(factor)
    fast, slow = read.number("beta_fast", 32.0, kind=float), read.number("beta_slow", 1.0, kind=float)
    if not slow < fast:
        raise CheckpointError(f"{read.file}: beta_fast={fast} and beta_slow={slow}; want a higher and a lower one")
    return YarnRope(
        factor,
        read.size("original_max_position_embeddings"),
        read.number("attention_factor", usual, kind=float),
        fast,
        slow,
        truncates=read.flag("truncate") if read.values.get("truncate") is not None else True,
    )


def _yarn_attention_factor(factor: float) -> float:
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _long_from_hf(read: Settings, max_seq_len: int) -> LongRope:
    short, long = (_numbers(read, key) for key in ("short_factor", "long_factor"))
    original = read.size("original_max_position_embeddings")
    factor = read.number("factor", max_seq_len / original, kind=float)
    return LongRope(
        short, long, original, read.number("attention_factor", _attention_factor(factor, original), kind=float)
    )


def _attention_factor(factor: float, original: int) -> float:
    """Return what cosines and sines are multiplied with in a context so many times as long (arXiv 2402.13753)."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0


def _numbers(read: Settings, key: str) -> tuple[float, ...]:
    values = read.values.get(key)
    if not isinstance(values, list) or not 0 < len(values) <= _LONGEST_LIST:
        raise CheckpointError(f"{read.file}: {key}={reprlib.repr(values)}; want a list of positive numbers")
    return tuple(Settings({key: value}, read.file).size(key, kind=float) for value in values)


def rope_to_hf(config: TransformerConfig) -> dict[str, Any]:
    """Return ``rope_type`` and its settings, without the base, as ``rope_parameters`` of a ``config.json`` has them."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_type": "default"}
    if isinstance(scaling, LinearRope):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, RopeScaling):
        values = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_seq_len)
        return {"rope_type": "llama3", **dict(zip(_BY_WAVELENGTH, values, strict=True))}
    original = scaling.original_max_seq_len
    if isinstance(scaling, YarnRope):
        own = {
            "attention_factor": (scaling.attention_factor, _yarn_attention_factor(scaling.factor)),
            "beta_fast": (scaling.beta_fast, 32.0),
            "beta_slow": (scaling.beta_slow, 1.0),
            "truncate": (scaling.truncates, True),
        }
        written = {"rope_type": "yarn", "factor": scaling.factor, "original_max_position_embeddings": original}
        return written | {key: value for key, (value, usual) in own.items() if value != usual}
    usual = _attention_factor(config.max_seq_len / original, original)
    return {
        "rope_type": "longrope",
        "short_factor": list(scaling.short_factors),
        "long_factor": list(scaling.long_factors),
        "original_max_position_embeddings": original,
        **({} if scaling.attention_factor == usual else {"attention_factor": scaling.attention_factor}),
    }


def rope_of_kinds(document: Mapping[str, Any], base_of_windows: float) -> tuple[dict[str, Any], float]:
    """Return a ``config.json`` whose rope settings are those of the layers without a window, and the base of those with one.

    transformers 5 writes them for each kind of layer; in other files the base of the layers with a window is `base_of_windows`, or
    said by another setting. CheckpointError if those layers have more settings than a base.
    """
    rope = Settings(document, "config.json").section("rope_parameters")
    if not rope.keys() & {FULL_ATTENTION, WINDOW_ATTENTION}:
        return dict(document), base_of_windows
    if unknown := sorted(rope.keys() - {FULL_ATTENTION, WINDOW_ATTENTION}):
        raise CheckpointError(f"config.json: rope_parameters has {unknown} beside kinds of layers")
    of_kind = Settings(rope, "config.json: rope_parameters")
    local = Settings(of_kind.section(WINDOW_ATTENTION), f"{of_kind.file}.{WINDOW_ATTENTION}")
    if local.values.get("rope_type", "default") != "default" or local.values.keys() - {"rope_type", "rope_theta"}:
        raise CheckpointError(f"{local.file}={dict(local.values)} is not supported; want 'default' and rope_theta")
    flat = {**document, "rope_parameters": of_kind.section(FULL_ATTENTION)}
    return flat, local.number("rope_theta", base_of_windows, kind=float)


def kinds_to_hf(written: Mapping[str, Any], base_of_windows: float) -> dict[str, Any]:
    """Return ``rope_parameters`` for each kind of layer, from those of the layers without a window."""
    local = {"rope_type": "default", "rope_theta": base_of_windows}
    return {"rope_parameters": {FULL_ATTENTION: written["rope_parameters"], WINDOW_ATTENTION: local}}


def linear_from_gguf(own: Mapping[str, Any], prefix: str) -> LinearRope | None:
    """Return the scaling of GGUF metadata, whose keys lack the architecture that `prefix` is; None without one.

    Raises:
        CheckpointError: Another one than a linear one, or without its factor.
    """
    kind = own.get("rope.scaling.type", "none")
    if kind == "linear":
        return LinearRope(Settings(own, "GGUF").size("rope.scaling.factor", kind=float))
    if kind != "none":
        raise CheckpointError(
            f"GGUF: {prefix}rope.scaling.type={reprlib.repr(kind)} is not supported; want none or 'linear'"
        )
    return None


def scaling_from_factors(rope_factors: Tensor, rotary_dim: int, rope_base: float) -> RopeScaling | None:
    """Return the Llama 3.1 scaling with these divisors (models differ only in its factor); None if all are 1."""
    factors = rope_factors.detach().float().cpu()
    scaling = RopeScaling(factors.max().item(), 1.0, 4.0, 8192)
    expected = inverse_frequencies(rotary_dim, rope_base, None) / inverse_frequencies(rotary_dim, rope_base, scaling)
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-3):
        raise CheckpointError(
            "GGUF: rope_freqs.weight is not the frequency scaling that config.json calls llama3; no other is supported"
        )
    return None if scaling.factor == 1.0 else scaling
