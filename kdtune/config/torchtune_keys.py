"""torchtune's config keys and components that do nothing here, each with one sentence on the replacement."""

import importlib
import importlib.util

_LAYERS_ARE_SHARDS = "every layer is a shard of its own; remove it"
_ONE_SWITCH = "use activation_checkpointing: full, selective, or a number n for every n-th layer"
_ALL_FILES = "list the files in checkpoint_files, or leave it out: every weight file of the folder is read"
_FROM_FOLDER = "the architecture is read from the folder's own configuration; remove it"
_NEWEST_STEP = "resume_from_checkpoint=true finds the newest whole step_N in output_dir; remove it"
_ADAPTERS = (
    "it is an argument of a builder with adapters (kdtune.models.lora_...), or of adapter=kdtune.models.apply_lora"
)
_PACKING = "kdtune's builders of a source take it; in a mixture set it in each of dataset.datasets, else remove it"
_ACTIVITIES = "what the CPU does is traced, and the GPU's work where there is one; remove it"
_VALIDATION = "this recipe does not validate while it trains; remove it"

# Keys by their place in a torchtune config. The table answers only for keys that the recipe itself does not have.
REFUSED: dict[str, str] = {
    "ac_mode": _ONE_SWITCH,
    "ac_option": _ONE_SWITCH,
    "batch_size_val": _VALIDATION,
    "checkpointer.adapter_checkpoint": "use checkpointer.adapter_dir, the folder with adapter_model.safetensors",
    "checkpointer.enable_dcp": "the resume state is always torch.distributed.checkpoint; remove it",
    "checkpointer.filename_format": _ALL_FILES,
    "checkpointer.keep_last_n_checkpoints": "it is a top-level key here: keep_last_n_checkpoints",
    "checkpointer.max_filename": _ALL_FILES,
    "checkpointer.model_type": _FROM_FOLDER,
    "checkpointer.output_dir": "checkpoints go below the top-level output_dir; remove it",
    "checkpointer.recipe_checkpoint": _NEWEST_STEP,
    "checkpointer.resume_from_checkpoint": "it is a top-level key here: resume_from_checkpoint",
    "checkpointer.safe_serialization": "weights are always written as safetensors; remove it",
    "checkpointer.should_load_recipe_state": "resume_from_checkpoint=true at the top level does it; remove it",
    "collate_fn": "the loader pads and the dataset shifts labels; for another layout write a dataset component",
    "context_parallel_dim": "a sequence is not split over processes; use parallelism.dp_shard or parallelism.tp",
    "custom_sharded_layers": _LAYERS_ARE_SHARDS,
    "data_parallel_replicate_dim": "use parallelism.dp_replicate",
    "data_parallel_shard_dim": "use parallelism.dp_shard",
    "dataset.new_system_prompt": "only kdtune.data.chat_dataset takes it; put a system turn into the rows, or use that one",
    "dataset.packed": _PACKING,
    "dataset.split_across_pack": _PACKING,
    "dataset_val": _VALIDATION,
    "enable_activation_offloading": "use activation_offloading",
    "enable_fp8_training": "training is in fp32 or bf16: use dtype",
    "enable_kv_cache": "the cache is always used; remove it",
    "epoch_save_dir": "checkpoints are named by step, step_N below output_dir; remove it",
    "fsdp_cpu_offload": "use parallelism.cpu_offload",
    "fsdp_reshard_after_forward": "use parallelism.reshard_after_forward",
    "fsdp_sharding_strategy": (
        "use parallelism.reshard_after_forward (SHARD_GRAD_OP: false) and parallelism.dp_replicate (HYBRID_SHARD: above 1)"
    ),
    "fused": "it is an argument of the optimizer: optimizer.fused=true",
    "kd_loss.ignore_index": "labels that are not trained on are always -100; remove it",
    "kd_loss.num_output_chunks": "the loss is cut by tokens, not into a number of chunks: use loss_chunk_size",
    "loss": "the loss is cross entropy, in distillation mixed with kd_loss by kd_ratio; remove it",
    "loss.num_output_chunks": "the loss is cut by tokens, not into a number of chunks: use loss_chunk_size",
    "low_cpu_ram": "loading needs about one copy of the weights as it is; remove it",
    "max_seq_len": "it is an argument of the tokenizer: tokenizer.max_seq_len",
    "max_steps": "use max_steps_per_epoch and epochs",
    "memory_efficient_fsdp_wrap": _LAYERS_ARE_SHARDS,
    "metric_logger.log_dir": "every logger writes below output_dir; remove it",
    "model.apply_lora_to_mlp": _ADAPTERS,
    "model.apply_lora_to_output": _ADAPTERS,
    "model.lora_alpha": _ADAPTERS,
    "model.lora_attn_modules": _ADAPTERS,
    "model.lora_dropout": _ADAPTERS,
    "model.lora_rank": _ADAPTERS,
    "model.quantize_base": _ADAPTERS,
    "model.use_dora": _ADAPTERS,
    "model_type": _FROM_FOLDER,
    "optimizer_in_bwd": "use optimizer_in_backward",
    "packed": "it is an argument of the dataset: dataset.packed=true",
    "profiler.cpu": _ACTIVITIES,
    "profiler.cuda": _ACTIVITIES,
    "profiler.enabled": "a profiler that is given is on: remove it, and for no profile set profiler=null",
    "quantizer": "write the quantized folder with `kdtune run quantize`, and set checkpointer.checkpoint_dir to it",
    "recipe_checkpoint": _NEWEST_STEP,
    "resize_token_embeddings": "heads of unequal size are cut to the ids both have, none is resized; remove it",
    "resume": "use resume_from_checkpoint",
    "run_val_every_n_steps": _VALIDATION,
    "save_adapter_weights_only": "use save_weights: both, merged or adapter",
    "tensor_parallel_dim": "use parallelism.tp",
    "tensor_parallel_plan": "the plan is the model's own: use parallelism.tp",
    "tokenizer.merges_file": "set path to the folder that holds tokenizer.json, which has the merges",
    "tokenizer.prompt_template": "the folder's own chat template is used; remove it",
    "tokenizer.special_tokens_path": "set path to the folder that holds the tokenizer, which has its special tokens",
    "use_clip_grad_value": "gradients are clipped by norm: use clip_grad_norm",
}

_ROLES = ("teacher_", "student_")

_CHECKPOINTER = "use kdtune.checkpoint.Checkpointer, which reads Hugging Face, Meta and GGUF files"
_CROSS_ENTROPY = "the loss is cross entropy without a component; remove it"

# Components whose counterpart has another name; those of the same name are found by looking (see component_hint).
RENAMED: dict[str, str] = {
    "AdamW": "use torch.optim.AdamW",
    "CEWithChunkedOutputLoss": _CROSS_ENTROPY,
    "DiskLogger": "every run writes metrics.jsonl; remove it",
    "ForwardKLWithChunkedOutputLoss": "use kdtune.losses.ForwardKL",
    "FullModelHFCheckpointer": _CHECKPOINTER,
    "FullModelMetaCheckpointer": _CHECKPOINTER,
    "FullModelTorchTuneCheckpointer": _CHECKPOINTER,
    "LinearCrossEntropyLoss": _CROSS_ENTROPY,
    "PagedAdamW8bit": "use torch.optim.AdamW, or torchao.optim.AdamW8bit",
    "StdoutLogger": "every run prints its steps and writes metrics.jsonl; remove it",
    "setup_torch_profiler": "use kdtune.training.Profiler",
}
_PACKAGES = ("models", "tokenizers", "losses", "data", "checkpoint", "training")


def key_hint(key: str) -> str | None:
    """Return the replacement for a torchtune key that does nothing here, or None for a key that torchtune never had."""
    head, dot, rest = key.partition(".")
    for role in _ROLES:
        if head.startswith(role) and f"{head.removeprefix(role)}{dot}{rest}" in REFUSED:
            head = head.removeprefix(role)
    return REFUSED.get(f"{head}{dot}{rest}")


def component_hint(name: str) -> str:
    """Return the replacement for the torchtune component of that name: kdtune's own, if there is one."""
    if name in RENAMED:
        return RENAMED[name]
    for package in _PACKAGES:
        module = f"kdtune.{package}"
        if importlib.util.find_spec(module) is not None and hasattr(importlib.import_module(module), name):
            return f"use kdtune.{package}.{name}"
    return "kdtune has no component of that name; `kdtune cat CONFIG` shows what its own configs use"
