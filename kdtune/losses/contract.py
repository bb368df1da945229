"""Check divergences by calling them on a few tokens, and choose the ids they are computed over."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtune.errors import ConfigError

Divergence: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""`f(student_logp_NV, teacher_logp_NV) -> [N]`, fp32 or wider."""

# Many ids: a divergence may look at the teacher's k most likely ones.
_TOKENS, _IDS = 3, 4096

# What a divergence may have beside its call.
_BESIDE = ("value_and_gradient", "terms", "target_problem", "temperature", "name", "for_text")


def check_divergence(kd_loss: Any, key: str = "kd_loss") -> None:
    """Check that a divergence returns one finite value per token with a gradient.

    The divergence (see `divergence_of`) is called on three tokens. A function that returns one number for all of them, or
    whose value for a token depends on the other tokens, would silently scale the loss or its gradient with the batch size.

    Args:
        kd_loss: the component: a divergence, or an object that has one.
        key: config key, for the messages.

    Raises:
        ConfigError: naming the component, what was found and what is allowed.
    """
    try:
        divergence = divergence_of(kd_loss)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    if getattr(divergence, "of_text", False):  # of likelihoods, not of distributions
        return
    if hasattr(divergence, "for_text"):
        for is_own_text, name in ((False, "teacher"), (True, "student")):
            check_divergence(divergence_for(divergence, is_own_text=is_own_text), f"{key}.{name}")
        return
    name = f"{key}: the divergence {_name(divergence)}"
    student, teacher = _few_tokens(), _few_tokens(of_teacher=True)
    try:
        values, gradient = _tried(divergence, student, teacher)
        alone = [_tried(divergence, *(x[i : i + 1] for x in (student, teacher)))[0] for i in range(_TOKENS)]
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    except Exception as error:  # the user's own function
        raise ConfigError(
            f"{name} raised {type(error).__name__}: {error}; it was given the log-probabilities of student and teacher, "
            f"both [{_TOKENS}, {_IDS}]"
        ) from error
    if not (values.isfinite().all() and gradient.isfinite().all()):
        what = "a gradient that is not finite" if values.isfinite().all() else f"the values {values.tolist()}"
        raise ConfigError(f"{name} gives {what} where all probabilities are above 0; allowed are finite numbers")
    if not torch.allclose(torch.cat(alone), values, rtol=1e-3, atol=1e-5):
        raise ConfigError(
            f"{name} gives {torch.cat(alone).tolist()} for tokens that come alone, {values.tolist()} for the same ones "
            "together; allowed is a function in which a token's value depends on its own row alone"
        )


def is_of_text(divergence: Any) -> bool:
    """Return whether it compares the likelihoods of single tokens, `f(student_logp_N, teacher_logp_N) -> [N]`, of one tokenizer."""
    return getattr(divergence, "of_text", False) and not getattr(divergence, "is_cross_tokenizer", False)


def divergence_of(kd_loss: Any) -> Divergence:
    """Return the divergence that a `kd_loss` component stands for: itself, or its attribute `divergence`.

    If the object has state or a formula beside that attribute, they stay with it, see `OfObject`. A class stands for one with
    its default settings, as in ``kd_loss.divergence=kdtune.losses.ReverseKL``.

    Raises:
        ConfigError: it is neither a function of two arguments nor has one, or a class that needs settings.
    """
    if isinstance(kd_loss, type):
        try:
            kd_loss = kd_loss()
        except TypeError as error:
            path = f"{kd_loss.__module__}.{kd_loss.__qualname__}"
            raise ConfigError(
                f"{path} needs settings ({error}); give {{_component_: {path}, setting: value}}"
            ) from error
    own = getattr(kd_loss, "divergence", None)
    if callable(own):
        return OfObject(kd_loss, own) if any(hasattr(kd_loss, name) for name in ("state_dict", *_BESIDE)) else own
    if callable(kd_loss) and _takes_two(kd_loss):
        return kd_loss
    raise ConfigError(
        f"{_name(type(kd_loss))} has no divergence; allowed is a function (student_logp, teacher_logp) -> one value a token, "
        "such as kdtune.losses.ForwardKL, or an object with one as its attribute `divergence`"
    )


def divergence_for(divergence: Divergence, *, is_own_text: bool) -> Divergence:
    """Return the divergence for text that the student has written, or for another's: another one of `kdtune.losses.BySource` alone."""
    choose: Callable[[bool], Divergence] | None = getattr(divergence, "for_text", None)
    return divergence if choose is None else choose(is_own_text)


def part_of(kd_loss: Any, whole: str) -> Divergence:
    """Return the divergence of a component that is part of another, `whole` by name.

    Raises:
        ConfigError: as `divergence_of`; or it depends on who has written the text, which a part is not told.
    """
    divergence = divergence_of(kd_loss)
    if hasattr(divergence, "for_text"):
        raise ConfigError(
            f"{whole}: {_name(divergence)} chooses by who has written the text, and must be the whole kd_loss; a part may be any other"
        )
    return divergence


class OfObject:
    """An object's attribute `divergence`, with what stands beside it: a formula of the gradient, terms, state.

    What the attribute has itself comes first. State is not copied here: it is found at `owner`.
    """

    def __init__(self, owner: Any, divergence: Divergence) -> None:
        self.owner, self.__wrapped__ = owner, divergence
        self.__name__ = type(owner).__name__
        for name in _BESIDE:
            for one in (owner, divergence):
                if hasattr(one, name):
                    setattr(self, name, getattr(one, name))

    def __call__(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
        """Return the divergence of each token, [N]."""
        return self.__wrapped__(student_logp_NV, teacher_logp_NV)


def value_and_gradient(
    divergence: Divergence, student_logp_NV: Tensor, teacher_logp_NV: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the divergence [N], and its partial derivatives [N, V] with respect to student_logp_NV, both detached.

    By the divergence's own method of this name, a formula; without one, by autograd. teacher_logp_NV is a constant.

    Raises:
        ConfigError: it does not return one value per token.
    """
    by_formula = getattr(divergence, "value_and_gradient", None)
    if by_formula is None:
        return gradient_by_autograd(divergence, student_logp_NV, teacher_logp_NV)
    values_N, gradient_NV = by_formula(student_logp_NV, teacher_logp_NV)
    return one_a_token(values_N, len(student_logp_NV), divergence), gradient_NV


def gradient_by_autograd(
    divergence: Divergence, student_logp_NV: Tensor, teacher_logp_NV: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what `value_and_gradient` does, by autograd."""
    with torch.enable_grad():
        student_logp_NV = student_logp_NV.detach().requires_grad_()
        values_N = one_a_token(divergence(student_logp_NV, teacher_logp_NV), len(student_logp_NV), divergence)
        (gradient_NV,) = torch.autograd.grad(values_N, student_logp_NV, torch.ones_like(values_N))
    return values_N.detach(), gradient_NV


def divergence_name(kd_loss: Any) -> str:
    """Display name of a divergence: its `name`, such as "KL" for the forward KL alone, else its class's name."""
    divergence = divergence_of(kd_loss)
    own = getattr(divergence, "name", None)
    if isinstance(own, str):
        return own
    named = kd_loss if hasattr(kd_loss, "__name__") else type(kd_loss)
    return str(named.__name__).removesuffix("Loss") or str(named.__name__)


def _takes_two(function: Any) -> bool:
    """Return whether it can be called with two positional arguments, as far as its signature tells."""
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # no signature, such as a builtin's
        return True
    return True


def one_a_token(values: Any, num_tokens: int, divergence: Divergence) -> Tensor:
    """Validate a divergence's output: one fp32 or fp64 value per token, shape [N].

    Raises:
        ConfigError: it is not one floating-point number, fp32 or wider, for each token.
    """
    if not isinstance(values, Tensor):
        found = f"a {type(values).__name__}"
    elif values.shape != (num_tokens,):
        found = f"a tensor of shape {list(values.shape)}"
    elif values.dtype not in (torch.float32, torch.float64):
        found = f"values in {str(values.dtype).removeprefix('torch.')}"
    else:
        return values
    raise ConfigError(
        f"the divergence {_name(divergence)} gives {found} for {num_tokens} tokens; allowed is one value a token, shape "
        f"[{num_tokens}], in fp32 or wider: sum over the ids alone, by .sum(-1)"
    )


def covers_extra_ids(divergence: Divergence, *, of_teacher: bool = False) -> bool:
    """Return whether value and gradient stay finite if the student gives probability to an id to which the teacher gives none.

    They do for forward KL and, carefully implemented, for Jensen-Shannon; for reverse KL they cannot. of_teacher: if the
    teacher gives some, and the student none, where it is the other way round.
    """
    if is_of_text(divergence):  # no other ids than the text's
        return True
    if hasattr(divergence, "for_text"):
        both = (divergence_for(divergence, is_own_text=is_own_text) for is_own_text in (False, True))
        return all(covers_extra_ids(one, of_teacher=of_teacher) for one in both)
    student, teacher = _few_tokens(), _few_tokens(of_teacher=True)
    (student if of_teacher else teacher)[:, -1] = -torch.inf
    try:
        values, gradient = _tried(divergence, student.log_softmax(-1), teacher.log_softmax(-1))
    except Exception:  # such as a function's own check of its arguments
        return False
    return bool(values.isfinite().all() and gradient.isfinite().all())


def over_student_ids(divergence: Divergence, vocab_size: int, num_shared: int) -> Divergence:
    """Adapt the divergence to a student of `vocab_size` ids, of which the teacher has the first `num_shared`.

    If it would be infinite for the other ids (see `covers_extra_ids`), it compares both distributions over the shared ids
    alone: each is renormalized over them.
    """
    if num_shared == vocab_size or covers_extra_ids(divergence):
        return divergence

    return OnSharedIds(divergence, num_shared)


@dataclass(frozen=True)
class OnSharedIds:
    """A divergence of the two distributions over the first ids alone, renormalized."""

    __wrapped__: Divergence
    num_shared: int

    def __call__(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
        """Return the divergence of each token, [N]."""
        return self.__wrapped__(self._shared(student_logp_NV), teacher_logp_NV[:, : self.num_shared])

    def value_and_gradient(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return values [N] and partial derivatives [N, V]."""
        teacher = teacher_logp_NV[:, : self.num_shared]
        return self.restricted(student_logp_NV, lambda student: value_and_gradient(self.__wrapped__, student, teacher))

    def restricted(
        self, student_logp_NV: Tensor, compare: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Return the values and partial derivatives of a function of the student's distribution over the shared ids."""
        shared = self._shared(student_logp_NV)
        values_N, slope = compare(shared)
        slope = slope - shared.exp() * slope.sum(-1, keepdim=True)
        return values_N, F.pad(slope, (0, student_logp_NV.shape[1] - self.num_shared))

    def _shared(self, student_logp_NV: Tensor) -> Tensor:
        return student_logp_NV[:, : self.num_shared].log_softmax(-1)


def _few_tokens(*, of_teacher: bool = False) -> Tensor:
    """Return log-probabilities, always the same ones: no generator is touched. Each token is more peaked than the one before it."""
    grid = torch.arange(_TOKENS * _IDS, dtype=torch.float32, device="cpu").view(_TOKENS, _IDS)
    logits = (2.5 * grid).cos() if of_teacher else (1.5 * grid).sin()
    return (logits * torch.arange(1, _TOKENS + 1, device="cpu")[:, None]).log_softmax(-1)


def _tried(divergence: Divergence, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return values [N] and gradient [N, V], on the CPU, or computed on the GPU if the function only works there."""
    try:
        return _values_and_gradient(divergence, student, teacher)
    except ConfigError:
        raise
    except Exception:
        if not torch.accelerator.is_available():
            raise
        device = torch.accelerator.current_accelerator()
        values, gradient = _values_and_gradient(divergence, student.to(device), teacher.to(device))
        return values.cpu(), gradient.cpu()


def _values_and_gradient(divergence: Divergence, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.enable_grad():
        student = student.clone().requires_grad_()
        values = one_a_token(divergence(student, teacher.clone()), len(student), divergence)
        if not values.requires_grad:
            raise ConfigError(
                f"the divergence {_name(divergence)} gives values without a gradient to the student; compute them from "
                "student_logp by operations of torch, without detach, item or no_grad"
            )
        (gradient,) = torch.autograd.grad(values.sum(), student, allow_unused=True, materialize_grads=True)
    return values.detach(), gradient


def _name(thing: Any) -> str:
    """Return `module.Class.function`; for an object without a name of its own, its class."""
    thing = inspect.unwrap(thing)
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"
