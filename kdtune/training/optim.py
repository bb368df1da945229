"""Optimizers: configs name any class that takes `params`; those defined here need to know the role of each weight.

The recipe calls `config.instantiate(cfg.optimizer, params=trainable_parameters(model))`. The parameters come with their
names, which torch's optimizers accept and by which Muon distinguishes hidden weights from the embedding and head.
"""

import inspect
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from kdtune.config import instantiate
from kdtune.errors import ConfigError, KDTuneError
from kdtune.training.uncompiled import without_compiler

# Modules whose 2-D weight has one row a token: orthogonalizing its update makes no sense, so AdamW takes it.
TOKEN_MODULES = frozenset({"tok_embeddings", "output"})

# Errors of libraries about arguments, besides TypeError and ValueError, which `instantiate` explains.
_REFUSALS = (RuntimeError, AssertionError, ArithmeticError, LookupError, AttributeError)

NamedParameters = Iterable[tuple[str, nn.Parameter]]


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return (name, parameter) of what takes a gradient, a tied weight once; ConfigError if all is frozen."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise ConfigError(
            "model: 0 trainable parameters, at least one must have requires_grad=True; a quantized folder is for use: "
            "train on the one it was made from, or unfreeze some parameters"
        )
    return named


def optimizer_problems(optimizer: Any, scheduler: Any, num_steps: int | None = None, *, walk: int = 2) -> list[str]:
    """Return problems with the nodes `optimizer` and `lr_scheduler`, found by building both for two small parameters.

    num_steps: training steps; None: unknown. walk: number of steps to try the schedule for.
    """
    without_compiler()
    matrix, vector = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    try:
        made = instantiate(optimizer, params=[("layers.0.attn.wq.weight", matrix), ("norm.weight", vector)])
    except KDTuneError as error:
        return [f"optimizer: {error}"]
    except _REFUSALS as error:
        return [f"optimizer: {optimizer['_component_']} refuses its arguments: {error}"]
    if not isinstance(made, torch.optim.Optimizer):
        return [f"optimizer: {optimizer['_component_']} gives a {type(made).__name__}; must be a torch.optim.Optimizer"]
    if isinstance(made, torch.optim.SparseAdam):
        return [
            "optimizer: torch.optim.SparseAdam takes sparse gradients, a model has dense ones; use torch.optim.AdamW"
        ]
    if type(made).__module__.startswith("torchao.") and not _has_compiler():
        return [
            f"optimizer: {optimizer['_component_']} compiles its step, and no C++ compiler is found (CXX, g++ or clang++); install "
            "one, or set the environment variable TORCHDYNAMO_DISABLE=1 to run the step uncompiled"
        ]
    if needed := _step_arguments(made):
        return [
            f"optimizer: the step of {optimizer['_component_']} needs {needed}, and the recipe steps without; use one whose step "
            "needs nothing, such as torch.optim.AdamW"
        ]
    try:
        schedule = instantiate(scheduler, optimizer=made, optional={"num_training_steps": num_steps or 10**9})
    except KDTuneError as error:
        return [str(error) if str(error).startswith("lr_scheduler") else f"lr_scheduler: {error}"]
    except _REFUSALS as error:
        return [f"lr_scheduler: {scheduler['_component_']} refuses its arguments: {type(error).__name__}: {error}"]
    return [] if schedule is None else _schedule_problems(schedule, made, scheduler["_component_"], num_steps, walk)


def _has_compiler() -> bool:
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return True
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++"))


def check_schedule(cfg: Any, num_steps: int) -> None:
    """Raise ConfigError if the config's `lr_scheduler` cannot run for this many steps; up to 100,000 of them are tried.

    It may refuse the number (such as a warm-up that is longer), or give a learning rate that is negative or not finite.
    """
    problems = optimizer_problems(cfg.optimizer, cfg.lr_scheduler, num_steps, walk=min(num_steps, 100_000))
    if problems:
        raise ConfigError("\n".join(problems))


def _schedule_problems(
    schedule: Any, made: torch.optim.Optimizer, name: str, num_steps: int | None, walk: int
) -> list[str]:
    if not callable(getattr(schedule, "step", None)):
        return [f"lr_scheduler: {name} gives a {type(schedule).__name__}; must be an LRScheduler"]
    if needed := _step_arguments(schedule):
        return [
            f"lr_scheduler: the step of {name} needs {needed}, and the recipe steps without; use one that "
            "goes by the number of steps, such as kdtune.training.get_cosine_schedule_with_warmup"
        ]
    # OneCycleLR's own length, beyond which it raises.
    total = getattr(schedule, "total_steps", None)
    if num_steps is not None and isinstance(total, int) and total < num_steps:
        return [f"lr_scheduler.total_steps={total}: fewer than the {num_steps} training steps; set it to {num_steps}"]
    for step in range(walk):
        lr = float(made.param_groups[0]["lr"])
        if not (math.isfinite(lr) and lr >= 0):
            return [
                f"lr_scheduler: {name} makes the learning rate of step {step + 1} {lr:g}; must be 0 or more, and finite"
            ]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of schedules that step before the optimizer does
                schedule.step()
        except (*_REFUSALS, TypeError, ValueError, KDTuneError) as error:
            return [f"lr_scheduler: {name} fails after step {step + 1}: {type(error).__name__}: {error}"]
    return []


def _step_arguments(stepped: Any) -> str:
    """Return the required arguments of an object's `step`."""
    function = getattr(type(stepped), "step", None)
    parameters = list(inspect.signature(inspect.unwrap(function)).parameters.values())[1:] if function else []
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return ", ".join(p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind in kinds)


def adamw(
    params: NamedParameters,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    fused: bool | None = None,
) -> torch.optim.AdamW:
    """Build a `torch.optim.AdamW` that decays only matrices: norms and biases (fewer than two dimensions) keep their size.

    `torch.optim.AdamW` itself, named in a config, decays every parameter, as torchtune's configs do. params: named
    parameters, as returned by `trainable_parameters`. lr, betas, eps, weight_decay and fused: as torch.optim.AdamW's.
    """
    return torch.optim.AdamW(decay_groups(params, weight_decay), lr=lr, betas=tuple(betas), eps=eps, fused=fused)  # type: ignore[arg-type]


def decay_groups(params: NamedParameters, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups: matrices with `weight_decay`, those of fewer than two dimensions with none; no empty group."""
    named = list(params)
    groups = [
        {"params": [(name, p) for name, p in named if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [(name, p) for name, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def is_muon_weight(name: str, parameter: torch.Tensor) -> bool:
    """Return whether Muon should train it: a 2-D weight that is neither the token embedding nor the output head."""
    return parameter.ndim == 2 and TOKEN_MODULES.isdisjoint(name.split("."))


class Muon(torch.optim.Optimizer):
    """Muon for the 2-D hidden weights and AdamW for the rest (embedding, head, norms, biases), as one optimizer.

    Muon (Keller Jordan, 2024) replaces the momentum of a matrix by approximately the nearest orthogonal matrix, found by
    Newton-Schulz steps; it is `torch.optim.Muon`. By default its update is scaled to AdamW's root mean square,
    0.2 * sqrt(max(rows, columns)) (Liu et al. 2025, arXiv 2502.16982), so that one `lr`, of AdamW's usual size, serves
    both halves.

    The halves share this object's `param_groups` and `state`: schedules and checkpoints see one ordinary optimizer.

    Args:
        params: (name, parameter) pairs, as `trainable_parameters` gives them.
        lr: learning rate of both halves.
        weight_decay: decoupled decay, on matrices only (norms and biases have none).
        momentum: Muon's momentum.
        nesterov: use Nesterov momentum in Muon.
        ns_steps: Newton-Schulz steps.
        adjust_lr_fn: how Muon scales its update: "match_rms_adamw", or "original" (sqrt(max(1, rows / columns))).
        adamw_lr: learning rate of the AdamW half; None: `lr`.
        betas: AdamW's moving-average factors.
        eps: AdamW's epsilon.
    """

    def __init__(
        self,
        params: NamedParameters,
        lr: float = 3e-4,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        adamw_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        named = list(params)
        if not all(isinstance(item, tuple) for item in named):
            raise ConfigError(
                "optimizer: kdtune.training.Muon got parameters without names; it needs (name, parameter) pairs to "
                "tell hidden weights from embeddings; pass trainable_parameters(model)"
            )
        hidden = [(name, p) for name, p in named if is_muon_weight(name, p)]
        rest = [(name, p) for name, p in named if not is_muon_weight(name, p)]
        if not hidden:
            raise ConfigError(
                "optimizer: kdtune.training.Muon found 0 hidden 2-D weights among the "
                f"{len(named)} trainable parameters; at least one is needed; use torch.optim.AdamW"
            )
        halves: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                hidden,
                lr=lr,
                weight_decay=weight_decay,
                momentum=momentum,
                nesterov=nesterov,
                ns_steps=ns_steps,
                adjust_lr_fn=adjust_lr_fn,
            )
        ]
        if rest:
            groups = decay_groups(rest, weight_decay)
            rest_lr = lr if adamw_lr is None else adamw_lr
            halves.append(torch.optim.AdamW(groups, lr=rest_lr, betas=tuple(betas), eps=eps))  # type: ignore[arg-type]
        self._halves = halves
        self._rest_options: dict[str, Any] = {
            "lr": lr if adamw_lr is None else adamw_lr,
            "betas": tuple(betas),
            "eps": eps,
        }
        self._group_counts = [len(half.param_groups) for half in halves]
        super().__init__([group for half in halves for group in half.param_groups], defaults={})
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group that AdamW trains."""
        if "_group_counts" not in vars(self) or len(self.param_groups) < sum(self._group_counts):
            return super().add_param_group(param_group)  # from torch's own constructor
        if len(self._halves) == 1:
            self._halves.append(torch.optim.AdamW([param_group], **self._rest_options))
            self._group_counts.append(0)
        else:
            self._halves[-1].add_param_group(param_group)
        self.param_groups.append(self._halves[-1].param_groups[-1])
        self._group_counts[-1] += 1
        self._share()

    def _share(self) -> None:
        """Make both halves work on this object's own state and group dicts, so that there is a single source of truth."""
        start = 0
        for half, count in zip(self._halves, self._group_counts, strict=True):
            half.state = self.state
            half.param_groups = self.param_groups[start : start + count]
            start += count

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()  # loading a state dict puts new dicts in place of the old

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {
            "_halves": self._halves,
            "_group_counts": self._group_counts,
            "_rest_options": self._rest_options,
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return the closure's result."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for half in self._halves:
            half.step()
        return loss
