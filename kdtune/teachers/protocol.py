"""What a teacher is, wherever its distributions come from: its interface, and the keys of one that is a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from kdtune.checkpoint import Checkpointer
from kdtune.config import component, key
from kdtune.data import Batch, Dataset
from kdtune.distributed import World
from kdtune.losses import Signal
from kdtune.models import Transformer
from kdtune.tokenizers import Tokenizer


@runtime_checkable
class Teacher(Protocol):
    """Source of a batch's signal: computed here, on other processes, or read from a file."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, from 0, that its signals give probability to."""

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Announce the batches of the next calls, in this order, so that the teacher may start on them at once."""

    def __call__(self, batch: Batch) -> Signal:
        """Return the signal for the positions of a batch; a constant: no gradient reaches the teacher."""


@runtime_checkable
class TeacherOfStudent(Protocol):
    """A teacher that computes with the student's weights: `attach` is called once, after the student is built."""

    def attach(self, student: Transformer) -> None:
        """Keep the student."""


@runtime_checkable
class ConfiguredTeacher(Protocol):
    """A teacher for the key `teacher` that a run checks and makes ready; its constructor reads nothing.

    `problems` is called when the config is read, `fit_data` when the data is, and `start` before the first batch.
    """

    @property
    def held_out(self) -> Teacher | None:
        """The teacher that the validation asks; None: it measures the cross entropy alone."""

    def problems(self, cfg: Any) -> list[str]:
        """Return why it cannot serve a distillation config, one sentence each; read no weights and no rows."""

    def fit_data(self, key: str, tokenizer: Tokenizer, dataset: Dataset) -> Dataset:
        """Check the run's tokenizer and its dataset of a config key, and return the part that it can teach.

        Raises:
            ConfigError, DataError: it cannot teach it.
        """

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies it: a resumed run must have an equal one."""

    def start(self, cfg: Any, world: World) -> None:
        """Read what it needs to answer on the world's device; all processes call it."""


@dataclass(kw_only=True)
class TeacherConfig:
    """Keys of a recipe with a teacher that is a model; a recipe's own `Config` inherits them."""

    teacher_checkpointer: Any = component(default=None, returns=Checkpointer)
    """The teacher's weights, with `adapter_dir` a finetuned adapter merged in; null: random, with a builder in `teacher_model`."""
    teacher_model: Any = component(default=None, returns=Transformer)
    """The teacher's builder; null: built from the checkpoint's own config."""
    teacher_dtype: Literal["fp32", "bf16"] | None = None
    """Teacher weight dtype; null: same as dtype."""
    teacher_quantization: str | None = None
    """Quantize the linears of the teacher's layers as they are read: int8, nf4 or another scheme of `kdtune ls quantize`; null: no."""
    teacher_device: str | None = key(None, may_change=True)
    """Device of the teacher's weights and forward, such as cuda:1 or cpu; hidden states come from there; null: as device."""
    teacher_offload: bool = key(False, may_change=True)
    """Keep the teacher's layers in the CPU's memory, and copy each to the device when its turn comes; CUDA only."""
    teacher_overlap: bool = key(False, may_change=True)
    """Compute the teacher on a CUDA stream of its own, beside the student's forward, at the price of the memory of both at once."""
    teacher_parallelism: Any = component(default=None, may_change=True)
    """Parallelism of the teacher, such as dp_shard 1 and dp_replicate -1 for a full copy on each; null: as parallelism."""
