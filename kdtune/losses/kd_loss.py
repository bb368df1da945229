"""Cross entropy and distillation from hidden states. Shapes: B batch, S sequence, N valid tokens, V vocabulary, D embedding."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from kdtune.errors import ConfigError
from kdtune.losses.contract import Divergence, OnSharedIds, divergence_for, divergence_of, is_of_text, over_student_ids
from kdtune.losses.divergences.kl import ForwardKL
from kdtune.losses.heads import Projection, project
from kdtune.losses.signal import HiddenSignal, PendingSignal, SampledSignal, Signal, TextSignal
from kdtune.losses.sparse import TeacherTargets, check_targets, misses_extra_ids
from kdtune.losses.targets import Targets, check_positions, check_target_ids

if TYPE_CHECKING:
    from kdtune.losses.comparison import Compare


@runtime_checkable
class StatefulLoss(Protocol):
    """A divergence, or an added term, with state that a resumed run must have again, such as `kdtune.losses.TAID`.

    It may have a method ``after_step(step, num_steps, kd_loss) -> Mapping[str, float]`` too, which is called after each step of
    the optimizer: step is the number of steps made, num_steps that of the full training, and kd_loss the step's divergence
    per token over all processes, the same on each. It returns values for the step's row of metrics.jsonl.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the state: tensors, and values that JSON has."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> object:
        """Restore that state."""


class KDLoss:
    """Cross entropy and distillation from hidden states, summed over valid tokens: (1 - kd_ratio) * ce + kd_ratio * kd.

    Neither model's [B, S, V] logits ever exist (see `kdtune.losses.fused_linear`). Divide by the number of valid tokens
    of the whole optimizer step, over micro-batches and ranks, before backward.

    Args:
        kd_loss: the divergence, such as `kdtune.losses.ForwardKL(temperature=2.0)`, or any
            ``f(student_logp_NV, teacher_logp_NV) -> [N]``; an object with such a function as its attribute `divergence` too.
            None: forward KL.
        kd_ratio: weight of the divergence, 0 to 1. At 0 the teacher is not computed and may be missing.
        chunk_size: tokens projected at a time; None: as many as fit a fixed number of bytes.
        teacher_targets: what the divergence sees of a teacher's whole distribution, such as `kdtune.losses.TopKTargets`; None: all
            of it.
        hidden_loss: a term on hidden states, such as `kdtune.losses.HiddenStateLoss`, which adds its weight times its sum; None: none.
        logits_dtype: None: logits as exact as fp32 has them. torch.bfloat16, for a bf16 model: logits and their gradient are
            rounded to bf16, which costs the loss's gradient some precision (docs/losses.md) and saves products where fp32 results
            take more than one.
        compile: compile softmax, divergence and gradient, with torch.compile; without a compiler they run as they are.
    """

    def __init__(
        self,
        kd_loss: Callable[..., Tensor] | None = None,
        *,
        kd_ratio: float = 0.5,
        chunk_size: int | None = None,
        teacher_targets: TeacherTargets | None = None,
        hidden_loss: Any = None,
        logits_dtype: torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        if not 0.0 <= kd_ratio <= 1.0:
            raise ConfigError(
                f"kd_ratio is outside its range: {kd_ratio}; allowed is 0 (cross entropy only) to 1 (distillation only)"
            )
        if chunk_size is not None and chunk_size < 1:
            raise ConfigError(
                f"chunk_size is not a number of tokens: {chunk_size}; allowed is 1 or more; null chooses it by memory"
            )
        self.divergence = ForwardKL() if kd_loss is None else divergence_of(kd_loss)
        self.kd_ratio = kd_ratio
        self.chunk_size = chunk_size
        self.teacher_targets = teacher_targets
        self.module = hidden_loss
        if logits_dtype not in (None, torch.bfloat16):
            raise ConfigError(f"logits_dtype={logits_dtype}: must be torch.bfloat16, or None for fp32")
        self.logits_dtype = logits_dtype
        self.compile = compile
        self._compiled: dict[str, Compare] = {}  # by device type
        check_targets(self.divergence, teacher_targets)
        self._over: dict[tuple[int, int, bool, bool], Divergence] = {}

    def __call__(
        self, hidden: Any, output: nn.Module, signal: Signal | None, targets: Targets | Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its parts, detached sums over the same tokens: "class_loss" and, with a teacher, the others.

        These are "kd_loss", the divergence; "agreement", the number of tokens to which both models give the same most
        likely id; and, where the student's head has ids that the teacher's has not, "student_mass_outside", the
        probability that the student gives to them. Watched targets (`Targets.watched_M`) add those of `watched_parts`. The
        student's softmax is over all of its ids, with a teacher as without one; see
        `kdtune.losses.covers_extra_ids` for what the divergence is taken over. The targets' weights multiply the loss of each
        token and its two losses among the parts; its class weights the cross entropy alone. Softmax
        and sums are in fp32 (float64 for float64 hidden states).

        Args:
            hidden: the student's last hidden states [B, S, D], after the final norm; with a hidden_loss a pair of these and
                those of its layers.
            output: the student's output head.
            signal: the teacher's, for the same positions; None with kd_ratio 0.
            targets: the batch's; or its labels [B, S], at the price of a wait for an accelerator.

        Raises:
            ConfigError: a head cannot be fused with the loss, or the teacher is missing.
            DataError: a label is not an id of both vocabularies.
            TrainingError: hidden states, signal and targets are not of the same positions.
        """
        if isinstance(targets, Tensor):
            targets = Targets.from_labels(targets)
        if isinstance(signal, PendingSignal):
            signal = signal.result()
        hidden_BSD, states = (hidden, ()) if isinstance(hidden, Tensor) else hidden
        student = project("student", hidden_BSD, output)
        check_positions("student hidden states", hidden_BSD.shape[:-1], targets.shape)
        if targets.alignment is not None:
            from kdtune.losses.alignment import aligned_loss  # only a cross-tokenizer run needs it

            if self.logits_dtype is None:
                self._compare(hidden_BSD)  # says once that it is not compiled
            return aligned_loss(self, student, signal, targets, targets.alignment)
        if self.kd_ratio > 0 and is_of_text(self.divergence):
            from kdtune.losses.sampled import text_loss  # few losses are

            total, parts = text_loss(self, student, signal, targets)
        else:
            total, parts = self._fused(student, signal, targets, self._compare(hidden_BSD))
        if self.module is not None:
            if not isinstance(signal, HiddenSignal) or not signal.layers:
                raise ConfigError("hidden_loss: the teacher's signal has no hidden states of layers; ~hidden_loss")
            term = self.module(states, signal.layers, targets.positions_N, targets.weights_N)
            total, parts["hidden_loss"] = total + self.module.weight * term, term.detach()
        return total, parts

    @property
    def needs_teacher(self) -> bool:
        """Return whether a step needs the teacher's signal."""
        return self.kd_ratio > 0 or self.module is not None

    @property
    def forward_options(self) -> dict[str, Any]:
        """Arguments of the student's forward for what the loss reads, beside `return_hidden`."""
        return {} if self.module is None else {"return_layers": self.module.student_layers}

    def parameters(self) -> list[nn.Parameter]:
        """Return its own trained parameters: the maps of its term on hidden states."""
        return [] if self.module is None else list(self.module.parameters())

    def _fused(
        self, student: Projection, signal: Signal | None, targets: Targets, compare_: "Compare"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return cross entropy and divergence of distributions, and their parts."""
        from kdtune.losses.fused_linear import Task, fused_linear_kd

        teacher = self._teacher(student, signal, targets)
        num_shared = student.vocab_size if teacher is None else min(student.vocab_size, teacher.vocab_size)
        check_target_ids(targets.id_range, num_shared)
        task = Task(
            positions_N=targets.positions_N,
            labels_N=targets.labels_N,
            teacher=teacher,
            divergence=self._divergence_over(student.vocab_size, num_shared, signal, targets.is_own_text),
            kd_ratio=self.kd_ratio,
            chunk_size=self.chunk_size,
            weights_N=targets.weights_N,
            class_weights_N=targets.class_weights_N,
            teacher_targets=self.teacher_targets,
            logits_dtype=self.logits_dtype,
            with_log_ratio=targets.watched_M is not None,
            compare_=compare_,
        )
        sums = fused_linear_kd(student, task)
        parts = {
            "class_loss": sums.ce,
            "kd_loss": sums.kd,
            "agreement": sums.agreement,
            "student_mass_outside": sums.outside,
        }
        if targets.watched_M is not None and teacher is not None and sums.log_ratio is not None:
            from kdtune.losses.watched import watched_parts  # only text of a model is watched

            parts |= watched_parts(student, teacher, targets, sums.log_ratio)
        return sums.total, {name: part for name, part in parts.items() if part is not None}

    def _compare(self, hidden_BSD: Tensor) -> "Compare":
        """Return what compares a block of logits, compiled if that is asked for and there are values to compute."""
        from kdtune.losses.comparison import compare_, compiled

        if self.logits_dtype is not None and hidden_BSD.dtype != self.logits_dtype:
            raise ConfigError(
                f"logits_dtype={self.logits_dtype}: the student's hidden states are {hidden_BSD.dtype}; it is for models in bf16"
            )
        if not self.compile or isinstance(hidden_BSD, FakeTensor):
            return compare_
        device_type = hidden_BSD.device.type
        if device_type not in self._compiled:
            problem = None
            # The numbers of a divergence are constants of compiled code.
            if any(True for _ in _parts_with_state("kd_loss", self.divergence)):
                problem = "its divergence changes with the steps"
            elif getattr(self.divergence, "is_cross_tokenizer", False):
                problem = "a cross-tokenizer loss sorts its rows one by one"
            self._compiled[device_type] = compiled(device_type, problem)
        return self._compiled[device_type]

    def with_kd_ratio(self, kd_ratio: float) -> "KDLoss":
        """Return the same loss with another weight of the divergence."""
        other = copy.copy(self)
        other.kd_ratio = kd_ratio
        return other

    def state_dict(self) -> dict[str, Any]:
        """Return the state of its parts (`StatefulLoss`), by part and name; empty for most losses."""
        return {f"{part}.{name}": value for part, one in self._stateful() for name, value in one.state_dict().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for part, one in self._stateful():
            names = {name: name.removeprefix(f"{part}.") for name in state_dict if name.startswith(f"{part}.")}
            one.load_state_dict({short: state_dict[name] for name, short in names.items()})

    def after_step(self, step: int, num_steps: int, kd_loss: float) -> dict[str, float]:
        """Tell its parts that a step was made, see `StatefulLoss`; return their values for the step's metrics."""
        found: dict[str, float] = {}
        for _, one in self._stateful():
            if callable(tell := getattr(one, "after_step", None)):
                found |= tell(step, num_steps, kd_loss)
        return found

    def _stateful(self) -> Iterator[tuple[str, StatefulLoss]]:
        yield from _parts_with_state("kd_loss", self.divergence)
        if self.module is not None:
            yield "hidden_loss", self.module

    def _teacher(self, student: Projection, signal: Signal | None, targets: Targets) -> Projection | Signal | None:
        """Return the input for the teacher's rows in the fused loss; None with kd_ratio 0."""
        if self.kd_ratio == 0:
            return None
        if signal is None:
            raise ConfigError(f"a teacher is missing: kd_ratio is {self.kd_ratio}; without a teacher it must be 0")
        if not isinstance(signal, HiddenSignal | Signal):
            raise ConfigError(
                f"the teacher gives a {type(signal).__name__}; allowed is an object with shape, vocab_size and log_probs(positions), "
                "such as kdtune.losses.DenseSignal"
            )
        check_positions("the teacher's log-probabilities", signal.shape, targets.shape)
        if not isinstance(signal, HiddenSignal):
            return signal
        with torch.no_grad():
            teacher = project("teacher", signal.hidden_BSD, signal.output)
        if teacher.shards and not student.shards:
            raise ConfigError(
                "the teacher's head is cut by the vocabulary, the student's is not; allowed are both, or the student's "
                "alone: give both models the same tp"
            )
        return teacher

    def _divergence_over(
        self, vocab_size: int, num_shared: int, signal: Signal | None, is_own_text: bool
    ) -> Divergence:
        """Return `over_student_ids`, cached; of draws, over the shared ids if an estimate from them would lack the others."""
        is_drawn = getattr(self.teacher_targets, "kind", None) == "sampled" or isinstance(signal, SampledSignal)
        key = (vocab_size, num_shared, is_drawn, is_own_text)
        if key not in self._over:
            divergence = divergence_for(self.divergence, is_own_text=is_own_text)
            self._over[key] = over_student_ids(divergence, vocab_size, num_shared)
            if is_drawn and num_shared < vocab_size and misses_extra_ids(divergence):
                self._over[key] = OnSharedIds(divergence, num_shared)
        return self._over[key]


def _parts_with_state(name: str, divergence: Any) -> Iterator[tuple[str, StatefulLoss]]:
    """Yield the divergence, or those that a sum, a mixture or a restriction to shared ids is made of, if they have state."""
    if isinstance(divergence, StatefulLoss):
        yield name, divergence
    inner = getattr(divergence, "parts", None) or [
        getattr(divergence, key, None) for key in ("divergence_from", "__wrapped__", "exact", "owner")
    ]
    for index, one in enumerate(inner):
        if one is not None:
            yield from _parts_with_state(f"{name}.{index}", one)


@torch.no_grad()
def signal_cross_entropy(signal: Signal, targets: Targets, chunk_size: int | None = None) -> Tensor | None:
    """Return the cross entropy of a teacher with the labels, summed over valid tokens, over all of its own ids.

    None if the signal does not know the probability of every id, nor those of the text.

    Args:
        signal: the teacher's.
        targets: of the batch.
        chunk_size: tokens whose logits exist at a time; None: as `KDLoss` chooses it.
    """
    from kdtune.losses.token_log_probs import signal_token_log_probs

    if isinstance(signal, HiddenSignal):
        return KDLoss(kd_ratio=0.0, chunk_size=chunk_size)(signal.hidden_BSD, signal.output, None, targets)[0]
    if not isinstance(signal, TextSignal) and not isinstance(signal.log_probs(targets.positions_N[:1]), Tensor):
        return None
    return -signal_token_log_probs(signal, targets.positions_N, targets.labels_N, chunk_size).sum()
