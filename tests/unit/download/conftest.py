"""A model hub, a second host beside it, and a client that can reach them."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, serve


def _files() -> dict[str, bytes]:
    weights = hashlib.shake_256(b"weights").digest(400_000)
    return {
        "README.md": b"# A model\n",
        "config.json": b'{"model_type": "llama"}\n',
        "empty.txt": b"",
        "model.safetensors": weights,
        "pytorch_model.bin": weights[:5000],
        "original/consolidated.00.pth": weights[:6000],
        "original/tokenizer.model": b"tokens\n" * 10,
    }


@pytest.fixture
def hub() -> Iterator[Hub]:
    yield from serve(Hub(_files()))


@pytest.fixture
def other_host() -> Iterator[Hub]:
    """A second server, for the client another host: where a hub redirects to."""
    yield from serve(Hub(_files()), "127.0.0.2")


@pytest.fixture(autouse=True)
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub client online, without this machine's login or proxies, and with no patience."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("kdtune.download.fetch._BACKOFF_S", 0.001)
    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HF_ENDPOINT",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
