"""A teacher that is a model, as a component: for the validation of a run with cached targets, and among several teachers."""

from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any, Literal, Self

import torch

from kdtune import parallel
from kdtune.checkpoint import Checkpointer
from kdtune.config import Factory, instantiate
from kdtune.data import Batch, Dataset
from kdtune.distributed import World, parallelism_problems
from kdtune.errors import ConfigError, DataError, KDTuneError
from kdtune.losses import HiddenSignal, PendingSignal, Signal, check_head
from kdtune.models import dtype_from_name
from kdtune.teachers.compatibility import check_tokenizer
from kdtune.teachers.online import OnlineTeacher
from kdtune.tokenizers import Tokenizer


class LiveTeacher:
    """A frozen model on the student's devices, with the run's parallelism; the same as the keys teacher_checkpointer, teacher_model ...

    Args:
        checkpointer: its weights; None: random, with a builder in `model`.
        model: its builder; None: built from the checkpoint's own config.
        dtype: of its weights; None: the run's.
        quantization: scheme of the linears of its layers, see `kdtune ls quantize`; None: none.

    Raises:
        ConfigError: neither weights nor a builder are given.
    """

    def __init__(
        self,
        checkpointer: Checkpointer | None = None,
        model: Factory | None = None,
        dtype: Literal["fp32", "bf16"] | None = None,
        quantization: str | None = None,
    ) -> None:
        if checkpointer is None and model is None:
            raise ConfigError("LiveTeacher: has neither checkpointer nor model; give one of them")
        self._checkpointer, self._builder = checkpointer, model
        self._dtype, self._quantization = dtype, quantization

    @property
    def held_out(self) -> Self:
        """The teacher itself."""
        return self

    @property
    def vocab_size(self) -> int:
        """Number of rows of its output head."""
        return self._teacher.vocab_size

    def problems(self, cfg: Any) -> list[str]:
        """Return what keeps the model from being built; read no weights."""
        if self._checkpointer is not None and (found := self._checkpointer.problems()):
            return [f"teacher: {problem}" for problem in found]
        try:
            parallel.model_config(self._builder, self._checkpointer)
        except KDTuneError as error:
            return [f"teacher: {error}"]
        if parallelism_problems(instantiate(cfg.parallelism), instantiate(cfg.teacher_parallelism)):
            return []  # said of the run
        as_keys = SimpleNamespace(
            dtype=cfg.dtype,
            compile=getattr(cfg, "compile", False),
            parallelism=cfg.parallelism,
            teacher_parallelism=cfg.teacher_parallelism,
            teacher_model=self._builder,
            teacher_checkpointer=self._checkpointer,
            teacher_dtype=self._dtype,
            teacher_quantization=self._quantization,
        )
        found = parallel.problems(as_keys, _device(cfg.device))
        return [f"teacher: {problem.replace('teacher_quantization=', 'quantization=', 1)}" for problem in found]

    def fit_data(self, key: str, tokenizer: Tokenizer, dataset: Dataset) -> Dataset:
        """Check that the tokenizer is the model's, and that no example is longer than its context; return the dataset."""
        if tokenizer.pair is None:
            check_tokenizer(tokenizer, self._checkpointer, "teacher.checkpointer", is_chat=dataset.is_chat)
        lengths = dataset.lengths if dataset.teacher_lengths is None else dataset.teacher_lengths
        context = parallel.model_config(self._builder, self._checkpointer).max_seq_len
        longest = max(lengths or [0])
        if longest > context:
            raise DataError(
                f"{key}: an example has {longest} tokens, and the context of the teacher has {context}; set "
                f"tokenizer.max_seq_len={context}"
            )
        return dataset

    def fingerprint(self) -> dict[str, Any]:
        """Return that of its weights, and how it computes."""
        weights = {} if self._checkpointer is None else {"weights": self._checkpointer.fingerprint()}
        return {**weights, "dtype": self._dtype, "quantization": self._quantization}

    def start(self, cfg: Any, world: World) -> None:
        """Build the model over the world, with the keys dtype, parallelism, teacher_parallelism and compile of `cfg`."""
        model = parallel.build_model(
            self._builder,
            self._checkpointer,
            dtype=dtype_from_name(self._dtype or cfg.dtype),
            world=world,
            parallelism=instantiate(cfg.teacher_parallelism or cfg.parallelism),
            trainable=False,
            quantization=self._quantization,
            compile=getattr(cfg, "compile", False),
        )
        check_head("teacher", model.output)
        self._teacher = OnlineTeacher(model)

    def meta_signal(self, shape: tuple[int, int]) -> Signal:
        """Raise ConfigError: `kdtune plan` estimates a teacher of the keys teacher_checkpointer and teacher_model alone."""
        raise ConfigError(
            "plan: the memory of kdtune.teachers.LiveTeacher is not estimated; plan with its model under teacher_checkpointer or "
            f"teacher_model, and without teacher (micro-batches of {shape[0]} x {shape[1]} tokens)"
        )

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Do nothing: the model computes on the devices that the student needs meanwhile."""

    def __call__(self, batch: Batch) -> HiddenSignal | PendingSignal:
        """Return the model's last hidden states on the batch, and its output head."""
        return self._teacher(batch)

    def generate(
        self, prompt_ids: Sequence[int], *, max_new_tokens: int, stop_ids: Collection[int], sync_tokens: bool = False
    ) -> list[int]:
        """Return the greedy ids after a prompt, see `kdtune.generation.generate`."""
        return self._teacher.generate(
            prompt_ids, max_new_tokens=max_new_tokens, stop_ids=stop_ids, sync_tokens=sync_tokens
        )


def _device(name: str | None) -> torch.device | None:
    """Return the device of a config's `device`, the best one there is for None; None if there is none such, which is said of the run."""
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = best if name is None else torch.device(name)
    except RuntimeError:
        return None
    is_there = device.type in ("cpu", best.type) and (device.index or 0) < max(1, torch.accelerator.device_count())
    return device if is_there else None
