"""torch's optimizers without torch's compiler, which they import when they are made, though nothing is compiled.

torch wraps an optimizer's methods for the case that torch.compile traces them. The wrappers import torch._dynamo on their first
call, and with it sympy, FSDP and 800 modules more: over a second of every start. Uncompiled, the wrapped methods do the same.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer

_METHODS = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
# What `torch._disable_dynamo` calls in place of a method, and keeps there after its first call (torch/_compile.py).
_CALLED = "__dynamo_disable"
# The wrapper that a step has for the compiler (torch/optim/optimizer.py).
_STEP_WRAPPER = "_use_grad_for_differentiable.<locals>._use_grad"


def without_compiler() -> None:
    """Let torch's optimizers run without importing torch._dynamo; nothing is changed if it is imported already.

    Where another version of torch is built differently, its optimizers import it as before. A function of one's own that is
    compiled later, in the same process, and calls one of these methods is compiled through it.
    """
    if "torch._dynamo" in sys.modules:
        return
    for name in _METHODS:
        method = inspect.unwrap(getattr(Optimizer, name))
        vars(method).setdefault(_CALLED, method)
    for kind in _subclasses(Optimizer):
        step: Any = vars(kind).get("step")
        if getattr(getattr(step, "__code__", None), "co_qualname", "") == _STEP_WRAPPER:
            kind.step = _step_without_compiler(step.__wrapped__)  # type: ignore[method-assign]


def _subclasses(kind: type[Optimizer]) -> Iterator[type[Optimizer]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def _step_without_compiler(step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a step as torch does, but for the marks that the compiler reads: gradients only for a differentiable optimizer."""

    @functools.wraps(step)
    def uncompiled(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step(self, *args, **kwargs)

    return uncompiled
