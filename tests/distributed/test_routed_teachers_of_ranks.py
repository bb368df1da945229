"""Routed teachers on two processes: a divided model and a cache, of which a process's micro-batch may have no example."""

import json
from pathlib import Path

import pytest
import torch
from distributed_runs import KD, PLAIN, check_same_rows, rows
from written_caches import write_cache

from kdtune.checkpoint import load_model, save_model
from kdtune.data import instruct_dataset
from kdtune.models import llama
from kdtune.tokenizers import byte_tokenizer


@pytest.mark.slow("three processes of the launcher; tests/recipes has a routed run on one")
@pytest.mark.parametrize("settings", [[], ["tokens_per_micro_batch=90"]])
def test_two_processes_give_the_numbers_of_one(launch, tmp_path: Path, settings: list[str]) -> None:
    torch.manual_seed(1)
    teacher = llama(
        vocab_size=320, embed_dim=24, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_dim=24, max_seq_len=256
    )
    tokenizer, source = byte_tokenizer(max_seq_len=96), tmp_path / "rows.jsonl"
    save_model(teacher, tmp_path / "live", tokenizer=byte_tokenizer())
    with torch.no_grad():
        teacher.output.weight.mul_(4)
    save_model(teacher, tmp_path / "other", tokenizer=byte_tokenizer())
    # Two in three are of the cache, in runs: many micro-batches have one kind alone.
    lines = [{"input": f"Is it {n}?", "output": "Yes. " * (1 + n % 4), "subject": "ab"[n % 9 < 6]} for n in range(27)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_cache(
        tmp_path / "cache",
        load_model(tmp_path / "other").eval(),
        instruct_dataset(tokenizer, source=str(source)),
        tokenizer,
    )
    weights = f"{{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {tmp_path}/live}}"
    live = f"{{_component_: kdtune.teachers.LiveTeacher, checkpointer: {weights}}}"
    cached = f"{{_component_: kdtune.teachers.CachedTeacher, path: {tmp_path}/cache}}"
    run = [
        *KD, *PLAIN, "~teacher_model", "dataset_val=null", "run_val_every_n_steps=null", *settings,
        f"teacher={{_component_: kdtune.teachers.Routed, teachers: {{b: {cached}}}, default: {live}}}",
        f"dataset={{_component_: kdtune.data.instruct_dataset, source: {source}, route_column: subject}}",
    ]  # fmt: skip
    for name, (ranks, accumulation) in {"one": (1, 2), "two": (2, 1)}.items():
        ended = launch.kdtune(
            *run, f"gradient_accumulation_steps={accumulation}", f"output_dir={tmp_path / name}", ranks=ranks
        )
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].text
    found = [[{**row, "teacher_seconds": 0.0} for row in rows(tmp_path / name)] for name in ("two", "one")]
    check_same_rows(*found)
    assert len(found[0]) >= 5
