"""A teacher that runs beside the student."""

import torch

from kdtune.data import Batch
from kdtune.losses import HiddenSignal
from kdtune.models import Transformer


class OnlineTeacher:
    """Gives a batch's signal by running the teacher on it; the model is frozen and stays in eval mode.

    Args:
        model: the teacher; its parameters stop taking gradients.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> HiddenSignal:
        """The teacher's last hidden states [B, S, D] on the batch's tokens, and its output head."""
        # Whoever generates or evaluates with the model may have switched its mode.
        self.model.eval()
        return HiddenSignal(self.model(batch.tokens, return_hidden=True), self.model.output)
