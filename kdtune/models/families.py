"""How the family of a model's files is found, and how the files of a family's model are described."""

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from kdtune.errors import CheckpointError, ConfigError
from kdtune.models.architecture import Family, KeyMap, TransformerConfig
from kdtune.models.llama import LLAMA

_OWN = (
    "the checkpointer's `family` names one of your own (docs/extending.md), or kdtune.models.hf_model, which has transformers compute it "
    "(docs/models.md)"
)


def _families(named: Family | None) -> tuple[Family, ...]:
    from kdtune.models.known_families import FAMILIES  # a file for each

    return FAMILIES if named is None else (named,)


# Settings beside ``text_config`` that are the text model's too.
_OF_WHOLE = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "quantization_config")


def text_config(document: Mapping[str, Any], named: Family | None = None) -> Mapping[str, Any]:
    """Return the ``config.json`` of the text part of a model that has others, for images; the document itself of another model.

    Its family is one of `FAMILIES`, or `named`. CheckpointError if ``text_config`` is no object of settings.
    """
    architectures, model_type, text = (
        document.get("architectures"),
        document.get("model_type"),
        document.get("text_config"),
    )
    for family in _families(named):
        is_whole = family.with_images is not None and (
            architectures == [family.with_images[1]] or (not architectures and model_type == family.with_images[0])
        )
        if is_whole and not isinstance(text, Mapping):
            raise CheckpointError(f"config.json: text_config={reprlib.repr(text)}; want the settings of the text part")
        if is_whole and isinstance(text, Mapping):
            kept = {key: document[key] for key in _OF_WHOLE if key in document}
            return {**text, **kept, "architectures": [family.architecture], "model_type": family.model_type}
    return document


def read_hf_config(document: Mapping[str, Any], named: Family | None = None) -> TransformerConfig:
    """Return the config of the model that a ``config.json`` describes, or of its text part, see `text_config`.

    Its family is one of `FAMILIES`, or `named`.

    Raises:
        CheckpointError: It is of another family, lacks a size, or has a setting that our decoder does not compute.
    """
    document, families = text_config(document, named), _families(named)
    architectures, model_type = document.get("architectures"), document.get("model_type")
    for family in families:
        if family.describes(document):
            return family.config_from_hf(family, document)
    wanted = " or ".join(f"{family.architecture} (model_type {family.model_type!r})" for family in families)
    raise CheckpointError(
        f"config.json: architectures={reprlib.repr(architectures)}, model_type={reprlib.repr(model_type)}; want {wanted}"
        + (f"; {_OWN}" if named is None else f", which family={named} stands for")
    )


def family_of_gguf(metadata: Mapping[str, Any], named: Family | None = None) -> tuple[Family, KeyMap]:
    """Return a GGUF file's family, and its names there; `named` as in `read_hf_config`; CheckpointError for another."""
    architecture = metadata.get("general.architecture")
    families = _families(named)
    for family in families:
        if family.gguf_keys is not None and family.gguf_architecture == architecture:
            return family, family.gguf_keys
    known = dict.fromkeys(repr(family.gguf_architecture) for family in families if family.gguf_keys is not None)
    raise CheckpointError(
        f"GGUF: general.architecture={architecture!r}; want {' or '.join(known) or f'safetensors, for family={named}'}"
    )


def family_of_meta(named: Family | None = None) -> tuple[KeyMap, Callable[..., TransformerConfig]]:
    """Return the names of Meta's files and what reads params.json; CheckpointError if family `named` has none."""
    for family in _families(named):
        if family.meta_keys is not None and family.config_from_meta is not None:
            return family.meta_keys, family.config_from_meta
    raise CheckpointError(f"params.json: not of family={named}; give its safetensors")


def write_hf_config(
    config: TransformerConfig, *, base: Mapping[str, Any] | None = None, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """Return a ``config.json`` that transformers 4 and 5 both read as ``config``.

    Args:
        config: The model.
        base: The ``config.json`` the model came from; its other values, such as token ids, are kept.
            Without one add ``bos_token_id`` and ``eos_token_id``: transformers would assume its own.
        dtype: Dtype of the weights in the same folder, such as "bfloat16".

    Raises:
        ConfigError: The model belongs to no family, or its family's files cannot describe it.
    """
    if base is None:
        base = {"pad_token_id": None}  # some families have a default, which may be beyond the vocabulary
    base = text_config(base, config.family)
    # layer_types are of the base's layers: where they are not all alike, the family writes them.
    dropped = ("transformers_version", "_name_or_path", "quantization_config", "layer_types")
    kept = {key: value for key, value in base.items() if key not in dropped}
    family = family_of(config)
    written = kept | family.config_to_hf(family, config)
    again = family.config_from_hf(family, written)
    others = {
        each.name: getattr(config, each.name)
        for each in fields(config)
        if each.name != "family" and getattr(config, each.name) != getattr(again, each.name)
    }
    if others:
        raise ConfigError(f"config.json of {family.name} cannot say {others}; it would be read as another model")
    return written | {"dtype": dtype, "torch_dtype": dtype}


def family_of(config: TransformerConfig) -> Family:
    """Return a model's family; without one, Llama's if it computes what Llama's models compute, else ConfigError."""
    if config.family is None and config.is_plain:
        return LLAMA
    if config.family is None:
        raise ConfigError(
            "the model belongs to no family, which says how its files are named; give its TransformerConfig a `family` "
            "(docs/extending.md)"
        )
    return config.family
