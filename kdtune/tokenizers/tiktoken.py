"""Llama 3's tokenizer: byte-pair ranks in tiktoken's text format, followed by 256 special tokens; run by the `tokenizers` library."""

import base64
import binascii
from pathlib import Path

from tokenizers import AddedToken

from kdtune.errors import CheckpointError
from kdtune.tokenizers.bpe import tokenizer_from_ranks
from kdtune.tokenizers.folder import copy_files
from kdtune.tokenizers.huggingface import HuggingFaceTokenizer, put_bos_first, write_tokenizer

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


class TiktokenTokenizer(HuggingFaceTokenizer):
    """Llama 3's tokenizer from its tokenizer.model; loading takes seconds, in which the merges are found from the ranks."""

    def __init__(self, file: Path, *, max_seq_len: int | None = None) -> None:
        self.file = file
        # Hugging Face's llama 3 repositories keep Meta's file in original/, and their own tokenizer files above it.
        folder = file.parent.parent if file.parent.name == "original" else file.parent
        backend = tokenizer_from_ranks(read_ranks(file), SPLIT_PATTERN)
        backend.add_special_tokens([AddedToken(name, normalized=False) for name in control_token_names()])
        put_bos_first(backend, "<|begin_of_text|>")
        super().__init__(
            backend,
            named={
                "bos_token": "<|begin_of_text|>",
                "eos_token": "<|end_of_text|>",
                "pad_token": "<|finetune_right_pad_id|>",
            },
            folder=folder,
            max_seq_len=max_seq_len,
            origin=file,
        )

    def _save_files(self, folder: Path) -> None:
        """Copy tokenizer.model, and tokenizer.json with its configs if they exist; else make them."""
        assert self.folder is not None
        copy_files(self.folder, folder)
        copy_files(self.file.parent, folder, [self.file.name])
        if not (folder / "tokenizer.json").is_file():
            write_tokenizer(self._backend, folder, named=self._named, chat_template=self.chat_template)
