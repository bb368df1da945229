"""Record of a search for the layers to drop, kept in a file so that a stopped search can be continued."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kdtune.checkpoint import atomic_write_text
from kdtune.config import instantiate
from kdtune.data import Batch
from kdtune.errors import CheckpointError, ConfigError
from kdtune.log import get_logger
from kdtune.pruning.prune import RemovalStep
from kdtune.runs.record import differing_values

log = get_logger(__name__)

# What the removals depend on, with the weights and the text; not on how many are to be made.
_DECIDING = ("model", "dtype", "seed", "num_candidates")


class RemovalRecord:
    """The removals of a search, in a file: read from an earlier start, and written one by one.

    Args:
        path: path of the file; it need not exist.
        cfg: config of the prune recipe.
        batches: the calibration text.

    Raises:
        CheckpointError: the file is damaged, or the weights cannot be read.
        ConfigError: the search in the file had other settings; each is named.
    """

    def __init__(self, path: Path, cfg: Any, batches: Iterable[Batch]) -> None:
        self.path = path
        self.removals: list[RemovalStep] = []
        self._settings = _settings(cfg, batches)
        if path.exists():
            self._read()
            num = len(self.removals)
            log.info("%s: continuing a search after %d removal%s", path, num, "" if num == 1 else "s")

    def add(self, step: RemovalStep) -> None:
        """Record one more removal; the file is replaced atomically; CheckpointError if it cannot be written."""
        self.removals.append(step)
        document = {"settings": self._settings, "removals": [vars(one) for one in self.removals]}
        atomic_write_text(self.path, json.dumps(document, indent=1) + "\n")

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> None:
        try:
            document = json.loads(self.path.read_text(encoding="utf-8-sig"))
            before = dict(document["settings"])
            self.removals = [
                RemovalStep(int(one["layer"]), float(one["loss"]), {int(k): float(v) for k, v in one["added"].items()})
                for one in document["removals"]
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.path}: is no record of a search that was stopped ({error}); remove it, or choose another output_dir"
            ) from error
        found = [one for key, now in self._settings.items() for one in differing_values(key, before.get(key), now)]
        if found:
            lines = "\n".join(f"  {difference}" for difference in found)
            raise ConfigError(
                f"{self.path}: has a search that was stopped, with other settings:\n{lines}\ntake the changes back to continue it, "
                "remove the file to start again, or choose another output_dir"
            )


def _settings(cfg: Any, batches: Iterable[Batch]) -> dict[str, Any]:
    """Return the settings that the removals depend on, as they come back from JSON."""
    text = hashlib.sha256()
    for batch in batches:
        for tensor in (batch.tokens, batch.labels):
            text.update(tensor.cpu().numpy().tobytes())
    checkpointer = instantiate(cfg.checkpointer)
    found = {
        **{key: getattr(cfg, key) for key in _DECIDING},
        "checkpointer": checkpointer and checkpointer.fingerprint(),
        "calibration text": text.hexdigest()[:16],
    }
    return dict(json.loads(json.dumps(found)))
