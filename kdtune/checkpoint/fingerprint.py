"""Fingerprints of files: detect changed weights without reading all of a large model."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from kdtune.errors import CheckpointError

# Files of this size together are read whole. Of more, each is read in blocks: those at its ends, where its names and shapes are,
# and one in every so many bytes, so that a large tensor has a block of its own.
WHOLE_BYTES = 2**28
BLOCK_BYTES = 2**16
STRIDE_BYTES = 2**22
_CHUNK_BYTES = 2**20


def file_fingerprints(files: Sequence[Path]) -> list[str]:
    """Return size and SHA-256 (the first 64 bits) of each file; of a large file, only blocks spread over it are hashed.

    Blocks detect another model, another finetune of it and another quantization. They may miss a few numbers changed by
    hand in a model of more than WHOLE_BYTES.

    Raises:
        CheckpointError: a file cannot be read.
    """
    try:
        sizes = [file.stat().st_size for file in files]
        return [
            _fingerprint(file, size, whole=sum(sizes) <= WHOLE_BYTES) for file, size in zip(files, sizes, strict=True)
        ]
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _fingerprint(path: Path, size: int, *, whole: bool) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        if whole or size <= STRIDE_BYTES:
            while chunk := file.read(_CHUNK_BYTES):
                found.update(chunk)
        else:
            found.update(file.read(_CHUNK_BYTES))
            for start in (*range(STRIDE_BYTES, size, STRIDE_BYTES), size - BLOCK_BYTES):
                file.seek(start)
                found.update(file.read(BLOCK_BYTES))
    return f"{size:,} bytes, {found.hexdigest()[:16]}"
