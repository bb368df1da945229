"""Tokenizers in a tokenizer.json, run by the `tokenizers` library."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from kdtune.errors import CheckpointError
from kdtune.json_files import read_json_if_there, read_text
from kdtune.log import get_logger
from kdtune.tokenizers.added_tokens import TokenFiles, read_tokens
from kdtune.tokenizers.base import SpecialTokens, Tokenizer, check_special_tokens, well_formed
from kdtune.tokenizers.bpe import piece_bytes, symbol_bytes
from kdtune.tokenizers.folder import (
    TOKENIZER_CONFIG,
    copy_files,
    take_tokenizer_json_as_it_stands,
    write_tokenizer_config,
)

log = get_logger(__name__)

# The library walks over all ids up to the largest, and a model has a row for each.
_LARGEST_ID = 2**24


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer run by the `tokenizers` library.

    Ids equal transformers' with `split_special_tokens=True`: special added tokens inside text stay text, while added
    tokens that are not special (words added to the vocabulary) are recognized in text, as in transformers.

    backend: the `tokenizers` object. named: the tokens that are bos, eos, pad, ... by name. folder: also the one whose files
    `save` copies. The other arguments are Tokenizer's.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        named: Mapping[str, str],
        folder: Path | None = None,
        chat_template: str | None = None,
        max_seq_len: int | None = None,
        origin: Path | str = "tokenizer.json",
    ) -> None:
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        check_special_tokens(named.values(), origin)
        _add_named(backend, named)
        if whole_words := [
            t.content for t in backend.get_added_tokens_decoder().values() if t.special and t.single_word
        ]:
            raise CheckpointError(
                f"{origin}: the special token {whole_words[0]!r} has single_word=true, by which it would stay text beside a letter in "
                "a chat template; this is not supported: set it to false"
            )
        added = {i: token for i, token in backend.get_added_tokens_decoder().items() if token.special}
        super().__init__(
            SpecialTokens(
                {token.content: i for i, token in added.items()},
                named,
                lstrip={token.content for token in added.values() if token.lstrip},
                rstrip={token.content for token in added.values() if token.rstrip},
            ),
            vocab_size=max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
            max_seq_len=max_seq_len,
            folder=folder,
            chat_template=chat_template,
            origin=origin,
        )
        self._special_ids = frozenset(self.special_tokens.values())
        self._continuing, self._prefix_after_control = _without_prefix(backend)
        self._keep_special_strings_as_text()

    def _keep_special_strings_as_text(self) -> None:
        self._backend.encode_special_tokens = True
        self._continuing.encode_special_tokens = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A pickled backend forgets the setting.
        self.__dict__.update(state)
        self._keep_special_strings_as_text()

    @property
    def begins_with_bos(self) -> bool:
        """Return whether transformers, with this tokenizer's files, adds bos to every text."""
        return self.bos_id is not None and self._backend.encode("a").ids[:1] == [self.bos_id]

    def _encode_text(self, text: str, previous: int | None) -> list[int]:
        prefixed = previous is None or (self._prefix_after_control and previous in self._special_ids)
        backend = self._backend if prefixed else self._continuing
        return backend.encode(text, add_special_tokens=False).ids

    def _decode_ids(self, ids: Sequence[int], skip_special: bool) -> str:
        return self._backend.decode(ids, skip_special_tokens=skip_special)

    def token_bytes(self) -> list[bytes | None]:
        """Return the bytes of each entry, as its decoder spells it; see `Tokenizer.token_bytes`."""
        decoder = self._backend.decoder
        steps = [] if decoder is None else _steps(json.loads(decoder.__getstate__()))
        kinds = {step["type"] for step in steps}
        spell: Callable[[str], bytes | None]
        if "ByteLevel" in kinds:
            spell = symbol_bytes
        elif kinds & {"ByteFallback", "Metaspace"}:
            spell = piece_bytes
        else:
            return super().token_bytes()
        found: list[bytes | None] = [None] * self.vocab_size
        added = self._backend.get_added_tokens_decoder()
        for token, i in self._backend.get_vocab(with_added_tokens=True).items():
            found[i] = token.encode() if i in added else spell(token)
        for i in self._special_ids:
            found[i] = None
        return found

    def _save_files(self, folder: Path) -> None:
        """Copy the folder's tokenizer files; mark a tokenizer.json made from a sentencepiece model to be read unchanged."""
        assert self.folder is not None
        copy_files(self.folder, folder)
        if "\u2581" in f"{self._backend.normalizer}{self._backend.pre_tokenizer}":
            take_tokenizer_json_as_it_stands(folder, self._named)


def _add_named(backend: tokenizers.Tokenizer, named: Mapping[str, str]) -> None:
    # A token named as bos, eos, ... is a special token even where tokenizer.json does not say so.
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for text in dict.fromkeys(named.values()):
        token = known.get(text) or tokenizers.AddedToken(text, normalized=False)
        if not token.special:
            token.special = True
            backend.add_tokens([token])


def _without_prefix(backend: tokenizers.Tokenizer) -> tuple[tokenizers.Tokenizer, bool]:
    """Return a tokenizer that puts no space before the text, and whether the given one does so after a special token too.

    Returns the same object if it never adds one.
    """
    parts = [
        json.loads(part.__getstate__()) for part in (backend.normalizer, backend.pre_tokenizer) if part is not None
    ]
    kinds = [kind for part in parts for kind in _steps(part) if _adds_prefix(kind)]
    if not kinds:
        return backend, False
    whole = json.loads(backend.to_str())
    for key in ("normalizer", "pre_tokenizer"):
        whole[key] = _strip_prefix(whole[key])
    after_control = any(kind.get("prepend_scheme", "always") != "first" for kind in kinds)
    return tokenizers.Tokenizer.from_str(json.dumps(whole)), after_control


def _steps(part: dict[str, Any]) -> list[dict[str, Any]]:
    inner = part.get("normalizers") or part.get("pretokenizers") or part.get("decoders") or []
    return [step for child in inner for step in _steps(child)] if part["type"] == "Sequence" else [part]


def _adds_prefix(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return step.get("prepend_scheme", "always") != "never"
    return step["type"] == "Prepend" or (step["type"] == "ByteLevel" and bool(step.get("add_prefix_space")))


def _strip_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        key = "normalizers" if "normalizers" in part else "pretokenizers"
        return {**part, key: [kept for child in part[key] if (kept := _strip_prefix(child)) is not None]}
    if part["type"] == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    return {**part, "add_prefix_space": False} if part["type"] == "ByteLevel" else part


def put_bos_first(backend: tokenizers.Tokenizer, bos: str) -> None:
    """Make transformers, unlike `Tokenizer.encode` here, begin every text with the special token `bos`."""
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )


def write_tokenizer(
    backend: tokenizers.Tokenizer,
    folder: Path,
    *,
    named: Mapping[str, str],
    chat_template: str,
    model_max_length: int | None = None,
) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template for transformers' AutoTokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    # Not backend.save: its errors are bare Exceptions, and a full disk must be told from a bug.
    (folder / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
    write_tokenizer_config(folder, named, model_max_length)
    (folder / "chat_template.jinja").write_text(well_formed(chat_template), encoding="utf-8")


def read_backend(file: Path) -> tokenizers.Tokenizer:
    """Read the tokenizer in a tokenizer.json. Raises CheckpointError naming the file if it is missing or broken."""
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    try:
        backend = tokenizers.Tokenizer.from_str(read_text(file))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(
            f"{file}: the tokenizers library cannot read it: {str(error)[:300]}; the file may be truncated, fetch it again"
        ) from error
    if (largest := max(backend.get_vocab().values(), default=0)) > _LARGEST_ID:
        raise CheckpointError(f"{file}: the largest id is {largest}; at most {_LARGEST_ID} expected: download it again")
    return backend


def load_huggingface(file: Path, *, max_seq_len: int | None = None) -> HuggingFaceTokenizer:
    """Load the tokenizer of a tokenizer.json, with the special tokens and chat template of the config files beside it."""
    folder = file.parent
    backend = read_backend(file)
    files = read_tokens(folder)
    _check_prefix(folder / TOKENIZER_CONFIG, files.settings, backend)
    backend = _add_tokens(backend, files, folder)
    return HuggingFaceTokenizer(
        backend, named=_named_tokens(files, folder, backend), folder=folder, max_seq_len=max_seq_len, origin=folder
    )


def _check_prefix(file: Path, config: Mapping[str, Any], backend: tokenizers.Tokenizer) -> None:
    """Raise on an add_prefix_space that contradicts tokenizer.json and that transformers' own classes would apply."""
    said = config.get("add_prefix_space")
    kind = config.get("tokenizer_class") or "PreTrainedTokenizerFast"
    has_prefix = _without_prefix(backend)[0] is not backend
    if isinstance(said, bool) and said != has_prefix and kind not in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        raise CheckpointError(
            f"{file}: add_prefix_space={str(said).lower()}, but tokenizer.json {'puts a' if has_prefix else 'puts no'} space in front of "
            f"a text, and {kind} goes by the former: the same text would be other ids; make the two agree (save the tokenizer with "
            "transformers)"
        )


def _add_tokens(backend: tokenizers.Tokenizer, files: TokenFiles, folder: Path) -> tokenizers.Tokenizer:
    """Add the tokens that the tokenizer lacks.

    The flags in tokenizer_config.json's added_tokens_decoder take precedence over tokenizer.json's.
    """
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    stand = {token.content for token in files.listed.values()} if "added_tokens_decoder" in files.settings else set()
    more = [token for token in files.all() if token.content in stand or token.content not in known]
    backend.add_tokens(more)
    for i, token in files.listed.items():
        if (given := backend.token_to_id(token.content)) != i:
            log.warning(
                "%s: the token %r is listed with the id %d and gets %s, as in transformers",
                folder,
                token.content,
                i,
                given,
            )
    if any(token.content in known and known[token.content].special and not token.special for token in more):
        # The library goes on to take a token for a special one until it is read anew.
        return tokenizers.Tokenizer.from_str(backend.to_str())
    return backend


def _named_tokens(files: TokenFiles, folder: Path, backend: tokenizers.Tokenizer) -> dict[str, str]:
    """Return special tokens by name; bos, eos and pad that no tokenizer file names are looked up by config.json's ids."""
    named = files.names
    config = read_json_if_there(folder / "config.json")
    for name in ("bos_token", "eos_token", "pad_token"):
        found = config.get(f"{name}_id")
        found = found[0] if isinstance(found, list) and found else found
        if name not in named and isinstance(found, int) and (token := backend.id_to_token(found)) is not None:
            named[name] = token
    return named
