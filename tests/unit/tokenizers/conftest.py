"""Tiny tokenizers of every kind, made on the spot."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

CORPUS = [
    "the cat sat on the mat",
    "user assistant system",
    "hello there, how are you?",
    "def f(x):\n    return x + 1",
] * 4
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level_bpe() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@pytest.fixture
def chatml_folder(tmp_path: Path) -> Path:
    """A tokenizer.json with ChatML's special tokens and no chat template."""
    folder = tmp_path / "chatml"
    folder.mkdir()
    byte_level_bpe().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def tiktoken_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiktoken file with the 256 bytes and a few merges."""
    words = [b"th", b"the", b" t", b" the", b"  ", b"    ", b"\n\n", b"us", b"er", b"user"]
    tokens = [bytes([value]) for value in range(256)] + words
    monkeypatch.setattr("kdtune.tokenizers.tiktoken.NUM_RANKS", len(tokens))
    file = tmp_path / "tiktoken" / "tokenizer.model"
    file.parent.mkdir()
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return file


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture
def sentencepiece_file(tmp_path: Path, sentencepiece_model: bytes) -> Path:
    file = tmp_path / "sentencepiece" / "tokenizer.model"
    file.parent.mkdir()
    file.write_bytes(sentencepiece_model)
    return file


@pytest.fixture
def make_gguf() -> Callable[..., Path]:
    """Writes a GGUF file that holds `byte_level_bpe` and nothing else."""
    return _write_gguf


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    return _write_gguf(tmp_path / "gguf" / "model.gguf")


def _write_gguf(file: Path, *, model: str = "gpt2", pre: str | None = "gpt-2") -> Path:
    backend = byte_level_bpe()
    whole = json.loads(backend.to_str())
    tokens = [str(backend.id_to_token(i)) for i in range(backend.get_vocab_size())]
    file.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in SPECIALS else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(merge) for merge in whole["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file
