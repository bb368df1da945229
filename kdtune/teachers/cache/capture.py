"""Fill a teacher cache: run the teacher once over a part of a data set, shard by shard.

The batches of a shard are made within it, by lengths alone: a shard's bytes do not depend on which process computes it, nor on
whether the capture was stopped before. Shapes: T tokens of a batch, N positions that are kept, D width of the hidden states.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdtune import parallel
from kdtune.config import factory, instantiate
from kdtune.constants import IGNORE_INDEX
from kdtune.data import Example, MapDataset
from kdtune.data.micro_batches import cut_by_tokens
from kdtune.distributed import World, lockstep_forwards, parallel_map, raise_on_all_ranks
from kdtune.errors import CheckpointError, DataError
from kdtune.log import get_logger
from kdtune.losses import check_head
from kdtune.models import Transformer, dtype_from_name
from kdtune.paths import user_path
from kdtune.runs.progress import Progress
from kdtune.teachers.cache.encode import encode, head_weight, uniforms
from kdtune.teachers.cache.format import begin, lock_folder, write_head, write_shard
from kdtune.teachers.cache.header import Header
from kdtune.teachers.cache.kinds import KINDS, Kind, size_text
from kdtune.teachers.cache.shard import Row
from kdtune.tokenizers import Tokenizer, fingerprint

log = get_logger(__name__)


@dataclass(frozen=True)
class Source:
    """The examples that a teacher reads, and how they are laid out in batches.

    dataset: in memory, not packed. pad_id: the tokenizer's. tokens_per_batch: largest batch, in tokens; a longer example is one.
    batch_size: examples of a batch, in their order, whatever tokens_per_batch is; None: by tokens_per_batch.
    """

    dataset: MapDataset
    pad_id: int
    tokens_per_batch: int
    batch_size: int | None = None

    def batches(self, example_ids: Sequence[int]) -> list[list[Example]]:
        """Return the examples, numbered as in their dataset: in batches of similar lengths, the longest first, or in their order."""
        examples = [self.dataset.numbered(index) for index in example_ids]
        if self.batch_size is not None:
            return [examples[at : at + self.batch_size] for at in range(0, len(examples), self.batch_size)]
        is_padded = self.dataset.has_own_batches
        parts = cut_by_tokens([len(one.tokens) for one in examples], self.tokens_per_batch, is_padded=is_padded)
        return [[examples[index] for index in part] for part in parts]


def capture_headers(cfg: Any, tokenizer: Tokenizer, dataset: MapDataset) -> list[Header]:
    """Return the header of a config's capture, and then those of all other kinds and dtypes.

    No weights are read, but for the hashes of their files.

    Args:
        cfg: the recipe's, with the keys of `TeacherConfig` too.
        tokenizer: of the run.
        dataset: whose examples are captured.

    Raises:
        ConfigError: a value is out of range, or the teacher's head cannot be used.
        DataError: first_example is beyond the data set.
    """
    builder, source = factory(cfg.teacher_model), instantiate(cfg.teacher_checkpointer)
    computed_in = cfg.teacher_dtype or cfg.dtype
    head = parallel.meta_model(builder, source, dtype=dtype_from_name(computed_in)).output
    check_head("teacher", head)
    vocab_size, dim = head_weight(head).shape
    weights = source.fingerprint() if source else {"random weights": {"seed": cfg.seed, **cfg.teacher_model}}
    if source is None:
        log.warning("the teacher has random weights, drawn with seed=%d: a cache of noise, to try things out", cfg.seed)
    teacher = {**weights, "dtype": computed_in, "quantization": cfg.teacher_quantization}
    chosen = (cfg.kind, cfg.stored_dtype or KINDS[cfg.kind][0])
    others = [(kind, dtype) for kind, dtypes in KINDS.items() for dtype in dtypes if (kind, dtype) != chosen]
    return headers_of(
        cfg, tokenizer, dataset, [chosen, *others], teacher=teacher, vocab_size=vocab_size, dim=dim,
        softcap=getattr(head, "softcap", None), tokens_per_batch=None if cfg.batch_size else cfg.tokens_per_batch,
        batch_size=cfg.batch_size,
    )  # fmt: skip


def headers_of(
    cfg: Any,
    tokenizer: Tokenizer,
    dataset: MapDataset,
    kinds: Sequence[tuple[Kind, str]],
    *,
    teacher: dict[str, Any],
    vocab_size: int,
    dim: int | None = None,
    softcap: float | None = None,
    tokens_per_batch: int | None = None,
    batch_size: int | None = None,
) -> list[Header]:
    """Return the headers of kinds, each with its dtype, for a teacher that is computed here or elsewhere.

    cfg, tokenizer, dataset, and what is raised: as of `capture_headers`. teacher: what it is known by. vocab_size, dim, softcap: of
    its head. tokens_per_batch, batch_size: of a capture.
    """
    left = dataset.size - cfg.first_example
    if left < 1:
        raise DataError(f"first_example={cfg.first_example}: the data set has {dataset.size} examples, counted from 0")
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "positions": cfg.positions,
        "first_example": cfg.first_example,
        "num_examples": min(left, cfg.max_examples or left),
        "dataset_size": dataset.size,
        "examples_per_shard": cfg.examples_per_shard,
        "tokens_per_batch": tokens_per_batch,
        "batch_size": batch_size,
        "max_seq_len": tokenizer.max_seq_len,
        "teacher": json.loads(json.dumps(teacher)),  # as it comes back from the file
        "tokenizer": fingerprint(tokenizer),
        "dataset": dataset.fingerprint(),
    }
    # A kind that is only compared with the chosen one must not be what is wrong.
    k = cfg.k if cfg.kind == "topk" else min(cfg.k, vocab_size)
    of_kind: dict[Kind, dict[str, Any]] = {
        "hidden": {"dim": dim, "softcap": softcap},
        "topk": {"num_ids": k, "temperature": cfg.temperature},
        "sampled": {"num_ids": cfg.num_draws, "exponent": cfg.exponent, "seed": cfg.seed},
        "path": {},
    }
    return [Header(kind=kind, dtype=dtype, **of_kind[kind], **common) for kind, dtype in kinds]


def start_capture(folder: str | Path, header: Header, num_bytes: int, world: World) -> list[int]:
    """Begin or resume a capture in a folder, and lock it; return the numbers of the shards that are missing, on every process.

    Args:
        folder: of the cache.
        header: of it.
        num_bytes: of all its shards and the head, see `cache_bytes`.
        world: the processes.

    Raises:
        ConfigError: the folder holds another capture, or a process is writing there.
        CheckpointError: it holds something else, or cannot be written, or its disk has no room for what is missing.
    """
    missing: list[int] = []
    with raise_on_all_ranks():
        if world.is_main:
            _check_space(user_path(folder), num_bytes)
            missing = begin(lock_folder(folder), header)
    return world.broadcast(missing)


def _check_space(folder: Path, num_bytes: int) -> None:
    needed = num_bytes - sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    disk = next(path for path in (folder, *folder.parents) if path.exists())
    if (free := shutil.disk_usage(disk).free) < needed:
        raise CheckpointError(
            f"{folder}: not enough space: {size_text(needed)} to write, {size_text(free)} free; free some, choose another output_dir, or "
            "capture less of the data (max_examples) or of each position (dry_run=true compares the kinds)"
        )


def capture_shards(
    model: Transformer,
    source: Source,
    folder: str | Path,
    header: Header,
    missing: Sequence[int],
    world: World,
    *,
    progress: Progress,
    stop: Callable[[], None],
) -> None:
    """Write the missing shards, each process whole ones, and the head; all processes call this.

    Args:
        model: the teacher, in eval mode; it may be sharded.
        source: the examples.
        folder: begun, on a disk that all processes share.
        header: of the cache.
        missing: numbers of the shards.
        world: the processes.
        progress: shows shards, and batches of one.
        stop: called before each batch; raises to end the capture. What is written stays, and need not be written again.

    Raises:
        CheckpointError: the teacher's states are not numbers, or the disk cannot be written.
    """

    def work(number: int) -> None:
        rows: list[Row] = []
        for examples in progress.counted(source.batches(header.examples_of(number)), "batches"):
            stop()
            rows += teacher_rows(model, header, source, examples)
        write_shard(folder, header, number, sorted(rows, key=lambda row: row.example_id))

    done = header.num_shards - len(missing)
    progress.start(header.num_shards, done, doing="capturing", unit="shard")

    def count(shards: Sequence[int]) -> None:
        nonlocal done
        done += len(shards)
        progress.step(done, [f"example {header.examples_of(shards[-1])[-1] + 1:,}"])

    with torch.no_grad():
        with lockstep_forwards(model, world):
            if header.kind == "hidden" and world.is_main:
                write_head(folder, head_weight(model.output))
        parallel_map(work, missing, model, world, on_done=count)
    progress.end_steps()


def teacher_rows(model: Transformer, header: Header, source: Source, examples: Sequence[Example]) -> list[Row]:
    """Run the teacher on a batch of examples and return what the cache keeps of each."""
    hidden_ND, labels_N, kept = teacher_states(model, header.positions, source, examples)
    values = encode(header, hidden_ND, model.output, labels_N, draws_of(header, examples, kept))
    return split_rows(examples, kept, values)


def draws_of(
    header: Header, examples: Sequence[Example], kept: Sequence[npt.NDArray[np.int64]]
) -> npt.NDArray[np.float64] | None:
    """Return the random numbers [N, K] of a batch's draws, see `uniforms`; None for other kinds. `kept`: positions of each example."""
    if header.kind != "sampled":
        return None
    return np.concatenate([uniforms(header, number(one), len(own)) for one, own in zip(examples, kept, strict=True)])


def split_rows(
    examples: Sequence[Example], kept: Sequence[npt.NDArray[np.int64]], values: dict[str, Tensor]
) -> list[Row]:
    """Return the rows of examples from their columns, end to end; `kept`: the positions of each."""
    counts = [len(own) for own in kept]
    parts = {name: one.split(counts) for name, one in values.items()}
    return [
        Row(
            number(example),
            example.tokens,
            torch.from_numpy(own.astype(np.int32)),
            {name: part[index] for name, part in parts.items()},
        )
        for index, (example, own) in enumerate(zip(examples, kept, strict=True))
    ]


def teacher_states(
    model: Transformer, positions: Literal["labels", "all"], source: Source, examples: Sequence[Example]
) -> tuple[Tensor, Tensor, list[npt.NDArray[np.int64]]]:
    """Return the hidden states [N, D] of the kept positions of a batch, the next tokens [N] there, and the positions of each example.

    Raises:
        CheckpointError: a state is not a number.
    """
    batch = source.dataset.collate(examples, source.pad_id).without_padding().to(model.device)
    hidden_TD = model(**batch.inputs, return_hidden=True).flatten(0, 1)
    kept = [kept_positions(example, positions) for example in examples]
    index_N = np.concatenate([start + own for start, own in zip(batch.row_starts, kept, strict=True)])
    labels_N = np.concatenate([example.tokens[own + 1] for example, own in zip(examples, kept, strict=True)])
    index, labels = (torch.from_numpy(one).to(model.device) for one in (index_N, labels_N))
    hidden_ND = hidden_TD[index]
    if not bool(hidden_ND.isfinite().all()):
        first = int((~hidden_ND.isfinite().all(-1)).nonzero()[0, 0])
        owner = examples[int(np.searchsorted(np.cumsum([len(own) for own in kept]), first, side="right"))]
        raise CheckpointError(
            f"example {number(owner)}: the teacher's hidden states are not numbers: its weights are damaged, or it overflows in "
            "this dtype; check it with `kdtune run generate`, or try teacher_dtype=fp32"
        )
    return hidden_ND, labels, kept


def kept_positions(example: Example, positions: Literal["labels", "all"]) -> npt.NDArray[np.int64]:
    """Return the positions of an example that a cache keeps, ascending: those with a label, or all that have a next token."""
    if positions == "all":
        return np.arange(max(0, len(example.tokens) - 1))
    return np.flatnonzero(example.labels[:-1] != IGNORE_INDEX)


def number(example: Example) -> int:
    """Return the index of an example in its dataset."""
    assert example.index is not None  # `Source` numbers them
    return example.index
