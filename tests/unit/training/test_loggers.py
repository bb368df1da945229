import builtins
import json
import math
from pathlib import Path

import pytest

from kdtune.errors import CheckpointError, ConfigError
from kdtune.runs import JSONLLogger, read_metrics, truncate_metrics
from kdtune.training import TensorBoardLogger, WandBLogger


def test_jsonl_keeps_every_bit_and_flushes_each_line(tmp_path):
    logger = JSONLLogger(tmp_path / "run" / "metrics.jsonl")
    value = 0.1 + 0.2
    logger.log({"loss": value, "num_valid_tokens": 7, "ppl": math.inf}, step=1)
    line = (tmp_path / "run" / "metrics.jsonl").read_text()  # before close
    assert json.loads(line) == {"step": 1, "loss": value, "num_valid_tokens": 7, "ppl": None}
    assert line.startswith('{"step": 1, ') and line.endswith("}\n")
    logger.close()


def test_truncate_cuts_later_steps_and_a_torn_line_and_logging_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logger = JSONLLogger(path)
    for step in (1, 2, 2, 3, 4):
        logger.log({"loss": step / 3}, step)
    whole = path.read_text().splitlines(keepends=True)
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    logger.close()
    truncate_metrics(path, 2)
    assert path.read_text() == "".join(whole[:3])
    with JSONLLogger(path) as logger:
        logger.log({"loss": 1.0}, 3)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 2, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_to_zero_and_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for values in ({}, {1: {"loss": 1.0}}):
        with JSONLLogger(path) as logger:
            for step, row in values.items():
                logger.log(row, step)
        truncate_metrics(path, 0)
        assert path.read_text() == ""


def test_torn_in_the_middle_of_a_character(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "note": "\xc3')
    truncate_metrics(path, 10)
    assert path.read_bytes() == b'{"step": 1}\n'


@pytest.mark.parametrize("bad", ["{", "[1]", '{"loss": 1.0}', ""])
def test_a_broken_line_inside_is_an_error_and_nothing_is_cut(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + bad + '\n{"step": 3}\n')
    before = path.read_text()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: line 2 must be a JSON object with a step"):
        truncate_metrics(path, 1)
    assert path.read_text() == before


def test_tensorboard_writes_the_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(str(tmp_path / "tensorboard"))
    logger.log({"loss": 2.5, "lr": 1e-4}, step=3)
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 2.5)]
    assert set(events.Tags()["scalars"]) == {"loss", "lr"}


@pytest.mark.parametrize(
    ("build", "module", "extra"),
    [
        (lambda path: TensorBoardLogger(path), "torch.utils.tensorboard", "tensorboard"),
        (lambda path: WandBLogger("project", log_dir=path), "wandb", "wandb"),
    ],
)
def test_a_missing_extra_names_the_pip_install(tmp_path, monkeypatch, build, module, extra):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == module:
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=rf"pip install 'kdtune\[{extra}\]'"):
        build(str(tmp_path))


def test_wandb_gets_the_values(tmp_path, monkeypatch):
    import sys
    from types import SimpleNamespace

    calls = []
    run = SimpleNamespace(log=lambda values, step: calls.append((values, step)), finish=lambda: calls.append("finish"))
    fake = SimpleNamespace(init=lambda **arguments: calls.append(arguments) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    logger = WandBLogger("distil", group="ablation", log_dir=str(tmp_path))
    logger.log({"loss": 1.5}, step=2)
    logger.close()
    assert calls[0] == {"project": "distil", "entity": None, "group": "ablation", "name": None, "dir": str(tmp_path)}
    assert calls[1:] == [({"loss": 1.5}, 2), "finish"]


def test_wandb_that_cannot_start_leaves_no_folder(tmp_path, monkeypatch):
    import sys
    from types import SimpleNamespace

    def init(dir, **arguments):
        assert Path(dir).is_dir()
        raise RuntimeError("no api key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(ConfigError, match="no api key"):
        WandBLogger("distil", log_dir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_texts_survive_too(tmp_path):
    path = tmp_path / "samples.jsonl"
    with JSONLLogger(path) as logger:
        logger.log({"answer": "à bientôt\nline\u2028two 🙂", "who": "student"}, step=1)
        logger.log({"answer": "later"}, step=2)
    truncate_metrics(path, 1)
    assert read_metrics(path) == [{"step": 1, "answer": "à bientôt\nline\u2028two 🙂", "who": "student"}]
