"""docs/python.md: its script is run as it stands, and `help()` of a public name leads to its arguments."""

import dataclasses
import importlib
import inspect
import json
import re
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kdtune.checkpoint import save_model
from kdtune.models import llama
from kdtune.tokenizers import byte_tokenizer

ROOT = Path(__file__).parent.parent


def test_the_script_of_the_docs_trains_and_saves(tmp_path: Path) -> None:
    script = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), flags=re.S)[0]
    assert len(script.splitlines()) <= 55, "a script to read at a glance: 40 lines of code"
    (tmp_path / "distil.py").write_text(script)
    rows = [{"prompt": f"Say {n}.", "response": f"{n} it is"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed, (name, layers) in enumerate((("teacher", 2), ("student", 1))):
        torch.manual_seed(seed)
        model = llama(vocab_size=320, embed_dim=32, num_layers=layers, num_heads=4, num_kv_heads=2, intermediate_dim=64,
                      max_seq_len=256)  # fmt: skip
        save_model(model, tmp_path / name, tokenizer=byte_tokenizer())
    done = subprocess.run(
        [sys.executable, "distil.py", "teacher", "student", "rows.jsonl", "out"],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.findall(r"([\d.]+) (?:before|after)", done.stdout))
    assert after != before
    old, new = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("student", "out"))
    assert old.keys() == new.keys() and any(not torch.equal(old[name], new[name]) for name in old)


PACKAGES = (
    "checkpoint", "config", "data", "distributed", "download", "evaluation", "generation", "losses", "models", "parallel", "planner",
    "pruning", "reports", "runs", "sweeps", "teachers", "tokenizers", "training",
)  # fmt: skip


def public_names() -> dict[str, Any]:
    modules = [importlib.import_module(f"kdtune.{package}") for package in PACKAGES]
    return {name: getattr(module, name) for module in modules for name in module.__all__}


def help_text(target: Any) -> str:
    """What `help()` shows of a function, or of a class and how it is made."""
    return f"{inspect.getdoc(target) or ''} {target.__init__.__doc__ or '' if inspect.isclass(target) else ''}"


def arguments_of(target: Callable[..., Any]) -> list[str]:
    """The names of its arguments, those that `**options: Unpack[SomeTypedDict]` takes too."""
    found = []
    for parameter in inspect.signature(target).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            if typing.get_origin(parameter.annotation) is typing.Unpack:
                found += list(typing.get_args(parameter.annotation)[0].__annotations__)
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            found.append(parameter.name)
    return found


def is_plain_record(target: Any) -> bool:
    """Whether it is used and not called, or its fields are its documentation: dataclasses, tuples, protocols, errors."""
    is_tuple = inspect.isclass(target) and issubclass(target, tuple | dict)
    is_error = inspect.isclass(target) and issubclass(target, Exception)
    return dataclasses.is_dataclass(target) or is_tuple or is_error or getattr(target, "_is_protocol", False)


WITH_ARGUMENTS = sorted(
    name
    for name, target in public_names().items()
    if callable(target) and getattr(target, "__module__", "").startswith("kdtune") and not is_plain_record(target)
    and not typing.get_origin(target) and len(arguments_of(target)) > 2
)  # fmt: skip


def test_there_are_many_of_them() -> None:
    assert len(WITH_ARGUMENTS) > 80 and "alpaca_cleaned_dataset" in WITH_ARGUMENTS


@pytest.mark.parametrize("name", WITH_ARGUMENTS)
def test_help_leads_to_the_arguments_in_one_hop(name: str) -> None:
    """Each argument is named in the docstring, or in that of a public name which the docstring has."""
    public = public_names()
    own = help_text(public[name])
    near = [own, *(help_text(public[word]) for word in set(re.findall(r"\w+", own)) if word in public)]
    known = set(re.findall(r"\w+", " ".join(near)))
    assert not [argument for argument in arguments_of(public[name]) if argument not in known]
