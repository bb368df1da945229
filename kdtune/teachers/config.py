"""The keys of a teacher that is a model."""

from dataclasses import dataclass
from typing import Any, Literal

from kdtune.checkpoint import Checkpointer
from kdtune.config import component
from kdtune.models import Transformer


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
    teacher_parallelism: Any = component(default=None, may_change=True)
    """Parallelism of the teacher, such as dp_shard 1 and dp_replicate -1 for a full copy on each; null: as parallelism."""
