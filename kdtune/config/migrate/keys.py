"""A torchtune file's keys, one after the other: carried, renamed, converted, dropped, or named as lost."""

import posixpath
import re
from collections.abc import Mapping
from typing import Any

from kdtune import _assets
from kdtune.config.check import COMPONENT
from kdtune.config.load import resolve_interpolations
from kdtune.config.migrate import components, tables
from kdtune.config.migrate.components import Convert, carry, nodes
from kdtune.config.migrate.draft import Draft, shown, torchtune_name
from kdtune.config.schema import field_docs
from kdtune.config.torchtune_keys import key_hint
from kdtune.errors import ConfigError

_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def is_torchtune(tree: Mapping[str, Any]) -> bool:
    """Return whether a config names a component of torchtune's."""
    return any(torchtune_name(node) is not None for _, node in nodes(dict(tree), ""))


def recipe_of(tree: Mapping[str, Any]) -> str:
    """Return our recipe for a torchtune file, by its keys.

    Raises:
        ConfigError: it is for a recipe that kdtune has no counterpart for, or cannot be told.
    """
    named = [str(node[COMPONENT]) for _, node in nodes(dict(tree), "")]
    reasons = [reason for key, reason in tables.FOREIGN_KEYS.items() if key in tree]
    reasons += [
        reason for name in named for prefix, reason in tables.FOREIGN_COMPONENTS.items() if name.startswith(prefix)
    ]
    reasons += [tables.QAT for name in named if "QAT" in name]
    if reasons:
        raise ConfigError(f"is of a recipe without a counterpart: {reasons[0]}")
    for recipe, marks in tables.RECIPE_MARKS.items():
        if any(tree.get(key) is not None for key in marks):
            return recipe
    known = ", ".join(key for marks in tables.RECIPE_MARKS.values() for key in marks)
    raise ConfigError(f"is of no recipe that is known: it has none of the keys {known}")


def migrate_tree(tree: Mapping[str, Any]) -> Draft:
    """Return the config that a torchtune file becomes.

    Raises:
        ConfigError: with every reason why there is none.
    """
    recipe = recipe_of(tree)
    path = _assets.find_recipe(recipe).path
    docs = field_docs(path.read_text(encoding="utf-8-sig"))
    keys = {
        name: "None" in doc.type or (doc.type == "component" and doc.default is not None) for name, doc in docs.items()
    }
    draft = Draft(tree, recipe, keys)
    for key, value in tree.items():
        _convert(draft, key, value)
    for key in draft.values.keys() - keys.keys():
        draft.note("lost", draft.origins.get(key, key), f"the recipe {recipe} has no such key")
        del draft.values[key]
    _fill(draft)
    _settle_references(draft)
    if draft.refusals:
        raise ConfigError("\n".join(draft.refusals))
    if recipe == "knowledge_distillation":
        draft.note(
            "changed",
            "gradient",
            "torchtune divides it by a step's tokens twice, kdtune once: norms in the log are larger, and Adam's eps weighs less; "
            "micro-batches count by their tokens, not each the same",
        )
    return draft


def _convert(draft: Draft, key: str, value: Any) -> None:
    special = _SPECIAL.get(key)
    if special is not None:
        special(draft, key, value)
    elif key in _CONVERTERS and (key in draft.keys or key == "loss"):
        (carry if value is None else _CONVERTERS[key])(draft, key, value)
    elif key in tables.RENAMED_KEYS and tables.RENAMED_KEYS[key].partition(".")[0] in draft.keys:
        draft.put(tables.RENAMED_KEYS[key], value, key)
        draft.note("changed", key, f"is {tables.RENAMED_KEYS[key]} here")
    elif key in draft.keys and (value is not None or draft.keys[key]):
        carry(draft, key, value)
    elif key in draft.keys:
        draft.drop(key, value, "it is null; the default stands")
    elif f"${{{key}}}" in str(draft.tree) or f"${{{key}." in str(draft.tree):
        draft.note("changed", key, "is no key of the recipe; its value stands where ${...} named it")
    else:
        draft.drop(key, value, key_hint(key) or tables.DROPPED.get(key))


def _seed(draft: Draft, key: str, value: Any) -> None:
    if value is None:
        draft.drop(key, value, "a run has a seed always, 0 if none is given")
    else:
        carry(draft, key, value)


def _clip(draft: Draft, key: str, value: Any) -> None:
    if value is None or str(value).lstrip(".") == "inf":
        draft.put(key, None)
        if value is not None:
            draft.note("changed", key, "inf is null here: the norm is logged in any case")
    elif draft.recipe == "knowledge_distillation":
        draft.note(
            "lost",
            f"{key}={shown(value)}",
            "torchtune divides the gradient by the tokens twice before it clips (with several processes it does not clip), so this value "
            "is of another scale; 1.0 is usual here",
        )
    else:
        carry(draft, key, value)


def _checkpointing(draft: Draft, key: str, value: Any) -> None:
    mode, option = draft.tree.get("ac_mode"), draft.tree.get("ac_option")
    if key == "ac_option" or value is None:
        draft.drop(key, value)
        return
    layers = option if isinstance(option, int) else "selective"
    draft.put("activation_checkpointing", layers if mode == "selective" else mode, key)
    draft.note("changed", key, f"with ac_option={shown(option)} is activation_checkpointing here")


def _enable_checkpointing(draft: Draft, key: str, value: Any) -> None:
    if draft.tree.get("ac_mode") is not None:
        draft.drop(key, value, "ac_mode says which layers")
    elif key in draft.keys:
        carry(draft, key, value)
    else:
        draft.drop(key, value)


def _offloading(draft: Draft, key: str, value: Any) -> None:
    draft.put("activation_offloading", value, key)
    ignored = value and draft.recipe == "knowledge_distillation"
    more = ": torchtune's recipe of distillation does not read it, kdtune's does" if ignored else ""
    draft.note("changed", key, f"is activation_offloading here{more}")


def _save_weights(draft: Draft, key: str, value: Any) -> None:
    if value:
        draft.put("save_weights", "adapter", key)
        draft.note("changed", key, "is save_weights: adapter here")
    else:
        draft.drop(key, value, "final/ has the merged model and the adapter (save_weights: both)")


def _fsdp(draft: Draft, key: str, value: Any) -> None:
    for name, item in (value or {}).items():
        if name == "cpu_offload":
            draft.put("parallelism.cpu_offload", item, f"{key}.{name}")
            draft.note("changed", f"{key}.{name}", "is parallelism.cpu_offload here")
        else:
            draft.drop(f"{key}.{name}", item)


def _tensor_parallel_plan(draft: Draft, key: str, value: Any) -> None:
    draft.drop(key, value)
    if draft.recipe == "generate":
        for name, size in {"tp": -1, "dp_shard": 1, "dp_replicate": 1}.items():
            draft.put(f"parallelism.{name}", size)
        draft.note("added", "parallelism", "tp=-1: each layer is divided over all processes, as torchtune's plan does")


def _quantizer(draft: Draft, key: str, value: Any) -> None:
    name = torchtune_name(value)
    if draft.recipe != "quantize" or name not in tables.QUANTIZERS:
        draft.drop(key, value) if value is None else draft.note(
            "lost", f"{key}={name or shown(value)}", str(key_hint(key))
        )
        return
    scheme, lack = tables.QUANTIZERS[name]
    draft.put("scheme", scheme, key)
    draft.put("group_size", value.get("groupsize", tables.GROUP_SIZES[name]), f"{key}.groupsize")
    draft.note("lost" if lack else "changed", f"{key}={name}", lack or f"is scheme: {scheme} here")


def _prompt(draft: Draft, key: str, value: Any) -> None:
    user = value.get("user") if isinstance(value, Mapping) else None
    if isinstance(user, Mapping):
        for name in user:
            if name != "text":
                draft.drop(f"{key}.user.{name}", user[name])
        value = {**value, "user": user.get("text")}
        draft.origins[f"{key}.user"] = f"{key}.user.text"
    carry(draft, key, value)


def _output_dir(draft: Draft, key: str, value: Any) -> None:
    if key not in draft.keys:
        draft.drop(key, value, tables.DROPPED[key])
    elif draft.recipe == "evaluate" and posixpath.normpath(str(value)) == ".":
        draft.put(key, "evaluation")
        draft.note("changed", key, "torchtune writes nothing there; kdtune makes this folder for results.json")
    else:
        carry(draft, key, value)


def _fill(draft: Draft) -> None:
    """Add what kdtune's recipe needs and torchtune's does not."""
    checkpointer = draft.tree.get("checkpointer")
    node = checkpointer if isinstance(checkpointer, Mapping) else {}
    if draft.recipe == "quantize" and "tokenizer" not in draft.values:
        draft.put("tokenizer", {COMPONENT: "kdtune.tokenizers.load", "path": node.get("checkpoint_dir")})
        draft.note("added", "tokenizer", "it is written into the folder too")
    if "output_dir" in draft.keys and "output_dir" not in draft.values and node.get("output_dir") is not None:
        draft.put("output_dir", node["output_dir"])
        draft.note("added", "output_dir", "as checkpointer.output_dir was")


def _settle_references(draft: Draft) -> None:
    """Write the value in place of a ${key} whose key has not stayed as it was."""
    resolved, _ = resolve_interpolations(draft.tree)

    def found(tree: Any, dotted: str) -> Any:
        for part in dotted.split("."):
            tree = tree.get(part) if isinstance(tree, Mapping) else None
        return tree

    def settled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: settled(item) for name, item in value.items()}
        if isinstance(value, list):
            return [settled(item) for item in value]
        gone = [
            name
            for name in (_REFERENCE.findall(value) if isinstance(value, str) else ())
            if found(draft.values, name) is None or found(draft.values, name) != found(draft.tree, name)
        ]
        for name in gone:
            if value == f"${{{name}}}":
                return found(resolved, name)
            value = value.replace(f"${{{name}}}", str(found(resolved, name)))
        return value

    draft.values = {key: settled(value) for key, value in draft.values.items()}


_CONVERTERS: dict[str, Convert] = {
    "model": components.convert_model,
    "teacher_model": components.convert_model,
    "tokenizer": components.convert_tokenizer,
    "checkpointer": components.convert_checkpointer,
    "teacher_checkpointer": components.convert_checkpointer,
    "dataset": components.convert_dataset,
    "dataset_val": components.convert_dataset,
    "optimizer": components.convert_optimizer,
    "lr_scheduler": components.convert_lr_scheduler,
    "loss": components.convert_loss,
    "kd_loss": components.convert_kd_loss,
    "metric_logger": components.convert_metric_logger,
    "profiler": components.convert_profiler,
}
_SPECIAL: dict[str, Convert] = {
    "ac_mode": _checkpointing,
    "ac_option": _checkpointing,
    "clip_grad_norm": _clip,
    "enable_activation_checkpointing": _enable_checkpointing,
    "enable_activation_offloading": _offloading,
    "fsdp": _fsdp,
    "output_dir": _output_dir,
    "prompt": _prompt,
    "quantizer": _quantizer,
    "save_adapter_weights_only": _save_weights,
    "seed": _seed,
    "tensor_parallel_plan": _tensor_parallel_plan,
}
