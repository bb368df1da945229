"""Random seeds and deterministic kernels."""

import os
import random

import numpy as np
import torch

from kdtune.errors import ConfigError

_MODES = ("default", "warn", "error")


def set_seed(seed: int, deterministic_mode: str | int | None = None) -> None:
    """Seed Python, numpy and torch (all devices).

    `deterministic_mode` is torchtune's `cudnn_deterministic_mode`: None leaves torch as it is; "default" (0) switches
    determinism off; "warn" (1) and "error" (2) ask for deterministic kernels and warn or raise where there is none.

    Raises:
        ConfigError: the seed is not in 0 ... 2**32 - 1 (numpy's range) or the mode is unknown.
    """
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed}: must be between 0 and {2**32 - 1}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic_mode is not None:
        _set_determinism(deterministic_mode)


def set_step_seed(seed: int, step: int, micro_batch: int = 0) -> None:
    """Seed torch for one micro_batch of an optimizer step from the run's seed, so that dropout depends only on these numbers.

    A resumed run then draws the same as an uninterrupted one, without a generator state in its checkpoint, and several
    processes draw the same as a single one, whichever of them has the micro-batch.
    """
    torch.manual_seed(np.random.SeedSequence((seed, step, micro_batch)).generate_state(1, np.uint64).item())


def _set_determinism(mode: str | int) -> None:
    names = dict(enumerate(_MODES))
    name = names.get(mode) if isinstance(mode, int) else mode
    if name not in _MODES:
        raise ConfigError(f"cudnn_deterministic_mode={mode}: unknown; use null, default (0), warn (1) or error (2)")
    torch.set_deterministic_debug_mode(name)
    torch.backends.cudnn.benchmark = name == "default"
    torch.backends.cudnn.deterministic = name != "default"
    if name != "default":
        # cuBLAS is deterministic only with a fixed workspace; it reads this when the first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
