"""A sentencepiece model with added tokens and no tokenizer.json, as in older finetunes of Llama."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from kdtune.errors import CheckpointError
from kdtune.json_files import read_json_if_there
from kdtune.tokenizers.added_tokens import TokenFiles, read_tokens
from kdtune.tokenizers.folder import ADDED_TOKENS
from kdtune.tokenizers.gguf import GGUFTokenizer
from kdtune.tokenizers.huggingface import put_bos_first
from kdtune.tokenizers.sentencepiece import SentencePieceTokenizer


def lists_other_tokens(model: SentencePieceTokenizer) -> bool:
    """Return whether files beside the model add tokens, change the flags of its own, or rename bos, eos or unk."""
    files = read_tokens(model.file.parent)
    renamed = any(files.names.get(name, token) != token for name, token in model.named_tokens.items() if token)
    flagged = any(token.lstrip or token.rstrip or token.single_word for token in files.all())
    return renamed or flagged or not {token.content for token in files.all()} <= model.special_tokens.keys()


def _check_listed(folder: Path, files: TokenFiles) -> None:
    """Raise if added_tokens.json gives an id of added_tokens_decoder to another token."""
    for text, i in read_json_if_there(folder / ADDED_TOKENS).items():
        other = files.listed.get(i)
        if other is not None and other.content != text:
            raise CheckpointError(
                f"{folder / ADDED_TOKENS}: the added token {text!r} has the id {i}, which is {other.content!r} in "
                "tokenizer_config.json; the files do not belong together: fetch them again"
            )


def load_slow(model: SentencePieceTokenizer, *, max_seq_len: int | None = None) -> GGUFTokenizer:
    """Load the tokenizer of a sentencepiece model and the files beside it, as transformers reads them.

    Text between added tokens gets the sentencepiece library's pieces. The tokenizer is saved as a tokenizer.json.

    Raises:
        CheckpointError: the `tokenizers` library cannot reproduce the model, or an added token does not get the id that is listed.
    """
    file = model.file
    folder = file.parent
    files = read_tokens(folder)
    _check_listed(folder, files)
    named = {name: token for name, token in (model.named_tokens | files.names).items() if token}
    added = {token.content: token for token in files.all()}
    special = {text: added.get(text) or AddedToken(text, special=True) for text in model.special_tokens}
    for token in special.values():
        token.special = True
    backend = model.backend(special)
    if backend is None:
        raise CheckpointError(
            f"{file}: has tokens added beside it, and is a sentencepiece model that the tokenizers library cannot follow; save it "
            "with transformers, AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), and take that folder"
        )
    _set_prefix(backend, files.settings)
    backend.add_tokens([token for text, token in added.items() if text not in special])
    for i, token in files.listed.items():
        if (given := backend.token_to_id(token.content)) != i:
            raise CheckpointError(
                f"{folder}: the added token {token.content!r} is listed with the id {i}, but {given} is the one it gets after "
                f"{file.name}'s {model.vocab_size} tokens; the files do not belong together: fetch them again"
            )
    tokenizer = GGUFTokenizer(
        backend,
        named=named,
        model_max_length=_length(files.settings),
        folder=folder,
        max_seq_len=max_seq_len,
        origin=folder,
    )
    backend.post_processor = None
    if files.settings.get("add_bos_token", True) and "bos_token" in named:
        put_bos_first(backend, named["bos_token"])
    return tokenizer


def _set_prefix(backend: Tokenizer, config: Mapping[str, Any]) -> None:
    """Configure where a leading space is added: at text start, with `legacy` after each special token too, or never."""
    if config.get("add_prefix_space") is False:
        backend.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
    else:
        scheme = "always" if config.get("legacy") is True else "first"
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)


def _length(config: Mapping[str, Any]) -> int | None:
    found = config.get("model_max_length")
    return found if isinstance(found, int) and found < 10**9 else None
