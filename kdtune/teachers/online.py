"""A teacher on the student's processes: its forward runs when the batch is requested."""

from collections.abc import Collection, Sequence

import torch

from kdtune.data import Batch
from kdtune.generation import generate
from kdtune.losses import HiddenSignal
from kdtune.models import Transformer


class OnlineTeacher:
    """Compute a batch's signal by running the teacher on it; the model is frozen and stays in eval mode.

    Args:
        model: the teacher; its parameters stop taking gradients.
        layers: layers whose hidden states the signal has too, see `Transformer.forward`.
    """

    def __init__(self, model: Transformer, layers: Sequence[int] = ()) -> None:
        self.layers = tuple(layers)
        self.model = model.requires_grad_(False).eval()

    @property
    def vocab_size(self) -> int:
        """Number of rows of its output head."""
        return self.model.config.vocab_size

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Do nothing: the teacher computes on the devices that the student needs meanwhile."""

    @torch.no_grad()
    def __call__(self, batch: Batch) -> HiddenSignal:
        """Return the teacher's last hidden states [B, S, D] on the batch's inputs, and its output head."""
        # Whoever generates or evaluates with the model may have switched its mode.
        self.model.eval()
        if self.layers:
            hidden_BSD, states = self.model(**batch.teacher_inputs, return_hidden=True, return_layers=self.layers)
            return HiddenSignal(hidden_BSD, self.model.output, tuple(states))
        return HiddenSignal(self.model(**batch.teacher_inputs, return_hidden=True), self.model.output)

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        stop_ids: Collection[int],
        sync_tokens: bool = False,
    ) -> list[int]:
        """Return the greedy ids after a prompt, see `kdtune.generation.generate`."""
        return generate(
            self.model, prompt_ids, max_new_tokens=max_new_tokens, stop_ids=stop_ids, sync_tokens=sync_tokens
        )
