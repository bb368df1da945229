"""The command line as a function, and the folders that recipe tests start from, all made here."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kdtune._cli.main import main
from kdtune.checkpoint import save_model
from kdtune.models import llama
from kdtune.tokenizers import byte_tokenizer

ROOT = Path(__file__).parents[2]
RECIPE = "knowledge_distillation_single_device"
CONFIG = "tiny/knowledge_distillation"


@dataclass(frozen=True)
class Outcome:
    """How a command line ended, and what it printed."""

    code: int
    out: str
    err: str


CLI = Callable[..., Outcome]


def run_here(*argv: str) -> Outcome:
    """`kdtune ARGV...` in this process; an exception that would have been a traceback comes out as it is."""
    out, err = io.StringIO(), io.StringIO()
    path = list(sys.path)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stopped:
        main(list(argv))
    sys.path[:] = path
    assert isinstance(stopped.value.code, int)
    return Outcome(stopped.value.code, out.getvalue(), err.getvalue())


def run_there(*argv: str, prepare: Callable[[], None] | None = None) -> Outcome:
    """`python -m kdtune ARGV...` as a process of its own; `prepare` runs in it before Python starts."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "kdtune", *argv],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, preexec_fn=prepare,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


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
