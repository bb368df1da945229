"""The keys that every training recipe has."""

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from kdtune import checkpoint, data, runs, teachers, tokenizers
from kdtune.config import PathText, component, instantiate, key
from kdtune.models import Transformer, dtype_from_name
from kdtune.models.float8 import float8_problems
from kdtune.paths import cache_folder
from kdtune.training.checks import loop_problems, memory_problems
from kdtune.training.precision import placement_problems, resolve_device


@dataclass(kw_only=True)
class TrainingConfig:
    """Keys of a recipe that trains a model; a recipe's own `Config` inherits them and adds its own.

    A key's `at_least` is its smallest value; `may_change` allows another value in a resumed run.
    """

    output_dir: PathText = key(may_change=True)
    """Folder of the run: config.yaml, run.json, metrics.jsonl, samples.jsonl, loss.png, step_N/ and final/."""
    models_dir: PathText = "/tmp"
    """Folder of downloaded models, for a config's own paths: ${models_dir}/Llama-3.2-1B-Instruct."""
    resume_from_checkpoint: bool = key(False, may_change=True)
    """Resume from the latest complete step_N in output_dir; start from scratch if there is none."""
    resume_changes: list[str] = key([], may_change=True)
    """Keys that a resumed run may change: optimizer.lr or another of its arguments, lr_scheduler,
    clip_grad_norm; in distillation also kd_ratio."""

    # The trained model: the student, in distillation
    checkpointer: Any = component(default=None, returns=checkpoint.Checkpointer)
    """The trained model's weights (kdtune.checkpoint.Checkpointer); null: random weights, with a builder in `model`."""
    model: Any = component(default=None, returns=Transformer)
    """The trained model's builder, checked against its checkpoint; null: built from the checkpoint's own config."""
    adapter: Any = component("model", default=None)
    """Adapters for the trained model, such as kdtune.models.apply_lora; null: as the builder says, else all parameters
    are trained."""
    tokenizer: Any = component(returns=tokenizers.Tokenizer)
    """The tokenizer, such as kdtune.tokenizers.load; max_seq_len is the longest example, in tokens."""
    device: str | None = key(None, may_change=True)
    """cpu, cuda, cuda:N or mps; null: the best one there is."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """dtype of the trained model's weights, gradients and optimizer state."""
    weight_update: Literal["nearest", "stochastic", "fp32_master"] = "nearest"
    """How bf16 weights take an update: nearest (it is lost where it is small), stochastic (it is right on average), or fp32_master
    (the optimizer holds an fp32 copy). The last two update in fp32, with fp32 state (docs/recipes.md)."""
    parallelism: Any = component(default={"_component_": "kdtune.distributed.Parallelism"}, may_change=True)
    """Parallelism of the trained model over the processes that torchrun starts; with one process it does nothing."""
    compile: bool = key(False, may_change=True)
    """torch.compile each layer of every model, and the loss."""
    enable_activation_checkpointing: bool = key(False, may_change=True)
    """As activation_checkpointing: full."""
    activation_checkpointing: Literal["full", "selective"] | int | None = key(None, may_change=True)
    """Recompute the trained model's activations in backward: full (less memory, about a third more time), a number n (of every n-th
    layer), or selective (all but matrix products and attention); null: keep them."""
    float8_training: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = key(None, may_change=True)
    """Multiply in float8 in the trained model's layers, by a recipe of torchao, for speed on Ada and Hopper GPUs; null: in their dtype."""
    activation_offloading: bool = key(False, may_change=True)
    """Hold the trained model's activations in the CPU's memory until backward; needs a CUDA device."""
    optimizer_in_backward: bool = key(False, may_change=True)
    """Update each weight in backward as soon as its gradient is there, and free that: gradients take no memory. It excludes
    gradient accumulation and clip_grad_norm."""

    # Data
    dataset: Any = component("tokenizer", returns=data.Dataset)
    """The training data, such as kdtune.data.alpaca_cleaned_dataset."""
    dataset_val: Any = component("tokenizer", default=None, returns=data.Dataset)
    """Held-out examples for the validation and the table at the end."""
    batch_size: int = key(4, at_least=1)
    """Examples per micro-batch."""
    padding_free: bool | None = key(None, may_change=True)
    """Lay the examples of a micro-batch end to end, each attended to by itself; false: pad them to the longest; null: true,
    and false with a `teacher` of your own, which may read a row an example."""
    tokens_per_micro_batch: int | None = key(None, at_least=1, may_change=True)
    """Cut the examples of a step, or of a validation batch, into micro-batches of at most so many tokens, similar lengths
    together; null: batch_size examples each. The step's examples are the same."""
    batch_size_val: int | None = key(None, at_least=1, may_change=True)
    """Examples per batch in validation; null: as batch_size."""
    shuffle: bool = True
    """Shuffle the data in every epoch; the order depends only on the seed."""
    num_workers: int = key(0, may_change=True)
    """Processes that prepare batches."""
    tokenized_cache_dir: PathText | None = key(cache_folder("tokenized"), may_change=True)
    """Folder where tokenized rows are kept for other runs with the same ones: in the user's cache; null: nowhere."""

    # Optimization
    optimizer: Any = component("params", returns=torch.optim.Optimizer)
    """Any torch optimizer, kdtune.training.Muon, or one of torchao.optim, whose state takes 8 or 4 bits: AdamW8bit, AdamW4bit, AdamWFp8."""
    lr_scheduler: Any = component(
        "optimizer", optional=("num_training_steps",), default=None, returns=torch.optim.lr_scheduler.LRScheduler
    )
    """Such as kdtune.training.get_cosine_schedule_with_warmup; null: a constant learning rate."""
    epochs: int = key(1, at_least=1, may_change=True)
    """Passes over the data."""
    max_steps_per_epoch: int | None = key(None, at_least=1, may_change=True)
    """Steps after which an epoch is cut; needed when the dataset is streamed."""
    gradient_accumulation_steps: int = key(1, at_least=1, may_change=True)
    """Micro-batches per optimizer step."""
    clip_grad_norm: float | None = None
    """Largest norm of a step's gradient; null: no clipping."""
    loss_chunk_size: int | None = key(None, at_least=1, may_change=True)
    """Tokens whose logits are in memory at a time; null: chosen by the size of the vocabulary."""
    loss_logits_dtype: Literal["bf16"] | None = None
    """bf16: round the loss's logits and their gradient to bf16, with dtype bf16: faster, less exact (docs/losses.md); null: fp32."""
    seed: int = 0
    """Seed of the data order and of random weights."""
    cudnn_deterministic_mode: Literal["default", "warn", "error"] | None = None
    """torch.use_deterministic_algorithms and cuDNN's counterpart: default (off), warn or error."""

    # Validation, samples, checkpoints
    run_val_every_n_steps: int | None = key(None, at_least=1, may_change=True)
    """Steps between validations; null: before the first step and after the last one only."""
    sample_prompts: list[str] = key([], may_change=True)
    """Prompts that the trained model answers before and after training, and a teacher once."""
    sample_every_n_steps: int | None = key(None, at_least=1, may_change=True)
    """Steps between samples during training; null: none."""
    sample_max_new_tokens: int = key(64, at_least=1, may_change=True)
    """Longest answer, in tokens."""
    save_every_n_steps: int | None = key(None, at_least=1, may_change=True)
    """Steps between checkpoints; null: a checkpoint only when the run is interrupted, and final/ at the end."""
    keep_last_n_checkpoints: int | None = key(None, at_least=1, may_change=True)
    """Older step_N folders are deleted (never the best); null: all are kept."""
    enable_async_checkpointing: bool = key(False, may_change=True)
    """Continue training while a step_N is written, from a copy in the CPU's memory; false: wait for it."""
    best_metric: Literal["val_class_loss", "val_kd_loss", "val_forward_kl", "val_agreement"] | None = key(
        None, may_change=True
    )
    """The validation metric whose best step_N is kept and named at the end; the last two need a teacher."""
    save_weights: Literal["both", "merged", "adapter"] = "both"
    """Content of final/ for a model with adapters: the merged model with the adapter in final/adapter/, or one of them."""

    # Logging
    metric_logger: Any = component(optional=("log_dir",), default=None, may_change=True)
    """A second logger beside metrics.jsonl: kdtune.training.TensorBoardLogger or WandBLogger."""
    log_every_n_steps: int = key(1, at_least=1, may_change=True)
    """Steps between lines of the second logger (metrics.jsonl has every step)."""
    log_peak_memory_stats: bool = key(True, may_change=True)
    """Log the peak memory so far."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = key("INFO", may_change=True)
    """Amount of output besides the progress bar."""
    profiler: Any = component(optional=("output_dir",), default=None, may_change=True)
    """kdtune.training.Profiler for a torch profiler trace."""

    def problems(self) -> list[str]:
        """Return config problems, one sentence each."""
        found = loop_problems(self)
        if self.model is None and self.checkpointer is None:
            found.append("checkpointer: missing, and no model to start from random weights; give one of them")
        found += memory_problems(self)
        param_dtype = (self.parallelism or {}).get("param_dtype")
        if self.loss_logits_dtype is not None and self.loss_logits_dtype != (param_dtype or self.dtype):
            key, value = ("parallelism.param_dtype", param_dtype) if param_dtype else ("dtype", self.dtype)
            found.append(
                f"loss_logits_dtype={self.loss_logits_dtype}: {key} is {value}; it is for models computed in bf16, use null"
            )
        return found

    @property
    def checkpointed(self) -> Literal["full", "selective"] | int | None:
        """The layers whose activations are recomputed, whichever key says so."""
        return "full" if self.enable_activation_checkpointing else self.activation_checkpointing

    def loss_settings(self) -> dict[str, Any]:
        """Return the arguments of `kdtune.losses.KDLoss` that say how it computes, not what."""
        dtype = None if self.loss_logits_dtype is None else dtype_from_name(self.loss_logits_dtype)
        return {"chunk_size": self.loss_chunk_size, "logits_dtype": dtype, "compile": self.compile}

    def machine_problems(self) -> list[str]:
        """Return machine problems, found without reading weights."""
        found = placement_problems(self)
        if getattr(self, "hidden_loss", None):
            found += teachers.layer_problems(self)
        if (teacher := teachers.configured_teacher(self)) is not None:
            found += teacher.problems(self)
        if self.activation_offloading and not found and resolve_device(self.device).type != "cuda":
            found.append(
                "activation_offloading=true: needs a CUDA device, from which there is something to move; set it to false"
            )
        if self.float8_training is not None and not found:
            dtype = dtype_from_name((self.parallelism or {}).get("param_dtype") or self.dtype)
            problems = float8_problems(self.float8_training, resolve_device(self.device), dtype)
            found += [f"float8_training={self.float8_training}: {problem}" for problem in problems]
        found += runs.output_dir_problems(self.output_dir, resume=self.resume_from_checkpoint)
        for name in (field.name for field in fields(self) if field.name.endswith("checkpointer")):
            if node := instantiate(getattr(self, name)):
                found += [f"{name}: {problem}" for problem in node.problems()]
        return found
