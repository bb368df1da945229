"""Answers that a model writes once, in a folder of JSON lines that `kdtune.data.answers_dataset` reads."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kdtune.checkpoint import atomic_write_text
from kdtune.config import instantiate, resolved_yaml, run_record
from kdtune.data import Dataset
from kdtune.data.answers import ANSWERS_HEADER, answers_file
from kdtune.errors import ConfigError
from kdtune.generation import Sampling, complete
from kdtune.json_files import read_json, read_json_lines
from kdtune.models import Transformer
from kdtune.rollouts.record import Prompt, random_seed
from kdtune.runs import write_run_files
from kdtune.tokenizers import Tokenizer, fingerprint


def answer_rows(
    cfg: Any,
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    share: Callable[[float], object],
) -> list[dict[str, Any]]:
    """Return a row of each answer that is kept, in the order of the prompts.

    `cfg` is the recipe's; `model` writes with its `tokenizer`; `share` is called with the share of the answers that is done.
    """
    asked = [(prompt, number) for prompt in prompts for number in range(cfg.num_answers)]
    done = 0

    def count(number: int) -> None:
        nonlocal done
        done += number
        share(done / len(asked))

    found = complete(
        model, [prompt.ids for prompt, _ in asked], max_new_tokens=cfg.max_new_tokens, stop_ids=tokenizer.stop_ids,
        sampling=Sampling(cfg.temperature, cfg.top_k, cfg.top_p), slots=cfg.slots, with_log_probs=True,
        seeds=[random_seed(cfg.seed, number, prompt.key) for prompt, number in asked], progress=count,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for (prompt, number), one in zip(asked, found, strict=True):
        ids = one.ids[: None if tokenizer.max_seq_len is None else tokenizer.max_seq_len - len(prompt.ids)]
        log_probs = (one.log_probs or [])[: len(ids)]
        rows.append({"example": prompt.key, "answer": number, "prompt_length": len(prompt.ids), "ids": [*prompt.ids, *ids],
                     "is_finished": one.is_finished and len(ids) == len(one.ids),
                     "mean_log_prob": round(sum(log_probs) / len(ids), 4),
                     "text": tokenizer.decode(ids, skip_special=True)})  # fmt: skip
    if cfg.keep_best is None:
        return rows
    best = [sorted(rows[start : start + cfg.num_answers], key=lambda row: -row["mean_log_prob"])[: cfg.keep_best]
            for start in range(0, len(rows), cfg.num_answers)]  # fmt: skip
    return [row for group in best for row in group]


def answers_header(
    cfg: Any, tokenizer: Tokenizer, dataset: Dataset, num_prompts: int, num_files: int
) -> dict[str, Any]:
    """Return what a folder's answers are known by: a run goes on only with an equal one.

    `cfg` is the recipe's; the prompts are of the `dataset`, in tokens of the `tokenizer`: `num_prompts`, in `num_files` files.
    """
    source = instantiate(cfg.checkpointer)
    keys = (
        "num_answers",
        "keep_best",
        "max_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "seed",
        "prompts_per_file",
        "dtype",
    )
    return {
        "num_files": num_files,
        "num_prompts": num_prompts,
        **{key: getattr(cfg, key) for key in keys},
        "model": source.fingerprint() if source else {"random weights": cfg.model},
        "tokenizer": fingerprint(tokenizer),
        "dataset": dataset.fingerprint(),
    }


def start_answers(cfg: Any, folder: Path, header: dict[str, Any]) -> None:
    """Write the header into a new folder, or check that of one that exists.

    `cfg` is the recipe's. ConfigError if the folder holds something else, or other answers.
    """
    header = json.loads(json.dumps(header))  # as it comes back from the file
    if (folder / ANSWERS_HEADER).is_file():
        before = read_json(folder / ANSWERS_HEADER)
        if different := sorted(key for key in header if header[key] != before.get(key)):
            raise ConfigError(
                f"output_dir={folder}: holds answers of another run, which differs in {', '.join(different)}; choose another output_dir, "
                "or put back what has changed"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"output_dir={folder}: holds files, and no answers; choose another output_dir")
    else:
        # First: without it the same command would refuse what a killed process has left.
        atomic_write_text(folder / ANSWERS_HEADER, json.dumps(header, indent=2) + "\n")
    write_run_files(folder, resolved_config=resolved_yaml(cfg), record=run_record(cfg))


def answers_summary(folder: Path) -> str:
    """Return how many answers a complete folder has, and of which length."""
    header = read_json(folder / ANSWERS_HEADER)
    lengths, finished = [], 0
    for number in range(header["num_files"]):
        for row in read_json_lines(folder / answers_file(number)):
            lengths.append(len(row["ids"]) - row["prompt_length"])
            finished += row["is_finished"]
    return (
        f"{len(lengths):,} answers to {header['num_prompts']:,} prompts, {sum(lengths) / len(lengths):.1f} tokens on average; "
        f"{1 - finished / len(lengths):.0%} were cut"
    )
