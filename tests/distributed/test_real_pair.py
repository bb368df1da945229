"""The real pair, SmolLM2-135M-Instruct and some of its layers, on several processes."""

from pathlib import Path

import pytest
from distributed_runs import FULL, KD, check_same_change, check_same_rows, rows

from kdtune.checkpoint import load_model, save_model
from kdtune.pruning.prune import keep_layers

# Ten steps, and LoRA and DoRA too, take minutes on two cores.
STEPS = 10 if FULL else 3
# Small steps: with larger ones this student, most of whose layers are gone, is chaotic, and rounding errors grow tenfold in two.
KINDS = {
    "full": ["optimizer.lr=0.01"],
    "lora": ["adapter=kdtune.models.apply_lora", "adapter.lora_dropout=0.05", "optimizer.lr=0.1"],
    "dora": ["adapter=kdtune.models.apply_lora", "adapter.use_dora=true", "optimizer.lr=0.05"],
}
# SmolLM2 has 9 heads and 3 key/value heads.
LAYOUTS = {
    "4x1, HSDP 2x2": (4, 1, ["parallelism.dp_replicate=2"]),
    "TP 3": (3, 4, ["parallelism.tp=3"]),
} | ({"2x2": (2, 2, []), "4x1": (4, 1, [])} if FULL else {})


@pytest.mark.real
@pytest.mark.slow("a real model on four processes; tiny ones are run in every layout")
@pytest.mark.parametrize("kind", KINDS if FULL else ["full"])
def test_the_numbers_of_one_process(kind: str, launch, smollm2_gguf: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    save_model(keep_layers(load_model(smollm2_gguf), [0, 1, 28, 29]), student)
    run = [
        *KD, f"tokenizer={{_component_: kdtune.tokenizers.load, path: {smollm2_gguf}, max_seq_len: 48}}",
        f"checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {student}}}", "model=null",
        f"teacher_checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {smollm2_gguf}}}",
        "teacher_model=null", "optimizer=torch.optim.SGD", *KINDS[kind], "~lr_scheduler", "clip_grad_norm=1.0", "batch_size=1",
        f"max_steps_per_epoch={STEPS}", "sample_prompts=[]", "save_every_n_steps=null", "dataset_val.split=test[:2]",
    ]  # fmt: skip
    for name, (ranks, accumulation, layout) in ({"1x4": (1, 4, [])} | LAYOUTS).items():
        out = tmp_path / name
        ended = launch.kdtune(
            *run, *layout, f"gradient_accumulation_steps={accumulation}", f"output_dir={out}", ranks=ranks
        )
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].text
        check_same_rows(rows(out), rows(tmp_path / "1x4"))
        check_same_change(out / "final", tmp_path / "1x4" / "final", student)
    trained = [row for row in rows(tmp_path / "1x4") if "loss" in row]
    assert trained[-1]["val_class_loss"] < rows(tmp_path / "1x4")[0]["val_class_loss"] - 0.01
    assert max(row["grad_norm"] for row in trained) > 1.0
