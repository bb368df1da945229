"""Tokenizers in the metadata of a GGUF file, rebuilt for the `tokenizers` library."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import Keys, TokenType
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE

from kdtune.errors import CheckpointError
from kdtune.gguf_file import read_gguf
from kdtune.log import get_logger
from kdtune.tokenizers.bpe import byte_level_words, sentencepiece_bpe
from kdtune.tokenizers.huggingface import HuggingFaceTokenizer, put_bos_first, write_tokenizer
from kdtune.tokenizers.tiktoken import SPLIT_PATTERN

log = get_logger(__name__)

_QWEN2_PATTERN = SPLIT_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")

_NAMED_IDS = {
    "bos_token": Keys.Tokenizer.BOS_ID,
    "eos_token": Keys.Tokenizer.EOS_ID,
    "unk_token": Keys.Tokenizer.UNK_ID,
    "pad_token": Keys.Tokenizer.PAD_ID,
}


# llama.cpp's names (tokenizer.ggml.pre) for how text is cut into words before merging. transformers 5 reads all GGUF
# files as GPT-2's; "smollm" was trained otherwise: 59 Alpaca answers with digits after blanks or empty lines cost
# SmolLM2-135M 12476 nats cut as here, 12982 cut as GPT-2 (more on 56 of the 59).
_PRE_TOKENIZERS = {
    "default": lambda: byte_level_words(),
    "gpt-2": lambda: byte_level_words(),
    "smollm": lambda: byte_level_words(single_digits=True),
    "llama-bpe": lambda: byte_level_words(SPLIT_PATTERN),
    "llama3": lambda: byte_level_words(SPLIT_PATTERN),
    "llama-v3": lambda: byte_level_words(SPLIT_PATTERN),
    "qwen2": lambda: byte_level_words(_QWEN2_PATTERN),
}


class GGUFTokenizer(HuggingFaceTokenizer):
    """A tokenizer rebuilt from GGUF metadata; saved as a tokenizer.json with its configs."""

    def __init__(self, *args: Any, model_max_length: int | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._model_max_length = model_max_length

    def _save_files(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat template for transformers' AutoTokenizer."""
        write_tokenizer(
            self._backend,
            folder,
            named=self._named,
            chat_template=self.chat_template,
            model_max_length=self._model_max_length,
        )


def load_gguf(file: Path, *, max_seq_len: int | None = None) -> GGUFTokenizer:
    """Load the tokenizer in a GGUF file's metadata: byte-level BPE ("gpt2") or sentencepiece BPE ("llama").

    Raises:
        CheckpointError: the file is broken, or its tokenizer is of another kind (named).
    """
    data = read_gguf(file).metadata
    kind = _need(data, Keys.Tokenizer.MODEL, file)
    tokens: list[str] = _need(data, Keys.Tokenizer.LIST, file)
    types: list[int] = data.get(Keys.Tokenizer.TOKEN_TYPE) or [TokenType.NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(f"{file}: found {len(tokens)} tokens but {len(types)} token types; want as many")
    if kind == "gpt2":
        backend = _byte_level_bpe(data, tokens, file)
    elif kind == "llama":
        backend = sentencepiece_bpe(
            tokens,
            _need(data, Keys.Tokenizer.SCORES, file),
            unknown=tokens[data.get(Keys.Tokenizer.UNK_ID, 0)],
            prefix=bool(data.get(Keys.Tokenizer.ADD_PREFIX, True)),
        )
    else:
        raise CheckpointError(
            f"{file}: {Keys.Tokenizer.MODEL}={kind!r}: this kind of tokenizer is not supported; allowed: 'gpt2' "
            "(byte-level BPE), 'llama' (sentencepiece BPE); take the model's Hugging Face folder instead"
        )
    _add_tokens(backend, tokens, types)
    ids = {name: data[key] for name, key in _NAMED_IDS.items() if key in data}
    wrong = {name: i for name, i in ids.items() if i >= len(tokens)}
    if wrong:
        raise CheckpointError(f"{file}: special tokens {wrong} lie outside the vocabulary of {len(tokens)}")
    named = {name: tokens[i] for name, i in ids.items()}
    add_bos = bool(data.get(Keys.Tokenizer.ADD_BOS, kind == "llama")) and "bos_token" in named
    if add_bos:
        put_bos_first(backend, named["bos_token"])
    architecture = data.get(Keys.General.ARCHITECTURE)
    return GGUFTokenizer(
        backend,
        named=named,
        model_max_length=data.get(f"{architecture}.context_length"),
        chat_template=data.get(Keys.Tokenizer.CHAT_TEMPLATE),
        max_seq_len=max_seq_len,
        origin=file,
    )


def _need(data: Mapping[str, Any], key: str, file: Path) -> Any:
    if key not in data:
        raise CheckpointError(f"{file}: no {key} in the metadata: the file carries no tokenizer; give another one")
    return data[key]


def _byte_level_bpe(data: Mapping[str, Any], tokens: Sequence[str], file: Path) -> Tokenizer:
    pre = data.get(Keys.Tokenizer.PRE, "default")
    if pre == "default":
        said = "says 'default'" if Keys.Tokenizer.PRE in data else "is missing"
        log.warning(
            "%s: %s %s: how this model's text was cut into words is not known, GPT-2's way is taken, and the ids may be wrong: THE "
            "MODEL MAY SEEM MUCH WORSE THAN IT IS; convert the model anew, or take its Hugging Face folder as tokenizer.path",
            file,
            Keys.Tokenizer.PRE,
            said,
        )
    if pre not in _PRE_TOKENIZERS:
        raise CheckpointError(
            f"{file}: {Keys.Tokenizer.PRE}={pre!r}: this way to cut text into words is not supported; allowed: "
            f"{', '.join(_PRE_TOKENIZERS)}; take the model's Hugging Face folder instead"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in _need(data, Keys.Tokenizer.MERGES, file)]
    vocab = {token: i for i, token in enumerate(tokens)}
    # llama 3 takes a word that is in the vocabulary as it is, even where the merges would not lead there.
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=pre in ("llama-bpe", "llama3", "llama-v3")))
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_tokens(backend: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    listed = [
        AddedToken(token, special=kind in special, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (*special, TokenType.USER_DEFINED)
    ]
    backend.add_special_tokens([token for token in listed if token.special])
    backend.add_tokens([token for token in listed if not token.special])
