"""Several teachers: one mixed from all of them, and one for each example by a column of the data."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from kdtune.config import instantiate
from kdtune.data import Batch, Dataset, MapDataset
from kdtune.data.batch import mover
from kdtune.distributed import World
from kdtune.errors import ConfigError, DataError, KDTuneError
from kdtune.losses import Signal
from kdtune.losses.several import MixtureSignal, RoutedSignal, normalized
from kdtune.models import Transformer
from kdtune.teachers.cache.cached import CachedTeacher
from kdtune.teachers.protocol import ConfiguredTeacher, Teacher, TeacherOfStudent
from kdtune.tokenizers import Tokenizer


class _Several:
    """What a run does with several teachers, whatever becomes of their signals; each may be several itself."""

    teachers: tuple[Teacher, ...]

    @property
    def vocab_size(self) -> int:
        """The largest of the teachers' vocabularies; they have the ids from 0 in common."""
        return max(teacher.vocab_size for teacher in self.teachers)

    def problems(self, cfg: Any) -> list[str]:
        """Return those of the teachers, and which of them does not know the probability of each id."""
        found = []
        for teacher in self.teachers:
            if isinstance(teacher, ConfiguredTeacher):
                found += teacher.problems(cfg)
            if isinstance(teacher, CachedTeacher):
                found += _lack_of_ids(teacher)
        if (tp := instantiate(cfg.parallelism).tp) != 1:
            found.append(f"parallelism.tp={tp}: several teachers need whole output heads; tp=1")
        if getattr(instantiate(cfg.kd_loss), "is_cross_tokenizer", False):
            found.append(
                "teacher: several teachers read the student's tokens, and a cross-tokenizer kd_loss is for a teacher with its own; choose "
                "another kd_loss"
            )
        return list(dict.fromkeys(found))

    def fit_data(self, key: str, tokenizer: Tokenizer, dataset: Dataset) -> Dataset:
        """Check the data with each teacher, and return the part that all of them can teach, which must be the same."""
        parts = [
            (one, one.fit_data(key, tokenizer, dataset)) for one in self.teachers if isinstance(one, ConfiguredTeacher)
        ]
        cached = [part for one, part in parts if _has_caches(one)]
        if len({part.fingerprint() for part in cached}) > 1:
            raise ConfigError(
                f"{key}: the teachers' caches are of different parts of it; capture the same part, or all of it"
            )
        return cached[0] if cached else dataset

    def fingerprint(self) -> dict[str, Any]:
        """Return those of the teachers."""
        return {
            str(number): teacher.fingerprint()
            for number, teacher in enumerate(self.teachers)
            if isinstance(teacher, ConfiguredTeacher)
        }

    def start(self, cfg: Any, world: World) -> None:
        """Start each teacher."""
        for teacher in self.teachers:
            if isinstance(teacher, ConfiguredTeacher):
                teacher.start(cfg, world)

    def attach(self, student: Transformer) -> None:
        """Give the student to the teachers that read it."""
        for teacher in self.teachers:
            if isinstance(teacher, TeacherOfStudent):
                teacher.attach(student)

    def meta_signal(self, shape: tuple[int, int]) -> Signal:
        """Raise ConfigError: `kdtune plan` estimates one teacher."""
        raise ConfigError(
            f"plan: the memory of {type(self).__name__}'s teachers is not estimated; plan with one of them (micro-batches of {shape[0]} x "
            f"{shape[1]} tokens)"
        )

    def pop_seconds_waited(self) -> float:
        """Return the seconds that were waited for the files of the teachers since the last call."""
        return sum(one.pop_seconds_waited() for one in self.teachers if isinstance(one, CachedTeacher | _Several))


class Mixture(_Several):
    """The mixture of the distributions of several teachers with the student's tokenizer: log sum_i w_i p_i(v), for every id v.

    For live teachers and cached ones. The divergence's temperature is of the mixture. The validation is against the mixture of the
    teachers of the validation; it measures the cross entropy alone if one of them has none.

    Args:
        teachers: two or more, such as `kdtune.teachers.LiveTeacher` and `kdtune.teachers.CachedTeacher`.
        weights: positive, one for each; they are divided by their sum. None: equal ones.

    Raises:
        ConfigError: there is not one positive weight for each teacher.
    """

    def __init__(self, teachers: Sequence[Teacher], weights: Sequence[float] | None = None) -> None:
        if not teachers:
            raise ConfigError("teachers: the list is empty; give at least one")
        given = [1.0] * len(teachers) if weights is None else weights
        if len(given) != len(teachers):
            raise ConfigError(f"weights: {len(given)} values for {len(teachers)} teachers; give one for each")
        self.teachers, self.weights = tuple(teachers), normalized(given)

    @cached_property
    def held_out(self) -> "Mixture | None":
        """The mixture of the teachers that the validation asks; None if one of them has none."""
        judges = _judges(self.teachers)
        return None if judges is None else self if judges == self.teachers else Mixture(judges, self.weights)

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Announce the batches to each teacher."""
        for teacher in self.teachers:
            teacher.prefetch(batches)

    def __call__(self, batch: Batch) -> MixtureSignal:
        """Return the mixture for the positions of a batch."""
        return MixtureSignal(tuple(teacher(batch) for teacher in self.teachers), self.weights)


class Routed(_Several):
    """One of several teachers for each example, chosen by a column of the data: the dataset's `route_column`.

    For live teachers and cached ones. Each is asked for its own examples of a micro-batch.

    Args:
        teachers: from the column's values, as text, to teachers.
        default: the teacher of other values; None: they are refused.

    Raises:
        ConfigError: there is no teacher.
    """

    def __init__(self, teachers: Mapping[str, Teacher], default: Teacher | None = None) -> None:
        if not teachers:
            raise ConfigError("teachers: is empty; give one for each value of the column")
        self._number_of = {str(value): number for number, value in enumerate(teachers)}
        self._has_default = default is not None
        self.teachers = (*teachers.values(), *([] if default is None else [default]))
        self._announced: deque[_Parts] = deque()

    @cached_property
    def held_out(self) -> "Routed | None":
        """The teachers that the validation asks, routed in the same way; None if one of them has none."""
        judges = _judges(self.teachers)
        if judges is None or judges == self.teachers:
            return None if judges is None else self
        default = judges[-1] if self._has_default else None
        return Routed(dict(zip(self._number_of, judges, strict=False)), default)

    def fit_data(self, key: str, tokenizer: Tokenizer, dataset: Dataset) -> Dataset:
        """Check that there is a teacher for every example, and the data with each teacher."""
        if isinstance(dataset, MapDataset):
            for index in range(dataset.size):
                example = dataset[index]
                for one in example.documents or (example,):
                    self._number(one.route, f"{key}: example {index}")
        return super().fit_data(key, tokenizer, dataset)

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Divide the batches, on the CPU, among the teachers, and announce each its own."""
        parts = [self._divided(batch) for batch in batches]
        self._announced.extend(parts)
        for number, teacher in enumerate(self.teachers):
            teacher.prefetch([part.batches[number] for part in parts])

    def __call__(self, batch: Batch) -> RoutedSignal:
        """Return the signals of the next batch's examples, each of its own teacher."""
        if not self._announced:
            self.prefetch([batch])
        part, device = self._announced.popleft(), batch.tokens.device
        signals = tuple(teacher(own.to(device)) for teacher, own in zip(self.teachers, part.batches, strict=True))
        move = mover(device)
        return RoutedSignal(signals, move(part.teacher_T), move(part.place_T), tuple(batch.tokens.shape))

    def _number(self, route: str | None, where: str) -> int:
        """Return the number of the teacher for a value of the column; `where` names the example."""
        if route is None:
            raise DataError(
                f"{where} has no route; give the data set a route_column, by whose values the teachers are chosen"
            )
        if route not in self._number_of and not self._has_default:
            raise DataError(
                f"{where} has the route {route!r}; the teachers are for {', '.join(map(repr, self._number_of))}: add one, or `default`"
            )
        return self._number_of.get(route, len(self._number_of))

    def _divided(self, batch: Batch) -> "_Parts":
        if batch.own_teacher_inputs is not None or set(batch.inputs) - {"tokens", "documents"}:
            raise ConfigError(
                "teacher: Routed divides batches of tokens alone; choose another dataset, or another teacher"
            )
        routes = batch.routes or [None] * len(batch.lengths)
        numbers = [self._number(route, "an example") for route in routes] if batch.num_tokens else []
        batches = []
        teacher_T, place_T = (torch.zeros(batch.tokens.numel(), dtype=torch.int64) for _ in range(2))
        for number in range(len(self.teachers)):
            rows = [row for row, of_row in enumerate(numbers) if of_row == number]
            own = batch.of_rows(rows)
            for row, start in zip(rows, own.row_starts, strict=False):
                here = slice(batch.row_starts[row], batch.row_starts[row] + batch.lengths[row])
                teacher_T[here], place_T[here] = number, torch.arange(start, start + batch.lengths[row])
            batches.append(own)
        return _Parts(batches, teacher_T, place_T)


@dataclass(frozen=True)
class _Parts:
    """A micro-batch divided among the teachers."""

    batches: list[Batch]
    teacher_T: Tensor
    place_T: Tensor


def _has_caches(teacher: Teacher) -> bool:
    """Return whether it is a cache, or some among several, which have the examples of their capture alone."""
    if isinstance(teacher, _Several):
        return any(map(_has_caches, teacher.teachers))
    return isinstance(teacher, CachedTeacher)


def _judges(teachers: tuple[Teacher, ...]) -> tuple[Teacher, ...] | None:
    """Return the teachers that the validation asks; None if one is missing."""
    judges = tuple(one.held_out if isinstance(one, ConfiguredTeacher) else one for one in teachers)
    return None if None in judges else cast(tuple[Teacher, ...], judges)


def _lack_of_ids(teacher: CachedTeacher) -> list[str]:
    try:
        kind = teacher.cache.header.kind
    except KDTuneError:  # said by the teacher itself
        return []
    if kind == "hidden" or (kind == "topk" and teacher.outside == "renormalize"):
        return []
    return [
        f"teacher: {teacher.path} is of kind={kind}, and several teachers need the probability of each id; allowed are kind=hidden, and "
        'kind=topk with outside="renormalize"'
    ]
