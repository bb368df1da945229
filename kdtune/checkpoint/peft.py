"""Adapters as PEFT folders (``adapter_config.json`` and ``adapter_model.safetensors``): read, check and describe them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdtune.checkpoint.huggingface import stored_tensors
from kdtune.checkpoint.peft_config import check_config, is_target, value_for
from kdtune.checkpoint.tensors import LazyTensor
from kdtune.distributed import full_tensor, is_sharded, local_slices, to_local
from kdtune.errors import CheckpointError
from kdtune.json_files import read_json
from kdtune.models import (
    Family,
    LoRALinear,
    Transformer,
    TransformerConfig,
    adapted_linears,
    adapter_parameters,
    family_of,
    text_config,
    weight_shapes,
)
from kdtune.models.architecture import KeyMap
from kdtune.models.lora import merged, untie_head
from kdtune.models.quantization import is_quantized
from kdtune.paths import user_path

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
# Where the text part is in a base that has parts for images, as transformers 5 and 4 name it.
_TEXT_PART = "model.language_model."
_TEXT_PARTS = (_TEXT_PART, "language_model.model.")
# PEFT's names of an adapter's tensors, by ours.
_PARTS = {"lora_a.weight": "lora_A.weight", "lora_b.weight": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_OURS = {theirs: ours for ours, theirs in _PARTS.items()} | {"lora_magnitude_vector.weight": "magnitude"}
# If the embeddings or the head are adapted, PEFT also stores a copy of their own weights.
_BASE_COPIES = ("tok_embeddings.weight", "output.weight")


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter stored in files, unread."""

    folder: Path
    tensors: Mapping[str, LazyTensor]
    """By the names of the parameters in a model with adapters, such as "layers.0.attn.q_proj.lora_a.weight"."""
    scaling: Mapping[str, float]
    """Scaling of each adapted module's update, by module name; its keys are the adapted modules, in order."""
    use_dora: bool
    base_copies: Mapping[str, LazyTensor]
    """Weights of the base that are stored beside the adapter, by the model's names."""

    def named(self, module: str) -> dict[str, LazyTensor]:
        """Return the tensors of one adapted module, as "lora_a.weight", "lora_b.weight" and "magnitude"."""
        return {part: self.tensors[f"{module}.{part}"] for part in _PARTS if f"{module}.{part}" in self.tensors}

    def merge(self, module: str, weight: Tensor) -> Tensor:
        """Return a module's full weight with its adapter merged; the weight itself if the module has none."""
        if module not in self.scaling:
            return weight
        parts = (stored.read().to(weight.device) for stored in self.named(module).values())
        a, b, *magnitude = parts
        return merged(weight, a, b, self.scaling[module], *magnitude)


def is_adapter_folder(folder: str | Path) -> bool:
    """Return whether the folder holds an adapter instead of a full model."""
    path = user_path(folder)
    return (path / CONFIG).is_file() or (path / WEIGHTS).is_file()


def read_adapter(folder: str | Path, base: TransformerConfig) -> StoredAdapter:
    """Describe the adapter, for a model of that config, of a PEFT folder; reads its config and the tensors' names and shapes.

    Raises:
        CheckpointError: the folder or a file is missing or damaged, a setting is not supported, or config and tensors
            disagree; file, setting or tensor are named, with what was found and what is allowed.
    """
    path, family, base_shapes = user_path(folder), family_of(base), weight_shapes(base)
    _check_folder(path)
    config = read_json(path / CONFIG)
    check_config(path / CONFIG, config)
    tensors: dict[str, LazyTensor] = {}
    copies: dict[str, LazyTensor] = {}
    for name, stored in stored_tensors([path / WEIGHTS]).items():
        if family.with_images is not None:
            name = next((name.replace(part, "model.", 1) for part in _TEXT_PARTS if part in name), name)
        weight = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
        if family.hf_keys.knows(weight) and family.hf_keys.to_kdtune(weight) in _BASE_COPIES:
            copies[family.hf_keys.to_kdtune(weight)] = stored
        else:
            tensors |= _ours(name, stored, family, base_shapes)
    modules = dict.fromkeys(name.rpartition(".lora_")[0] or name.removesuffix(".magnitude") for name in tensors)
    if not modules:
        raise CheckpointError(f"{path / WEIGHTS}: holds no adapter tensors; write the adapter again")
    scaling = {module: _check_module(module, family, config, tensors, path) for module in modules}
    return StoredAdapter(path, tensors, scaling, bool(config.get("use_dora")), copies)


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise CheckpointError(f"adapter_dir={path}: no such folder; give one with {CONFIG} and {WEIGHTS}")
    if missing := [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]:
        what = f"{path / missing[0]}: missing; a PEFT folder has {CONFIG} and {WEIGHTS}"
        if (path / "adapter_model.bin").is_file():
            what += "; adapter_model.bin is a pickle, which can run code: save the adapter as safetensors"
        elif (path / "config.json").is_file():
            what += "; this looks like a whole model: give it as checkpoint_dir"
        raise CheckpointError(what)


def _ours(
    name: str, stored: LazyTensor, family: Family, base_shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, LazyTensor]:
    """Return the tensor by our name; of a matrix that holds several of ours, the part of each."""
    theirs, keys = name.removeprefix(_PREFIX), family.hf_keys
    for part, ours in _OURS.items():
        if name.startswith(_PREFIX) and theirs.endswith(f".{part}"):
            weights = keys.parts_of(theirs.removesuffix(part) + "weight")
            if all(map(keys.knows, weights)):
                names = [keys.to_kdtune(weight) for weight in weights]
                is_shared = len(names) == 1 or ours == "lora_a.weight" or not base_shapes.keys() >= {*names}
                parts = [stored] * len(names) if is_shared else stored.blocks([base_shapes[one][0] for one in names])
                return {one.removesuffix("weight") + ours: part for one, part in zip(names, parts, strict=True)}
    raise CheckpointError(
        f"{stored}: unexpected; {_PREFIX}MODULE.PART expected, with a linear layer of a {family.name} as MODULE and "
        f"{', '.join(_PARTS.values())} as PART: this is an adapter for another kind of model or of another kind"
    )


def _check_module(
    module: str, family: Family, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], path: Path
) -> float:
    """Check that a module's tensors agree with the config and with each other, and return its scaling."""
    theirs = _hf_module(module, family)
    parts = ["lora_a.weight", "lora_b.weight"] + (["magnitude"] if config.get("use_dora") else [])
    for part in parts:
        if f"{module}.{part}" not in tensors:
            raise CheckpointError(
                f"{path / WEIGHTS}: tensor {_PREFIX + theirs + '.' + _PARTS[part]!r} missing; the adapter's other tensors "
                f"of {theirs} and {CONFIG} (use_dora={bool(config.get('use_dora'))}) want it: write the adapter again"
            )
    if not config.get("use_dora") and f"{module}.magnitude" in tensors:
        raise CheckpointError(f"{tensors[f'{module}.magnitude']}: unexpected; {CONFIG} says use_dora=false")
    rank = value_for(config.get("rank_pattern"), theirs, config["r"], path / CONFIG)
    alpha = value_for(config.get("alpha_pattern"), theirs, config["lora_alpha"], path / CONFIG)
    for part, dimension in (("lora_a.weight", 0), ("lora_b.weight", 1)):
        stored = tensors[f"{module}.{part}"]
        if len(stored.shape) != 2 or stored.shape[dimension] != rank:
            raise CheckpointError(
                f"{stored}: shape {list(stored.shape)} found, rank {rank} (dimension {dimension}) expected by {CONFIG}; "
                "config and weights do not belong together: take both from the same folder"
            )
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _hf_module(module: str, family: Family) -> str:
    return family.hf_keys.whole_of(family.hf_keys.from_kdtune(f"{module}.weight")).removesuffix(".weight")


def check_adapter(adapter: StoredAdapter, model: Transformer) -> None:
    """Check that the adapter fits this base, and the model's own adapters if it has any; reads no weights.

    Raises:
        CheckpointError: a module, shape, rank or setting differs; what was found and what is expected are named.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name.endswith(".weight")}
    advice = "this is the adapter of another base: give the base that adapter_config.json names as checkpoint_dir"
    for module in adapter.scaling:
        parts = adapter.named(module)
        base = shapes.get(f"{module}.weight")
        if base is None:
            raise CheckpointError(
                f"{parts['lora_a.weight']}: the model has no such module; it has {model.config.num_layers} layers; {advice}"
            )
        rank = parts["lora_a.weight"].shape[0]
        expected = {"lora_a.weight": (rank, base[1]), "lora_b.weight": (base[0], rank), "magnitude": (base[0],)}
        for part, stored in parts.items():
            if stored.shape != expected[part]:
                raise CheckpointError(
                    f"{stored}: shape {list(stored.shape)} found, {list(expected[part])} expected beside a base weight of "
                    f"{list(base)}; {advice}"
                )
            if not stored.dtype.is_floating_point or stored.dtype.itemsize == 1:
                raise CheckpointError(f"{stored}: dtype {stored.dtype} found; float32, float16 or bfloat16 expected")
    _check_all_layers(adapter, model, advice)
    if own := adapted_linears(model):
        _check_same_adapters(adapter, own, family_of(model.config).hf_keys)


def _check_all_layers(adapter: StoredAdapter, model: Transformer, advice: str) -> None:
    """Raise if a module that the config adapts has no tensors: the base is another one, or tensors are lost."""
    path = adapter.folder / CONFIG
    config = read_json(path)
    linears = [name for name, one in model.named_modules() if isinstance(one, nn.Linear) and ".lora_" not in name]
    first = next(iter(adapter.tensors.values())).name
    begin = next((part for part in _TEXT_PARTS if part in first), "model.")
    for module in linears:
        theirs = _hf_module(module, family_of(model.config))
        if is_target(theirs.replace("model.", begin, 1), config, path) and module not in adapter.scaling:
            raise CheckpointError(
                f"{adapter.folder / WEIGHTS}: tensor {_PREFIX + theirs + '.lora_A.weight'!r} missing; {CONFIG} "
                f"adapts it (target_modules={config['target_modules']!r}) in each of the base's "
                f"{model.config.num_layers} layers; {advice}"
            )


def _check_same_adapters(adapter: StoredAdapter, own: Mapping[str, LoRALinear], keys: KeyMap) -> None:
    from kdtune.checkpoint.peft_fused import modules_beside

    where = adapter.folder / CONFIG
    # In the file a matrix of several of ours is adapted whole.
    in_file = {one: [beside for beside in modules_beside(one, keys) if beside in own] for one in adapter.scaling}
    in_file = {one: beside for one, beside in in_file.items() if one in own or not beside}
    advice = "use the settings that the adapter was trained with, or another adapter_dir"
    if different := sorted(own.keys() ^ in_file.keys()):
        place = "the model's settings adapt it, the file does not" if different[0] in own else "only the file has it"
        raise CheckpointError(
            f"{where}: adapts other modules than the model (first: {different[0]!r}: {place}); {advice}"
        )
    for module, linear in own.items():
        rank = adapter.named(module)["lora_a.weight"].shape[0]
        if rank not in (linear.rank, linear.rank * len(in_file[module])):
            raise CheckpointError(f"{where}: rank {rank} found ({module}), lora_rank={linear.rank} expected; {advice}")
        if not math.isclose(adapter.scaling[module], linear.scaling, rel_tol=1e-6):
            raise CheckpointError(
                f"{where}: scaling {adapter.scaling[module]:g} found ({module}), lora_alpha / lora_rank = "
                f"{linear.scaling:g} expected; {advice}"
            )
        if adapter.use_dora != (linear.magnitude is not None):
            raise CheckpointError(
                f"{where}: use_dora={adapter.use_dora} found, use_dora={not adapter.use_dora} expected; {advice}"
            )


@torch.no_grad()
def fill_adapter(model: Transformer, adapter: StoredAdapter) -> Transformer:
    """Load the adapter's weights into a model that holds its base: into the model's adapters if it has any, else merged.

    Raises:
        CheckpointError: the adapter does not fit the model, see `check_adapter`, or was trained beside embeddings or a
            head that differ from the base's.
    """
    check_adapter(adapter, model)
    for name, stored in adapter.base_copies.items():
        weight = model.get_parameter(name)
        if stored.shape != tuple(weight.shape) or not _same_values(
            stored.read().to(weight.device), full_tensor(weight)
        ):
            raise CheckpointError(
                f"{stored}: a copy of the base's weights that differs from the base's own {name!r}; the adapter was trained "
                "beside changed embeddings, which is not supported: merge it with peft and give the merged model"
            )
    parameters = adapter_parameters(model)
    if parameters:
        from kdtune.checkpoint.peft_fused import fitted

        for name, stored in fitted(adapter, adapted_linears(model), family_of(model.config).hf_keys).items():
            stored.fill(parameters[name])
        return model
    for module, scaling in adapter.scaling.items():
        if is_quantized(model.get_parameter(f"{module}.weight")):
            continue  # merged before it was quantized, see `fill_model`
        if module == "output":
            _check_can_be_untied(model, adapter)
            untie_head(model)
        weight = model.get_parameter(f"{module}.weight")
        rows, columns = local_slices(weight)
        a, b, *magnitude = (stored.read().to(weight.device) for stored in adapter.named(module).values())
        if columns.stop - columns.start < weight.shape[1]:
            # DoRA needs the norms of full rows.
            to_local(weight).copy_(merged(full_tensor(weight), a, b, scaling, *magnitude)[rows, columns])
        else:
            to_local(weight).copy_(merged(to_local(weight), a, b[rows], scaling, *(gain[rows] for gain in magnitude)))
    return model


def _check_can_be_untied(model: Transformer, adapter: StoredAdapter) -> None:
    if model.config.tie_embeddings and is_sharded(model.parameters()):
        # FSDP would keep sharing what is no longer tied, and the head's update would be silently lost.
        raise CheckpointError(
            f"{adapter.folder}: adapts the head, which this model shares with its embeddings; on several processes such an "
            "adapter cannot be merged while loading: merge it first (save_weights=merged) and give the merged folder"
        )


def _same_values(one: Tensor, other: Tensor) -> bool:
    """Return whether both hold the same numbers, each compared in the coarser of the two dtypes."""
    dtype = min(one.dtype, other.dtype, key=lambda found: found.itemsize)
    return torch.equal(one.to(dtype), other.to(dtype))


def peft_tensors(model: Transformer, base: str | Path | None = None) -> dict[str, Tensor]:
    """Return the adapters' parameters by PEFT's names; all processes of a sharded model call it together. `base`: see `peft_config`."""
    from kdtune.checkpoint.peft_fused import joined

    family, tensors = family_of(model.config), joined(model)
    wholes = {_hf_module(module, family) for module, _ in tensors}
    for name, parameter in adapter_parameters(model).items():
        module, part = next((name.removesuffix(f".{part}"), part) for part in _PARTS if name.endswith(f".{part}"))
        if _hf_module(module, family) not in wholes:
            tensors[module, part] = parameter.detach().contiguous()
    begin = _TEXT_PART if _has_images(base) else "model."
    return {
        f"{_PREFIX}{_hf_module(module, family).replace('model.', begin, 1)}.{_PARTS[part]}": tensor
        for (module, part), tensor in tensors.items()
    }


def _in_text_part(names: Sequence[str]) -> str:
    """Return the regular expression of modules of these names in the text part of a base that has parts for images."""
    inner = "|".join(name for name in names if name != "lm_head")
    return rf".*\.language_model\..*\.({inner})" + ("|lm_head" if "lm_head" in names else "")


def _has_images(base: str | Path | None) -> bool:
    path = None if base is None else user_path(base) / "config.json"
    return path is not None and path.is_file() and text_config(document := read_json(path)) is not document


def peft_config(model: Transformer, base: str | Path | None) -> dict[str, Any]:
    """Return an ``adapter_config.json`` for the model's adapters.

    `base` is the location of the base model: if it has parts for images, the adapters are those of its text part.
    """
    from kdtune.checkpoint.peft_fused import num_joined

    linears, family = adapted_linears(model), family_of(model.config)
    first = next(iter(linears.values()))
    alpha: float = int(first.alpha) if float(first.alpha).is_integer() else first.alpha
    # The last parts of the adapted modules' names: each stands for all layers.
    names = sorted({_hf_module(name, family).rpartition(".")[2] for name in linears})
    counts = {name: count for name, count in num_joined(model).items() if count > 1}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base is None else str(user_path(base).absolute()),
        "inference_mode": True,
        # Parts for images have modules of these names too.
        "target_modules": _in_text_part(names) if _has_images(base) else names,
        "r": first.rank,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout,
        "use_dora": first.magnitude is not None,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {name: count * first.rank for name, count in counts.items()},
        "alpha_pattern": {name: count * alpha for name, count in counts.items()},
    }


def load_adapter(model: Transformer, folder: str | Path) -> Transformer:
    """Load the adapter of a PEFT folder into a model that holds its base, in place: into its adapters if any, else merged.

    Raises:
        CheckpointError: the folder is missing or damaged, or does not belong to the model; see `Checkpointer`.
    """
    adapter = read_adapter(folder, model.config)
    check_adapter(adapter, model)
    return fill_adapter(model, adapter)
