"""Tokens that the files beside a vocabulary add or give a role, combined as in transformers 5."""

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from kdtune.errors import CheckpointError
from kdtune.json_files import read_json_if_there
from kdtune.tokenizers.base import check_special_tokens
from kdtune.tokenizers.folder import ADDED_TOKENS, SPECIAL_TOKEN_KEYS, SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenFiles:
    """Token entries of a folder's files, with their flags.

    listed: the added tokens by id, the smallest first. named: special tokens by name: bos_token, eos_token, ..., and a model's own,
    such as image_token. extra: special tokens without a name. settings: tokenizer_config.json, merged with
    special_tokens_map.json if transformers reads that.
    """

    listed: Mapping[int, AddedToken]
    named: Mapping[str, AddedToken]
    extra: list[AddedToken]
    settings: Mapping[str, Any]

    @property
    def names(self) -> dict[str, str]:
        """Return the special tokens' texts by name."""
        return {name: token.content for name, token in self.named.items()}

    def all(self) -> list[AddedToken]:
        """Return the tokens in the order in which they get ids, each once; the first entry of a text decides its flags."""
        tokens = [*self.listed.values(), *self.named.values(), *self.extra]
        special = {token.content for token in (*self.named.values(), *self.extra)}
        unique = {token.content: token for token in reversed(tokens)}
        found = [unique[text] for text in dict.fromkeys(token.content for token in tokens)]
        for token in found:
            token.special = token.special or token.content in special
        return found


def read_tokens(folder: Path) -> TokenFiles:
    """Read tokenizer_config.json, special_tokens_map.json and added_tokens.json of a folder, if they exist.

    added_tokens_decoder in the first one replaces the others. Without it, special_tokens_map.json takes precedence over
    tokenizer_config.json, and added_tokens.json lists the added tokens. The latter has no flags: a token in it is special if it
    has a name, or looks like one (<|...|>).

    Raises:
        CheckpointError: an entry is no token with an id, or no text of a special token.
    """
    settings = _settings(folder)
    extra = settings.get("extra_special_tokens")
    own = {key: value for key, value in settings.items() if key.endswith("_token") and key not in SPECIAL_TOKEN_KEYS}
    entries = {key: settings.get(key) for key in SPECIAL_TOKEN_KEYS} | own | (extra if isinstance(extra, dict) else {})
    file = folder / TOKENIZER_CONFIG
    named = {key: _token(entry, file) for key, entry in entries.items() if _text(entry)}
    extras = [_token(entry, file) for entry in extra if _text(entry)] if isinstance(extra, list) else []
    special = {token.content for token in (*named.values(), *extras)}
    return TokenFiles(_listed(folder, settings, special), named, extras, settings)


def _settings(folder: Path) -> dict[str, Any]:
    settings = _with_extra(read_json_if_there(folder / TOKENIZER_CONFIG))
    if settings.get("added_tokens_decoder") is not None:
        return settings
    mapped = read_json_if_there(folder / SPECIAL_TOKENS_MAP)
    both = [one.get("extra_special_tokens") for one in (settings, mapped)]
    settings |= mapped
    if all(isinstance(tokens, list) for tokens in both):
        settings["extra_special_tokens"] = [token for tokens in both for token in tokens or []]
    return _with_extra(settings)


def _with_extra(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with additional_special_tokens under its present name."""
    settings = dict(config)
    former = settings.pop("additional_special_tokens", None)
    return settings | ({"extra_special_tokens": former} if former and not settings.get("extra_special_tokens") else {})


def _listed(folder: Path, settings: Mapping[str, Any], special: Iterable[str]) -> dict[int, AddedToken]:
    decoder = settings.get("added_tokens_decoder")
    pairs: list[tuple[Any, Any]]
    if decoder is not None:
        file = folder / TOKENIZER_CONFIG
        pairs = list(decoder.items()) if isinstance(decoder, Mapping) else [(None, decoder)]
    else:
        file = folder / ADDED_TOKENS
        pairs = [
            (i, {"content": text, "special": text in special or (text[:2], text[-2:]) == ("<|", "|>")})
            for text, i in read_json_if_there(file).items()
        ]
    found: dict[int, AddedToken] = {}
    for i, entry in pairs:
        if not str(i).isdecimal() or not isinstance(entry, Mapping) or not _text(entry) or int(i) in found:
            what = (
                "by id (whole numbers), each an AddedToken object with a content"
                if decoder is not None
                else "with their ids"
            )
            raise CheckpointError(
                f"{file}: the added token {reprlib.repr(entry)} with the id {i!r}: tokens {what} expected, each id once; fetch it again"
            )
        found[int(i)] = _token(entry, file)
    return dict(sorted(found.items()))


def _text(entry: Any) -> str | None:
    text = entry.get("content") if isinstance(entry, Mapping) else entry
    return text if isinstance(text, str) and text else None


def _token(entry: Any, file: Path) -> AddedToken:
    text = _text(entry)
    assert text is not None
    check_special_tokens([text], file)
    if not isinstance(entry, Mapping):
        return AddedToken(text, special=True)
    return AddedToken(text, **{flag: bool(entry[flag]) for flag in _FLAGS if flag in entry})
