"""The header of a teacher cache: what was captured, of which teacher, text and settings."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import kdtune
from kdtune.errors import CheckpointError, ConfigError
from kdtune.json_files import read_json
from kdtune.teachers.cache.kinds import KINDS, Kind

FORMAT = 1
FILE = "header.json"


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a teacher cache holds. Two captures with equal headers, but for the version, write equal files."""

    kind: Kind
    dtype: str
    """Of the numbers, one of the kind's in `KINDS`."""
    vocab_size: int
    """Number of ids of the teacher's head."""
    dim: int | None = None
    """Width of the hidden states; hidden alone."""
    softcap: float | None = None
    """Soft-cap on the logits; hidden alone."""
    num_ids: int | None = None
    """Ids kept of a position: k of topk, the draws of sampled."""
    temperature: float = 1.0
    """Of the log-probabilities of topk."""
    exponent: float = 1.0
    """Draws are in proportion to p^exponent; sampled alone."""
    seed: int = 0
    """Of the draws; sampled alone."""
    positions: Literal["labels", "all"] = "labels"
    """Positions that are kept of an example: those with a label, or all but the last."""
    first_example: int = 0
    """Index in the data set of the first example that is captured."""
    num_examples: int
    """Number of examples that are captured, one after the other."""
    dataset_size: int
    """Number of examples of the data set."""
    examples_per_shard: int
    tokens_per_batch: int | None = None
    """Tokens of a forward pass of the teacher, on which the numbers depend by rounding; None: not computed by a capture, or by
    batch_size."""
    batch_size: int | None = None
    """Examples of a forward pass, in their order; None: by tokens_per_batch."""
    max_seq_len: int | None = None
    """Longest example that the tokenizer made; None: no limit."""
    teacher: Mapping[str, Any] = field(default_factory=dict)
    """Fingerprint of its weights, and how they were computed: dtype, quantization."""
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    """`kdtune.tokenizers.fingerprint`, chat template included."""
    dataset: str = ""
    """`Dataset.fingerprint`."""
    kdtune_version: str = kdtune.__version__
    format: int = FORMAT

    def __post_init__(self) -> None:
        if found := problems(self):
            raise ConfigError(found[0])

    @property
    def num_shards(self) -> int:
        """Number of shards, the last one maybe with fewer examples."""
        return -(-self.num_examples // self.examples_per_shard)

    def examples_of(self, shard: int) -> range:
        """Return the indices of a shard's examples."""
        start = self.first_example + shard * self.examples_per_shard
        return range(start, min(start + self.examples_per_shard, self.first_example + self.num_examples))

    def shard_of(self, example_id: int) -> int:
        """Return the number of the shard that an example is in, if it is in the range."""
        return (example_id - self.first_example) // self.examples_per_shard

    @property
    def example_ids(self) -> range:
        """Indices of the captured examples."""
        return range(self.first_example, self.first_example + self.num_examples)

    def described(self) -> dict[str, Any]:
        """Return the header as JSON has it."""
        return asdict(self)


def problems(header: Header) -> list[str]:
    """Return what is wrong with a header's values, one sentence each."""
    if header.kind not in KINDS:
        return [f"kind={header.kind}: must be one of {', '.join(KINDS)}"]
    found = []
    if header.dtype not in KINDS[header.kind]:
        found.append(f"dtype={header.dtype}: kind={header.kind} keeps {' or '.join(KINDS[header.kind])}")
    needed: dict[str, int | None] = {
        "vocab_size": header.vocab_size,
        "num_examples": header.num_examples,
        "examples_per_shard": header.examples_per_shard,
    }
    if header.kind == "hidden":
        needed["dim"] = header.dim
    if header.kind in ("topk", "sampled"):
        needed["num_ids"] = header.num_ids
    found += [f"{key}={value}: must be 1 or more" for key, value in needed.items() if value is None or value < 1]
    if header.kind == "topk" and (header.num_ids or 0) > header.vocab_size:
        found.append(f"k={header.num_ids}: the teacher has {header.vocab_size} ids; choose at most so many")
    if not header.temperature > 0:
        found.append(f"temperature={header.temperature}: must be above 0")
    if not 0 < header.exponent <= 1:
        found.append(f"exponent={header.exponent}: must be above 0 and at most 1")
    return found


def read_header(folder: Path) -> Header:
    """Return the header of the cache in a folder.

    Raises:
        CheckpointError: there is none, or it is not one that this version reads; the message says which key.
    """
    file, advice = folder / FILE, "capture it again, or give the folder that kdtune run cache_teacher wrote"
    if not file.is_file():
        raise CheckpointError(f"{folder}: is not a teacher cache: it has no {FILE}; {advice}")
    values = read_json(file, advice=advice)
    if values.get("format") != FORMAT:
        raise CheckpointError(
            f"{file}: format is {values.get('format')!r}; this version of kdtune reads {FORMAT}; {advice}"
        )
    known = {one.name for one in fields(Header)}
    if unknown := sorted(set(values) - known):
        raise CheckpointError(f"{file}: has unknown keys: {', '.join(unknown)}; {advice}")
    try:
        return Header(**values)
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"{file}: {error}; {advice}") from error


def differences(before: Header, now: Header) -> list[str]:
    """Return the keys in which two headers differ, each with both values; the version is not one of them."""
    first, second = before.described(), now.described()
    return [
        f"{key}: {first[key]} in the folder, {second[key]} now"
        for key in first
        if key != "kdtune_version" and first[key] != second[key]
    ]
