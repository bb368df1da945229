"""The folders that recipe tests start from, all made here."""

from pathlib import Path

import pytest
import torch
from command_line import CLI, run_here, run_there

from kdtune.checkpoint import load_model, save_model
from kdtune.models import llama
from kdtune.pruning.prune import keep_layers
from kdtune.tokenizers import byte_tokenizer, load

RECIPE = "knowledge_distillation_single_device"
CONFIG = "tiny/knowledge_distillation"


@pytest.fixture(autouse=True)
def runs_of_tests_are_undrawn(undrawn: None) -> None:
    """Those of fixtures are drawn."""


@pytest.fixture(scope="session")
def cli() -> CLI:
    """`run_here`."""
    return run_here


@pytest.fixture(scope="session")
def process() -> CLI:
    """`run_there`."""
    return run_there


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and `sharded`, the tiny config's student as Hugging Face folders, and `run`, a short run."""
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    model = llama(
        vocab_size=320, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_dim=64, max_seq_len=256,
        tie_embeddings=True,
    )  # fmt: skip
    save_model(model, folder / "model", tokenizer=byte_tokenizer())
    save_model(model, folder / "sharded", tokenizer=byte_tokenizer(), max_shard_bytes=40_000)
    done = run_here(
        "run", RECIPE, "--config", CONFIG, f"output_dir={folder / 'run'}", "sample_prompts=[]", "max_steps_per_epoch=2",
        "save_every_n_steps=1", "run_val_every_n_steps=null",
    )  # fmt: skip
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="session")
def real_pair(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `teacher` and `student`, SmolLM2-135M-Instruct and 12 of its layers; a GGUF file would take seconds to read."""
    folder = tmp_path_factory.mktemp("pair")
    model, tokenizer = load_model(smollm2_gguf), load(smollm2_gguf)
    save_model(model, folder / "teacher", tokenizer=tokenizer)
    save_model(keep_layers(model, [*range(6), *range(24, 30)]), folder / "student", tokenizer=tokenizer)
    return folder
