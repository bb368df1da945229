"""`kdtune cache`: a teacher cache from the answers of a server that computes the teacher elsewhere."""

import argparse
import json
from typing import Any

from kdtune._cli.names import load_config
from kdtune.errors import ConfigError
from kdtune.paths import user_path

_EPILOG = """\
example:
  kdtune cache prompts llama3_1/8B_cache_teacher > prompts.jsonl
  kdtune cache import llama3_1/8B_cache_teacher rows.jsonl k=20 output_dir=caches/llama

Between the two, a server is asked: docs/teacher_cache.md has the script. The config is one of cache_teacher, of which no weights are read.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `cache` to the command's parsers."""
    about: dict[str, Any] = {"epilog": _EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = subparsers.add_parser(
        "cache", help="a teacher cache from a server's answers", description=__doc__, **about
    )
    verbs = parser.add_subparsers(title="commands", metavar="VERB", dest="verb", required=True)
    prompts = verbs.add_parser("prompts", help="print the token ids of each example, one JSON object a line", **about)
    imported = verbs.add_parser("import", help="write a cache of kind topk from answers with prompt_logprobs", **about)
    for verb in (prompts, imported):
        verb.add_argument(
            "config", metavar="NAME|PATH", help="config of cache_teacher: its tokenizer, dataset and range"
        )
    imported.add_argument("rows", metavar="FILE", help="the answers, one JSON object a line")
    imported.add_argument(
        "--teacher", metavar="NAME", help="the served model's name, for the header (default: FILE's name)"
    )
    imported.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="rows of the teacher's head (default: those of teacher_model, else the ids of the tokenizer)",
    )
    for verb, execute in ((prompts, print_prompts), (imported, import_answers)):
        verb.add_argument("overrides", nargs="*", metavar="key=value|~key", help="changes to the config")
        verb.set_defaults(func=execute)


def print_prompts(arguments: argparse.Namespace) -> None:
    """Print the token ids of each example of the range.

    Raises:
        ConfigError: the config is not valid, or not one of cache_teacher.
    """
    cfg, _, dataset = _config_and_data(arguments)
    for index in range(dataset.size)[cfg.first_example :][: cfg.max_examples]:
        print(json.dumps({"example_id": index, "prompt_token_ids": dataset[index].tokens.tolist()}))


def import_answers(arguments: argparse.Namespace) -> None:
    """Write the cache and print its size.

    Raises:
        ConfigError: the config is not valid, or not one of cache_teacher.
        DataError: an answer does not fit the data set.
    """
    from kdtune.teachers import cache

    cfg, tokenizer, dataset = _config_and_data(arguments)
    file = user_path(arguments.rows)
    name = arguments.teacher or file.name
    header = cache.server_header(cfg, tokenizer, dataset, name=name, answers=file, vocab_size=arguments.vocab_size)
    index = cache.import_rows(file, cfg.output_dir, header, dataset)
    print(
        f"{cfg.output_dir}: {header.num_examples:,} examples, {index['num_rows']:,} positions, {index['bytes']:,} bytes"
    )


def _config_and_data(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Return the config, its tokenizer and its dataset."""
    recipe, cfg = load_config(arguments.config, ["kind=topk", *arguments.overrides])
    if recipe.name != "cache_teacher":
        raise ConfigError(
            f"{arguments.config}: is for {recipe.name}; give a config of cache_teacher, such as tiny/cache_teacher"
        )
    if cfg.kind != "topk":
        raise ConfigError(f"kind={cfg.kind}: a server gives the most likely ids; ~kind")

    from kdtune.data import load_dataset
    from kdtune.teachers import cache
    from kdtune.training import load_tokenizer

    tokenizer, cfg = load_tokenizer(cfg)
    return cfg, tokenizer, cache.checked_dataset("dataset", load_dataset("dataset", cfg.dataset, tokenizer))
