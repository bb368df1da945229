"""The README.md of a finished run's model: front matter for the Hugging Face hub, and a page on how the model was made."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from kdtune.escape import markdown_table, markdown_text
from kdtune.paths import user_path
from kdtune.runs.held_out import held_out, teacher_held_out, validated_rows
from kdtune.runs.metrics_file import read_metrics
from kdtune.runs.origin import base_model, checkpoint_folder, licence, licence_text, model_name
from kdtune.runs.record import last_start, read_resolved_config
from kdtune.runs.resume import is_changeable

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_USE = {
    "model": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")""",
    "adapter": """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")""",
}
_KDTUNE = {
    "model": "kdtune run generate --config generation checkpointer.checkpoint_dir=FOLDER tokenizer.path=FOLDER temperature=0",
    "adapter": "kdtune run generate --config generation checkpointer.checkpoint_dir=BASE "
    "checkpointer.adapter_dir=FOLDER tokenizer.path=FOLDER temperature=0",
}


def model_card(output_dir: Path, kind: Literal["model", "adapter"]) -> str:
    """Return the card of the model, or of the adapter alone, that a run of finetune or knowledge_distillation has made.

    It is derived from the run's config.yaml, run.json and metrics.jsonl. It contains no path of this machine: models and files
    are named by what they were downloaded as, or by their own names.
    """
    config, start = read_resolved_config(output_dir), last_start(output_dir)
    rows = read_metrics(output_dir / "metrics.jsonl")
    base = model_name(config.get("checkpointer"))
    teacher = _teacher_text(config).replace("random weights", "a model of random weights")
    title = f"{base or 'A model of random weights'}, " + ("distilled" if is_distilled(config) else "finetuned")
    parts = [
        front_matter(config, start, kind),
        f"# {markdown_text(title)}",
        f"Trained with kdtune {markdown_text(start['versions']['kdtune'])}"
        + (f" to follow its teacher, {markdown_text(teacher)}." if is_distilled(config) else "."),
        "## Training",
        markdown_table(
            ["", ""], [[name, markdown_text(value)] for name, value in run_facts(config, start, rows)], num_text=2
        ),
    ]
    if results := _results(rows, divergence_title(config, start)):
        parts += ["## Held-out results", _results_text(results), results]
    parts += [
        "## Use",
        f"FOLDER is the folder of this file{', BASE that of the base model' if kind == 'adapter' else ''}. In Python:",
        f"```python\n{_USE[kind]}\n```",
        "With kdtune:",
        f"```\n{_KDTUNE[kind]}\n```",
        licence_text(checkpoint_folder(config.get("checkpointer")), data=True),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def front_matter(config: Mapping[str, Any], start: Mapping[str, Any], kind: Literal["model", "adapter"]) -> str:
    """Return the YAML block at the top: base_model, licence, library, tags, data sets of the hub."""
    methods = ["knowledge-distillation"] if is_distilled(config) else ["sft"]
    sources = [str(node["source"]) for node in _nodes(config.get("dataset")) if _is_on_hub(node.get("source"))]
    from huggingface_hub import ModelCardData  # half a second, see kdtune/runs/origin.py

    data = ModelCardData(
        base_model=base_model(config.get("checkpointer")),
        license=licence(checkpoint_folder(config.get("checkpointer"))),
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        datasets=list(dict.fromkeys(sources)) or None,
        tags=["kdtune", *methods, *(["lora"] if _is_adapted(config, start) or kind == "adapter" else [])],
    )
    return f"---\n{data.to_yaml()}\n---"


def is_distilled(config: Mapping[str, Any]) -> bool:
    """Return whether the run has trained on its teacher; with a kd_ratio of 0 it has only measured the divergence from it."""
    ratio = config.get("kd_ratio")
    return isinstance(ratio, int | float) and ratio > 0


def has_facts(config: Mapping[str, Any], start: Mapping[str, Any]) -> bool:
    """Return whether a run has the keys that `run_facts` reads; a user's own recipe may have others."""
    per_step = start.get("batches_per_step", config.get("gradient_accumulation_steps"))
    return (
        {"dataset", "dtype", "seed", *(["kd_loss"] if is_distilled(config) else [])} <= config.keys()
        and all(isinstance(config.get(key), Mapping) for key in ("tokenizer", "optimizer"))
        and isinstance(start.get("versions"), Mapping)
        and isinstance(config.get("batch_size"), int)
        and isinstance(per_step, int)
    )


def run_facts(
    config: Mapping[str, Any], start: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """Return (name, text) pairs that describe how a run's model was made: models, data, loss, steps, optimizer, versions.

    Args:
        config: the run's config.yaml, of finetune or knowledge_distillation.
        start: the start in its run.json that reached the end.
        rows: the rows of its metrics.jsonl.
    """
    trained = [row for row in rows if "loss" in row]
    tokens = sum(row.get("num_valid_tokens", 0) for row in trained)
    per_step = config["batch_size"] * start.get("batches_per_step", config["gradient_accumulation_steps"])
    inputs = start.get("inputs") or {}
    found = [("base model", model_name(config.get("checkpointer")) or "random weights")]
    if is_distilled(config):
        found += [
            ("teacher", _teacher_text(config)),
            ("what is stored of the teacher", _stored_text(inputs.get("teacher"))),
            ("loss", "(1 - kd_ratio) × cross entropy + kd_ratio × divergence"),
            ("divergence from the teacher", component_text(config["kd_loss"])),
        ]
    else:
        found.append(("loss", "cross entropy"))
        if any("val_kd_loss" in row for row in rows):
            found.append(("teacher of the held-out results", _teacher_text(config)))
    if "kd_ratio" in config:
        found.append(("kd_ratio", f"{config['kd_ratio']:.4g}"))
    found += [
        ("data", _data_text(config["dataset"], inputs.get("dataset"))),
        ("held-out data", _data_text(config.get("dataset_val"), inputs.get("dataset_val"))),
        ("max_seq_len", f"{config['tokenizer'].get('max_seq_len') or 'any number of'} tokens"),
        ("steps", str(trained[-1]["step"] if trained else 0)),
        ("examples a step", str(per_step)),
        ("tokens with a label", f"{tokens:,.0f}"),
        ("trained", _trained_text(config, start)),
        ("optimizer", component_text(config["optimizer"])),
        ("learning rate", str(config["optimizer"].get("lr", "the optimizer's default"))),
        ("schedule", component_text(config.get("lr_scheduler")) or "constant"),
        (f"changed after step {start.get('step')}", _changes_text(start)),
        ("weights", config["dtype"]),
        ("seed", str(config["seed"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in start["versions"].items() if version)),
    ]  # fmt: skip
    return [(name, text) for name, text in found if text]


def component_text(node: Any) -> str:
    """Format a component of a config in a line, without its lr, paths as names: `torch.optim.AdamW(weight_decay=0.1)`."""
    if not isinstance(node, Mapping):
        return "" if node is None else _value_text(node)
    arguments = [f"{name}={_value_text(value)}" for name, value in node.items() if name not in ("_component_", "lr")]
    return f"{node.get('_component_', '')}({', '.join(arguments)})" if arguments else str(node.get("_component_", ""))


def _value_text(value: Any) -> str:
    if isinstance(value, Mapping):
        if "_component_" in value:
            return component_text(value)
        return f"{{{', '.join(f'{_value_text(name)}: {_value_text(one)}' for name, one in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_value_text, value))}]"
    if isinstance(value, str):
        return value.rstrip("/").rpartition("/")[2] if _is_path(value) else value
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _is_path(text: str) -> bool:
    """Return whether a setting's text is a path. A prompt may contain a slash, too, and a path a blank."""
    if "/" not in text or _is_on_hub(text):
        return False
    if re.match(r"[/~.]|\S*/\S*$", text) or re.search(r"\.\w{1,10}$", text):
        return True
    try:
        return user_path(text).exists()
    except (OSError, ValueError):  # too long for a name, or with a null character
        return False


def _is_adapted(config: Mapping[str, Any], start: Mapping[str, Any]) -> bool:
    """Return whether adapters were trained. The builder in `model` can make them too, so the run's record decides, if any."""
    return bool(start.get("adapters", config.get("adapter") is not None))


def _changes_text(start: Mapping[str, Any]) -> str:
    """Describe the settings that the run's last resume changed, such as "optimizer.lr 0.001 -> 0.0005"; "" if none."""
    changed = (start.get("changed") or {}).items()
    return ", ".join(f"{key} {one['was']} -> {one['is']}" for key, one in changed if is_changeable(key))


def _teacher_text(config: Mapping[str, Any]) -> str:
    """Name of a run's teacher: a component of the user's own, or a model."""
    if config.get("teacher") is not None:
        return component_text(config["teacher"])
    return model_name(config.get("teacher_checkpointer")) or "random weights"


def _stored_text(header: Any) -> str:
    """Describe the cache that a run's targets are from, by its header in run.json; "" without one."""
    if not isinstance(header, Mapping) or "kind" not in header:
        return ""
    num_ids = f", {header['num_ids']} ids a token" if header.get("num_ids") else ""
    return f"{header['kind']} of {header['num_examples']} examples, {header['dtype']}{num_ids}"


def _trained_text(config: Mapping[str, Any], start: Mapping[str, Any]) -> str:
    if not _is_adapted(config, start):
        return "all parameters"
    if config.get("adapter") is not None:
        return component_text(config["adapter"])
    return f"the adapters of {component_text(config.get('model')) or 'the checkpoint'}"


def divergence_title(config: Mapping[str, Any], start: Mapping[str, Any]) -> str:
    """Display name of a run's divergence: the name in its record, else one from its config.

    `start` is the start in its run.json; runs of older versions have no name there. The divergence's code need not be installed.
    """
    if isinstance(recorded := start.get("divergence"), str):
        return recorded
    node = config.get("kd_loss")
    name = str(node.get("_component_", "")) if isinstance(node, Mapping) else ""
    if name in ("", "kdtune.losses.ForwardKL", "kdtune.losses.ForwardKLLoss"):
        return "KL"
    return name.rpartition(".")[2].removesuffix("Loss")


def _data_text(node: Any, fingerprint: Any) -> str:
    """Describe the data set, its split (kdtune's own default too), and how many examples it gave."""
    if isinstance(node, Mapping) and str(node.get("_component_")).startswith("kdtune.data.") and len(_nodes(node)) == 1:
        node = {**node, "split": node.get("split", "train")}
    return ": ".join(filter(None, [component_text(node), fingerprint if isinstance(fingerprint, str) else None]))


def _nodes(node: Any) -> list[Mapping[str, Any]]:
    """Yield a component and those inside it, such as the parts of a mixture."""
    if isinstance(node, list):
        return [found for item in node for found in _nodes(item)]
    if not isinstance(node, Mapping):
        return []
    return [node, *(found for value in node.values() for found in _nodes(value))]


def _is_on_hub(source: Any) -> bool:
    """Return whether a data set's source is a name of the hub, not a path: an existing file takes precedence over such a name."""
    return isinstance(source, str) and bool(_HUB_NAME.fullmatch(source)) and not Path(source).exists()


def _results_text(table: str) -> str:
    return f"Means per token; cross entropy{' and KL' if ' KL to the teacher ' in table else ''} in nats."


def _results(rows: Sequence[Mapping[str, Any]], divergence: str) -> str:
    """Return the table of before, after and teacher; "" without a validation."""
    validated = validated_rows(rows)
    if not validated:
        return ""
    lines = [(f"step {row['step']}", held_out(row)) for row in (validated[0], validated[-1])]
    if (teacher := teacher_held_out(validated)) is not None:
        lines.append(("teacher", teacher))
    header = ["model", "cross entropy", "perplexity", f"{divergence} to the teacher", "same top token"]
    cells = [
        [name, _number(one.class_loss), one.perplexity_text or "-", _number(one.kd_loss), one.agreement_text or "-"]
        for name, one in lines
    ]
    num_columns = len(header) if any("val_kd_loss" in row for row in validated) else 3
    return markdown_table(header[:num_columns], [line[:num_columns] for line in cells], num_text=1)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
