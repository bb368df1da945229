from .builders import builder_problems
from .checks import (
    divergence_problems,
    may_change,
)
from .clip import check_finite, clip_grad_norm_
from .comparison import comparable, divergence_of, metrics_csv, read_runs
from .config import TrainingConfig
from .inputs import check_context, check_data, check_inputs, check_lengths, context_note, example_lengths
from .interrupt import InterruptFlag
from .loggers import (
    JSONLLogger,
    MetricLogger,
    TensorBoardLogger,
    WandBLogger,
    read_metrics,
    truncate_metrics,
)
from .memory import memory_stats
from .metrics import Metrics
from .model_card import divergence_title, has_facts, model_card, run_facts
from .optim import Muon, adamw, decay_groups, is_muon_weight, trainable_parameters
from .origin import origin_card, origin_record
from .plan_text import plan_on_paper, print_plan
from .plot import VALIDATION_PREFIX, curve_look, plot_losses, plot_runs, unit_of
from .precision import device_name_problems, device_problems, resolve_device
from .profiling import Profiler
from .progress import Progress
from .removal_record import RemovalRecord
from .report import (
    comparison_table,
    held_out_table,
    print_results,
    samples_text,
    stopped_text,
    validation_text,
)
from .resume_changes import load_training_state, resume_extra
from .rounding import lost_share, warn_of_lost_updates
from .run import Run, Step, show_results
from .run_folder import (
    check_unchanged,
    holds_run,
    is_finished,
    new_folder_problems,
    output_dir_problems,
    start_run,
    step_to_resume,
    write_final,
    write_run_files,
    writing_problems,
)
from .samples import record_samples
from .schedules import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_exponential_schedule_with_warmup,
    get_inverse_sqrt_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)
from .seed import set_seed, set_step_seed
from .start import Inputs, build_optimizer, build_trained_model, load_inputs, start
from .step_log import StepLog
from .steps import count_steps, enter_epoch, plan_steps, step_text, take_micro_batches
from .table import format_table
from .tokenizer import load_tokenizer
from .training_run import TrainingRun, read_run

__all__ = [
    "VALIDATION_PREFIX",
    "Inputs",
    "InterruptFlag",
    "JSONLLogger",
    "MetricLogger",
    "Metrics",
    "Muon",
    "Profiler",
    "Progress",
    "RemovalRecord",
    "Run",
    "Step",
    "StepLog",
    "TensorBoardLogger",
    "TrainingConfig",
    "TrainingRun",
    "WandBLogger",
    "adamw",
    "build_optimizer",
    "build_trained_model",
    "builder_problems",
    "check_context",
    "check_data",
    "check_finite",
    "check_inputs",
    "check_lengths",
    "check_unchanged",
    "clip_grad_norm_",
    "comparable",
    "comparison_table",
    "context_note",
    "count_steps",
    "curve_look",
    "decay_groups",
    "device_name_problems",
    "device_problems",
    "divergence_of",
    "divergence_problems",
    "divergence_title",
    "enter_epoch",
    "example_lengths",
    "format_table",
    "get_constant_schedule_with_warmup",
    "get_cosine_schedule_with_warmup",
    "get_exponential_schedule_with_warmup",
    "get_inverse_sqrt_schedule_with_warmup",
    "get_linear_schedule_with_warmup",
    "get_wsd_schedule",
    "has_facts",
    "held_out_table",
    "holds_run",
    "is_finished",
    "is_muon_weight",
    "load_inputs",
    "load_tokenizer",
    "load_training_state",
    "lost_share",
    "may_change",
    "memory_stats",
    "metrics_csv",
    "model_card",
    "new_folder_problems",
    "origin_card",
    "origin_record",
    "output_dir_problems",
    "plan_on_paper",
    "plan_steps",
    "plot_losses",
    "plot_runs",
    "print_plan",
    "print_results",
    "read_metrics",
    "read_run",
    "read_runs",
    "record_samples",
    "resolve_device",
    "resume_extra",
    "run_facts",
    "samples_text",
    "set_seed",
    "set_step_seed",
    "show_results",
    "start",
    "start_run",
    "step_text",
    "step_to_resume",
    "stopped_text",
    "take_micro_batches",
    "trainable_parameters",
    "truncate_metrics",
    "unit_of",
    "validation_text",
    "warn_of_lost_updates",
    "write_final",
    "write_run_files",
    "writing_problems",
]
