"""Quantize a model's linear weights to 8 or 4 bits, for use by the generate and evaluate recipes.

    kdtune run quantize --config quantization checkpointer.checkpoint_dir=MODEL tokenizer.path=MODEL output_dir=MODEL-int8
    kdtune run quantize --config smollm2/quantization scheme=nf4 output_dir=models/SmolLM2-nf4

Writes a folder that checkpointers read like any other, bit for bit; it is for inference, not for training. The schemes:
int8_weight_only (almost no loss), int8_dynamic (int8 arithmetic: faster on many tokens), float8_weight_only,
float8_dynamic (CUDA compute capability 8.9 or higher), int4_weight_only (8.0 or higher, bf16), nf4 (4 bits on any device),
intx_4bit (the error of 4 bits, stored in a byte each).
"""

from dataclasses import dataclass
from typing import Any, Literal

from tqdm import tqdm

from kdtune import checkpoint, config, data, evaluation, parallel, runs, teachers, tokenizers, training
from kdtune.distributed import World
from kdtune.log import bar_settings
from kdtune.models import Transformer, dtype_from_name, has_adapters, on_meta_device, quantization


@dataclass(kw_only=True)
class Config:
    """All keys of this recipe."""

    models_dir: config.PathText = "/tmp"
    """Folder of downloaded models, for a config's own paths: ${models_dir}/Llama-3.2-1B-Instruct."""
    output_dir: config.PathText
    """The folder to write; it must not exist yet."""

    checkpointer: Any = config.component(default=None, returns=checkpoint.Checkpointer)
    """The weights (kdtune.checkpoint.Checkpointer); null: random weights, with a builder in `model`."""
    model: Any = config.component(default=None, returns=Transformer)
    """The builder, checked against the checkpoint; null: built from the checkpoint's own config."""
    tokenizer: Any = config.component(returns=tokenizers.Tokenizer)
    """The tokenizer, written into the folder too."""
    device: str | None = None
    """Device on which the model will be used: cpu, cuda, cuda:N or mps; null: the best one there is."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Dtype of the arithmetic, and of the weights that are not quantized: embedding, norms, head."""
    seed: int = 0
    """Seed of random weights."""

    scheme: str
    """int8_weight_only, int8_dynamic, float8_weight_only, float8_dynamic, int4_weight_only, nf4 or intx_4bit."""
    group_size: int | None = None
    """Input features that share a scale, of int4_weight_only (null: 128) and intx_4bit (null: 32)."""
    quantize_output: bool = False
    """Quantize the head too, if it is not tied to the embedding."""

    dataset_val: Any = config.component("tokenizer", default=None, returns=data.Dataset)
    """Held-out examples; null: no loss is measured."""
    batch_size_val: int = 4
    """Examples per batch."""

    def problems(self) -> list[str]:
        """Return config problems, one sentence each."""
        found = training.device_name_problems(self.device)
        if self.batch_size_val < 1:
            found.append(f"batch_size_val={self.batch_size_val}: must be at least 1")
        if self.quantize_output and self.dataset_val is not None:
            found.append(
                "quantize_output=true, dataset_val: the held-out loss needs a plain head; remove one: ~quantize_output or ~dataset_val"
            )
        if self.model is None and self.checkpointer is None:
            found.append("checkpointer: missing, and no model to start from random weights; give one of them")
        return found + training.builder_problems(self) + data.first_row_problems(self)

    def machine_problems(self) -> list[str]:
        """Return machine problems, found without reading weights."""
        if self.model is not None and is_adapted(self.model):
            return [
                "model: this builder makes adapters, and adapters are not quantized; merge the adapters: use "
                "checkpointer.adapter_dir, with the plain builder or model=null"
            ]
        found = training.device_problems(self.device, self.dtype)
        found += runs.new_folder_problems(self.output_dir)
        checkpointer = config.instantiate(self.checkpointer)
        if checkpointer is not None:
            found += [f"checkpointer: {problem}" for problem in checkpointer.problems()]
        if found:
            return found
        device, dtype = training.resolve_device(self.device), dtype_from_name(self.dtype)
        if problems := quantization.scheme_problems(self.scheme, device, dtype, self.group_size):
            return problems
        model_config = parallel.model_config(config.factory(self.model), checkpointer)
        return quantization.shape_problems(
            self.scheme, model_config, self.group_size, quantize_output=self.quantize_output
        )


@config.entry_point(Config)
def main(cfg: Config) -> None:
    """Run the recipe."""
    run(cfg)


def run(cfg: Config) -> None:
    """Load held-out data and model, quantize, and write the folder."""
    world, dtype = World(training.resolve_device(cfg.device)), dtype_from_name(cfg.dtype)
    tokenizer, cfg = training.load_tokenizer(cfg)
    held_out = None
    if cfg.dataset_val is not None:
        dataset = data.load_dataset("dataset_val", cfg.dataset_val, tokenizer)
        training.check_lengths(cfg, {"dataset_val": dataset.lengths})
        held_out = list(data.batches(dataset, cfg.batch_size_val, pad_id=tokenizer.pad_id, padding_free=True))
    checkpointer = config.instantiate(cfg.checkpointer)
    teachers.check_tokenizer(tokenizer, checkpointer, "checkpointer", path=cfg.tokenizer.get("path"))
    training.set_seed(cfg.seed)
    model = parallel.build_model(config.factory(cfg.model), checkpointer, dtype=dtype, world=world)
    tokenizers.check_vocabulary(tokenizer, model.config.vocab_size)

    def held_out_loss() -> float | None:
        if held_out is None:
            return None
        return evaluation.evaluate_ce(model, held_out, world=world)["class_loss"]

    before = {
        "weights": cfg.dtype,
        "size (MB)": quantization.megabytes(model),
        "held-out loss (nats/token)": held_out_loss(),
    }
    linears = quantization.target_linears(model, quantize_output=cfg.quantize_output)
    with tqdm(total=len(linears), desc="quantizing", unit="linear", **bar_settings()) as bar:
        errors = quantization.quantize(
            model, cfg.scheme, group_size=cfg.group_size, quantize_output=cfg.quantize_output,
            progress=lambda _: bar.update(),
        )  # fmt: skip
    relative = [error.relative_error for error in errors]
    after = {"weights": cfg.scheme, "size (MB)": quantization.megabytes(model), "mean weight error": sum(relative) / len(relative),
             "largest weight error": max(relative), "held-out loss (nats/token)": held_out_loss()}  # fmt: skip

    with checkpoint.atomic_folder(cfg.output_dir) as folder:
        checkpoint.write_quantized(
            model, folder, scheme=quantization.scheme_name(cfg.scheme), group_size=cfg.group_size,
            base=cfg.checkpointer and cfg.checkpointer["checkpoint_dir"], tokenizer=tokenizer,
        )  # fmt: skip
        origin = runs.origin_record(cfg.checkpointer, f"{cfg.scheme} weights")
        runs.write_run_files(folder, resolved_config=config.resolved_yaml(cfg), record=config.run_record(cfg) | origin)
    columns = ["weights", "size (MB)", "mean weight error", "largest weight error"]
    columns += ["held-out loss (nats/token)"] if held_out is not None else []
    print(runs.format_table([{column: row.get(column) for column in columns} for row in (before, after)]))
    worst = max(errors, key=lambda error: error.relative_error)
    print(f"{len(errors)} linears quantized, the largest relative error in {worst.name}\nwrote {cfg.output_dir}")


def is_adapted(builder: Any) -> bool:
    """Return whether the builder's model has adapters; it is built without weights."""
    with on_meta_device():
        return has_adapters(config.instantiate(builder))


if __name__ == "__main__":
    main()
