"""What torchtune 0.6's components and keys are called here; beside them stands kdtune/config/torchtune_keys.py, for what is dropped."""

from typing import Any

# A file is of the first recipe one of whose keys it has.
RECIPE_MARKS: dict[str, tuple[str, ...]] = {
    "knowledge_distillation": ("kd_loss", "teacher_model", "teacher_checkpointer", "kd_ratio"),
    "evaluate": ("tasks",),
    "finetune": ("optimizer", "dataset"),
    "generate": ("prompt",),
    "quantize": ("quantizer",),
}

PREFERENCES = (
    "it trains on preferences or rewards (DPO, PPO, GRPO); kdtune distils and finetunes, and has no such recipe"
)
QAT = "it trains for quantization (QAT); kdtune does not: finetune, then `kdtune run quantize`"
EARLY_EXIT = "it trains with layer dropout and losses of early exits, which kdtune does not have"

# Keys of recipes that kdtune has no counterpart for, and the prefix of their components.
FOREIGN_KEYS: dict[str, str] = {
    **dict.fromkeys(
        ("ref_checkpointer", "ref_policy_checkpointer", "policy_model", "reward_and_value_model", "reward_checkpointer",
         "value_checkpointer", "ppo_epochs", "ppo_batch_size", "grpo_samples"),
        PREFERENCES,
    ),
    **dict.fromkeys(("fake_quant_after_n_steps", "fake_quant_module"), QAT),
    **dict.fromkeys(("early_exit_loss", "early_exit", "layer_dropout"), EARLY_EXIT),
}  # fmt: skip
FOREIGN_COMPONENTS: dict[str, str] = {"torchtune.rlhf.": PREFERENCES, "torchtune.dev.rl.": PREFERENCES}

# Plain keys with another name here.
RENAMED_KEYS: dict[str, str] = {
    "data_parallel_replicate_dim": "parallelism.dp_replicate",
    "data_parallel_shard_dim": "parallelism.dp_shard",
    "enable_activation_offloading": "activation_offloading",
    "fsdp_cpu_offload": "parallelism.cpu_offload",
    "fsdp_reshard_after_forward": "parallelism.reshard_after_forward",
    "optimizer_in_bwd": "optimizer_in_backward",
    "resume": "resume_from_checkpoint",
    "tensor_parallel_dim": "parallelism.tp",
}

# Reasons for dropping a key, beside those of torchtune_keys.
DROPPED: dict[str, str] = {
    "fsdp": "its cpu_offload is parallelism.cpu_offload",
    "log_level": "this recipe has no such key",
    "output_dir": "the text is printed; output_file=... writes it",
    "profile_memory": "it is an argument of the profiler: profiler.profile_memory",
    "resume_from_checkpoint": "this recipe has nothing to resume",
    "save_every_epoch": "use save_every_n_steps",
}

ADAPTER_ARGUMENTS = ("lora_attn_modules", "apply_lora_to_mlp", "apply_lora_to_output", "lora_rank", "lora_alpha",
                     "lora_dropout", "use_dora", "quantize_base")  # fmt: skip

# Builders of models by the name without lora_ or qlora_, if it is another one here.
MODELS: dict[str, str] = {
    "llama3_3_70b": "llama3_1_70b",
    "phi3_mini": "phi3_mini_4k",
    "phi4_14b": "phi4",
}
# Builders for which the config.json beside the weights is read: one of torchtune's stands for several models here, or takes the
# sizes as arguments.
FROM_FOLDER = ("code_llama2_7b", "code_llama2_13b", "code_llama2_70b", "llama2", "llama3", "llama3_1", "llama3_2",
               "mistral", "mistral_7b", "qwen2", "qwen2_5", "qwen3")  # fmt: skip
NAME_ENDINGS = ("_instruct", "_base")

# Our dataset, and the arguments that torchtune's stands for.
DATASETS: dict[str, tuple[str, dict[str, Any]]] = {
    "alpaca_dataset": ("alpaca_dataset", {}),
    "alpaca_cleaned_dataset": ("alpaca_cleaned_dataset", {}),
    "chat_dataset": ("chat_dataset", {}),
    "cnn_dailymail_articles_dataset": (
        "text_completion_dataset", {"source": "ccdv/cnn_dailymail", "name": "3.0.0", "column": "article"},
    ),
    "grammar_dataset": ("instruct_dataset", {"source": "liweili/c4_200m"}),
    "instruct_dataset": ("instruct_dataset", {}),
    "samsum_dataset": (
        "instruct_dataset", {"source": "Samsung/samsum", "column_map": {"input": "dialogue", "output": "summary"}},
    ),
    "slimorca_dataset": (
        "chat_dataset",
        {"source": "Open-Orca/SlimOrca-Dedup", "conversation_column": "conversations", "conversation_style": "sharegpt"},
    ),
    "text_completion_dataset": ("text_completion_dataset", {}),
    "wikitext_dataset": (
        "text_completion_dataset",
        {"source": "EleutherAI/wikitext_document_level", "name": "wikitext-103-v1", "column": "page"},
    ),
}  # fmt: skip
DATASET_ARGUMENTS: dict[str, str] = {"subset": "name"}

# Our optimizer, and what becomes of its memory.
_PAGED = "its state stays on the device; paging is bitsandbytes' own"
_EIGHT_BITS = "torchao's, with 8 bits of state as well"
OPTIMIZERS: dict[str, tuple[str, str]] = {
    "bitsandbytes.optim.AdamW": ("torch.optim.AdamW", "torch's own"),
    "bitsandbytes.optim.PagedAdamW": ("torch.optim.AdamW", _PAGED),
    "bitsandbytes.optim.AdamW8bit": ("torchao.optim.AdamW8bit", _EIGHT_BITS),
    "bitsandbytes.optim.PagedAdamW8bit": ("torchao.optim.AdamW8bit", f"{_EIGHT_BITS}; {_PAGED}"),
    "bitsandbytes.optim.Adam": ("torch.optim.Adam", "torch's own"),
    "bitsandbytes.optim.Adam8bit": ("torchao.optim.Adam8bit", _EIGHT_BITS),
    **{
        f"torchao.prototype.low_bit_optim.{name}": (f"torchao.optim.{name}", "torchao has moved it")
        for name in ("Adam8bit", "Adam4bit", "AdamFp8", "AdamW8bit", "AdamW4bit", "AdamWFp8")
    },
}
LOW_BIT_ARGUMENTS = ("lr", "betas", "eps", "weight_decay", "amsgrad")
# Their steps do not depend on the scale of the gradient, but for eps.
SCALE_FREE = ("Adam", "NAdam", "RAdam", "RMSprop", "Lion", "Muon")

KD_LOSSES: dict[str, str] = {
    "ForwardKLLoss": "ForwardKL",
    "ForwardKLWithChunkedOutputLoss": "ForwardKL",
    "ReverseKLLoss": "ReverseKL",
    "ReverseKLWithChunkedOutputLoss": "ReverseKL",
    "SymmetricKLLoss": "SymmetricKL",
    "SymmetricKLWithChunkedOutputLoss": "SymmetricKL",
}
CROSS_ENTROPIES = ("CEWithChunkedOutputLoss", "LinearCrossEntropyLoss", "CrossEntropyLoss")

LOGGERS: dict[str, str] = {"TensorBoardLogger": "TensorBoardLogger", "WandBLogger": "WandBLogger"}

# Scheme, and what it lacks.
QUANTIZERS: dict[str, tuple[str, str]] = {
    "Int4WeightOnlyQuantizer": ("int4_weight_only", ""),
    "Int8DynActInt4WeightQuantizer": (
        "int4_weight_only",
        "the weights have 4 bits in the same groups, but inputs stay as they are; scheme=int8_dynamic has both in 8 bits",
    ),
}
GROUP_SIZES: dict[str, int] = {"Int4WeightOnlyQuantizer": 128, "Int8DynActInt4WeightQuantizer": 256}
