"""Cached targets on several processes, each of which reads the rows of its own examples."""

from pathlib import Path

import pytest
import torch
from distributed_runs import KD, PLAIN, check_same_rows, rows
from written_caches import write_cache

from kdtune.data import quickstart_dataset
from kdtune.models import llama
from kdtune.tokenizers import byte_tokenizer


@pytest.mark.slow(
    "three processes of the launcher; tests/unit/teachers reads the rows of each rank of two in one process"
)
@pytest.mark.parametrize("settings", [[], ["tokens_per_micro_batch=200"]])
def test_shards_give_the_numbers_of_one_process(launch, tmp_path: Path, settings: list[str]) -> None:
    torch.manual_seed(1)
    teacher = llama(
        vocab_size=320, embed_dim=24, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_dim=24, max_seq_len=256
    ).eval()
    tokenizer = byte_tokenizer(max_seq_len=96)
    for name, split in (("train", "train"), ("test", "test[:9]")):
        write_cache(
            tmp_path / name, teacher, quickstart_dataset(tokenizer, split=split), tokenizer, {"examples_per_shard": 64}
        )
    cached = (
        f"teacher={{_component_: kdtune.teachers.CachedTeacher, path: {tmp_path}/train, validation: {tmp_path}/test}}"
    )
    run = [*KD, *PLAIN, "~teacher_model", cached, "max_steps_per_epoch=3", *settings]
    for name, ranks, accumulation in (("one", 1, 2), ("two", 2, 1)):
        ended = launch.kdtune(
            *run, f"gradient_accumulation_steps={accumulation}", f"output_dir={tmp_path / name}", ranks=ranks
        )
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].text
    found = [[{**row, "teacher_seconds": 0.0} for row in rows(tmp_path / name)] for name in ("two", "one")]
    check_same_rows(*found)
