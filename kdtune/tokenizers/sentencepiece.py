"""Llama 2's tokenizer: a sentencepiece model."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken
from tokenizers import Tokenizer as Tokenizers

from kdtune.errors import CheckpointError
from kdtune.log import get_logger
from kdtune.tokenizers.base import SpecialTokens, Tokenizer
from kdtune.tokenizers.bpe import piece_bytes, sentencepiece_bpe
from kdtune.tokenizers.compare import BATTERY, PLAIN_BATTERY
from kdtune.tokenizers.folder import copy_files, take_tokenizer_json_as_it_stands
from kdtune.tokenizers.huggingface import put_bos_first, read_backend, write_tokenizer

log = get_logger(__name__)

# Serialized protocol buffers merge when one follows the other: this is normalizer_spec { add_dummy_prefix: false }.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


def read_model(file: Path) -> bytes:
    """Read the serialized sentencepiece model in a file.

    Raises:
        CheckpointError: the file cannot be read, is no sentencepiece model, or ends early.
    """
    try:
        proto = file.read_bytes()
        sentencepiece.SentencePieceProcessor(model_proto=proto)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{file}: neither a tiktoken nor a sentencepiece model: {error}; the file may be truncated, fetch it again"
        ) from error
    # The pieces come first: cut off between two of them, what is left is a model with other defaults and fewer pieces.
    fields = _top_level_fields(proto)
    missing = [name for name, number in (("trainer_spec", 2), ("normalizer_spec", 3)) if number not in fields]
    if missing:
        raise CheckpointError(
            f"{file}: neither a tiktoken nor a sentencepiece model: found no {' and no '.join(missing)} in it; the "
            "file may be truncated, fetch it again"
        )
    return proto


def _top_level_fields(proto: bytes) -> set[int]:
    """Yield the numbers of the fields in a well-formed message whose fields are all messages (length-delimited)."""
    fields: set[int] = set()
    at = 0
    while at < len(proto):
        tag, at = _varint(proto, at)
        length, at = _varint(proto, at)
        fields.add(tag >> 3)
        at += length
    return fields


def _varint(proto: bytes, at: int) -> tuple[int, int]:
    """Decode a protocol buffer's integer at a position, 7 bits per byte, lowest first; also return the position after it."""
    value = shift = 0
    while proto[at] & 0x80:
        value |= (proto[at] & 0x7F) << shift
        shift += 7
        at += 1
    return value | proto[at] << shift, at + 1


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer run by the sentencepiece library."""

    def __init__(self, file: Path, *, max_seq_len: int | None = None) -> None:
        self.file = file
        proto = read_model(file)
        self._model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        # Text that goes on within a sequence gets no dummy space in front.
        self._continuing = sentencepiece.SentencePieceProcessor(model_proto=proto + _NO_DUMMY_PREFIX)
        model = self._model
        size = model.get_piece_size()
        ids = {model.id_to_piece(i): i for i in range(size) if model.is_control(i) or model.is_unknown(i)}
        roles = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
        super().__init__(
            SpecialTokens(ids, {name: model.id_to_piece(i) for name, i in roles.items() if i >= 0}),
            vocab_size=size,
            pad_id=model.pad_id() if model.pad_id() >= 0 else None,
            max_seq_len=max_seq_len,
            folder=file.parent,
            origin=file,
        )
        self._special_strings = dict(zip(self.special_tokens.values(), self.special_tokens, strict=True))

    def _encode_text(self, text: str, previous: int | None) -> list[int]:
        # Meta's reference starts a sentence, dummy space included, after each bos; Llama 2's tokenizer.json after each special token.
        starts_sentence = previous is None or previous in self._special_strings
        return list((self._model if starts_sentence else self._continuing).encode(text))

    def _decode_ids(self, ids: Sequence[int], skip_special: bool) -> str:
        if skip_special:
            return str(self._model.decode([i for i in ids if i not in self._special_strings]))
        parts: list[str] = []
        for is_special, group in groupby(ids, self._special_strings.__contains__):
            members = list(group)
            parts.append(
                "".join(self._special_strings[i] for i in members) if is_special else self._model.decode(members)
            )
        return "".join(parts)

    def token_bytes(self) -> list[bytes | None]:
        """Return the bytes of each piece; see `Tokenizer.token_bytes`."""
        special = set(self.special_tokens.values())
        pieces = map(self._model.id_to_piece, range(self.vocab_size))
        return [None if i in special else piece_bytes(piece) for i, piece in enumerate(pieces)]

    def _save_files(self, folder: Path) -> None:
        """Copy tokenizer.model, and tokenizer.json with its configs if they exist and give the same ids; else make them.

        Without a tokenizer.json transformers 5 would read tokenizer.model itself, and give other ids. For a model that
        the `tokenizers` library cannot reproduce (a unigram model, another normalizer) none is made, and a warning says so.
        """
        copy_files(self.file.parent, folder)
        copy_files(self.file.parent, folder, [self.file.name])
        file = folder / "tokenizer.json"
        was_there = file.is_file()
        if not was_there or self._differs(file):
            backend = self.backend()
            if backend is None:
                log.warning(
                    "%s: no tokenizer.json can be made for it; load it with the sentencepiece library", self.file
                )
                return
            if was_there:
                file.write_text(backend.to_str(pretty=True), encoding="utf-8")
            else:
                write_tokenizer(backend, folder, named=self._named, chat_template=self.chat_template)
        take_tokenizer_json_as_it_stands(folder, self._named)

    def _differs(self, file: Path) -> bool:
        """Return whether a tokenizer.json is broken or gives other ids, also after a special token."""
        try:
            backend = read_backend(file)
        except CheckpointError:
            return True
        begin = self._named["bos_token"] or next(iter(self.special_tokens))
        return any(
            backend.encode(before + text, add_special_tokens=False).ids != [*ids, *self._model.encode(text)]
            for text in (*PLAIN_BATTERY, " x", "  x", "   ")
            for before, ids in (("", []), (begin, [self.special_tokens[begin]]))
        )

    @property
    def named_tokens(self) -> dict[str, str]:
        """Return bos_token, eos_token and unk_token of the model; "" for one that it lacks."""
        return dict(self._named)

    def backend(self, special: Mapping[str, AddedToken] | None = None) -> Tokenizers | None:
        """Return the same tokenizer for the `tokenizers` library; None if it would give other ids.

        `special`: the special tokens as they are added, if not unchanged.
        """
        model, ids = self._model, range(self.vocab_size)
        pieces = [model.id_to_piece(i) for i in ids]
        backend = sentencepiece_bpe(
            pieces,
            [model.get_score(i) for i in ids],
            unknown=pieces[max(model.unk_id(), 0)],
            prefix=model.encode("a") != self._continuing.encode("a"),
        )
        plain = {token: AddedToken(token, normalized=False) for token in self.special_tokens}
        backend.add_special_tokens(list((special or plain).values()))
        backend.encode_special_tokens = True  # special tokens in a text are text, as in the sentencepiece library
        if any(backend.encode(text).ids != model.encode(text) for text in BATTERY):
            return None
        backend.encode_special_tokens = False
        if "bos_token" in self._named:
            put_bos_first(backend, self._named["bos_token"])
        return backend
