"""A student and a teacher of transformers on several processes: the numbers of one."""

from pathlib import Path

import pytest
import torch
import transformers
from distributed_runs import KD, PLAIN, check_same_change, check_same_rows, rows

from kdtune.tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found, tokenizer = tmp_path_factory.mktemp("hf"), byte_tokenizer()
    for seed, name in enumerate(("gpt_neox", "stablelm")):
        torch.manual_seed(seed)
        config = transformers.AutoConfig.for_model(
            name, vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            max_position_embeddings=256, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
            tie_word_embeddings=name == "stablelm",
        )  # fmt: skip
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(found / name)
        tokenizer.save(found / name, is_chat=True)
    return found


def models(folders: Path) -> list[str]:
    return [
        part
        for prefix, name in (("", "stablelm"), ("teacher_", "gpt_neox"))
        for part in (
            f"~{prefix}model",
            f"{prefix}checkpointer=kdtune.checkpoint.Checkpointer",
            f"{prefix}checkpointer.checkpoint_dir={folders / name}",
            f"{prefix}checkpointer.family=kdtune.models.hf_model",
        )
    ]


LORA = ["adapter=kdtune.models.apply_lora"]
ADAPTERS = {"null": ["adapter=null"], "LoRA": LORA, "QLoRA": [*LORA, "adapter.quantize_base=true", "optimizer.lr=3.0"]}


@pytest.mark.slow(
    "three starts of up to two processes, twice; that a decoder is sharded at all is seen in test_same_numbers.py"
)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_two_processes_compute_what_one_does(adapter: str, launch, folders: Path, tmp_path: Path) -> None:
    run = [*KD, *PLAIN, *models(folders), *ADAPTERS[adapter], "run_val_every_n_steps=3", "save_every_n_steps=3"]
    for ranks in (1, 2):
        accumulation = f"gradient_accumulation_steps={2 // ranks}"
        ended = launch.kdtune(*run, accumulation, f"output_dir={tmp_path / str(ranks)}", ranks=ranks)
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].text
    check_same_rows(rows(tmp_path / "2"), rows(tmp_path / "1"))
    check_same_change(tmp_path / "2" / "final", tmp_path / "1" / "final", folders / "stablelm")
    # What two processes wrote is resumed by one.
    (tmp_path / "2" / "final").rename(tmp_path / "final")
    resumed = ["gradient_accumulation_steps=2", f"output_dir={tmp_path / '2'}", "resume_from_checkpoint=true"]
    ended = launch.kdtune(*run, *resumed, ranks=1)
    assert ended[0].code == 0, ended[0].text
    check_same_rows(rows(tmp_path / "2"), rows(tmp_path / "1"))


@pytest.mark.slow(
    "five processes, one or two at a time; that a teacher is apart at all is seen in test_remote_teacher.py"
)
def test_a_teacher_on_its_own_process_and_bf16_arithmetic(launch, folders: Path, tmp_path: Path) -> None:
    run = [*KD, *PLAIN, *models(folders), "run_val_every_n_steps=3", "gradient_accumulation_steps=2"]
    layouts: dict[str, tuple[int, list[str]]] = {
        "one": (1, []),
        "apart": (2, ["teacher_processes=1"]),
        "bf16": (2, ["parallelism.param_dtype=bf16", "gradient_accumulation_steps=1"]),
    }
    for name, (ranks, settings) in layouts.items():
        ended = launch.kdtune(*run, *settings, f"output_dir={tmp_path / name}", ranks=ranks)
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].text
    check_same_rows(rows(tmp_path / "apart"), rows(tmp_path / "one"))
    check_same_change(tmp_path / "apart" / "final", tmp_path / "one" / "final", folders / "stablelm")
    check_same_rows(rows(tmp_path / "bf16"), rows(tmp_path / "one"), tolerance=0.05)
