"""A teacher that was captured: its rows are found by example, checked against the tokens, and read while the student computes.

Shapes: N labelled positions of a micro-batch, B batch, S sequence, T = B * S.
"""

import functools
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdtune import parallel
from kdtune.config import factory, instantiate
from kdtune.data import Batch, Dataset
from kdtune.data.batch import mover
from kdtune.distributed import World
from kdtune.errors import ConfigError, DataError, KDTuneError
from kdtune.losses import PendingSignal, Signal
from kdtune.losses.sparse import Outside
from kdtune.models import OutputHead, Transformer
from kdtune.paths import PathText
from kdtune.teachers.cache.checks import fitted_dataset
from kdtune.teachers.cache.format import Cache
from kdtune.teachers.cache.signals import loss_problem, stored_signal
from kdtune.teachers.protocol import ConfiguredTeacher, Teacher, TeacherOfStudent
from kdtune.tokenizers import Tokenizer

# Micro-batches whose rows are read before they are asked for.
_AHEAD = 4
_MEASURED_AGAINST_A_TEACHER = ("val_kd_loss", "val_forward_kl", "val_agreement")


class CachedTeacher:
    """The teacher whose targets `kdtune run cache_teacher` has captured; its weights are not read, and need not be there.

    Rows are found by the index of an example in its data set and checked by a hash of its tokens, so order, epochs, batches, packs
    and processes may be any; an example that differs stops the run. They are read by a thread of their own, ahead of the steps.
    If part of a data set was captured, the run trains on that part.

    Args:
        path: folder of the cache.
        outside: of kind topk, what becomes of the ids that it does not keep: "tail", one id more that has the probability of all of
            them; "renormalize", none has any; or "ignore": see `kdtune.losses.TopKTargets`.
        validation: teacher of `dataset_val`: the folder of another cache, or a component such as `kdtune.teachers.LiveTeacher`; None:
            the validation measures the cross entropy alone.
    """

    def __init__(
        self, path: PathText, *, outside: Outside = "tail", validation: PathText | Teacher | None = None
    ) -> None:
        self.path, self.outside = path, outside
        self.held_out = CachedTeacher(validation, outside=outside) if isinstance(validation, str) else validation
        self._seconds = 0.0
        self._student_vocab_size: int | None = None
        self._announced: deque[Batch] = deque()
        self._reading: deque[tuple[Batch, Future[_Rows]]] = deque()

    @functools.cached_property
    def cache(self) -> Cache:
        """The opened cache; CheckpointError if it is missing or not complete."""
        return Cache(self.path)

    @property
    def vocab_size(self) -> int:
        """Number of ids of the teacher's head."""
        return self.cache.header.vocab_size

    def problems(self, cfg: Any) -> list[str]:
        """Return why the cache, or that of its validation, cannot serve a distillation config; read no rows."""
        found = self._problems(cfg, "teacher.path")
        if isinstance(self.held_out, CachedTeacher):
            found += self.held_out._problems(cfg, "teacher.validation")
        elif isinstance(self.held_out, ConfiguredTeacher):
            found += self.held_out.problems(cfg)
        if self.held_out is None and getattr(cfg, "best_metric", None) in _MEASURED_AGAINST_A_TEACHER:
            found.append(
                f"best_metric={cfg.best_metric}: is measured against a teacher, and teacher.validation is null; give one, or "
                "best_metric=val_class_loss"
            )
        if self.held_out is not None and cfg.dataset_val is None:
            found.append(
                "teacher.validation: has no effect without dataset_val; give one of held-out examples, or ~teacher.validation"
            )
        return found

    def fit_data(self, key: str, tokenizer: Tokenizer, dataset: Dataset) -> Dataset:
        """Check that the cache is of these examples, and return those that it has; see `fitted_dataset`."""
        return fitted_dataset(self.cache, key, tokenizer, dataset)

    def fingerprint(self) -> dict[str, Any]:
        """Return the header, a hash of all rows, and those of the validation's teacher."""
        own = self.cache.fingerprint()
        return own | (
            {"validation": self.held_out.fingerprint()} if isinstance(self.held_out, ConfiguredTeacher) else {}
        )

    def start(self, cfg: Any, world: World) -> None:
        """Put the teacher's head on the world's device, if hidden states need it, and start the validation's teacher."""
        self._device = world.device
        # The thread ends with the process; it is idle between the steps.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="teacher cache")
        self._head = None
        if self.cache.header.kind == "hidden":
            self._head = OutputHead.of(self.cache.head.to(world.device), softcap=self.cache.header.softcap)
        if isinstance(self.held_out, ConfiguredTeacher):
            self.held_out.start(cfg, world)

    def meta_signal(self, shape: tuple[int, int]) -> Signal:
        """Return the signal of a micro-batch of this `shape` [B, S] on the meta device, all of whose positions have a row."""
        header, num_tokens = self.cache.header, math.prod(shape)
        columns = {
            name: torch.empty(num_tokens, *one.shape, dtype=one.dtype, device="meta")
            for name, one in self.cache.columns.items()
        }
        head = None
        if header.kind == "hidden":
            weight = torch.empty(header.vocab_size, header.dim or 0, dtype=self.cache.head_dtype, device="meta")
            head = OutputHead.of(weight, softcap=header.softcap)
        positions = torch.arange(num_tokens, device="meta")
        return stored_signal(header, positions, columns, shape, head=head, outside=self.outside)

    def attach(self, student: Transformer) -> None:
        """Keep the number of the student's ids, beyond which no stored id may lie."""
        self._student_vocab_size = student.config.vocab_size
        if isinstance(self.held_out, TeacherOfStudent):
            self.held_out.attach(student)

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Begin to read the rows of the batches, on the CPU, that are asked for next, in this order."""
        self._announced.extend(batches)
        self._read_ahead()

    def __call__(self, batch: Batch) -> PendingSignal:
        """Return the signal of the next batch, whose rows the loss waits for.

        Raises:
            RuntimeError: the batch is not the next one that `prefetch` was given.
        """
        if not self._reading:
            self.prefetch([batch])
        shape, (announced, rows) = _shape(batch), self._reading.popleft()
        if (shape, batch.example_ids) != (_shape(announced), announced.example_ids):
            raise RuntimeError(
                f"a batch of {shape} tokens, examples {batch.example_ids}: the one announced next has {_shape(announced)}, examples "
                f"{announced.example_ids}"
            )
        self._read_ahead()
        return PendingSignal(shape, self.vocab_size, functools.cache(functools.partial(self._signal, shape, rows)))

    def pop_seconds_waited(self) -> float:
        """Return the seconds that the loss has waited for rows since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _problems(self, cfg: Any, key: str) -> list[str]:
        try:
            header, kd_loss = self.cache.header, instantiate(cfg.kd_loss)
        except KDTuneError as error:
            return [f"{key}: {error}"]
        found = []
        if problem := loss_problem(header, kd_loss, self.outside):
            found.append(f"{key}={self.path}: {problem}")
        if getattr(cfg, "teacher_targets", None) is not None and header.kind != "hidden":
            found.append(
                f"teacher_targets: what the divergence sees was chosen when {self.path} was captured (kind={header.kind}); "
                "~teacher_targets, or a cache of kind=hidden"
            )
        if self.cache.largest_id is not None and (problem := _id_problem(self.cache.largest_id, _vocab_size(cfg))):
            found.append(f"{key}={self.path}: {problem}")
        if self.outside != "tail" and header.kind != "topk":
            found.append(
                f"teacher.outside={self.outside}: is for a cache of kind=topk, and {self.path} is of kind={header.kind}; ~teacher.outside"
            )
        return found

    def _read_ahead(self) -> None:
        while self._announced and len(self._reading) < _AHEAD:
            batch = self._announced.popleft()
            self._reading.append((batch, self._reader.submit(self._rows, batch)))

    def _signal(self, shape: tuple[int, int], rows: "Future[_Rows]") -> Signal:
        since = time.perf_counter()
        found = rows.result()
        self._seconds += time.perf_counter() - since
        positions, *values = map(mover(self._device), (found.positions_N, *found.columns.values()))
        columns = dict(zip(found.columns, values, strict=True))
        return stored_signal(self.cache.header, positions, columns, shape, head=self._head, outside=self.outside)

    def _rows(self, batch: Batch) -> "_Rows":
        """Read the rows of a micro-batch, in the reader's thread."""
        parts = [self._part(one) for one in _documents(batch, self.path)]
        names = parts[0].columns if parts else {}
        positions = torch.cat([part.positions_N for part in parts]) if parts else torch.zeros(0, dtype=torch.int64)
        columns = {name: torch.cat([part.columns[name] for part in parts]) for name in names} or self._no_columns()
        if (
            "ids" in columns
            and len(positions)
            and (problem := _id_problem(int(columns["ids"].max()), self._student_vocab_size))
        ):
            raise DataError(f"{self.path}: {problem}")
        if self._device.type == "cuda":
            positions, columns = positions.pin_memory(), {name: one.pin_memory() for name, one in columns.items()}
        return _Rows(positions, columns)

    def _part(self, document: "_Document") -> "_Rows":
        row = self.cache.read(document.example_id, document.tokens)
        stored = row.positions.numpy()
        at = np.searchsorted(stored, document.wanted)
        is_stored = at < len(stored)
        is_stored[is_stored] = stored[at[is_stored]] == document.wanted[is_stored]
        if not is_stored.all():
            raise DataError(
                f"{self.path}: example {document.example_id} has a label at position {document.wanted[~is_stored][0]}, and the cache has "
                "nothing there: it was captured for other labels; train on the same parts of the text as in the capture, or capture "
                "with positions=all"
            )
        columns = dict(row.columns)
        if len(at) < len(stored):
            columns = {name: one[torch.from_numpy(at)] for name, one in columns.items()}
        return _Rows(torch.from_numpy(document.wanted + document.start), columns)

    def _no_columns(self) -> dict[str, Tensor]:
        """Return the columns of a micro-batch without labels."""
        return {name: torch.zeros(0, *one.shape, dtype=one.dtype) for name, one in self.cache.columns.items()}


@dataclass(frozen=True)
class _Rows:
    positions_N: Tensor
    """int64 places among the micro-batch's flattened positions."""
    columns: dict[str, Tensor]


@dataclass(frozen=True)
class _Document:
    """An example of a micro-batch."""

    example_id: int
    tokens: npt.NDArray[np.int64]
    start: int
    """Place of its first token among the flattened ones."""
    wanted: npt.NDArray[np.int64]
    """Positions in it whose rows the loss reads, ascending."""


def _id_problem(largest: int, vocab_size: int | None) -> str | None:
    """Return why a teacher's ids, the largest of which is given, do not fit a student's head; None if they do, or it is not known."""
    if vocab_size is None or largest < vocab_size:
        return None
    return (
        f"the teacher's id {largest} is none of the student's {vocab_size} ids; capture kind=hidden, of which the student's ids alone are "
        "compared"
    )


def _vocab_size(cfg: Any) -> int | None:
    """Return the number of ids of a config's student; None if it cannot be read, which is said elsewhere."""
    builder, source = factory(cfg.model), instantiate(cfg.checkpointer)
    try:
        return parallel.model_config(builder, source).vocab_size if builder or source else None
    except KDTuneError:
        return None


def _shape(batch: Batch) -> tuple[int, int]:
    rows, width = batch.teacher_inputs["tokens"].shape
    return rows, width


def _documents(batch: Batch, path: str) -> Iterator[_Document]:
    """Yield the examples of a batch that have labels, in the tokens that the teacher reads."""
    if batch.num_valid_tokens == 0:
        return
    if batch.example_ids is None:
        raise ConfigError(
            f"{path}: the batches do not say which examples they hold, and rows are found by example: they do not for a stream, for "
            "examples cut to fill packs (split_across_pack), nor for packs in a mixture; read the data into memory (streaming=false), "
            "and do not cut examples"
        )
    tokens = batch.teacher_inputs["tokens"]
    lengths = batch.lengths if batch.teacher_lengths is None else batch.teacher_lengths
    starts = [row * tokens.shape[1] for row in range(len(lengths))]
    if "documents" in batch.teacher_inputs:
        starts = list(accumulate(lengths, initial=0))[:-1]
    alignment = batch.targets.alignment
    wanted_N = batch.targets.positions_N if alignment is None else alignment.teacher_text_M3[:, 0]
    flat, wanted = tokens.flatten().cpu().numpy(), np.sort(wanted_N.cpu().numpy())
    for example_id, start, length in zip(batch.example_ids, starts, lengths, strict=True):
        first, last = np.searchsorted(wanted, (start, start + length))
        if first < last:
            yield _Document(example_id, flat[start : start + length], start, wanted[first:last] - start)
