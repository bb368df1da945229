"""Build the models of a config without weights, to find problems early."""

import json
from typing import Any

from kdtune.config import factory
from kdtune.config.check import is_ours
from kdtune.errors import KDTuneError
from kdtune.parallel import model_config

# Nodes that were found to be in order: a sweep asks for the same ones hundreds of times.
_IN_ORDER: set[str] = set()


def builder_problems(cfg: Any) -> list[str]:
    """Return problems with kdtune's builders in `model` and `teacher_model`, such as sizes that no model has.

    They are built without weights. cfg: of any recipe.
    """
    found = []
    for key in ("model", "teacher_model"):
        node = getattr(cfg, key, None)
        name = json.dumps(node, sort_keys=True, default=str)
        if node is None or name in _IN_ORDER or not is_ours(node):
            continue
        try:
            model_config(factory(node), None)
        except KDTuneError as error:
            found.append(f"{key}: {error}")
        else:
            _IN_ORDER.add(name)
    return found
