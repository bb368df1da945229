"""Shared fixtures: one thread, no hub, and the real model and tokenizers where they have been fetched."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("COLUMNS", None)  # pytest-xdist sets 80 in its workers: output would be wrapped

import pytest
from hypothesis import settings

# The same examples every time: a failure in CI is one that can be had at home.
settings.register_profile("kdtune", derandomize=True, deadline=None)
settings.load_profile("kdtune")


def _real(name: str) -> Path:
    """Path of a fetched real input; skips where KDTUNE_TEST_MODELS is unset, fails where KDTUNE_REQUIRE_REAL is set (CI)."""
    root = os.environ.get("KDTUNE_TEST_MODELS")
    path = Path(root or "/nonexistent") / name
    if not path.exists():
        message = f"{name} is not in KDTUNE_TEST_MODELS={root}: run `make test-models` first"
        if os.environ.get("KDTUNE_REQUIRE_REAL"):
            pytest.fail(message)
        pytest.skip(message)
    return path


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """Folder with the real SmolLM2-135M-Instruct GGUF and its licence."""
    return _real("smollm2-gguf")


@pytest.fixture(scope="session")
def llama3_tokenizer_file() -> Path:
    """The real Llama 3 tokenizer.model (tiktoken)."""
    return _real("llama3-tokenizer/tokenizer.model")


@pytest.fixture
def drawn() -> None:
    """Asked for by a test that looks at a run's loss.png."""


@pytest.fixture
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave loss.png empty: drawing it takes a third of a tiny run's time. tests/unit/runs draws every kind of run."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("kdtune.runs.summary.plot_losses", lambda metrics_file, png, **_: Path(png).touch())


@pytest.fixture(scope="session")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tokenizer for a teacher: other ids than bytes, words of several bytes, Llama 3's chat template."""
    from tokenizers import AddedToken

    from kdtune.tokenizers import GGUFTokenizer
    from kdtune.tokenizers.bpe import tokenizer_from_ranks
    from kdtune.tokenizers.chat_format import LLAMA3

    ranks = {bytes([i]): 255 - i for i in range(256)} | {word: 256 + i for i, word in enumerate((b"th", b"the", b" a"))}
    backend = tokenizer_from_ranks(ranks, r" ?\p{L}+|[^\p{L}]")
    names = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    backend.add_special_tokens([AddedToken(name, special=True) for name in names])
    named = {"bos_token": names[0], "eos_token": names[1]}
    made = GGUFTokenizer(backend, named=named, model_max_length=None, chat_template=LLAMA3, origin="test")
    path = tmp_path_factory.mktemp("teacher")
    made.save(path, is_chat=True)
    return path
