"""Detect the kind of tokenizer at a path and load it; or build one of bytes, with nothing to download."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers.models import BPE

from kdtune.errors import CheckpointError
from kdtune.json_files import read_json
from kdtune.paths import user_path
from kdtune.tokenizers.base import Tokenizer
from kdtune.tokenizers.chat_format import CHATML
from kdtune.tokenizers.folder import check_flags
from kdtune.tokenizers.gguf import GGUFTokenizer, load_gguf
from kdtune.tokenizers.huggingface import load_huggingface
from kdtune.tokenizers.sentencepiece import SentencePieceTokenizer
from kdtune.tokenizers.slow import lists_other_tokens, load_slow
from kdtune.tokenizers.tiktoken import TiktokenTokenizer

_LOOKED_FOR = (
    "a tokenizer is looked for as tokenizer.json, tokenizer.model (tiktoken or sentencepiece) or one *.gguf file"
)


def load(
    path: str | Path,
    *,
    max_seq_len: int | None = None,
    date: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """Load the tokenizer of a model folder, or of one tokenizer.json, tokenizer.model or GGUF file.

    In a folder that has both, a sentencepiece tokenizer.model takes precedence over its conversion to tokenizer.json, unless
    the latter has tokens of its own; tokenizer.json takes precedence over a tiktoken tokenizer.model.

    Args:
        path: the folder or file.
        max_seq_len: length to which datasets truncate, in tokens.
        date: the day (YYYY-MM-DD) for a chat template that prints today's, such as Llama 3.2's; null: now. A run uses the
            day on which it was started, and writes it into its config.
        chat_template_kwargs: variables of the chat template, such as {"enable_thinking": False} for Qwen3's; null: none. A row's
            own (its column of this name) come first.

    Raises:
        CheckpointError: nothing there is a tokenizer, or its file is broken.
        ConfigError: max_seq_len is not positive, date is no date, or the chat template knows no such variable.
    """
    path = user_path(path)
    check_flags(path.parent if path.is_file() else path)
    tokenizer = _load_file(path if path.is_file() else _find(path), max_seq_len)
    tokenizer.date = date
    tokenizer.chat_template_kwargs = chat_template_kwargs or {}
    return tokenizer


def llama3_tokenizer(path: str | Path, max_seq_len: int | None = None, date: str | None = None) -> TiktokenTokenizer:
    """Load Llama 3's tokenizer from Meta's tokenizer.model (tiktoken), or from the folder that holds it; `date` as in `load`."""
    file = _model_file(user_path(path))
    if not _is_tiktoken(file):
        raise CheckpointError(f"{file}: not a tiktoken file (lines of base64 and rank); want llama 3's tokenizer.model")
    tokenizer = TiktokenTokenizer(file, max_seq_len=max_seq_len)
    tokenizer.date = date
    return tokenizer


def llama2_tokenizer(
    path: str | Path, max_seq_len: int | None = None, date: str | None = None
) -> SentencePieceTokenizer:
    """Load Llama 2's tokenizer from its sentencepiece tokenizer.model, or from the folder that holds it; `date` as in `load`."""
    file = _model_file(user_path(path))
    if _is_tiktoken(file):
        raise CheckpointError(f"{file}: a tiktoken file; want llama 2's sentencepiece tokenizer.model")
    tokenizer = SentencePieceTokenizer(file, max_seq_len=max_seq_len)
    if lists_other_tokens(tokenizer):
        raise CheckpointError(
            f"{file}: the files beside it add tokens to llama 2's, or name others as bos or eos; take kdtune.tokenizers.load"
        )
    tokenizer.date = date
    return tokenizer


def byte_tokenizer(max_seq_len: int | None = None) -> GGUFTokenizer:
    """Build a tokenizer with one id per byte of UTF-8 (256), then <|im_start|> and <|im_end|>, and ChatML as chat template.

    max_seq_len: length to which datasets truncate, in tokens; None: no truncation.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    return GGUFTokenizer(
        backend,
        named={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        model_max_length=None,
        chat_template=CHATML,
        max_seq_len=max_seq_len,
        origin="byte_tokenizer",
    )


def _model_file(path: Path) -> Path:
    if path.is_file():
        return path
    tried = [path / "tokenizer.model", path / "original" / "tokenizer.model"]
    for file in tried:
        if file.is_file():
            return file
    raise CheckpointError(f"{path}: no tokenizer.model found; want that file, or a folder that holds it")


def _load_file(file: Path, max_seq_len: int | None) -> Tokenizer:
    if file.suffix == ".json":
        return load_huggingface(file, max_seq_len=max_seq_len)
    if file.suffix == ".gguf":
        return load_gguf(file, max_seq_len=max_seq_len)
    if _is_tiktoken(file):
        return TiktokenTokenizer(file, max_seq_len=max_seq_len)
    model = SentencePieceTokenizer(file, max_seq_len=max_seq_len)
    return load_slow(model, max_seq_len=max_seq_len) if lists_other_tokens(model) else model


def _find(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such file or folder; {_LOOKED_FOR}")
    json_file, model = folder / "tokenizer.json", folder / "tokenizer.model"
    if json_file.is_file():
        original = model.is_file() and not _is_tiktoken(model) and not _has_own_tokens(json_file, model)
        return model if original else json_file
    for file in (model, folder / "original" / "tokenizer.model"):
        if file.is_file():
            return file
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        raise CheckpointError(
            f"{folder}: found {len(ggufs)} GGUF files ({names}); name the one to read the tokenizer from"
        )
    raise CheckpointError(f"{folder}: no tokenizer found; {_LOOKED_FOR}")


def _is_tiktoken(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", opened.read(4096)) is not None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error


def _has_own_tokens(json_file: Path, model: Path) -> bool:
    """Return whether tokenizer.json, or a file beside it, has added tokens that the sentencepiece model lacks as special tokens."""
    original = SentencePieceTokenizer(model)
    if lists_other_tokens(original):
        return True
    special = original.special_tokens
    added = read_json(json_file).get("added_tokens") or []
    try:
        return any(special.get(token.get("content")) != token.get("id") for token in added)
    except (AttributeError, TypeError):  # no list of tokens: whatever reads the file says so
        return True
