"""A teacher on another device of the student's process: token ids go there, hidden states come back."""

from collections import deque
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from kdtune.data import Batch
from kdtune.data.batch import mover
from kdtune.losses import PendingSignal
from kdtune.models import OutputHead, Transformer
from kdtune.teachers.online import OnlineTeacher


class OtherDeviceTeacher(OnlineTeacher):
    """Compute signals on the model's device for a loss on another; a copy of the head is kept there, the logits are computed there.

    An accelerator begins a batch when the one before is asked for, so it computes beside the student's forward and backward. A CPU
    computes a batch when the loss reads its signal: the student's forward is queued on its device by then, and runs meanwhile.

    Args:
        model: the teacher; its parameters stop taking gradients.
        layers: layers whose hidden states the signal has too, see `Transformer.forward`.
        device: the loss's.
    """

    def __init__(self, model: Transformer, layers: Sequence[int] = (), *, device: torch.device) -> None:
        super().__init__(model, layers)
        self._move = mover(device)
        self._own_head = OutputHead.of(self._move(model.output.weight.detach()), softcap=model.config.logit_softcap)
        self._announced: deque[Callable[[], list[Tensor]]] = deque()

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Take the batches as the next ones that are asked for: those on the CPU need not be fetched from the student's device."""
        self._announced.extend(cache(partial(self._hidden, batch)) for batch in batches)

    def __call__(self, batch: Batch) -> PendingSignal:
        """Return the signal of the next batch, on the student's device once the loss reads it."""
        if not self._announced:
            self.prefetch([batch])
        hidden = self._announced.popleft()
        if self.model.device.type != "cpu":
            for begin in (hidden, *list(self._announced)[:1]):
                begin()
        return self._pending(batch, lambda: [self._move(states) for states in hidden()])

    def _hidden(self, batch: Batch) -> list[Tensor]:
        return super()._hidden(batch.to(self.model.device))

    def head(self) -> OutputHead:
        """Return the output head of its signals, on the device of the loss."""
        return self._own_head
