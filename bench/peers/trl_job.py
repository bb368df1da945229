"""The job of bench/step.py for TRL's GKDTrainer: lmbda 0 and beta 0, that is forward KL on the data. It has no cross entropy term.

python trl_job.py JOB.json      # written by bench/step.py
"""

import json
import os
import sys
import tempfile
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", TOKENIZERS_PARALLELISM="false")

import torch
from datasets import Dataset
from peft import LoraConfig
from probe import StepLog
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer


def main(job: dict[str, Any]) -> None:
    torch.manual_seed(1234)
    with open(job["rows"], encoding="utf-8") as file:
        rows = json.load(file)
    if job["row_length"]:
        rows = cut(rows, job["row_length"])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["dtype"]]
    student, teacher = (AutoModelForCausalLM.from_pretrained(job[name], dtype=dtype) for name in ("student", "teacher"))
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=GKDConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=job["batch_size"], max_steps=job["steps"],
            learning_rate=job["lr"], weight_decay=0.01, lr_scheduler_type="cosine", warmup_steps=2, max_grad_norm=0.0,
            optim="adamw_torch_fused", lmbda=0.0, beta=0.0, temperature=1.0, max_length=8192, gradient_checkpointing=False,
            bf16=False, use_cpu=True, train_sampling_strategy="sequential", logging_steps=1, save_strategy="no",
            report_to=[], dataloader_drop_last=True, disable_tqdm=True, seed=1234,
        ),
        train_dataset=Dataset.from_list([example(row) for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(job["teacher"]),
        peft_config=lora(job["rank"]),
        callbacks=[Callback(job["log"])],
    )  # fmt: skip
    trainer.train()
    model = trainer.model.merge_and_unload() if job["rank"] else trainer.model
    model.save_pretrained(job["out"])


class Callback(TrainerCallback):
    """Hands the numbers that the trainer logs after each step to the log that every tool writes."""

    def __init__(self, path: str) -> None:
        self._log = StepLog(path)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Record the step."""
        if logs and "loss" in logs:
            self._log.log({"loss": float(logs["loss"])}, state.global_step)


def cut(rows: list[dict[str, list[int]]], length: int) -> list[dict[str, list[int]]]:
    """Return the rows end to end, cut into rows of one length: this trainer has no packing that keeps examples apart."""
    streams = {name: [number for row in rows for number in row[name]] for name in ("tokens", "labels")}
    count = len(streams["tokens"]) // length
    return [{name: stream[i * length : (i + 1) * length] for name, stream in streams.items()} for i in range(count)]


def example(row: dict[str, list[int]]) -> dict[str, Any]:
    """Return a row as the trainer's collator takes it: trained from the first label on; at least one token is the prompt."""
    first = max(1, next(index for index, label in enumerate(row["labels"]) if label >= 0))
    mask = [0] * first + [1] * (len(row["tokens"]) - first)
    return {"prompt": "", "input_ids": row["tokens"], "completion_mask": mask}


def lora(rank: int) -> LoraConfig | None:
    names = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
    return LoraConfig(**settings, target_modules=names) if rank else None


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as job_file:
        main(json.load(job_file))
