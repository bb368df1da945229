"""A LoRA student's own base as its teacher: no second copy of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

from kdtune.errors import ConfigError
from kdtune.models import OutputHead, Transformer, has_adapters
from kdtune.models.lora import without_adapters
from kdtune.teachers.online import OnlineTeacher


class BaseOfStudent(OnlineTeacher):
    """The teacher is the student without its adapters, whose weights training does not change.

    It draws nothing: a student's dropout is in its adapters. Before the first step its distribution is the student's.
    """

    def __init__(self) -> None:
        # What training does with the student stays: its gradients, its mode, and its stream, on which its weights are gathered.
        self.layers, self._stream = (), None

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
        self.model = student

    def head(self) -> OutputHead:
        """Return the output head of its signals, on the device of the loss."""
        # With FSDP the weight is whole from the forward to the end of the student's backward.
        return OutputHead.of(self.model.output.weight, softcap=self.model.config.logit_softcap)

    @contextmanager
    def _teaching(self) -> Iterator[None]:
        if not hasattr(self, "model"):
            raise RuntimeError("BaseOfStudent: attach the student before the first batch")
        with without_adapters(self.model):
            yield


def _is_of_adapter(name: str) -> bool:
    return ".lora_" in name or name.endswith(".magnitude")
