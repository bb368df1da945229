"""A LoRA student's own base as its teacher: no second copy of the weights."""

from collections.abc import Collection, Sequence

import torch

from kdtune.data import Batch
from kdtune.errors import ConfigError
from kdtune.generation import generate
from kdtune.losses import HiddenSignal
from kdtune.models import OutputHead, Transformer, has_adapters
from kdtune.models.lora import without_adapters


class BaseOfStudent:
    """The teacher is the student without its adapters, whose weights training does not change.

    It draws nothing: a student's dropout is in its adapters. Before the first step its distribution is the student's.
    """

    def __init__(self) -> None:
        self._student: Transformer | None = None

    def attach(self, student: Transformer) -> None:
        """Keep the student, which is sharded and compiled as it is trained.

        Raises:
            ConfigError: it has no adapters, or trains other weights too.
        """
        if not has_adapters(student):
            raise ConfigError(
                "teacher: kdtune.teachers.BaseOfStudent is the student without its adapters, and this student has none; give "
                "`adapter`, such as kdtune.models.apply_lora, or another teacher"
            )
        trained = [name for name, one in student.named_parameters() if one.requires_grad and not _is_of_adapter(name)]
        if trained:
            raise ConfigError(
                f"teacher: kdtune.teachers.BaseOfStudent needs a frozen base, and {trained[0]} is trained; freeze it, or give "
                "another teacher"
            )
        self._student = student

    @property
    def model(self) -> Transformer:
        """The student."""
        if self._student is None:
            raise RuntimeError("BaseOfStudent: attach the student before the first batch")
        return self._student

    @property
    def vocab_size(self) -> int:
        """Number of rows of the student's output head."""
        return self.model.config.vocab_size

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Do nothing: the student's device computes it."""

    @torch.no_grad()
    def __call__(self, batch: Batch) -> HiddenSignal:
        """Return the base's last hidden states [B, S, D] on the batch's inputs, and its output head."""
        with without_adapters(self.model):
            hidden_BSD = self.model(**batch.teacher_inputs, return_hidden=True)
        # With FSDP the weight is whole from here to the end of the student's backward.
        config, weight = self.model.config, self.model.output.weight
        head = OutputHead(config.embed_dim, config.vocab_size, softcap=config.logit_softcap, device="meta")
        head.weight = weight
        return HiddenSignal(hidden_BSD, head)

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        stop_ids: Collection[int],
        sync_tokens: bool = False,
    ) -> list[int]:
        """Return the base's greedy ids after a prompt, see `kdtune.generation.generate`."""
        with without_adapters(self.model):
            return generate(
                self.model, prompt_ids, max_new_tokens=max_new_tokens, stop_ids=stop_ids, sync_tokens=sync_tokens
            )


def _is_of_adapter(name: str) -> bool:
    return ".lora_" in name or name.endswith(".magnitude")
