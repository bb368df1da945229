"""Time a config's step on this machine in seconds, from its own micro-batches and a few layers of each model.

All layers of a model are alike, so that one and three of them, with random weights, tell the time of all. The loss and the
optimizer run as in training. No weight is read.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdtune.config import factory, instantiate
from kdtune.data import Batch
from kdtune.distributed.allocator import keep_freed_memory
from kdtune.errors import ConfigError
from kdtune.losses import HiddenSignal, KDLoss, divergence_of, is_of_text
from kdtune.models import Transformer, dtype_from_name
from kdtune.models.float8 import apply_float8
from kdtune.models.nf4 import is_nf4, quantize_nf4
from kdtune.models.quantization import quantize
from kdtune.models.transformer import INIT_STD
from kdtune.parallel import apply_activation_checkpointing, apply_compile, meta_model

# Layers of the larger of the two models that are timed; the other has one.
NUM_LAYERS = 3
NUM_BATCHES = 16


@dataclass(frozen=True)
class Calibration:
    """Times of a step on this machine, in seconds, by part, and what they were measured on."""

    teacher: float
    student: float
    """Forward and backward of its layers."""
    loss: float
    optimizer: float
    tokens: float
    """Tokens of a step, without padding."""
    num_batches: int
    """Micro-batches that were timed, the first of the config's data."""
    device: str

    @property
    def step(self) -> float:
        """Seconds of an optimizer step."""
        return self.teacher + self.student + self.loss + self.optimizer

    def text(self) -> str:
        """Return the lines that a plan prints."""
        parts = {name: getattr(self, name) for name in ("teacher", "student", "loss", "optimizer")}
        shares = ", ".join(f"{name} {seconds:.3g}" for name, seconds in parts.items() if seconds)
        return (
            f"Measured here ({self.device}, {self.num_batches} micro-batches of the data): {self.step:.3g} s a step ({shares}), "
            f"{self.tokens:,.0f} tokens a step on average, {self.tokens / self.step:,.0f} tokens a second. Without validation and "
            "checkpoints."
        )


def calibrate(
    cfg: Any,
    steps: Iterator[Sequence[Batch]],
    device: torch.device,
    *,
    budget: float = 20.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Calibration:
    """Time the parts of a step of a training config on its device, in one process.

    Args:
        cfg: config of a recipe that trains.
        steps: the micro-batches of each of its steps.
        device: of this process.
        budget: seconds after which no further micro-batch is timed; at least one is.
        clock: returns seconds, such as `time.process_time` for those of this process's processors.

    Raises:
        ConfigError: the config has a teacher that does not run here: on other processes, or of the user's own.
    """
    check_calibrated(cfg)
    if device.type == "cpu":  # as a run does
        keep_freed_memory()
    student = _model(cfg, device, factory(cfg.model), instantiate(cfg.checkpointer), cfg.dtype, cfg.adapter)
    if cfg.float8_training:
        apply_float8(student, cfg.float8_training)
    if cfg.checkpointed:
        apply_activation_checkpointing(student, cfg.checkpointed)
    teacher = None
    if getattr(cfg, "kd_ratio", 0.0) > 0:
        checkpointer = instantiate(cfg.teacher_checkpointer)
        dtype = cfg.teacher_dtype or cfg.dtype
        teacher = _model(cfg, device, factory(cfg.teacher_model), checkpointer, dtype).requires_grad_(False)
        if cfg.teacher_quantization:
            quantize(teacher, cfg.teacher_quantization)
    divergence = divergence_of(instantiate(cfg.kd_loss)) if teacher is not None else None
    loss = KDLoss(divergence, kd_ratio=getattr(cfg, "kd_ratio", 0.0), **cfg.loss_settings())
    timer = Timer(device, clock)
    began, sums = time.perf_counter(), dict.fromkeys(("teacher", "student", "loss"), 0.0)
    num_tokens = tokens_of_steps = num_steps = count = 0

    def is_enough() -> bool:
        return count >= NUM_BATCHES or (count > 0 and time.perf_counter() - began > budget)

    while not is_enough():
        batches = next(steps)
        num_steps, tokens_of_steps = num_steps + 1, tokens_of_steps + sum(batch.num_tokens for batch in batches)
        for batch in itertools.takewhile(lambda _: not is_enough(), batches):
            for name, seconds in _micro_batch(student, teacher, loss, batch.to(device), timer).items():
                sums[name] += seconds
            num_tokens, count = num_tokens + batch.num_tokens, count + 1
    tokens = tokens_of_steps / num_steps
    return Calibration(
        **{name: seconds * tokens / num_tokens for name, seconds in sums.items()},
        optimizer=_optimizer_seconds(cfg.optimizer, student, timer),
        tokens=tokens,
        num_batches=count,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )


class Timer:
    """Times functions on a device: the faster of two calls, after one that allocates and compiles."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._clock = device, clock

    def seconds(self, function: Callable[[], object]) -> float:
        """Return the seconds of a call, the device waited for."""
        function()
        found = []
        for _ in range(2):
            self._wait()
            start = self._clock()
            function()
            self._wait()
            found.append(self._clock() - start)
        return min(found)

    def of_all_layers(self, run: Callable[[Transformer], object], model: Transformer) -> float:
        """Return the seconds that a function of the model takes with all layers of its config, from one and NUM_LAYERS layers."""
        layers = model.layers
        model.layers = layers[:1]
        one = self.seconds(lambda: run(model))
        model.layers = layers
        several = self.seconds(lambda: run(model))
        return one + (model.config.num_layers - 1) * max(0.0, several - one) / max(1, len(layers) - 1)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def check_calibrated(cfg: Any) -> None:
    """Raise ConfigError if the config has a teacher that is not timed, see `calibrate`."""
    for key, value in (
        ("teacher_processes", getattr(cfg, "teacher_processes", 0)),
        ("teacher", getattr(cfg, "teacher", None)),
    ):
        if value:
            raise ConfigError(
                f"--calibrate: {key} is set, and only a teacher beside the student in one process is timed; ~{key}"
            )
    divergence = divergence_of(instantiate(cfg.kd_loss)) if getattr(cfg, "kd_loss", None) else None
    if getattr(divergence, "is_cross_tokenizer", False) or is_of_text(divergence):
        raise ConfigError(
            "--calibrate: a cross-tokenizer kd_loss, or one of the text's likelihood, is not timed; give kd_loss=kdtune.losses.ForwardKL"
        )


def _model(
    cfg: Any, device: torch.device, builder: Any, checkpointer: Any, dtype: str, adapter: Any = None
) -> Transformer:
    """Return the first layers of a model, and all else of it, with random weights on the device."""
    model = meta_model(builder, checkpointer, adapter=factory(adapter), dtype=dtype_from_name(dtype))
    model.layers = nn.ModuleList(model.layers[:NUM_LAYERS])
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, _random(parameter, device))
    model.tie_weights()
    if cfg.compile:
        apply_compile(model)
    return model


def _random(parameter: Tensor, device: torch.device) -> nn.Parameter:
    values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device).normal_(std=INIT_STD)
    return quantize_nf4(values) if is_nf4(parameter) else nn.Parameter(values, requires_grad=parameter.requires_grad)


def _micro_batch(
    student: Transformer, teacher: Transformer | None, loss: KDLoss, batch: Batch, timer: Timer
) -> dict[str, float]:
    """Return the seconds of the teacher's forward, of the student's forward and backward, and of the loss."""

    def forward(model: Transformer) -> Any:
        with torch.no_grad():
            return model(**batch.inputs, return_hidden=True)

    def train(model: Transformer) -> None:
        hidden = model(**batch.inputs, return_hidden=True)
        hidden.backward(torch.ones_like(hidden))
        model.zero_grad()

    def compare() -> None:
        hidden = answers[0].detach().requires_grad_()
        signal = None if teacher is None else HiddenSignal(answers[1], teacher.output)
        loss(hidden, student.output, signal, batch.targets)[0].backward()
        student.zero_grad()

    answers: Sequence[Tensor] = [forward(model) for model in (student, teacher) if model is not None]
    return {
        "teacher": 0.0 if teacher is None else timer.of_all_layers(forward, teacher),
        "student": timer.of_all_layers(train, student),
        "loss": timer.seconds(compare),
    }


def _optimizer_seconds(node: Any, model: Transformer, timer: Timer) -> float:
    """Return the seconds of a step of the config's optimizer over all layers."""
    optimizers: dict[int, Any] = {}

    def update(part: Transformer) -> None:
        named = [(name, parameter) for name, parameter in part.named_parameters() if parameter.requires_grad]
        for _, parameter in named:
            if parameter.grad is None:
                parameter.grad = torch.ones_like(parameter)
        if len(part.layers) not in optimizers:
            optimizers[len(part.layers)] = instantiate(node, params=named)
        optimizers[len(part.layers)].step()

    return timer.of_all_layers(update, model)
