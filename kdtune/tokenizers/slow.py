"""A sentencepiece model with tokens added beside it, and no tokenizer.json, as older finetunes of Llama have it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from kdtune.errors import CheckpointError
from kdtune.model_files import read_json_if_there
from kdtune.tokenizers.chat_format import folder_template, folder_tool_template
from kdtune.tokenizers.folder import (
    TOKENIZER_CONFIG,
    generation_eos_ids,
    more_special_tokens,
    special_tokens,
)
from kdtune.tokenizers.gguf import GGUFTokenizer
from kdtune.tokenizers.huggingface import added_tokens_by_id, put_bos_first
from kdtune.tokenizers.sentencepiece import SentencePieceTokenizer

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_ADDED = "added_tokens.json"


def lists_other_tokens(model: SentencePieceTokenizer) -> bool:
    """Return whether the files beside the model add tokens to it, or name others as bos, eos or unk."""
    folder = model.file.parent
    named = {name: token for name, token in special_tokens(folder).items() if token}
    own = model.named_tokens
    differs = any(named.get(name, token) != token for name, token in own.items() if token)
    return differs or not {*_listed(folder).values(), *named.values()} <= model.control_tokens.keys()


def _listed(folder: Path) -> dict[int, str]:
    """The added tokens by id, as added_tokens.json and tokenizer_config.json list them.

    Raises:
        CheckpointError: an entry is no token with an id, or the two files differ.
    """
    found: dict[int, str] = {}
    config = read_json_if_there(folder / TOKENIZER_CONFIG).get("added_tokens_decoder") or {}
    listed = added_tokens_by_id(config, folder / TOKENIZER_CONFIG)
    for file, pairs in (
        (_ADDED, [(i, token) for token, i in read_json_if_there(folder / _ADDED).items()]),
        (TOKENIZER_CONFIG, [(i, entry["content"]) for i, entry in listed]),
    ):
        for i, token in pairs:
            if not str(i).isdigit() or not isinstance(token, str) or found.get(int(i), token) != token:
                raise CheckpointError(
                    f"{folder / file}: the added token {token!r} has the id {i!r}, which is no whole number or another "
                    f"token's in {_ADDED}; the files do not belong together: fetch them again"
                )
            found[int(i)] = token
    return found


def load_slow(model: SentencePieceTokenizer, *, max_seq_len: int | None = None) -> GGUFTokenizer:
    """The tokenizer of a sentencepiece model and the files beside it, as transformers reads them.

    What the model itself cuts into pieces are the sentencepiece library's pieces. It is saved as a tokenizer.json.

    Raises:
        CheckpointError: the `tokenizers` library cannot follow the model, or an added token does not get the id that is listed.
    """
    file = model.file
    folder = file.parent
    config = read_json_if_there(folder / TOKENIZER_CONFIG)
    named = {name: token for name, token in (model.named_tokens | special_tokens(folder)).items() if token}
    listed = added_tokens_by_id(config.get("added_tokens_decoder") or {}, folder / TOKENIZER_CONFIG)
    flags = {entry["content"]: entry for _, entry in listed}

    def added(token: str) -> AddedToken:
        entry = flags.get(token, {})
        chosen = {key: bool(entry[key]) for key in _FLAGS if key in entry}
        # Of a token in added_tokens.json alone nothing says whether it is a control token: by its name, or its looks.
        looks_so = token in model.control_tokens or token in named.values() or (token[:2], token[-2:]) == ("<|", "|>")
        return AddedToken(token, special=bool(entry.get("special", looks_so)), **{"normalized": False, **chosen})

    backend = model.backend({token: added(token) for token in model.control_tokens})
    if backend is None:
        raise CheckpointError(
            f"{file}: has tokens added beside it, and is a sentencepiece model that the tokenizers library cannot follow; save it "
            "with transformers, AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), and take that folder"
        )
    _set_prefix(backend, config)
    for i, token in sorted(_listed(folder).items()):
        if backend.token_to_id(token) is None or token in flags:
            _add(backend, added(token))
        if (given := backend.token_to_id(token)) != i:
            raise CheckpointError(
                f"{folder}: the added token {token!r} is listed with the id {i}, but {given} is the one it gets after "
                f"{file.name}'s {model.vocab_size} tokens; the files do not belong together: fetch them again"
            )
    for token in more_special_tokens(config):
        if backend.token_to_id(token) is None:
            _add(backend, added(token))
    tokenizer = GGUFTokenizer(
        backend,
        named=named,
        model_max_length=_length(config),
        chat_template=folder_template(folder),
        tool_template=folder_tool_template(folder),
        max_seq_len=max_seq_len,
        extra_stop_ids=generation_eos_ids(folder),
        origin=folder,
    )
    backend.post_processor = None
    if config.get("add_bos_token", True) and "bos_token" in named:
        put_bos_first(backend, named["bos_token"])
    return tokenizer


def _add(backend: Tokenizer, token: AddedToken) -> None:
    if token.special:
        backend.add_special_tokens([token])
    else:
        backend.add_tokens([token])


def _set_prefix(backend: Tokenizer, config: Mapping[str, Any]) -> None:
    """Configure where a leading space is added: at text start, with `legacy` after each control token too, or never."""
    if config.get("add_prefix_space") is False:
        backend.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
    else:
        scheme = "always" if config.get("legacy") is True else "first"
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)


def _length(config: Mapping[str, Any]) -> int | None:
    found = config.get("model_max_length")
    return found if isinstance(found, int) and found < 10**9 else None
