"""What a run leaves behind, through other people's eyes: transformers loads step_N/ and final/ as they are."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import ROOT
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from kdtune.checkpoint import load_model
from kdtune.models import LLAMA
from kdtune.tokenizers import load

RECIPE = "knowledge_distillation_single_device"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SGD = "optimizer={_component_: torch.optim.SGD, lr: 1.0e-3}"  # no state: the checkpoints are the weights
TEXTS = ("The capital of France is Paris.", "def f(x):\n    return x + 1  # 你好, 12 🙂", "  two  blanks <|im_end|>")


def check_weights(folder: Path, dtype: torch.dtype) -> Any:
    """Names, dtype and bits of every weight; returns transformers' model in fp32, next to which ours is put."""
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, state = load_model(folder), theirs.state_dict()
    assert theirs.dtype == dtype
    assert {LLAMA.hf_keys.from_kdtune(name) for name in ours.state_dict()} == state.keys()
    for name, tensor in ours.state_dict().items():
        other = state[LLAMA.hf_keys.from_kdtune(name)]
        assert tensor.dtype == other.dtype == dtype and torch.equal(tensor, other), name
    return theirs.float().eval()


def check_logits(folder: Path, theirs: Any, tokens_BS: Tensor) -> None:
    """Within 1e-3 in fp32, whatever the weights are stored in, and the same choice at every position."""
    with torch.no_grad():
        ours = load_model(folder, dtype=torch.float32).eval()(tokens_BS)
        expected = theirs(tokens_BS).logits
    assert (ours - expected).abs().max() < 1e-3
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))


def check_tokenizer(folder: Path, tokenizer: Any) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_bos=False, add_eos=False)
        assert theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids == ids
    chat = [{"role": "user", "content": TEXTS[0]}]
    rendered = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == tokenizer.render(chat, add_generation_prompt=True)


def check_generation_config(folder: Path, tokenizer: Any) -> None:
    found = GenerationConfig.from_pretrained(folder)
    ends = found.eos_token_id if isinstance(found.eos_token_id, list) else [found.eos_token_id]
    assert set(ends) == tokenizer.stop_ids and found.bos_token_id == tokenizer.bos_id


def folders(out: Path, steps: int) -> list[Path]:
    return [*(out / f"step_{step}" for step in range(1, steps + 1)), out / "final"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_run(dtype: str, cli: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = cli(
        "run", RECIPE, "--config", "tiny/knowledge_distillation", f"output_dir={out}", f"dtype={dtype}",
        "sample_prompts=[]", "max_steps_per_epoch=2", "save_every_n_steps=1", "run_val_every_n_steps=null",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    tokens = torch.randint(0, 258, (2, 60), generator=torch.Generator().manual_seed(0))
    weights = []
    for folder in folders(out, 2):
        theirs = check_weights(folder, DTYPES[dtype])
        check_logits(folder, theirs, tokens)
        check_tokenizer(folder, load(folder))
        check_generation_config(folder, load(folder))
        weights.append(theirs.model.norm.weight)
    assert not torch.equal(weights[0], weights[1]), "the second step has changed nothing"
    assert torch.equal(weights[1], weights[2]), "final/ is the last step"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]


@pytest.fixture(scope="module")
def pruned(smollm2_gguf: Path, cli: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers of the real SmolLM2, by the prune recipe."""
    folder = tmp_path_factory.mktemp("pruned") / "student"
    ended = cli(
        "run", "prune", "--config", "smollm2/prune", f"output_dir={folder}", "layers=[0, 1, 28, 29]", "num_layers=null",
        f"checkpointer.checkpoint_dir={smollm2_gguf}", f"tokenizer.path={smollm2_gguf}", "tokenizer.max_seq_len=48",
        "num_candidates=null", "num_calibration_tokens=16", "device=cpu", "dtype=fp32",
        "dataset={_component_: kdtune.data.quickstart_dataset}",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    return folder


@pytest.mark.real
@pytest.mark.parametrize(
    "dtype",
    [pytest.param("fp32", marks=pytest.mark.slow("the real model once more; the tiny one has both dtypes")), "bf16"],
)
def test_real_run(dtype: str, pruned: Path, smollm2_gguf: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = cli(
        "run", RECIPE, "--config", "quickstart", f"output_dir={out}", f"dtype={dtype}", "device=cpu",
        f"checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: '{pruned}'}}",
        f"teacher_checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: '{smollm2_gguf}'}}",
        f"tokenizer.path={smollm2_gguf}", "tokenizer.max_seq_len=48", "batch_size=1", "gradient_accumulation_steps=1",
        "dataset={_component_: kdtune.data.quickstart_dataset}",
        "dataset_val=null", "run_val_every_n_steps=null", "best_metric=null", "sample_prompts=[]", SGD,
        "sample_every_n_steps=null", "lr_scheduler=null", "epochs=1", "max_steps_per_epoch=2", "save_every_n_steps=1",
        "keep_last_n_checkpoints=1",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    tokenizer = load(smollm2_gguf)
    ids = [tokenizer.encode(text * 3, add_eos=False)[:24] for text in TEXTS]
    tokens = torch.tensor([row for row in ids if len(row) == 24])
    assert len(tokens) >= 2
    for folder in (out / "step_2", out / "final"):
        theirs = check_weights(folder, DTYPES[dtype])
        check_logits(folder, theirs, tokens)
        check_tokenizer(folder, tokenizer)
        check_generation_config(folder, tokenizer)
        assert "Apache License" in (folder / "LICENSE").read_text()
    assert not (out / "step_1").exists()


@pytest.mark.slow("imports torch anew; test_cli_streams.py has every kind of closed stream")
def test_a_run_whose_reader_leaves_trains_to_the_end(cli: Callable[..., Any], tmp_path: Path) -> None:
    """Witness: the same run with a reader that stays."""
    run = ["run", "finetune", "--config", "tiny/finetune", "max_steps_per_epoch=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = shlex.join([sys.executable, "-m", "kdtune", *run, f"output_dir={tmp_path / 'left'}"])
    line = f"{command} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert cli(*run, f"output_dir={tmp_path / 'stayed'}").code == 0
    left, stayed = (sorted(path.name for path in (tmp_path / name).rglob("*")) for name in ("left", "stayed"))
    assert left == stayed and "model.safetensors" in left
    losses = [
        [json.loads(line).get("loss") for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("left", "stayed")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3
