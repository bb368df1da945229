from .comparison import comparable, metrics_csv, read_runs, shared_divergence_title
from .folder import holds_run, new_folder_problems, output_dir_problems, writing_problems
from .interrupt import InterruptFlag
from .metrics_file import JSONLLogger, read_metrics, truncate_metrics
from .model_card import divergence_title, has_facts, model_card, run_facts
from .origin import origin_card, origin_record
from .plot import VALIDATION_PREFIX, curve_look, plot_losses, plot_runs, unit_of
from .progress import Progress
from .record import TrainingRun, read_run
from .resume import check_unchanged, is_finished, resume_changes_problems, step_to_resume
from .summary import comparison_table, held_out_table, print_results, samples_text, stopped_text, validation_text
from .table import format_table
from .write import start_run, write_final, write_run_files

__all__ = [
    "VALIDATION_PREFIX",
    "InterruptFlag",
    "JSONLLogger",
    "Progress",
    "TrainingRun",
    "check_unchanged",
    "comparable",
    "comparison_table",
    "curve_look",
    "divergence_title",
    "format_table",
    "has_facts",
    "held_out_table",
    "holds_run",
    "is_finished",
    "metrics_csv",
    "model_card",
    "new_folder_problems",
    "origin_card",
    "origin_record",
    "output_dir_problems",
    "plot_losses",
    "plot_runs",
    "print_results",
    "read_metrics",
    "read_run",
    "read_runs",
    "resume_changes_problems",
    "run_facts",
    "samples_text",
    "shared_divergence_title",
    "start_run",
    "step_to_resume",
    "stopped_text",
    "truncate_metrics",
    "unit_of",
    "validation_text",
    "write_final",
    "write_run_files",
    "writing_problems",
]
