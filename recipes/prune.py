"""Make a student from a teacher by dropping layers, chosen by what each one costs.

    kdtune run prune --config smollm2/prune
    kdtune run prune --config smollm2/prune num_layers=16 method=block_influence output_dir=models/SmolLM2-16-layers

Writes a Hugging Face folder. The choice of layers matters more than their number: the loss of every choice is printed. A
greedy search that is stopped (Ctrl-C, SIGTERM, a crash) keeps its removals so far in OUTPUT_DIR.partial, and the same command
continues it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from kdtune import checkpoint, config, data, parallel, pruning, runs, teachers, tokenizers, training
from kdtune.distributed import World
from kdtune.errors import TrainingError
from kdtune.models import Transformer, dtype_from_name


@dataclass(kw_only=True)
class Config:
    """All keys of this recipe."""

    models_dir: config.PathText = "/tmp"
    """Folder of downloaded models, for a config's own paths: ${models_dir}/Llama-3.2-1B-Instruct."""
    output_dir: config.PathText
    """The Hugging Face folder to write; it must not exist yet."""

    checkpointer: Any = config.component(default=None, returns=checkpoint.Checkpointer)
    """The teacher's weights (kdtune.checkpoint.Checkpointer); null: random weights, with a builder in `model`."""
    model: Any = config.component(default=None, returns=Transformer)
    """The teacher's builder, checked against its checkpoint; null: built from the checkpoint's own config."""
    tokenizer: Any = config.component(returns=tokenizers.Tokenizer)
    """The tokenizer, written into the folder too; max_seq_len is the longest calibration example, in tokens."""
    device: str | None = None
    """cpu, cuda, cuda:N or mps; null: the best one there is."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Weight dtype, for the measurement and in the folder."""

    layers: list[int] | None = None
    """The layers to keep, by index from 0; null: num_layers of them, chosen by `method`."""
    num_layers: int | None = None
    """Number of layers to keep."""
    method: Literal["greedy", "block_influence", "even"] = "greedy"
    """greedy: repeatedly drop the layer whose removal raises the loss least; block_influence: keep those that change their
    input most (arXiv 2403.03853); even: at equal distances."""

    dataset: Any = config.component("tokenizer", returns=data.Dataset)
    """Calibration text, on whose labels the loss is measured."""
    num_candidates: int | None = None
    """greedy: number of layers tried for each removal after the first, those that cost least when last tried; null: all."""
    num_calibration_tokens: int = 1024
    """Number of labels to measure with, from the start of the dataset; the time is proportional to it."""
    seed: int = 0
    """Seed of random weights."""

    def problems(self) -> list[str]:
        """Return config problems, one sentence each."""
        found = training.device_name_problems(self.device)
        if self.layers is None and self.num_layers is None:
            found.append("layers, num_layers: give one of them, the list to keep (layers=[0,1]) or the number to keep")
        if self.layers is not None and self.num_layers is not None:
            found.append(
                "layers, num_layers: both given, the list to keep and the number to keep; remove one: ~layers or ~num_layers"
            )
        if self.layers is not None and self.method != "greedy":
            found.append(
                f"method={self.method}: has no effect with layers; remove one: ~method, or ~layers and give num_layers"
            )
        for key in ("num_calibration_tokens", "num_layers", "num_candidates"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                found.append(f"{key}={getattr(self, key)}: must be at least 1")
        if self.num_candidates is not None and (self.layers is not None or self.method != "greedy"):
            found.append(f"num_candidates={self.num_candidates}: has no effect but in the greedy choice of num_layers; remove it: "
                         "~num_candidates")  # fmt: skip
        if self.model is None and self.checkpointer is None:
            found.append("checkpointer: missing, and no model to start from random weights; give one of them")
        return found + training.builder_problems(self) + data.first_row_problems(self)

    def machine_problems(self) -> list[str]:
        """Return machine problems, found without reading weights."""
        found = training.device_problems(self.device, self.dtype)
        found += runs.new_folder_problems(self.output_dir)
        if checkpointer := config.instantiate(self.checkpointer):
            found += [f"checkpointer: {problem}" for problem in checkpointer.problems()]
        return found or pruning.architecture_problems(parallel.model_config(config.factory(self.model), checkpointer))


@config.entry_point(Config)
def main(cfg: Config) -> None:
    """Run the recipe."""
    with runs.Progress(every=1) as progress:
        run(cfg, progress)


def run(cfg: Config, progress: runs.Progress) -> None:
    """Load the calibration text and the model, choose the layers, write the folder."""
    device, dtype = training.resolve_device(cfg.device), dtype_from_name(cfg.dtype)
    training.set_seed(cfg.seed)
    tokenizer, cfg = training.load_tokenizer(cfg)
    progress.phase("reading the data")
    dataset = data.load_dataset("dataset", cfg.dataset, tokenizer)
    batches = [batch.to(device) for batch in calibration_batches(dataset, cfg.num_calibration_tokens, tokenizer.pad_id)]
    training.check_lengths(cfg, {"dataset": training.example_lengths(batches)})
    checkpointer = config.instantiate(cfg.checkpointer)
    teachers.check_tokenizer(tokenizer, checkpointer, "checkpointer", path=cfg.tokenizer.get("path"))
    num_tokens = sum(batch.num_valid_tokens for batch in batches)
    is_searched = cfg.layers is None and cfg.method == "greedy"
    record = pruning.RemovalRecord(checkpoint.partial_of(cfg.output_dir), cfg, batches) if is_searched else None

    progress.phase("loading the model")
    model = parallel.build_model(config.factory(cfg.model), checkpointer, dtype=dtype, world=World(device)).eval()
    tokenizers.check_vocabulary(tokenizer, model.config.vocab_size)
    print(f"calibrating on {num_tokens} labels of {dataset.report.source}")
    kept, removals = choose_layers(cfg, model, batches, record, progress)

    progress.phase("measuring this choice and others")
    choices = {"all layers": list(range(model.config.num_layers)), "this choice": kept}
    choices["evenly spaced"] = pruning.evenly_spaced(model.config.num_layers, len(kept))
    choices["block influence"] = pruning.most_influential(pruning.block_influence(model, batches), len(kept))
    costs = {name: pruning.mean_loss(model, batches, layers) for name, layers in choices.items()}
    print(runs.format_table([{"layers": name, "number": len(choices[name]), "loss (nats/token)": cost,
                                  "kept": ranges(choices[name])} for name, cost in costs.items()]))  # fmt: skip

    progress.phase(f"writing {cfg.output_dir}")
    student = pruning.keep_layers(model, kept)
    report = {"kept": kept, "removals": removals, "num_calibration_tokens": num_tokens, "loss": costs}
    with checkpoint.atomic_folder(cfg.output_dir) as folder:
        checkpoint.write_model(
            student, folder, base=cfg.checkpointer and cfg.checkpointer["checkpoint_dir"], tokenizer=tokenizer
        )
        made, start = f"{len(kept)} of the {model.config.num_layers} layers", config.run_record(cfg)
        origin = runs.origin_record(cfg.checkpointer, made)
        runs.write_run_files(folder, resolved_config=config.resolved_yaml(cfg), record=start | origin)
        card = runs.origin_card(
            cfg.checkpointer, f"{made} ({ranges(kept)})", tag="pruned", version=start["versions"]["kdtune"]
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / "prune.json").write_text(json.dumps(report, indent=1) + "\n")
    if record is not None:
        record.remove()
    print(f"wrote {cfg.output_dir}: {len(kept)} of {model.config.num_layers} layers, "
          f"{sum(p.numel() for p in student.parameters()) / 1e6:.1f}M parameters")  # fmt: skip


def calibration_batches(dataset: Any, num_tokens: int, pad_id: int) -> Iterator[data.Batch]:
    """Return single examples (so nothing is padding) from the start of the dataset, until they hold this many valid labels."""
    count = 0
    for batch in data.batches(dataset, 1, pad_id):
        if count >= num_tokens:
            return
        count += batch.num_valid_tokens
        yield batch


def choose_layers(
    cfg: Config,
    model: Transformer,
    batches: list[data.Batch],
    record: pruning.RemovalRecord | None,
    progress: runs.Progress,
) -> tuple[list[int], list[dict[str, float]]]:
    """Return the layers to keep, and for the greedy choice each removal with the loss after it."""
    total = model.config.num_layers
    if cfg.layers is not None:
        pruning.check_layers(model, cfg.layers)
        return cfg.layers, []
    assert cfg.num_layers is not None
    if cfg.method == "even":
        return pruning.evenly_spaced(total, cfg.num_layers), []
    if record is None:
        progress.phase("measuring the layers")
        influence = pruning.block_influence(model, batches)
        rows: list[dict[str, Any]] = [
            {"layer": index, "block influence": value} for index, value in enumerate(influence)
        ]
        print(runs.format_table(rows))
        return pruning.most_influential(influence, cfg.num_layers), []
    removals = search(cfg, model, batches, record, progress)
    rows = [{"dropped layer": step.layer, "loss without it (nats/token)": step.loss} for step in removals]
    print(runs.format_table(rows))
    dropped = {step.layer for step in removals}
    layers = [index for index in range(total) if index not in dropped]
    return layers, [{"layer": step.layer, "loss": step.loss} for step in removals]


def search(
    cfg: Config,
    model: Transformer,
    batches: list[data.Batch],
    record: pruning.RemovalRecord,
    progress: runs.Progress,
) -> list[pruning.RemovalStep]:
    """Return the greedy removals. Each is recorded when it is decided, and a stopped search continues from its record."""
    assert cfg.num_layers is not None
    num_removals = max(0, model.config.num_layers - cfg.num_layers)

    def add(step: pruning.RemovalStep) -> None:
        record.add(step)
        progress.step(len(record.removals), [f"layer {step.layer}", f"loss {step.loss:.3f}"])

    def show(share: float) -> None:
        progress.share(share)
        if interrupt.requested:
            num = len(record.removals)
            outcome = f"kept in {record.path}; the same command continues" if num else "the same command starts again"
            raise TrainingError(f"stopped by {interrupt.signal_name} after {num} of {num_removals} removals: {outcome}")

    progress.start(num_removals, min(len(record.removals), num_removals), doing="dropping layers", unit="removal")
    with runs.InterruptFlag() as interrupt:
        found = pruning.greedy_removal(
            model, batches, cfg.num_layers, num_candidates=cfg.num_candidates, done=tuple(record.removals), on_removal=add,
            on_progress=show,
        )  # fmt: skip
    progress.end_steps()
    return found


def ranges(layers: list[int]) -> str:
    """Shorten consecutive indices to ranges: [0, 1, 2, 5] gives "0-2, 5"."""
    starts = [i for i in layers if i - 1 not in layers]
    ends = [i for i in layers if i + 1 not in layers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


if __name__ == "__main__":
    main()
