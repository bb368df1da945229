"""A teacher that is asked for every batch: beside the student, or on processes of its own."""

from collections.abc import Iterable
from typing import Any

import torch

from kdtune.data import Batch
from kdtune.losses import HiddenSignal
from kdtune.models import Transformer
from kdtune.teachers.remote import RemoteModel


class OnlineTeacher:
    """Gives a batch's signal by running the teacher on it; the model is frozen and stays in eval mode.

    Args:
        model: the teacher, or what this process sees of one on other processes; its parameters stop taking gradients.
    """

    def __init__(self, model: Transformer | RemoteModel) -> None:
        self.model: Any = model.requires_grad_(False).eval()

    def expect(self, batches: Iterable[Batch]) -> None:
        """Says what it will be asked for next, in this order: on processes of its own it starts at once."""
        if isinstance(self.model, RemoteModel):
            self.model.request(batch.tokens for batch in batches)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> HiddenSignal:
        """The teacher's last hidden states [B, S, D] on the batch's tokens, and its output head."""
        # Whoever generates or evaluates with the model may have switched its mode.
        self.model.eval()
        return HiddenSignal(self.model(**batch.inputs, return_hidden=True), self.model.output)
