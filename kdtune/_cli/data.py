"""`kdtune data`: shows the first rows of a config's dataset as the model sees them and marks the trained tokens; reads no weights."""

import argparse
import os
import sys
from collections.abc import Mapping
from typing import Any

from kdtune._cli.names import load_config
from kdtune.errors import ConfigError

_LONGEST_STRETCH = 600
_MOST_CHUNKS = 20


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `data` to the command's parsers."""
    parser = subparsers.add_parser(
        "data", help="show a config's examples, with the trained tokens marked", description=__doc__
    )
    parser.add_argument("config", metavar="NAME|PATH", help="config, as `kdtune ls` names it, or a path")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="examples that are shown (default: 3)")
    parser.add_argument(
        "--count", default="1000", metavar="N|all", help="rows that are read for the numbers (default: the first 1000)"
    )
    parser.add_argument(
        "--key", metavar="KEY", help="which dataset, such as dataset_val (default: dataset, where the config has one)"
    )
    parser.add_argument("--full", action="store_true", help="show long texts whole")
    parser.add_argument("overrides", nargs="*", metavar="key=value|~key", help="changes to the config")
    parser.set_defaults(func=execute)


def execute(arguments: argparse.Namespace) -> None:
    """Print the examples, then the numbers.

    Raises:
        ConfigError: the config is not valid or has no dataset.
        DataError: the dataset cannot be read.
    """
    count = _row_count(arguments.count)
    if arguments.rows < 0:
        raise ConfigError(f"--rows {arguments.rows}: must be at least 0")
    _, cfg = load_config(arguments.config, arguments.overrides)

    from kdtune.data import dataset_nodes
    from kdtune.training import load_tokenizer, pair_tokenizers

    nodes = dict(dataset_nodes(cfg))
    keys = [key.partition(".")[0] for key in nodes]
    if not nodes:
        raise ConfigError(f"{arguments.config}: names no dataset; give one with dataset=... or dataset_val=...")
    chosen = arguments.key or ("dataset" if "dataset" in keys else keys[0])
    if chosen not in keys:
        raise ConfigError(
            f"--key {chosen}: {arguments.config} has no such dataset; it has {', '.join(dict.fromkeys(keys))}"
        )
    tokenizer, cfg = load_tokenizer(cfg)
    tokenizer = pair_tokenizers(cfg, tokenizer)
    for key, node in nodes.items():
        if key.partition(".")[0] == chosen:
            _show(key, node, tokenizer, arguments, count)


def _row_count(text: str) -> int:
    if text == "all":
        return sys.maxsize
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--count {text}: must be a number of rows, at least 1, or all")
    return int(text)


def _show(key: str, node: Mapping[str, Any], tokenizer: Any, arguments: argparse.Namespace, count: int) -> None:
    from kdtune.data import load_dataset, previewed, show
    from kdtune.escape import printable
    from kdtune.log import fit_for_stdout, terminal_width

    with previewed(max(count, arguments.rows)):
        dataset = load_dataset(key, dict(node), tokenizer)
        examples = list(dataset.examples(seed=0, epoch=0, shuffle=False))
    report, colour = dataset.report, _has_colour()
    print(fit_for_stdout(f"{key}: {report.source}"))
    print("what is trained on is " + ("in colour" if colour else "between [[ and ]]"))
    for number, example in enumerate(examples[: arguments.rows], start=1):
        length, num_trained = len(example.tokens), show.count_trained([example])
        print(f"\n--- example {number}: {length:,} tokens, {num_trained:,} trained on ---")
        limit = None if arguments.full else _LONGEST_STRETCH
        print(show.example_text(example, tokenizer, colour=colour, longest_stretch=limit))
        if example.teacher is not None:
            print(
                show.chunks_text(
                    example, example.teacher, tokenizer.pair, longest=None if arguments.full else _MOST_CHUNKS
                )
            )
    lengths = [len(example.tokens) for example in examples]
    print("\n" + show.rows_table(report, lengths, show.count_trained(examples), tokenizer.max_seq_len))
    if report.rows == count:
        print("(the first rows of the source; --count all reads every one)")
    if lengths:
        print("\n" + show.histogram(lengths, width=min(terminal_width() or 60, 80)))
    for note in report.notes():
        print(printable(f"note: {note}"))


def _has_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
