"""Components that the config tests point at: plain Python, no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kdtune.config import MISSING, component

NOT_CALLABLE = 3


@dataclass
class Optimizer:
    params: Any
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    fused: bool = False


@dataclass
class Tokenizer:
    path: str
    max_seq_len: int | None = None


@dataclass
class Dataset:
    tokenizer: Any
    source: str
    split: Literal["train", "test"] = "train"
    column_map: Mapping[str, str] | None = None


class Base:
    def __init__(self, path: str) -> None:
        self.path = path


class Inherits(Base):
    pass


def unannotated(path):  # type: ignore[no-untyped-def]
    return path


def mixed(tokenizer: Any, datasets: Sequence[Any], weights: list[float]) -> tuple[Any, Any, Any]:
    return tokenizer, datasets, weights


def anything(**options: Any) -> dict[str, Any]:
    return options


def at_path(path: Path) -> Path:
    return path


def fails_typing(model: "NameThatDoesNotExist", size: int) -> int:  # type: ignore[name-defined]  # noqa: F821
    return size


def int_of(text: str) -> int:
    return int(text)


@dataclass
class Config:
    """A schema as recipes have it."""

    output_dir: str = MISSING
    """Folder of the run."""
    tokenizer: Any = component()
    """Text to ids."""
    dataset: Any = component("tokenizer")
    optimizer: Any = component(
        "params", default={"_component_": "config_samples.Optimizer", "lr": 0.1, "betas": [0.8, 0.9]}
    )
    lr_scheduler: Any = component("optimizer", optional=("num_training_steps",), default=None)
    kd_ratio: float = 0.5
    """Weight of the divergence,
    between 0 and 1."""
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    clip_grad_norm: float | None = None
    dtype: Literal["fp32", "bf16"] = "bf16"
    log_dir: str = "${output_dir}/logs"
    resume: Path | None = None
    prompts: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        found = [] if 0 <= self.kd_ratio <= 1 else [f"kd_ratio={self.kd_ratio}: must lie between 0 and 1"]
        return found if self.batch_size > 0 else [*found, f"batch_size={self.batch_size}: must be positive"]

    def machine_problems(self) -> list[str]:
        return ["output_dir: no disk"] if self.output_dir == "nowhere" else []
