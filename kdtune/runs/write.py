"""Write a run's files: config.yaml and run.json at its start, final/ at its end."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from kdtune.checkpoint import SaveWeights, atomic_write_text, discard_steps_after, remove_folder, save_model, writing
from kdtune.config.load import resolved_values
from kdtune.distributed import World, barrier, raise_on_all_ranks
from kdtune.log import get_logger
from kdtune.models import Transformer
from kdtune.runs.folder import lock
from kdtune.runs.metrics_file import read_metrics, truncate_metrics
from kdtune.runs.model_card import model_card
from kdtune.runs.record import ABSENT, differing_values, read_resolved_config, recorded_starts

log = get_logger(__name__)


def start_run(output_dir: Path, world: World, *, step: int, resolved_config: str, record: Mapping[str, Any]) -> None:
    """Prepare the folder for the steps after `step`: write its config and record, and remove everything beyond the step.

    `world` is the processes; `resolved_config` becomes config.yaml in `output_dir`, `record` an entry of run.json.
    The record has `step` and, for a resumed run, `changed`: each changed key of the config, with both values. Only rank 0
    writes, once all processes have read what they resume from.

    Raises:
        CheckpointError: a file in it is damaged (nothing is written then), or it cannot be written.
        ConfigError: another run is writing into it.
    """
    barrier()
    with raise_on_all_ranks():
        if not world.is_main:
            return
        before, now = read_resolved_config(output_dir), resolved_values(resolved_config)
        shared = [key for key in now if key in before and key != "resume_from_checkpoint"]
        changed = [one for key in shared for one in differing_values(key, before[key], now[key])]
        record = {
            **record,
            "step": step,
            "changed": {one.key: {"was": _or_none(one.was), "is": _or_none(one.is_now)} for one in changed},
        }
        logs = [file for name in ("metrics.jsonl", "samples.jsonl") if (file := output_dir / name).exists()]
        for file in logs:
            read_metrics(file)
        with writing(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
        lock(output_dir)
        write_run_files(output_dir, resolved_config=resolved_config, record=record)
        discard_steps_after(output_dir, step)
        for file in logs:
            # At step 0 the validation before the first step runs again.
            truncate_metrics(file, step if step > 0 else -1)


def write_run_files(folder: Path, *, resolved_config: str, record: Mapping[str, Any]) -> None:
    """Write `config.yaml` (every value) and `run.json` (versions and command line, one entry per start) into a folder.

    `resolved_config` is the text of config.yaml, `record` this start's entry in run.json.

    Raises:
        CheckpointError: an existing run.json is damaged, or the files cannot be written.
    """
    starts = recorded_starts(folder)
    atomic_write_text(folder / "config.yaml", resolved_config)
    atomic_write_text(folder / "run.json", json.dumps({"starts": [*starts, dict(record)]}, indent=1) + "\n")


def _or_none(value: Any) -> Any:
    return None if value is ABSENT else value


def write_final(
    output_dir: Path,
    model: Transformer,
    world: World,
    *,
    base: str | Path | None,
    tokenizer: Any,
    save_weights: SaveWeights = "both",
    is_chat: bool = False,
) -> None:
    """Write `final/` into `output_dir`, replacing that of a shorter run that was resumed with more steps.

    `save_weights` selects the content for a model with adapters, see `save_model`: "both" is the merged model in `final/` and
    a PEFT folder in `final/adapter/`. Each has a model card, see `model_card`. `is_chat`: as in `save_model`. `world`: the
    processes, all of which call this.

    Raises:
        CheckpointError: it cannot be written.
        ConfigError: the adapter alone is requested of a model without adapters.
    """
    final = output_dir / "final"
    if world.is_main and final.exists():
        remove_folder(final)

    def card(kind: Literal["model", "adapter"]) -> str | None:
        try:
            return model_card(output_dir, kind)
        except Exception as error:  # a failed card must not lose the trained model
            log.warning("%s has no README.md: it could not be made: %s: %s", final, type(error).__name__, error)
            return None

    save_model(model, final, base=base, tokenizer=tokenizer, save_weights=save_weights, is_chat=is_chat, card=card)
