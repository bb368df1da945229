"""Check the first row of a config's datasets, before anything else is read or built."""

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from kdtune.config import instantiate, is_component
from kdtune.config.check import COMPONENT, is_ours
from kdtune.data.columns import MissingColumnError
from kdtune.data.files import ElsewhereError
from kdtune.data.sources import previewed
from kdtune.errors import ConfigError, DataError

# Nodes whose first row was found to be in order: a sweep asks for the same ones hundreds of times.
_IN_ORDER: set[str] = set()


class _NoTokenizer:
    """A placeholder for the tokenizer when only the columns of a row are checked."""

    bos_id = eos_id = pad_id = 0
    stop_ids: frozenset[int] = frozenset()
    max_seq_len = None
    begins_with_bos = False

    def encode(self, text: str, *, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        return [0, 0]

    def tokenize_messages(self, messages: Sequence[Any], **options: Any) -> tuple[list[int], list[bool]]:
        return [0, 0], [True, True]

    def left_out(self, messages: Sequence[Any], **options: Any) -> list[str]:
        return []


def dataset_nodes(cfg: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Return the nodes of a config that are built with its tokenizer, by key; a mixture as its datasets."""
    for field in dataclasses.fields(cfg):
        node = getattr(cfg, field.name)
        if "tokenizer" in field.metadata.get("runtime", ()) and is_component(node):
            yield from _unmixed(field.name, node)


def _unmixed(key: str, node: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    parts = node.get("datasets")
    if not isinstance(parts, list):
        yield key, node
        return
    for number, part in enumerate(parts):
        if is_component(part):
            yield from _unmixed(f"{key}.datasets.{number}", part)


def first_row_problems(cfg: Any, *, prompts_alone: Collection[str] = ()) -> list[str]:
    """Return what kdtune's dataset builders cannot read in the first row of their source, with the settings that fit.

    Sources that are not on this machine are skipped: nothing is downloaded, and the run may take place elsewhere. `prompts_alone` are the
    keys of `cfg`, such as "dataset", of data whose answers a model writes; elsewhere `kdtune.data.prompts_dataset` is refused.
    """
    nodes = dict(dataset_nodes(cfg))
    found = [
        answers_needed(key, str(node[COMPONENT]))
        for key, node in nodes.items()
        # Written in any of its ways, such as kdtune.data.prompts.prompts_dataset.
        if is_ours(node) and node[COMPONENT].endswith(".prompts_dataset") and key.partition(".")[0] not in prompts_alone
    ]

    def read(node: Mapping[str, Any]) -> None:
        instantiate(dict(node), tokenizer=_NoTokenizer())

    return found + read_problems(nodes, read)


def answers_needed(key: str, name: str) -> str:
    """Return the sentence that refuses the data of `key`, of which `name` gives prompts alone, where answers are needed."""
    return (
        f"{key}: {name} has no answers, and they are needed here; it is for write_answers, and for the dataset of "
        "a distillation in which a model writes the text of every step (rollouts.policy without a share for the data)"
        + ("; ~dataset_val validates on nothing" if key == "dataset_val" else "")
    )


def read_problems(nodes: Mapping[str, Any], read: Callable[[Any], object]) -> list[str]:
    """Return what is wrong with the first row of these nodes' sources, as `first_row_problems`; nodes by key of the config.

    read: builds a node's component, which opens its source. Components that are not kdtune's are skipped.
    """
    found = []
    for key, node in nodes.items():
        name = json.dumps(node, sort_keys=True, default=str)
        if name in _IN_ORDER or not is_ours(node):
            continue
        try:
            with previewed(1, local_only=True):
                read(node)
        except ElsewhereError:
            continue
        except MissingColumnError as error:
            found.append(f"{key}: {error.under(key)}")
        except (DataError, ConfigError) as error:
            found.append(f"{key}: {error}")
        else:
            _IN_ORDER.add(name)
    return found
