"""A pair of one family whose heads are padded to different heights: distilled, resumed, and read by transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import CLI
from torch.nn import functional

from kdtune import _assets
from kdtune.config import instantiate, load
from kdtune.config.recipe import import_recipe
from kdtune.constants import IGNORE_INDEX
from kdtune.tokenizers import byte_tokenizer

# The tokenizer has 320 ids.
STUDENT_ROWS, TEACHER_ROWS = 328, 352
OTHERS = pytest.mark.slow(
    "the recipe takes the same path for every family; tests/parity/test_families.py compares each"
)
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "mistral": {"sliding_window": 9},
    "ministral": {"head_dim": 12, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3": {"head_dim": 12},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "olmo3": {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": 9, "partial_rotary_factor": 0.5},
    "gemma2": {
        "head_dim": 12,
        "sliding_window": 9,
        "query_pre_attn_scalar": 3,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "granite": {
        "attention_multiplier": 0.6,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
    },
}


def write_model(folder: Path, model_type: str, *, rows: int, width: int, tied: bool) -> Any:
    """A random model of transformers, and the byte tokenizer, which the tiny configs use."""
    torch.manual_seed(width)
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=rows, hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tied, pad_token_id=None,
        **FAMILIES[model_type],
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    byte_tokenizer().save(folder)
    return model.eval()


@pytest.mark.parametrize(
    "model_type", ["qwen2", *(pytest.param(name, marks=OTHERS) for name in FAMILIES if name != "qwen2")]
)
def test_heads_of_different_heights(model_type: str, cli: CLI, tmp_path: Path) -> None:
    student = write_model(tmp_path / "student", model_type, rows=STUDENT_ROWS, width=32, tied=True)
    teacher = write_model(tmp_path / "teacher", model_type, rows=TEACHER_ROWS, width=48, tied=False)
    config = [
        "~model", "checkpointer=kdtune.checkpoint.Checkpointer", f"checkpointer.checkpoint_dir={tmp_path / 'student'}",
        "~teacher_model", "teacher_checkpointer=kdtune.checkpoint.Checkpointer",
        f"teacher_checkpointer.checkpoint_dir={tmp_path / 'teacher'}", "adapter=kdtune.models.apply_lora", "adapter.lora_rank=4",
        f"output_dir={tmp_path / 'run'}", "dataset.split=train[:6]", "batch_size=6", "gradient_accumulation_steps=1", "epochs=4",
        "max_steps_per_epoch=null", "~lr_scheduler", "dataset_val=null", "run_val_every_n_steps=null", "save_every_n_steps=2",
        "~sample_prompts", "~sample_max_new_tokens",
    ]  # fmt: skip
    run = ["run", "knowledge_distillation", "--config", "tiny/knowledge_distillation", *config]
    done = cli(*run)
    assert done.code == 0, done.err
    assert "student 328 rows, teacher 352 (padding)" in done.err
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]

    # The first step sees all examples with the weights as they are: adapters start from 0.
    recipe = import_recipe(_assets.find_recipe("knowledge_distillation"))
    cfg = load("tiny/knowledge_distillation", config, recipe.schema)
    class_losses, divergences = list[torch.Tensor](), list[torch.Tensor]()
    dataset = instantiate(cfg.dataset, tokenizer=instantiate(cfg.tokenizer))
    for index in range(len(dataset)):
        batch = dataset.collate([dataset[index]], 0)
        valid = batch.labels[0] != IGNORE_INDEX
        with torch.no_grad():
            logits = student(batch.tokens).logits[0, valid]
            target = teacher(batch.tokens).logits[0, valid, :STUDENT_ROWS].log_softmax(-1)
        class_losses.append(functional.cross_entropy(logits, batch.labels[0, valid], reduction="none"))
        divergences.append(functional.kl_div(logits.log_softmax(-1), target, log_target=True, reduction="none").sum(-1))
    assert rows[0]["class_loss"] == pytest.approx(torch.cat(class_losses).mean().item(), rel=1e-4)
    assert rows[0]["kd_loss"] == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-4)
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["loss"] < rows[0]["loss"]

    final = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/final")
    assert type(final) is type(student) and final.config.vocab_size == STUDENT_ROWS
    before = (tmp_path / "run/final/model.safetensors").read_bytes()
    for name in ("final", "step_4"):
        shutil.rmtree(tmp_path / "run" / name)
    assert cli(*run, "resume_from_checkpoint=true").code == 0
    assert (tmp_path / "run/final/model.safetensors").read_bytes() == before
