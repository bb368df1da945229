"""Llama 3's tokenizer: byte-pair ranks in tiktoken's text format, followed by 256 special tokens."""

import base64
import binascii
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import tiktoken
import tokenizers

from kdtune.errors import CheckpointError
from kdtune.tokenizers.base import SpecialTokens, Tokenizer
from kdtune.tokenizers.byte_level import tokenizer_from_ranks
from kdtune.tokenizers.chat_format import folder_template, folder_tool_template
from kdtune.tokenizers.folder import copy_files, generation_eos_ids
from kdtune.tokenizers.huggingface import put_bos_first, write_tokenizer

# Another number is a truncated file, or another family's, whose pattern and special tokens are not these.
NUM_RANKS = 128_000
NUM_CONTROL_TOKENS = 256

# Meta's order (llama 3.1); the ids follow the ranks.
_FIRST_CONTROL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)

# How llama 3 cuts text into words before byte-pair merging (llama 3 model card; tiktoken's cl100k_base with runs of
# up to 3 digits).
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# tiktoken backtracks over whitespace one frame a character and panics between 1e5 and 1e6 of them.
_MAX_WHITESPACE_RUN = 50_000
# Unicode's White_Space, as Rust's \s has it; Python's \s also takes U+001C..U+001F.
_LONG_WHITESPACE = re.compile(
    r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{%d,}" % _MAX_WHITESPACE_RUN  # noqa: UP031
)


def control_token_names() -> list[str]:
    """Return the 256 special tokens of Llama 3 in the order of their ids."""
    rest = NUM_CONTROL_TOKENS - len(_FIRST_CONTROL_TOKENS)
    return [*_FIRST_CONTROL_TOKENS, *(f"<|reserved_special_token_{3 + i}|>" for i in range(rest))]


def read_ranks(file: Path) -> dict[bytes, int]:
    """Read byte sequences and their ranks from a tiktoken file: a line is base64, a space, the rank.

    Raises:
        CheckpointError: the file cannot be read, a line is broken, or the ranks are not 0..127,999.
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(
                f"{file}: line {number}: found {line[:40]!r}; want base64, a space and a rank; the file may be "
                "truncated, fetch it again"
            ) from error
    if sorted(ranks.values()) != list(range(NUM_RANKS)):
        raise CheckpointError(
            f"{file}: found {len(ranks)} ranks; want llama 3's {NUM_RANKS}, 0..{NUM_RANKS - 1}, each once; the file "
            "may be truncated or another family's"
        )
    if any(bytes([value]) not in ranks for value in range(256)):
        raise CheckpointError(f"{file}: not every single byte has a rank; this is no byte-level vocabulary")
    return ranks


class TiktokenTokenizer(Tokenizer):
    """Llama 3's tokenizer from its tokenizer.model."""

    def __init__(self, file: Path, *, max_seq_len: int | None = None) -> None:
        self.file = file
        self._ranks = read_ranks(file)
        self._encoding = tiktoken.Encoding(
            file.name, pat_str=SPLIT_PATTERN, mergeable_ranks=self._ranks, special_tokens={}
        )
        names = control_token_names()
        named = {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|end_of_text|>",
            "pad_token": "<|finetune_right_pad_id|>",
        }
        super().__init__(
            SpecialTokens({name: len(self._ranks) + i for i, name in enumerate(names)}, named),
            vocab_size=len(self._ranks) + NUM_CONTROL_TOKENS,
            max_seq_len=max_seq_len,
            chat_template=folder_template(self._files_folder),
            tool_template=folder_tool_template(self._files_folder),
            extra_stop_ids=generation_eos_ids(self._files_folder),
            origin=file,
        )
        self._special_strings = dict(zip(self.special_tokens.values(), self.special_tokens, strict=True))

    @property
    def _files_folder(self) -> Path:
        # Hugging Face's llama 3 repositories keep Meta's file in original/, and their own tokenizer files above it.
        folder = self.file.parent
        return folder.parent if folder.name == "original" else folder

    @cached_property
    def _whole(self) -> tiktoken.Encoding:
        """Merge a text as one word, without the pattern, which backtracks."""
        return tiktoken.Encoding(
            f"{self.file.name}-whole", pat_str=r"[\s\S]+", mergeable_ranks=self._ranks, special_tokens={}
        )

    @cached_property
    def _backend(self) -> tokenizers.Tokenizer:
        """Build the same tokenizer for the `tokenizers` library; takes seconds, so it is done once, for the first save."""
        backend = tokenizer_from_ranks(self._ranks, SPLIT_PATTERN)
        backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in self.special_tokens])
        put_bos_first(backend, self._named["bos_token"])
        return backend

    def _encode_text(self, text: str, previous: int | None) -> list[int]:
        if len(text) < _MAX_WHITESPACE_RUN or not _LONG_WHITESPACE.search(text):
            return self._encoding.encode_ordinary(text)
        ids: list[int] = []
        for part, is_word in _split_long_whitespace(text):
            ids += (self._whole if is_word else self._encoding).encode_ordinary(part)
        return ids

    def _decode_ids(self, ids: Sequence[int], skip_special: bool) -> str:
        pieces: list[bytes] = []
        for i in ids:
            special = self._special_strings.get(i)
            if special is None:
                pieces.append(self._encoding.decode_single_token_bytes(i))
            elif not skip_special:
                pieces.append(special.encode())
        return b"".join(pieces).decode("utf-8", errors="replace")

    def _save_files(self, folder: Path) -> None:
        """Copy tokenizer.model, and tokenizer.json with its configs if they exist; else make them."""
        copy_files(self._files_folder, folder)
        copy_files(self.file.parent, folder, [self.file.name])
        if not (folder / "tokenizer.json").is_file():
            write_tokenizer(self._backend, folder, named=self._named, chat_template=self.chat_template)


def _split_long_whitespace(text: str) -> Iterator[tuple[str, bool]]:
    """Split the text into parts whose ids, concatenated, are those of the full text; True marks a part that is one word.

    The pattern splits a run of whitespace as follows: newlines right after punctuation belong to that word; otherwise
    everything up to the last newline is a word. Of the rest, all but the last character is a word, and the last character
    belongs to the following word.
    """
    position = 0
    for match in _LONG_WHITESPACE.finditer(text):
        start, end = match.span()
        if start and _is_punctuation(text[start - 1]):
            while start < end and text[start] in "\r\n":
                start += 1
        yield text[position:start], False
        newline = max(text.rfind("\n", start, end), text.rfind("\r", start, end))
        if newline >= 0:
            yield text[start : newline + 1], True
            start = newline + 1
        keep = end if end == len(text) else max(start, end - 1)
        yield text[start:keep], True
        position = keep
    yield text[position:], False


def _is_punctuation(char: str) -> bool:
    return unicodedata.category(char)[0] not in "LN"
