"""A chat template that prints the date: a run, its resumption, its evaluation and a sweep's steps go by one day."""

import json
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from kdtune.sweeps import runner
from kdtune.sweeps.plan import Step
from kdtune.tokenizers import byte_tokenizer, chat_format, load
from kdtune.training import load_tokenizer

TEMPLATE = (
    "<|im_start|>{{ strftime_now('%d %b %Y, %H:%M') }}<|im_end|>{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the clock."""

    def set_clock(day: str) -> None:
        monkeypatch.setattr(chat_format, "_strftime_now", datetime.fromisoformat(day).strftime)

    return set_clock


@pytest.fixture
def run(tmp_path: Path, cli: Callable[..., Any]) -> Callable[..., list[float]]:
    """Trains into a folder and gives the losses; every token of a conversation is trained on, the date too."""
    byte_tokenizer().save(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"input": f"{i}?", "output": f"{i}."}) + "\n" for i in range(8))
    )

    def train(name: str, *overrides: str) -> list[float]:
        ended = cli(
            "run", "finetune", "--config", "tiny/finetune", f"output_dir={tmp_path / name}", "tokenizer=kdtune.tokenizers.load",
            f"tokenizer.path={tmp_path / 'tokenizer'}", "tokenizer.max_seq_len=128", "dataset=kdtune.data.instruct_dataset",
            f"dataset.source={tmp_path / 'rows.jsonl'}", "dataset.train_on_input=true", "dataset_val=null", "sample_prompts=[]",
            "run_val_every_n_steps=null", "save_every_n_steps=1", "max_steps_per_epoch=2", "gradient_accumulation_steps=1",
            "epochs=1", "~lr_scheduler", *overrides,
        )  # fmt: skip
        assert ended.code == 0, ended.err
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if "loss" in row]

    return train


def recorded(folder: Path) -> Any:
    return yaml.safe_load((folder / "config.yaml").read_text())["tokenizer"].get("date")


def test_a_run_goes_by_the_day_on_which_it_was_started(
    run: Callable[..., list[float]], on: Callable[[str], None], cli: Callable[..., Any], tmp_path: Path
) -> None:
    on("2026-11-29T23:59")
    whole = run("whole")
    run("cut")
    for name in ("step_2", "final"):
        shutil.rmtree(tmp_path / "cut" / name)
    on("2026-11-30T00:01")
    assert run("cut", "resume_from_checkpoint=true") == whole
    assert recorded(tmp_path / "whole") == recorded(tmp_path / "cut") == "2026-11-29"
    # Another day is another text, so that the equality above says something; and that day can be asked for.
    assert run("later") != whole
    assert run("asked", "tokenizer.date=2026-11-29") == whole
    # Evaluated another day, in the words it was trained on.
    (tmp_path / "evaluate.yaml").write_text(f"""recipe: evaluate
tokenizer: {{_component_: kdtune.tokenizers.load, path: "???", max_seq_len: 128}}
checkpointer: {{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: "???"}}
dataset_val: {{_component_: kdtune.data.instruct_dataset, source: {tmp_path / "rows.jsonl"}}}
device: cpu
dtype: fp32
""")
    for name in ("whole", "later"):
        final = tmp_path / name / "final"
        ended = cli(
            "run", "evaluate", "--config", str(tmp_path / "evaluate.yaml"), f"output_dir={tmp_path / name}-measured",
            f"tokenizer.path={final}", f"checkpointer.checkpoint_dir={final}",
        )  # fmt: skip
        assert ended.code == 0, ended.err
        assert recorded(tmp_path / f"{name}-measured") == recorded(tmp_path / name)


def test_the_examples_shown_are_those_of_the_day_that_a_run_goes_by(
    run: Callable[..., list[float]], on: Callable[[str], None], cli: Callable[..., Any], tmp_path: Path
) -> None:
    on("2026-11-29")
    run("started", "max_steps_per_epoch=1")
    on("2026-11-30")
    config = str(tmp_path / "started" / "config.yaml")
    final = tmp_path / "started" / "final"
    days = {"device=cpu": "30", "resume_from_checkpoint=true": "29", f"tokenizer.path={final}": "29"}
    for override, day in days.items():
        shown = cli("data", config, "~tokenizer.date", override)
        assert shown.code == 0 and f"{day} Nov 2026" in shown.out, shown.err + shown.out


def test_a_resumed_run_refuses_another_day(
    run: Callable[..., list[float]], on: Callable[[str], None], tmp_path: Path
) -> None:
    on("2026-11-29")
    run("cut", "max_steps_per_epoch=1")
    with pytest.raises(AssertionError, match=r"tokenizer.date: was '2026-11-29', is '2026-11-30'"):
        run("cut", "resume_from_checkpoint=true", "tokenizer.date=2026-11-30")


def test_a_run_that_records_no_day_can_be_resumed(
    run: Callable[..., list[float]], on: Callable[[str], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One started by a version that wrote none down; its own day can be given, and another key is still refused."""
    on("2026-11-29")
    whole = run("whole")
    run("cut", "max_steps_per_epoch=1")
    config = tmp_path / "cut" / "config.yaml"
    lines = config.read_text().splitlines()
    config.write_text("\n".join(line for line in lines if not line.startswith("  date:")) + "\n")
    assert recorded(tmp_path / "cut") is None
    on("2026-11-30")
    with pytest.raises(AssertionError, match=r"tokenizer\.max_seq_len: was 128, is 64\n"):
        run("cut", "resume_from_checkpoint=true", "tokenizer.max_seq_len=64")
    assert run("cut", "resume_from_checkpoint=true", "tokenizer.date=2026-11-29") == whole
    assert recorded(tmp_path / "cut") == "2026-11-29"
    assert "records no tokenizer.date; it continues with 2026-11-29" in caplog.text


def test_no_word_of_a_date_where_the_template_prints_none(
    run: Callable[..., list[float]], on: Callable[[str], None], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(chat_format.CHATML)
    on("2026-11-29")
    run("plain")
    assert recorded(tmp_path / "plain") is None


def test_the_steps_of_a_sweep_go_by_its_first_day(
    on: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def execute(command: list[str], log: Path, lock: int, stop: Any, environment: dict[str, str]) -> tuple[int, bool]:
        seen.append(environment[chat_format.DATE_VARIABLE])
        return 0, True

    monkeypatch.setattr(runner, "_execute", execute)
    for day, name in (("2026-11-29", "one"), ("2026-11-30", "two")):
        on(day)
        step = Step(name, name, "finetune", "tiny/finetune", (), tmp_path / "steps" / name)
        runner.run_step(step, lock=0, stop=lambda: False)
    assert seen == ["2026-11-29", "2026-11-29"]


def test_the_environment_names_the_day_of_a_run(
    run: Callable[..., list[float]], on: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on("2026-11-30")
    monkeypatch.setenv(chat_format.DATE_VARIABLE, "2026-11-29")
    run("step", "max_steps_per_epoch=1")
    assert recorded(tmp_path / "step") == "2026-11-29"


def test_a_given_date_is_printed_in_place_of_now(
    run: Callable[..., list[float]], on: Callable[[str], None], tmp_path: Path
) -> None:
    folder = tmp_path / "tokenizer"
    chat = [{"role": "user", "content": "Hi"}]
    on("2026-11-29T13:00")
    assert "29 Nov 2026, 13:00" in load(folder).render(chat)
    assert "30 Jun 2020, 00:00" in load(folder, date="2020-06-30").render(chat)


def test_the_config_is_left_as_it_is_and_its_dated_copy_keeps_what_it_came_from(
    on: Callable[[str], None], tmp_path: Path
) -> None:
    on("2026-11-29T12:00")
    byte_tokenizer().save(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    node = {"_component_": "kdtune.tokenizers.load", "path": str(tmp_path / "tokenizer")}
    cfg = SimpleNamespace(output_dir="", tokenizer=dict(node), seed=7)
    tokenizer, dated = load_tokenizer(cfg)
    assert cfg.tokenizer == node
    assert dated.tokenizer == {**node, "date": "2026-11-29"} and dated.seed == 7
    assert tokenizer.date == "2026-11-29"
    plain = SimpleNamespace(output_dir="", tokenizer={"_component_": "kdtune.tokenizers.byte_tokenizer"})
    assert load_tokenizer(plain)[1] is plain
