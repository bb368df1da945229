from .checks import builder_problems, divergence_problems, is_own_text, may_change, range_problems, rollout_problems
from .clip import check_finite, clip_grad_norm_
from .config import TrainingConfig
from .inputs import check_context, check_data, check_inputs, check_lengths, context_note, example_lengths
from .loggers import JSONLLogger, MetricLogger, StepLog, TensorBoardLogger, WandBLogger
from .metrics import Metrics, memory_stats
from .optim import Muon, adamw, decay_groups, is_muon_weight, trainable_parameters
from .out_of_memory import explained_out_of_memory
from .precision import device_name_problems, device_problems, placement_problems, resolve_device
from .profiling import Profiler
from .resume import load_training_state, resume_extra
from .rounding import lost_share, warn_of_lost_updates
from .run import Run, Step, show_results
from .schedules import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_exponential_schedule_with_warmup,
    get_inverse_sqrt_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)
from .seed import set_seed, set_step_seed
from .start import (
    Inputs,
    build_kd_loss,
    build_optimizer,
    build_trained_model,
    load_inputs,
    start,
    start_rollouts,
    steps_of,
)
from .steps import count_steps, enter_epoch, plan_steps, step_text, take_micro_batches
from .tokenizer import load_tokenizer, pair_tokenizers

__all__ = [
    "Inputs",
    "JSONLLogger",
    "MetricLogger",
    "Metrics",
    "Muon",
    "Profiler",
    "Run",
    "Step",
    "StepLog",
    "TensorBoardLogger",
    "TrainingConfig",
    "WandBLogger",
    "adamw",
    "build_kd_loss",
    "build_optimizer",
    "build_trained_model",
    "builder_problems",
    "check_context",
    "check_data",
    "check_finite",
    "check_inputs",
    "check_lengths",
    "clip_grad_norm_",
    "context_note",
    "count_steps",
    "decay_groups",
    "device_name_problems",
    "device_problems",
    "divergence_problems",
    "enter_epoch",
    "example_lengths",
    "explained_out_of_memory",
    "get_constant_schedule_with_warmup",
    "get_cosine_schedule_with_warmup",
    "get_exponential_schedule_with_warmup",
    "get_inverse_sqrt_schedule_with_warmup",
    "get_linear_schedule_with_warmup",
    "get_wsd_schedule",
    "is_muon_weight",
    "is_own_text",
    "load_inputs",
    "load_tokenizer",
    "load_training_state",
    "lost_share",
    "may_change",
    "memory_stats",
    "pair_tokenizers",
    "placement_problems",
    "plan_steps",
    "range_problems",
    "resolve_device",
    "resume_extra",
    "rollout_problems",
    "set_seed",
    "set_step_seed",
    "show_results",
    "start",
    "start_rollouts",
    "step_text",
    "steps_of",
    "take_micro_batches",
    "trainable_parameters",
    "warn_of_lost_updates",
]
