"""A model's settings in its files: read and write config.json as transformers does, and read GGUF metadata; for any family."""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kdtune.errors import CheckpointError, ConfigError
from kdtune.models.architecture import MOST_LAYERS, Family, TransformerConfig
from kdtune.models.rope import AnyScaling

# Settings that change a decoder's arithmetic in ways that ours does not compute, with the values that do not.
_PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0.0, None),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
}
FULL_ATTENTION = "full_attention"
WINDOW_ATTENTION = "sliding_attention"

# Divisors of the frequencies are computed from the config by the model, but their tensors are the only place where a GGUF file
# says how the frequencies are scaled: their names, and those of the arguments that a family's `config_from_gguf` takes them as.
ROPE_FACTORS = "rope_freqs.weight"
SHORT_ROPE_FACTORS, LONG_ROPE_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
GGUF_FACTORS = {
    ROPE_FACTORS: "rope_factors",
    SHORT_ROPE_FACTORS: "rope_short_factors",
    LONG_ROPE_FACTORS: "rope_long_factors",
}

# Above any setting of a model, and what float64 holds: JSON has integers of any length, and Infinity.
_TOO_LARGE = 2**200


class Settings:
    """Settings by key, and the file that they are from, which begins each error."""

    def __init__(self, values: Mapping[str, Any], file: str) -> None:
        self.values, self.file = values, file

    def size(self, key: str, *, kind: type = int) -> Any:
        """Return a positive number of the kind; CheckpointError if the key is absent or has another value."""
        value = self.number(key, kind=kind)
        if value is None:
            raise CheckpointError(f"{self.file}: {key} is missing")
        return value

    def num_layers(self, key: str = "num_hidden_layers") -> int:
        """Return the number of layers; CheckpointError for one so large that a list of layers would fill the memory."""
        value: int = self.size(key)
        if value > MOST_LAYERS:
            raise CheckpointError(f"{self.file}: {key}={reprlib.repr(value)}; want at most {MOST_LAYERS}")
        return value

    def number(self, key: str, default: Any = None, *, kind: type = int) -> Any:
        """Return a positive number of the kind (an int passes for a float); the default if the key is absent or null."""
        value: Any = self.values.get(key)
        if value is None:
            return default
        if type(value) not in (int, kind) or not 0 < value < _TOO_LARGE:
            wanted = f"want a positive {'integer' if kind is int else 'number'}"
            raise CheckpointError(f"{self.file}: {key}={reprlib.repr(value)}; {wanted}")
        return kind(value)

    def flag(self, key: str) -> bool:
        """Return a bool; False if the key is absent."""
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.file}: {key}={reprlib.repr(value)}; want true or false")
        return value

    def section(self, key: str) -> Mapping[str, Any]:
        """Return the settings below a key; empty if it is absent or null."""
        found = self.values.get(key) or {}
        if not isinstance(found, Mapping):
            raise CheckpointError(f"{self.file}: {key}={reprlib.repr(found)}; want an object of settings, or null")
        return found

    def config(self, **fields: Any) -> TransformerConfig:
        """Return the config with these fields; CheckpointError for values that do not go together."""
        try:
            return TransformerConfig(**fields)
        except ConfigError as error:
            raise CheckpointError(f"{self.file}: {error}") from error


def config_from_hf(
    family: Family, document: Mapping[str, Any], *, windows: tuple[int | None, ...] | None = None, **switches: Any
) -> TransformerConfig:
    """Return the config of the model of that family in a ``config.json``.

    Absent keys get the family's ``hf_defaults``, then the defaults of transformers' LlamaConfig.

    Args:
        family: The family.
        document: The parsed file.
        windows: `TransformerConfig.windows`, of a family that has some; None: a window in the file is refused.
        **switches: Further switches of `TransformerConfig`, beside the family's.

    Raises:
        CheckpointError: A missing size, or a setting this model does not compute.
    """
    from kdtune.models.rope_settings import rope_from_hf  # once a run reads a model's file

    document = {**family.hf_defaults, **document}
    constants = {key: (value, None) if value is False else (value,) for key, value in family.hf_constants.items()}
    _refuse_others(document, {**_PLAIN_VALUES, **constants})
    if windows is None:
        windows = ()
        if document.get("use_sliding_window") is not False:  # else the window's size says nothing
            _refuse_others(document, {"sliding_window": (None,)})
        if kinds := set(layer_kinds(document) or ()) - {FULL_ATTENTION}:
            raise CheckpointError(
                f"config.json: layer_types with {sorted(kinds)} is not supported; want {FULL_ATTENTION!r} alone"
            )
    found = Settings(document, "config.json")
    embed_dim, num_heads = found.size("hidden_size"), found.size("num_attention_heads")
    max_seq_len = found.number("max_position_embeddings", 2048)
    rope_base, rope_scaling = rope_from_hf(found, max_seq_len)
    return found.config(
        vocab_size=found.size("vocab_size"),
        embed_dim=embed_dim,
        num_layers=found.size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=found.number("num_key_value_heads", num_heads),
        head_dim=found.number("head_dim", embed_dim // num_heads),
        intermediate_dim=found.size("intermediate_size"),
        max_seq_len=max_seq_len,
        norm_eps=found.number("rms_norm_eps", 1e-6, kind=float),
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        tie_embeddings=found.flag("tie_word_embeddings"),
        windows=windows,
        family=family,
        **family.switches,
        **switches,
    )


def _refuse_others(document: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    for key, values in allowed.items():
        if key in document and document[key] not in values:
            raise CheckpointError(
                f"config.json: {key}={reprlib.repr(document[key])} is not supported; want {values[0]!r}"
            )


def layer_kinds(document: Mapping[str, Any]) -> list[str] | None:
    """Return ``layer_types`` of a ``config.json``: the kind of attention of each layer; None if the file has none."""
    kinds = document.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or not {*map(str, kinds)} <= {FULL_ATTENTION, WINDOW_ATTENTION}:
        raise CheckpointError(
            f"config.json: layer_types={reprlib.repr(kinds)} is not supported; want a list of {FULL_ATTENTION!r} and "
            f"{WINDOW_ATTENTION!r}"
        )
    if len(kinds) != document.get("num_hidden_layers"):
        raise CheckpointError(
            f"config.json: layer_types has {len(kinds)} values; want num_hidden_layers={document.get('num_hidden_layers')}"
        )
    return kinds


def windows_from_hf(family: Family, document: Mapping[str, Any], kinds: Sequence[str]) -> tuple[int | None, ...]:
    """Return the windows of layers of these kinds, of the size that ``sliding_window`` gives; () if no layer has one."""
    window = Settings({**family.hf_defaults, **document}, "config.json").number("sliding_window")
    windows = tuple(window if kind == WINDOW_ATTENTION else None for kind in kinds)
    return windows if any(windows) else ()


def windows_to_hf(config: TransformerConfig) -> dict[str, Any]:
    """Return ``sliding_window`` and ``layer_types`` of a ``config.json``; both null for a model without windows."""
    sizes = {window for window in config.windows if window is not None}
    if len(sizes) > 1:
        raise ConfigError(f"windows={config.windows}: config.json has one size of them for all layers")
    kinds = [WINDOW_ATTENTION if window else FULL_ATTENTION for window in config.windows]
    return {"sliding_window": sizes.pop() if sizes else None, "layer_types": kinds or None}


def config_to_hf(family: Family, config: TransformerConfig) -> dict[str, Any]:
    """Return the settings of a ``config.json`` that transformers 4 and 5 both read as ``config``."""
    from kdtune.models.rope_settings import rope_to_hf

    rope = rope_to_hf(config)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
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
        **family.hf_constants,
        # transformers 4 reads these two, transformers 5 the third where the second is null.
        "rope_theta": config.rope_base,
        "rope_scaling": None if config.rope_scaling is None else dict(rope),
        "rope_parameters": {"rope_theta": config.rope_base, **rope},
    }


def config_from_gguf(
    family: Family,
    metadata: Mapping[str, Any],
    *,
    tie_embeddings: bool,
    rope_factors: Tensor | None = None,
    rope_scaling: AnyScaling | None = None,
    **switches: Any,
) -> TransformerConfig:
    """Return the config of the model of that family that a GGUF file's metadata describes.

    Args:
        family: The family, whose GGUF architecture begins the keys.
        metadata: The file's fields, such as "llama.block_count", as plain Python values.
        tie_embeddings: Whether the file lacks the tensor ``output.weight``.
        rope_factors: The tensor ``rope_freqs.weight``, if the file has one: the divisor of each frequency.
        rope_scaling: A scaling that the family has read from the file; None: the one that the metadata or these factors say.
        **switches: Further switches of `TransformerConfig`, beside the family's.

    Raises:
        CheckpointError: A missing size, or a setting this model does not compute.
    """
    from kdtune.models.rope_settings import linear_from_gguf, scaling_from_factors

    prefix = f"{family.gguf_architecture}."
    own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    found = Settings(own, "GGUF")
    if own.get("expert_count"):
        raise CheckpointError(f"GGUF: {prefix}expert_count={own['expert_count']} is not supported; want a dense model")
    if own.get("attention.sliding_window"):
        raise CheckpointError(
            f"GGUF: {prefix}attention.sliding_window={own['attention.sliding_window']} is not supported; want none"
        )
    embed_dim, num_heads = found.size("embedding_length"), found.size("attention.head_count")
    head_dim = own.get("attention.key_length", embed_dim // num_heads)
    num_rotated = switches.get("rotary_dim") or head_dim
    if own.get("rope.dimension_count", num_rotated) != num_rotated:
        raise CheckpointError(
            f"GGUF: {prefix}rope.dimension_count={own['rope.dimension_count']}; want head_dim={head_dim}"
        )
    rope_base = float(own.get("rope.freq_base", 10_000.0))
    if rope_scaling is None:
        rope_scaling = linear_from_gguf(own, prefix)
    if rope_factors is not None:
        rope_scaling = scaling_from_factors(rope_factors, num_rotated, rope_base)
    return found.config(
        vocab_size=own.get("vocab_size") or len(metadata.get("tokenizer.ggml.tokens", ())),
        embed_dim=embed_dim,
        num_layers=found.size("block_count"),
        num_heads=num_heads,
        num_kv_heads=own.get("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        intermediate_dim=found.size("feed_forward_length"),
        max_seq_len=found.size("context_length"),
        # Stored as a 32-bit float: 1e-5 reads as 9.9999997e-06.
        norm_eps=float(f"{found.size('attention.layer_norm_rms_epsilon', kind=float):.7g}"),
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        tie_embeddings=tie_embeddings,
        family=family,
        **family.switches,
        **switches,
    )
