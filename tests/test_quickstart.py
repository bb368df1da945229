"""`make quickstart`: its steps and the commands it prints at its end, without running them; the run itself is minutes long."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from test_documented_commands import ROOT, accept

from kdtune import tokenizers
from kdtune.config import instantiate, load
from kdtune.constants import IGNORE_INDEX
from recipes.knowledge_distillation import Config as Distillation


def make(*words: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(["make", "--no-print-directory", *words], cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.replace("\\\n", " ")


def commands(text: str) -> list[str]:
    """The `kdtune ...` commands of a shell text, without what is piped or redirected."""
    return [found[1].strip() for found in re.finditer(r"\.venv/bin/(kdtune (?:run|download) [^|>&\n]*)", text)]


@pytest.fixture(scope="module")
def steps() -> list[str]:
    lines = make("-n", "quickstart", "VENV=.venv").splitlines()
    return commands("\n".join(line for line in lines if not line.startswith("echo")))


def test_every_step_and_every_next_command_is_accepted(steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipes = [command.split()[2] for command in steps if command.startswith("kdtune run")]
    assert recipes[:4] == ["prune", *["knowledge_distillation_single_device"] * 2, "compare"]
    following = commands(make("quickstart-next"))
    assert [command.split()[2] for command in following] == ["generate", "knowledge_distillation"]
    for command in [*steps, *following]:
        accept(command)


def test_sft_and_kd_differ_in_the_ratio_and_the_folder_alone(steps: list[str]) -> None:
    overrides = [
        [word for word in shlex.split(command) if "=" in word]
        for command in steps
        if "knowledge_distillation" in command
    ]
    sft, kd = (vars(load("quickstart", words, Distillation)) for words in overrides[:2])
    assert {key for key in sft if sft[key] != kd[key]} == {"kd_ratio", "output_dir"}
    assert (sft["kd_ratio"], kd["kd_ratio"]) == (0, 1) and sft["resume_from_checkpoint"]


def test_loss_and_table_are_of_the_answers() -> None:
    cfg = load("quickstart", [], Distillation)
    rows = [json.loads(line) for line in (ROOT / "kdtune" / "data" / "quickstart.jsonl").open()]
    tokenizer = tokenizers.byte_tokenizer()
    for node, row in ((cfg.dataset, rows[0]), (cfg.dataset_val, rows[7])):
        example = instantiate(node, tokenizer=tokenizer)[0]
        trained = [int(label) for label in example.labels if label != IGNORE_INDEX]
        assert tokenizer.decode(trained, skip_special=True).strip() == row["output"]


def installs(*words: str) -> list[list[str]]:
    """What `make quickstart` gives to `pip install` for the environment, one list a call."""
    lines = make("-n", "-W", "pyproject.toml", "quickstart", *words).splitlines()
    return [shlex.split(line.partition("pip install ")[2]) for line in lines if "pip install" in line
            and "transformers" not in line]  # fmt: skip


def readme_installs() -> list[list[str]]:
    (block,) = re.findall(r"The same in plain commands.*?\n\n(.*?)\n\n", (ROOT / "README.md").read_text(), re.DOTALL)
    return [shlex.split(line)[2:] for line in block.splitlines() if line.strip().startswith("pip install")]


def test_a_cpu_user_looks_for_torch_alone_at_the_cpu_wheels_and_the_readme_says_the_same() -> None:
    everything = ["-c", "constraints.txt", "-e", "."]
    torch = ["-c", "constraints.txt", "--no-deps", "--extra-index-url", "https://download.pytorch.org/whl/cpu", "torch"]
    assert installs() == [everything]
    assert installs("CPU=1") == readme_installs() == [torch, everything]
