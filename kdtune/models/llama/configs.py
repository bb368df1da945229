"""Convert model settings from ``config.json``, ``params.json`` and GGUF metadata to ours and back."""

import reprlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdtune.errors import CheckpointError, ConfigError
from kdtune.models.llama.sizes import LLAMA3_1_ROPE, SIZES
from kdtune.models.rope import RopeScaling, inverse_frequencies
from kdtune.models.transformer import TransformerConfig

# Settings that change a Llama's arithmetic in ways this model does not compute, with the values that do not.
_HF_PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0.0, None),
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
}
# Above any setting of a model, and what float64 holds: JSON has integers of any length, and Infinity.
_TOO_LARGE = 2**200

_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_ROPE_SCALING_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def config_from_hf(config: Mapping[str, Any]) -> TransformerConfig:
    """Return the config of the model in a ``config.json``; absent keys get the defaults of transformers' LlamaConfig.

    Reads ``rope_theta`` with ``rope_scaling`` (transformers 4) and ``rope_parameters`` (transformers 5).

    Raises:
        CheckpointError: Another architecture, a missing size, or a setting this model does not compute.
    """
    architectures, model_type = config.get("architectures"), config.get("model_type")
    # LlamaModel is the same model saved without its head, which is missed where the embedding does not take its place.
    if architectures not in (["LlamaForCausalLM"], ["LlamaModel"], None) or (
        not architectures and model_type != "llama"
    ):
        raise CheckpointError(
            f"config.json: architectures={reprlib.repr(architectures)}, model_type={reprlib.repr(model_type)}; want LlamaForCausalLM"
        )
    for key, plain in _HF_PLAIN_VALUES.items():
        if key in config and config[key] not in plain:
            raise CheckpointError(f"config.json: {key}={reprlib.repr(config[key])} is not supported; want {plain[0]!r}")
    embed_dim, num_heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    max_seq_len = _or(_number(config, "max_position_embeddings"), 2048)
    rope_base, rope_scaling = _rope_from_hf(config, max_seq_len)
    return _checked_config(
        "config.json",
        vocab_size=_size(config, "vocab_size"),
        embed_dim=embed_dim,
        num_layers=_size(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_or(_number(config, "num_key_value_heads"), num_heads),
        head_dim=_or(_number(config, "head_dim"), embed_dim // num_heads),
        intermediate_dim=_size(config, "intermediate_size"),
        max_seq_len=max_seq_len,
        norm_eps=_or(_number(config, "rms_norm_eps", kind=float), 1e-6),
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        tie_embeddings=_flag(config, "tie_word_embeddings"),
    )


def config_to_hf(
    config: TransformerConfig, *, base: Mapping[str, Any] | None = None, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """Return a ``config.json`` that transformers 4 and 5 both read as ``config``.

    Args:
        config: The model.
        base: The ``config.json`` the model came from; its other values, such as token ids, are kept.
            Without one add ``bos_token_id`` and ``eos_token_id``: transformers would assume Llama 2's.
        dtype: Dtype of the weights in the same folder, such as "bfloat16".
    """
    dropped = ("transformers_version", "_name_or_path", "quantization_config")
    kept = {key: value for key, value in (base or {}).items() if key not in dropped}
    scaling: dict[str, Any] = {}
    if config.rope_scaling is not None:
        rope = config.rope_scaling
        values = (rope.factor, rope.low_freq_factor, rope.high_freq_factor, rope.original_max_seq_len)
        scaling = dict(zip(_ROPE_SCALING_KEYS, values, strict=True))
    rope_type = "llama3" if scaling else "default"
    return kept | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        # transformers 4 reads these two, transformers 5 the third where the second is null.
        "rope_theta": config.rope_base,
        "rope_scaling": {"rope_type": rope_type, **scaling} if scaling else None,
        "rope_parameters": {"rope_type": rope_type, "rope_theta": config.rope_base, **scaling},
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _rope_from_hf(config: Mapping[str, Any], max_seq_len: int) -> tuple[float, RopeScaling | None]:
    old, new = _settings(config, "rope_scaling"), _settings(config, "rope_parameters")
    for key in old.keys() & new.keys():
        if old[key] != new[key]:
            raise CheckpointError(
                f"config.json: rope_scaling.{key}={reprlib.repr(old[key])} and rope_parameters.{key}={reprlib.repr(new[key])} disagree"
            )
    rope = {**new, **old}
    base = _or(_number(rope, "rope_theta", kind=float), _or(_number(config, "rope_theta", kind=float), 10_000.0))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise CheckpointError(
            f"config.json: rope_type={reprlib.repr(rope_type)} is not supported; want 'default' or 'llama3'"
        )
    if rope.get("partial_rotary_factor", 1.0) not in _HF_PLAIN_VALUES["partial_rotary_factor"]:
        raise CheckpointError(
            f"config.json: partial_rotary_factor={reprlib.repr(rope['partial_rotary_factor'])} is not supported; want 1.0"
        )
    allowed = _ROPE_KEYS | set(_ROPE_SCALING_KEYS if rope_type == "llama3" else ())
    if unknown := sorted(rope.keys() - allowed):
        raise CheckpointError(f"config.json: unknown rope settings {unknown}; {rope_type!r} has {sorted(allowed)}")
    if rope_type == "default":
        return float(base), None
    rope.setdefault("original_max_position_embeddings", max_seq_len)
    if missing := [key for key in _ROPE_SCALING_KEYS if rope.get(key) is None]:
        raise CheckpointError(f"config.json: rope_type 'llama3' without {missing}")
    factor, low, high, original = (_number(rope, key, kind=float) for key in _ROPE_SCALING_KEYS)
    if not low < high:
        raise CheckpointError(
            f"config.json: low_freq_factor={low} and high_freq_factor={high}; want a lower and a higher one"
        )
    return float(base), RopeScaling(float(factor), float(low), float(high), int(original))


_META_KEYS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "multiple_of", "ffn_dim_multiplier",
    "norm_eps", "rope_theta", "use_scaled_rope", "rope_scaling_factor", "max_seq_len", "max_batch_size",
}  # fmt: skip


def config_from_meta(
    params: Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    max_seq_len: int | None = None,
    tie_embeddings: bool | None = None,
) -> TransformerConfig:
    """Return the config of the model that Meta's ``params.json`` describes.

    The file does not contain the context length, whether the head is tied, or the factor of a scaled RoPE. If a published
    size agrees with everything in the file, they are that size's; else 4096, untied and 8 (as in Meta's own code).

    Args:
        params: The parsed file.
        vocab_size: Rows of the embeddings, for Llama 2, whose file says -1.
        max_seq_len: Context length; None: as above.
        tie_embeddings: Tie the head to the embedding; None: as above.

    Raises:
        CheckpointError: A missing or unknown setting.
    """
    if unknown := sorted(params.keys() - _META_KEYS):
        raise CheckpointError(f"params.json: unsupported settings {unknown}; want a text model without quantization")
    dim, num_heads = _size(params, "dim", "params.json"), _size(params, "n_heads", "params.json")
    stated_vocab_size = params.get("vocab_size", -1)
    if type(stated_vocab_size) is not int:
        raise CheckpointError(f"params.json: vocab_size={stated_vocab_size!r}; want an integer")
    stated_vocab_size = _or(vocab_size, -1) if stated_vocab_size <= 0 else stated_vocab_size
    if stated_vocab_size <= 0:
        raise CheckpointError("params.json: no vocab_size; pass the number of rows of tok_embeddings.weight")
    scaled = replace(LLAMA3_1_ROPE, factor=float(params.get("rope_scaling_factor", LLAMA3_1_ROPE.factor)))
    config = _checked_config(
        "params.json",
        vocab_size=stated_vocab_size,
        embed_dim=dim,
        num_layers=_size(params, "n_layers", "params.json"),
        num_heads=num_heads,
        num_kv_heads=_or(_number(params, "n_kv_heads", "params.json"), num_heads),
        head_dim=_or(_number(params, "head_dim", "params.json"), dim // num_heads),
        intermediate_dim=_meta_intermediate_dim(params),
        max_seq_len=4096,
        norm_eps=_size(params, "norm_eps", "params.json", kind=float),
        rope_base=_or(_number(params, "rope_theta", "params.json", kind=float), 10_000.0),
        rope_scaling=scaled if params.get("use_scaled_rope") else None,
        tie_embeddings=False,
    )
    config = next((size for size in SIZES.values() if _stated_by_meta(size) == _stated_by_meta(config)), config)
    if "rope_scaling_factor" in params and config.rope_scaling is not None:
        config = replace(config, rope_scaling=scaled)
    return replace(
        config,
        max_seq_len=_or(max_seq_len, config.max_seq_len),
        tie_embeddings=_or(tie_embeddings, config.tie_embeddings),
    )


def _stated_by_meta(config: TransformerConfig) -> TransformerConfig:
    """Return the config with every field that params.json lacks set to one value."""
    scaling = None if config.rope_scaling is None else LLAMA3_1_ROPE
    return replace(config, max_seq_len=1, tie_embeddings=False, rope_scaling=scaling)


def _meta_intermediate_dim(params: Mapping[str, Any]) -> int:
    """Return two thirds of 4 * dim, times the multiplier, rounded up to a multiple."""
    inner = int(2 * 4 * params["dim"] / 3)
    inner = int(_or(_number(params, "ffn_dim_multiplier", "params.json", kind=float), 1) * inner)
    multiple = _or(_number(params, "multiple_of", "params.json"), 256)
    return -(-inner // multiple) * multiple


def config_from_gguf(
    metadata: Mapping[str, Any], *, tie_embeddings: bool, rope_factors: Tensor | None = None
) -> TransformerConfig:
    """Return the config of the model that a GGUF file's metadata describes.

    Args:
        metadata: Its fields, such as "llama.block_count", as plain Python values.
        tie_embeddings: Whether the file lacks the tensor ``output.weight``.
        rope_factors: The tensor ``rope_freqs.weight``, if the file has one: the divisor of each frequency.

    Raises:
        CheckpointError: Another architecture, a missing size, or a setting this model does not compute.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"GGUF: general.architecture={architecture!r}; want 'llama'")
    llama = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    if llama.get("expert_count"):
        raise CheckpointError(f"GGUF: llama.expert_count={llama['expert_count']} is not supported; want a dense model")
    if llama.get("rope.scaling.type", "none") != "none":
        raise CheckpointError(
            f"GGUF: llama.rope.scaling.type={llama['rope.scaling.type']!r} is not supported; want none"
        )
    embed_dim, num_heads = _size(llama, "embedding_length", "GGUF"), _size(llama, "attention.head_count", "GGUF")
    head_dim = llama.get("attention.key_length", embed_dim // num_heads)
    if llama.get("rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError(
            f"GGUF: llama.rope.dimension_count={llama['rope.dimension_count']}; want head_dim={head_dim}"
        )
    rope_base = float(llama.get("rope.freq_base", 10_000.0))
    return _checked_config(
        "GGUF",
        vocab_size=llama.get("vocab_size") or len(metadata.get("tokenizer.ggml.tokens", ())),
        embed_dim=embed_dim,
        num_layers=_size(llama, "block_count", "GGUF"),
        num_heads=num_heads,
        num_kv_heads=llama.get("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        intermediate_dim=_size(llama, "feed_forward_length", "GGUF"),
        max_seq_len=_size(llama, "context_length", "GGUF"),
        # Stored as a 32-bit float: 1e-5 reads as 9.9999997e-06.
        norm_eps=float(f"{_size(llama, 'attention.layer_norm_rms_epsilon', 'GGUF', kind=float):.7g}"),
        rope_base=rope_base,
        rope_scaling=None if rope_factors is None else _scaling_from_factors(rope_factors, head_dim, rope_base),
        tie_embeddings=tie_embeddings,
    )


def _scaling_from_factors(rope_factors: Tensor, head_dim: int, rope_base: float) -> RopeScaling | None:
    """Return the Llama 3.1 scaling with these divisors (models differ only in its factor); None if all are 1."""
    factors = rope_factors.detach().float().cpu()
    scaling = replace(LLAMA3_1_ROPE, factor=factors.max().item())
    expected = inverse_frequencies(head_dim, rope_base, None) / inverse_frequencies(head_dim, rope_base, scaling)
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-3):
        raise CheckpointError("GGUF: rope_freqs.weight is not a Llama 3.1 frequency scaling; no other is supported")
    return None if scaling.factor == 1.0 else scaling


def _checked_config(source: str, **settings: Any) -> TransformerConfig:
    try:
        return TransformerConfig(**settings)
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _size(config: Mapping[str, Any], key: str, source: str = "config.json", *, kind: type = int) -> Any:
    value = _number(config, key, source, kind=kind)
    if value is None:
        raise CheckpointError(f"{source}: {key} is missing")
    return value


def _number(config: Mapping[str, Any], key: str, source: str = "config.json", *, kind: type = int) -> Any:
    """Return a positive number of the kind (an int passes for a float); None if the key is absent or null."""
    value: Any = config.get(key)
    if value is None:
        return None
    if type(value) not in (int, kind) or not 0 < value < _TOO_LARGE:
        shown = reprlib.repr(value)
        raise CheckpointError(f"{source}: {key}={shown}; want a positive {'integer' if kind is int else 'number'}")
    return kind(value)


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key}={reprlib.repr(value)}; want true or false")
    return value


def _settings(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"config.json: {key}={reprlib.repr(found)}; want an object of settings, or null")
    return found


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
