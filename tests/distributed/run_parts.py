"""Parts that these tests put into runs, named in configs as run_parts.NAME: what fails, stops the run, or says who reads."""

import os
import signal
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kdtune.checkpoint import Checkpointer
from kdtune.models import Transformer, apply_lora, llama

SIZES: dict[str, int] = {"vocab_size": 320, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_dim": 64,
         "max_seq_len": 256}  # fmt: skip


def fail(how: str) -> None:
    """Raises, runs out of memory, hangs, or is ended by the signal of that name."""
    if how == "raise":
        raise ValueError("it went wrong")
    if how == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if how == "hang":
        time.sleep(600)
    os.kill(os.getpid(), getattr(signal, how))


class Failing(torch.optim.SGD):
    """Fails on rank 1 at a step; with `once` only under torchrun, in its first start."""

    def __init__(
        self, params: Iterable[Any], lr: float = 0.1, how: str = "raise", at: int = 3, *, once: bool = False
    ) -> None:
        super().__init__(params, lr=lr)
        self.how, self.at, self.once, self.made = how, at, once, 0

    def step(self, closure: Any = None) -> Any:
        self.made += 1
        is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if self.made == self.at and os.environ["RANK"] == "1" and (is_first or not self.once):
            fail(self.how)
        return super().step(closure)


class RefusingLogger:
    """A second logger that cannot be made, as one without an account."""

    def __init__(self) -> None:
        raise ValueError("it wants a login")


class Stopping(torch.optim.AdamW):
    """Stops the run after the step whose number is in the environment's STOP_AT."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        if int(next(iter(self.state.values()))["step"]) == int(os.environ.get("STOP_AT", "0")):
            signal.raise_signal(signal.SIGTERM)
        return result


class OnRank2(Checkpointer):
    """Weights that only the process of that rank may read."""

    def load(self, *arguments: Any, **settings: Any) -> Transformer:
        assert os.environ["RANK"] == "2", "a process of the student reads the teacher's weights"
        return super().load(*arguments, **settings)


class FailingModel(Transformer):
    """Fails at its twelfth forward."""

    how, made = "raise", 0

    def forward(self, tokens_BS: Tensor, **settings: Any) -> Tensor:
        self.made += 1
        if self.made == 12:
            fail(self.how)
        return super().forward(tokens_BS, **settings)


def failing_teacher(how: str = "raise") -> Transformer:
    model = FailingModel(llama(**SIZES).config)
    model.how = how
    return model


def adapted_teacher() -> Transformer:
    return apply_lora(llama(**SIZES), apply_lora_to_output=True)
