"""A teacher on the student's processes: its forward runs when the batch is requested."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from kdtune.data import Batch
from kdtune.generation import generate
from kdtune.losses import HiddenSignal, PendingSignal
from kdtune.models import OutputHead, Transformer
from kdtune.teachers.streams import beside, side_stream


class OnlineTeacher:
    """Compute a batch's signal by running the teacher on it; the model is frozen and stays in eval mode.

    Args:
        model: the teacher; its parameters stop taking gradients.
        layers: layers whose hidden states the signal has too, see `Transformer.forward`.
        overlaps: compute on a CUDA stream of its own, beside what is queued next, such as the student's forward; the loss waits
            for it. For a model that is not sharded: collective operations have one order. On other devices it has no effect.
    """

    model: Transformer

    def __init__(self, model: Transformer, layers: Sequence[int] = (), *, overlaps: bool = False) -> None:
        self.layers = tuple(layers)
        self.model = model.requires_grad_(False).eval()
        self._stream = side_stream(model.device) if overlaps else None

    @property
    def vocab_size(self) -> int:
        """Number of rows of its output head."""
        return self.model.config.vocab_size

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Do nothing: the teacher computes on the devices that the student needs meanwhile."""

    def __call__(self, batch: Batch) -> HiddenSignal | PendingSignal:
        """Return the teacher's last hidden states [B, S, D] on the batch's inputs, and its output head."""
        if self._stream is None:
            return self._signal(*self._hidden(batch))
        return self._pending(batch, beside(self._stream, lambda: self._hidden(batch)))

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        stop_ids: Collection[int],
        sync_tokens: bool = False,
    ) -> list[int]:
        """Return the greedy ids after a prompt, see `kdtune.generation.generate`."""
        with self._teaching():
            return generate(
                self.model, prompt_ids, max_new_tokens=max_new_tokens, stop_ids=stop_ids, sync_tokens=sync_tokens
            )

    @torch.no_grad()
    def _hidden(self, batch: Batch) -> list[Tensor]:
        """Return the last hidden states, and those of the layers that the signal has too."""
        with self._teaching():
            if not self.layers:
                return [self.model(**batch.teacher_inputs, return_hidden=True)]
            last, states = self.model(**batch.teacher_inputs, return_hidden=True, return_layers=self.layers)
            return [last, *states]

    def _pending(self, batch: Batch, states: Callable[[], list[Tensor]]) -> PendingSignal:
        shape = tuple(batch.teacher_inputs["tokens"].shape)
        return PendingSignal(shape, self.vocab_size, lambda: self._signal(*states()))

    def _signal(self, hidden_BSD: Tensor, *states: Tensor) -> HiddenSignal:
        return HiddenSignal(hidden_BSD, self.head(), states)

    def head(self) -> OutputHead:
        """Return the output head of its signals, on the device of the loss."""
        return self.model.output

    @contextmanager
    def _teaching(self) -> Iterator[None]:
        """A context in which the model computes what the teacher is."""
        # Whoever generates or evaluates with the model may have switched its mode.
        self.model.eval()
        yield
