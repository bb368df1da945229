"""Answers of a run's models to its prompts, in samples.jsonl."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdtune.distributed import World
from kdtune.errors import CheckpointError
from kdtune.generation import Generator, answer
from kdtune.models import Transformer
from kdtune.runs.metrics_file import JSONLLogger
from kdtune.runs.progress import Progress


def record_samples(
    output_dir: Path,
    models: Mapping[str, Transformer | Generator],
    tokenizer: Any,
    prompts: Sequence[str],
    step: int,
    world: World,
    progress: Progress,
    *,
    max_new_tokens: int,
) -> None:
    """Append each model's answer to each prompt to samples.jsonl; all processes call it, rank 0 writes.

    Args:
        output_dir: the run's folder.
        models: models, or objects that generate with one, such as a teacher, by their name in the file.
        tokenizer: the tokenizer of all of them.
        prompts: questions.
        step: the current optimizer step.
        world: the processes.
        progress: display of the progress.
        max_new_tokens: the longest answer.

    Raises:
        CheckpointError: the logits of a model are not finite; the message names it.
    """
    if not prompts:
        return
    progress.phase(f"answering sample_prompts ({len(prompts)})")
    with JSONLLogger(output_dir / "samples.jsonl" if world.is_main else None) as samples:
        for prompt in progress.counted(prompts, "prompts"):
            for who, model in models.items():
                try:
                    text = answer(model, tokenizer, prompt, max_new_tokens, sync_tokens=True)
                except CheckpointError as error:  # its weights are not numbers
                    raise CheckpointError(f"{who}: {error}") from error
                samples.log({"model": who, "prompt": prompt, "answer": text}, step)
