"""torchtune's components, each turned into kdtune's by one function of the draft, the key and the node."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kdtune.config.check import COMPONENT, resolve
from kdtune.config.component import parameters_of
from kdtune.config.migrate import tables
from kdtune.config.migrate.draft import Draft, arguments_of, folder_of, shown, torchtune_name
from kdtune.config.torchtune_keys import component_hint, key_hint
from kdtune.errors import ConfigError

Convert = Callable[[Draft, str, Any], None]


def carry(draft: Draft, key: str, value: Any) -> None:
    """Set a key as it is; a component of torchtune's in it is refused, for it has no counterpart."""
    for where, node in nodes(value, key):
        if torchtune_name(node) is not None:
            draft.refusals.append(f"{where}: {node[COMPONENT]}: {component_hint(str(torchtune_name(node)))}")
    draft.put(key, value)


def nodes(value: Any, key: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Yield every component node in a value, with its dotted key."""
    if isinstance(value, Mapping) and COMPONENT in value:
        yield key, value
    if isinstance(value, Mapping | list):
        for name, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from nodes(item, f"{key}.{name}")


def convert_model(draft: Draft, key: str, node: Any) -> None:
    """A builder, for the trained model with its adapters; a teacher's adapters are dropped."""
    name = torchtune_name(node)
    if name is None:
        carry(draft, key, node)
        return
    plain = name.removeprefix("q").removeprefix("lora_") if name.startswith(("lora_", "qlora_")) else name
    prefix = name.removesuffix(plain)
    arguments, ours = arguments_of(node), _builder(plain)
    if prefix and (key == "teacher_model" or "adapter" not in draft.keys):
        arguments = {each: value for each, value in arguments.items() if each not in tables.ADAPTER_ARGUMENTS}
        draft.note(
            "changed",
            key,
            f"{name} builds new adapters, which change nothing until they are trained; here {ours or plain} without. A trained adapter: "
            f"{'teacher_' if key == 'teacher_model' else ''}checkpointer.adapter_dir",
        )
        prefix = ""
    elif ours and ours != plain:
        draft.note("changed", key, f"{name} is {prefix}{ours} here")
    if ours is None:
        draft.refusals.append(
            f"{key}: kdtune has no model {plain} ({node[COMPONENT]}); it has {', '.join(_builders())} (docs/models.md)"
        )
    elif ours:
        component = f"kdtune.models.{prefix}{ours}"
        draft.put_component(key, component, arguments, _accepted(component))
    else:
        _read_from_folder(draft, key, name, prefix, arguments)


def _read_from_folder(draft: Draft, key: str, name: str, prefix: str, arguments: Mapping[str, Any]) -> None:
    """Leave the builder out: the model is built from its folder's config.json, and the adapters are a key of their own."""
    adapter = {each: value for each, value in arguments.items() if each in tables.ADAPTER_ARGUMENTS}
    sizes = [each for each in arguments if each not in adapter]
    draft.note(
        "changed",
        key,
        f"{name}: left out, the model is built from the config.json in the checkpointer's folder"
        + (f", which has {', '.join(sizes)} too" if sizes else ""),
    )
    if prefix:
        quantized = {"quantize_base": True} if prefix == "qlora_" else {}
        draft.put_component("adapter", "kdtune.models.apply_lora", {**adapter, **quantized}, None, old=key)


def _builders() -> list[str]:
    names = importlib.import_module("kdtune.models.builders").BUILDERS
    return [name for name in names if not name.startswith(("lora_", "qlora_"))]


def _builder(plain: str) -> str | None:
    """Return our builder of a torchtune model, "" if its folder's config.json is read instead, None if there is none."""
    if plain in tables.FROM_FOLDER:
        return ""
    plain = tables.MODELS.get(plain, plain)
    known = _builders()
    shortened = (plain.removesuffix(ending) for ending in tables.NAME_ENDINGS)
    return next((name for name in (plain, *shortened) if name in known), None)


def _accepted(component: str) -> list[str] | None:
    """Return the arguments that a component takes; None if it takes any, or is not installed."""
    try:
        parameters = parameters_of(resolve(component))
    except ConfigError:
        return None
    if parameters is None or any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return None
    return list(parameters)


def convert_tokenizer(draft: Draft, key: str, node: Any) -> None:
    """Llama 3's stays, with the chat format it has in torchtune; for any other the model's folder is read."""
    name = torchtune_name(node)
    if name is None:
        carry(draft, key, node)
        return
    arguments = arguments_of(node)
    path = next(
        (arguments.pop(each) for each in ("path", "vocab_path", "tokenizer_json_path") if each in arguments), None
    )
    for each in ("merges_path", "tokenizer_config_json_path"):
        arguments.pop(each, None)
    if name == "llama3_tokenizer" and path is not None:
        component = f"kdtune.tokenizers.{name}"
        draft.note(
            "changed",
            key,
            "the same file and chat format; torchtune ends a conversation with <|end_of_text|> as well, which it does not train on. "
            "kdtune.tokenizers.load with the model's folder has the chat template of that folder instead",
        )
    else:
        component, path = "kdtune.tokenizers.load", folder_of(str(path)) if path else _checkpoint_dir(draft)
        draft.note(
            "changed",
            key,
            f"{name}: the tokenizer and the chat template of the folder {path} are read. torchtune has a format of its own, so a "
            "conversation may have other ids; `kdtune data` shows them",
        )
    draft.put_component(key, component, {"path": path, **arguments}, ("path", "max_seq_len"))


def _checkpoint_dir(draft: Draft) -> Any:
    node = draft.tree.get("checkpointer")
    return node.get("checkpoint_dir") if isinstance(node, Mapping) else None


def convert_checkpointer(draft: Draft, key: str, node: Any) -> None:
    """The folder, and its files unless they are the numbered parts of one model, or pickles."""
    name = torchtune_name(node)
    if name is None:
        carry(draft, key, node)
        return
    arguments = arguments_of(node)
    files = arguments.get("checkpoint_files")
    listed = [files.get("filename_format")] if isinstance(files, Mapping) else files if isinstance(files, list) else []
    names = [str(file) for file in listed]
    if any(name.endswith((".bin", ".pt")) for name in names):
        del arguments["checkpoint_files"]
        draft.note(
            "lost",
            f"{key}.checkpoint_files",
            "pickles (.bin, .pt) are not read; the folder must hold the model's safetensors: `kdtune download` fetches those",
        )
    elif isinstance(files, Mapping) or any("-of-" in name for name in names):
        del arguments["checkpoint_files"]
        draft.drop(f"{key}.checkpoint_files", files, "every weight file of the folder is read")
    for each in [each for each, value in arguments.items() if value is None]:
        draft.drop(f"{key}.{each}", arguments.pop(each), key_hint(f"checkpointer.{each}") or "it is null")
    draft.put_component(key, "kdtune.checkpoint.Checkpointer", arguments, ("checkpoint_dir", "checkpoint_files"))
    if name == "FullModelTorchTuneCheckpointer":
        draft.note("lost", key, "torchtune's own format is not read; give the Hugging Face folder of the model")


def convert_dataset(draft: Draft, key: str, node: Any) -> None:
    """A dataset, or a list of them, which become a mixture."""
    if isinstance(node, list):
        parts = [_dataset(draft, f"{key}.{index}", part) for index, part in enumerate(node)]
        draft.put(key, {COMPONENT: "kdtune.data.mixed_dataset", "datasets": parts, "weights": [1] * len(parts)})
        draft.origins |= {f"{key}.datasets.{index}": f"{key}.{index}" for index in range(len(parts))}
        draft.note(
            "lost",
            key,
            "torchtune puts the datasets one after the other; kdtune mixes them by `weights`, here equal: set them",
        )
    else:
        draft.put(key, _dataset(draft, key, node))


def _dataset(draft: Draft, key: str, node: Any) -> Any:
    name = torchtune_name(node)
    if name is None:
        return node
    if name not in tables.DATASETS:
        draft.refusals.append(
            f"{key}: kdtune has no counterpart of {node[COMPONENT]}; it has those of {', '.join(tables.DATASETS)}, and "
            "instruct_dataset or chat_dataset read any rows (docs/data.md)"
        )
        return node
    ours, stands_for = tables.DATASETS[name]
    component = f"kdtune.data.{ours}"
    given = {tables.DATASET_ARGUMENTS.get(each, each): value for each, value in arguments_of(node).items()}
    draft.origins |= {
        f"{key}.{new}": f"{key}.{old}" for old, new in tables.DATASET_ARGUMENTS.items() if old in arguments_of(node)
    }
    if ours != name:
        draft.note(
            "changed", key, f"{name} is {ours} with {', '.join(f'{k}={shown(v)}' for k, v in stands_for.items())} here"
        )
    if ours != "text_completion_dataset" and not given.get("train_on_input", ours.startswith("alpaca")):
        draft.note(
            "changed",
            key,
            "only answers are trained on; torchtune trains on the header before an answer too, kdtune does not",
        )
    if ours == "text_completion_dataset":
        if given.get("packed"):
            given.setdefault("split_across_pack", True)  # torchtune's default
        elif "split_across_pack" in given:
            draft.drop(f"{key}.split_across_pack", given.pop("split_across_pack"), "it is for packed=true")
    accepted = _accepted(component)
    arguments = {each: value for each, value in {**stands_for, **given}.items() if value is not None}
    for each in [each for each in arguments if accepted is not None and each not in accepted]:
        draft.drop(f"{key}.{each}", arguments.pop(each), key_hint(f"dataset.{each}") or key_hint(each))
    return {COMPONENT: component, **arguments}


def convert_optimizer(draft: Draft, key: str, node: Any) -> None:
    """Optimizers of torch stay; those of bitsandbytes and of torchao's prototypes have other names here."""
    name = str(node.get(COMPONENT, "")) if isinstance(node, Mapping) else ""
    if name in tables.OPTIMIZERS:
        ours, what = tables.OPTIMIZERS[name]
        draft.note("changed", key, f"{name} is {ours} here: {what}")
        reason = f"{ours} is given {', '.join(tables.LOW_BIT_ARGUMENTS)} only"
        draft.put_component(key, ours, arguments_of(node), tables.LOW_BIT_ARGUMENTS, reason=reason)
    elif name.startswith(("bitsandbytes.", "torchao.prototype.")):
        draft.refusals.append(f"{key}: {name} has no counterpart; those of {', '.join(tables.OPTIMIZERS)} have")
    else:
        carry(draft, key, node)
    if draft.recipe == "knowledge_distillation" and name:
        last = name.rpartition(".")[2]
        if not last.startswith(("Paged", *tables.SCALE_FREE)):
            text = "torchtune divides the gradient by the tokens once more than kdtune: this value does not carry over"
            draft.remarks[f"{key}.lr"] = f"{text}; divide it by the tokens of a micro-batch, or search for it again"
            draft.note("lost", f"{key}.lr={shown(node.get('lr'))}", draft.remarks[f"{key}.lr"])


def convert_lr_scheduler(draft: Draft, key: str, node: Any) -> None:
    """The one schedule of torchtune has the same name and arguments here."""
    name = torchtune_name(node)
    if name == "get_cosine_schedule_with_warmup":
        component = f"kdtune.training.{name}"
        draft.put_component(key, component, arguments_of(node), _accepted(component))
    else:
        carry(draft, key, node)


def convert_loss(draft: Draft, key: str, node: Any) -> None:
    """The loss is cross entropy, whatever its chunks; one of the user's is lost."""
    name = str(node.get(COMPONENT, "")) if isinstance(node, Mapping) else ""
    if name.rpartition(".")[2] in tables.CROSS_ENTROPIES:
        draft.drop(
            key,
            node,
            f"{name.rpartition('.')[2]}: the loss is cross entropy, cut by tokens (loss_chunk_size), not into a number of chunks",
        )
    elif node is not None:
        draft.note(
            "lost",
            f"{key}={name or shown(node)}",
            "kdtune trains with cross entropy, in distillation mixed with kd_loss",
        )


def convert_kd_loss(draft: Draft, key: str, node: Any) -> None:
    """The divergences, with torchtune's weight of the forward direction."""
    name = torchtune_name(node)
    ours = tables.KD_LOSSES.get(name or "")
    if ours is None:
        carry(draft, key, node)
        return
    arguments = arguments_of(node)
    if "sym_kd_ratio" in arguments:
        arguments["forward_weight"] = arguments.pop("sym_kd_ratio")
        draft.origins[f"{key}.forward_weight"] = f"{key}.sym_kd_ratio"
    draft.put_component(key, f"kdtune.losses.{ours}", arguments, ("forward_weight",))
    if ours != "ReverseKL":
        draft.note(
            "changed",
            key,
            "torchtune logs the cross entropy with the teacher's distribution: the KL plus the teacher's entropy. kdtune logs the "
            "KL, which is 0 where the models agree: kd_loss and loss are smaller by the entropy, times its weight, and a token's "
            "gradient is the same",
        )


def convert_metric_logger(draft: Draft, key: str, node: Any) -> None:
    """TensorBoard and W&B; what torchtune writes to a file or the terminal, every run has here."""
    name = torchtune_name(node)
    if name is None:
        carry(draft, key, node)
    elif name in ("DiskLogger", "StdoutLogger"):
        draft.drop(key, node, f"{name}: every run writes metrics.jsonl, and shows its steps")
    elif name not in tables.LOGGERS:
        draft.note(
            "lost",
            f"{key}={name}",
            "kdtune has TensorBoardLogger and WandBLogger; a class of your own works too (docs/extending.md)",
        )
    else:
        required = {"project": "torchtune"} if name == "WandBLogger" else {}
        component = f"kdtune.training.{tables.LOGGERS[name]}"
        draft.put_component(key, component, {**required, **arguments_of(node)}, _accepted(component))


def convert_profiler(draft: Draft, key: str, node: Any) -> None:
    """On if it is given; torchtune's has a switch."""
    if torchtune_name(node) is None:
        carry(draft, key, node)
    elif not node.get("enabled"):
        draft.drop(key, node, "it was off (enabled: false); profiler=kdtune.training.Profiler is one that is on")
    else:
        component = "kdtune.training.Profiler"
        draft.put_component(key, component, arguments_of(node), _accepted(component))
