"""Earlier rollouts, of which a step may learn again. Shapes: N rollouts, T tokens of all, A answer tokens of all."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kdtune.errors import ConfigError
from kdtune.rollouts.record import Rollout

_NUMBERS = ("prompt_length", "is_finished", "step", "key")
_OF_TOKENS = ("log_probs", "teacher_log_probs")


class Buffer:
    """The newest rollouts, at most `capacity`; the same ones, in the same order, on all processes.

    Args:
        capacity: number of sequences; 0: none are kept.
        max_staleness: largest number of optimizer steps between writing and learning; None: any.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(self, capacity: int, max_staleness: int | None = None) -> None:
        if capacity < 0 or (max_staleness is not None and max_staleness < 0):
            raise ConfigError(
                f"buffer_size={capacity}, max_staleness={max_staleness}: must be 0 or more (max_staleness=null: no limit)"
            )
        self.capacity, self.max_staleness = capacity, max_staleness
        self.rollouts: list[Rollout] = []

    @property
    def is_full(self) -> bool:
        """Return whether the next rollout would displace one."""
        return len(self.rollouts) >= self.capacity

    def push(self, rollouts: Sequence[Rollout]) -> None:
        """Add rollouts; the oldest beyond the capacity are dropped."""
        kept = [*self.rollouts, *rollouts]
        self.rollouts = kept[max(len(kept) - self.capacity, 0) :]

    def drop_stale(self, step: int) -> None:
        """Drop those that are too old to be learned from at an optimizer step."""
        if self.max_staleness is not None:
            self.rollouts = [one for one in self.rollouts if step - one.step <= self.max_staleness]

    def draw(self, count: int, seed: int) -> list[Rollout]:
        """Return `count` rollouts, or all if there are fewer: uniform, without replacement, depending on the seed and the buffer alone."""
        chosen = np.random.default_rng(seed).permutation(len(self.rollouts))[:count]
        return [self.rollouts[index] for index in chosen]

    def state_dict(self) -> dict[str, Any]:
        """Return all of it: tensors, and values that JSON has."""
        ours = self.rollouts
        if not ours:
            return {}
        numbers = torch.tensor([[int(getattr(one, name)) for name in _NUMBERS] for one in ours])
        found: dict[str, Any] = {
            "numbers": numbers,
            "lengths": torch.tensor([len(one.tokens) for one in ours]),
            "tokens": torch.from_numpy(np.concatenate([one.tokens for one in ours]).astype(np.int32)),
            "sources": [one.source for one in ours],
            "routes": [one.route for one in ours],
        }
        for name in _OF_TOKENS:
            values = [value for one in ours if (value := getattr(one, name)) is not None]
            if len(values) == len(ours):
                found[name] = torch.from_numpy(np.concatenate(values))
        targets = [one.target for one in ours if one.target is not None]
        if len(targets) == len(ours):
            found["targets"] = torch.cat(targets)
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore it."""
        self.rollouts = []
        if not state_dict:
            return
        texts = state_dict["tokens"].split(state_dict["lengths"].tolist())
        for text, numbers, source, route in zip(
            texts, state_dict["numbers"].tolist(), state_dict["sources"], state_dict["routes"], strict=True
        ):
            values = dict(zip(_NUMBERS, numbers, strict=True)) | {"is_finished": bool(numbers[1])}
            self.rollouts.append(Rollout(text.numpy().astype(np.int64), source=source, route=route, **values))
        sizes = [one.answer_length for one in self.rollouts]
        for name in (name for name in _OF_TOKENS if name in state_dict):
            found = zip(self.rollouts, state_dict[name].split(sizes), strict=True)
            self.rollouts = [replace(one, **{name: part.numpy()}) for one, part in found]
        if "targets" in state_dict:
            found = state_dict["targets"].split(sizes)
            self.rollouts = [replace(one, target=part.clone()) for one, part in zip(self.rollouts, found, strict=True)]
