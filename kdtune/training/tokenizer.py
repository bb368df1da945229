"""The tokenizer of a run, with a fixed date: token ids must not depend on the day on which the data is read."""

import copy
from pathlib import Path
from typing import Any, TypeVar

from kdtune import teachers
from kdtune.config import instantiate
from kdtune.distributed import broadcast_object
from kdtune.errors import ConfigError
from kdtune.log import get_logger
from kdtune.paths import user_path
from kdtune.runs.record import read_resolved_config
from kdtune.tokenizers import Tokenizer
from kdtune.tokenizers.chat_format import today

Config = TypeVar("Config")

log = get_logger(__name__)


def load_tokenizer(cfg: Config) -> tuple[Tokenizer, Config]:
    """Return the config's tokenizer, and the config; where the chat template prints the date, a copy with `tokenizer.date`.

    The date is `tokenizer.date`; else, for a resumed run, the recorded one; else that of the run whose folder (final/ or
    step_N/) contains the tokenizer; else today's. All processes get the same.

    Raises:
        CheckpointError, ConfigError: the tokenizer cannot be built, is no `Tokenizer`, or a run's config.yaml is damaged.
    """
    values: Any = cfg
    node: dict[str, Any] = values.tokenizer
    day = broadcast_object(_recorded(cfg) or today())
    tokenizer = instantiate(node, optional={"date": day})
    if not isinstance(tokenizer, Tokenizer):
        raise ConfigError(
            f"tokenizer: {node['_component_']} returns a {type(tokenizer).__name__}, not a tokenizer; return what "
            "kdtune.tokenizers.load gives, or an object of your own subclass of kdtune.tokenizers.Tokenizer"
        )
    # A component of the user's own may take no date, and its template then be told what it likes.
    if "date" not in node and tokenizer.asks_date and tokenizer.date == day:
        values = copy.copy(values)
        values.tokenizer = {**node, "date": day}
        log.info("the chat template prints the date: %s throughout this run (tokenizer.date)", day)
    return tokenizer, values


def pair_tokenizers(cfg: Any, tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer that the datasets of a config are given: paired with a teacher's own, or as it is.

    See `kdtune.teachers.pair_with_teacher`.
    """
    return teachers.pair_with_teacher(cfg, tokenizer) if getattr(cfg, "kd_loss", None) else tokenizer


def _recorded(cfg: Any) -> str | None:
    """Return the date in the config.yaml of the run to resume, or of the run that wrote the tokenizer."""
    folders = [Path(cfg.output_dir)] if getattr(cfg, "resume_from_checkpoint", False) else []
    path = cfg.tokenizer.get("path")
    if isinstance(path, str) and (user_path(path).name == "final" or user_path(path).name.startswith("step_")):
        folders.append(user_path(path).parent)
    for folder in folders:
        recorded = read_resolved_config(folder).get("tokenizer")
        if isinstance(recorded, dict) and isinstance(recorded.get("date"), str):
            return str(recorded["date"])
    return None
