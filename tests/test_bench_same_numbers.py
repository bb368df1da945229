"""bench/same_numbers.py finds the smallest difference between two records, and what one of them lacks."""

import copy
import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

SCRIPT = Path(__file__).parent.parent / "bench" / "same_numbers.py"
SPEC = importlib.util.spec_from_file_location("same_numbers", SCRIPT)
assert SPEC and SPEC.loader
same_numbers = sys.modules["same_numbers"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(same_numbers)

LOSS = 2.8896228266697306
ROWS = [
    {"step": 0, "val_class_loss": 5.76},
    {"step": 1, "loss": LOSS, "grad_norm": 0.5, "lr": 0.01, "step_seconds": 0.14, "peak_memory_rss": 0.36},
    {"step": 2, "loss": 2.77, "grad_norm": 0.9, "lr": 0.01, "step_seconds": 0.13, "val_class_loss": 5.1},
]


def write_run(folder: Path, rows: list[dict[str, float]], weight: torch.Tensor) -> Path:
    (folder / "final" / "adapter").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_file({"norm": torch.ones(4), "head": weight}, folder / "final" / "model.safetensors")
    save_file({"head": torch.ones(2)}, folder / "final" / "adapter" / "adapter_model.safetensors")
    return folder


@pytest.fixture
def found(tmp_path: Path) -> dict[str, Any]:
    run = same_numbers.read_run(write_run(tmp_path / "run", ROWS, torch.zeros(3, dtype=torch.bfloat16)))
    made_of = {"commit": "1", "torch": "2", "torchao": "3", "machine": "4"}
    return {"made_of": made_of, "runs": {"kd full": run, "kd lora": copy.deepcopy(run)}}


def test_a_record_has_the_exact_numbers_and_nothing_that_a_clock_says(found: dict[str, Any]) -> None:
    run = found["runs"]["kd full"]
    assert {step: set(row) for step, row in run["steps"].items()} == {
        "0": {"val_class_loss"}, "1": {"loss", "grad_norm", "lr"}, "2": {"loss", "grad_norm", "lr", "val_class_loss"}
    }  # fmt: skip
    assert float.fromhex(run["steps"]["1"]["loss"]) == LOSS
    assert set(run["tensors"]) == {"norm", "head", "adapter/head"} and run["tensors"]["head"].startswith("BF16 [3] ")
    assert same_numbers.compare(found, json.loads(json.dumps(found))) == [("kd full", "equal"), ("kd lora", "equal")]


def test_one_bit_of_a_metric(found: dict[str, Any]) -> None:
    other = copy.deepcopy(found)
    next_float = math.nextafter(LOSS, 3)
    other["runs"]["kd lora"]["steps"]["1"]["loss"] = next_float.hex()
    equal, (name, verdict) = same_numbers.compare(found, other)
    assert equal == ("kd full", "equal") and name == "kd lora"
    assert verdict == f"step 1 loss: {LOSS!r} and {next_float!r}, relative {(next_float - LOSS) / LOSS:.1e}"


def test_the_largest_of_several_differences(found: dict[str, Any]) -> None:
    other = copy.deepcopy(found)
    other["runs"]["kd full"]["steps"]["1"]["loss"] = math.nextafter(LOSS, 3).hex()
    other["runs"]["kd full"]["steps"]["2"]["grad_norm"] = (1.8).hex()
    (_, verdict), _ = same_numbers.compare(found, other)
    assert verdict.startswith("step 1 loss: ") and "2 metrics in all, relative 5.0e-01 at most" in verdict


@pytest.mark.parametrize("change", ["bit", "dtype", "shape"])
def test_a_tensor(change: str, found: dict[str, Any], tmp_path: Path) -> None:
    weight = torch.zeros(3, dtype=torch.bfloat16)
    if change == "bit":
        weight.view(torch.int16)[1] = 1
    changed = {"bit": weight, "dtype": weight.to(torch.float16), "shape": weight[None]}[change]
    other = copy.deepcopy(found)
    other["runs"]["kd full"] = same_numbers.read_run(write_run(tmp_path / "changed", ROWS, changed))
    assert same_numbers.compare(found, other)[0][1] == "1 of 3 tensors of final/, such as head"


@pytest.mark.parametrize("which", ["first", "second"])
def test_what_one_record_lacks(which: str, found: dict[str, Any]) -> None:
    def verdicts(less: dict[str, Any]) -> list[str]:
        pair = (less, found) if which == "first" else (found, less)
        return [verdict for _, verdict in same_numbers.compare(*pair)]

    less = copy.deepcopy(found)
    del less["runs"]["kd full"]
    assert sorted(verdicts(less)) == ["equal", f"missing in the {which} record"]
    less = copy.deepcopy(found)
    del less["runs"]["kd lora"]["steps"]["2"]
    assert verdicts(less) == ["equal", f"step 2 is missing in the {which} record"]
    less = copy.deepcopy(found)
    del less["runs"]["kd lora"]["tensors"]["norm"]
    assert verdicts(less) == ["equal", "1 of 3 tensors of final/, such as norm"]


def test_metrics_that_are_gone_new_or_renamed(found: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    other = copy.deepcopy(found)
    for run in other["runs"].values():
        run["steps"]["1"]["ce"] = run["steps"]["1"].pop("loss")
    del other["runs"]["kd full"]["steps"]["2"], other["runs"]["kd lora"]["steps"]["2"]
    del found["runs"]["kd full"]["steps"]["2"], found["runs"]["kd lora"]["steps"]["2"]
    assert same_numbers.compare(found, other)[0][1] == "step 1: loss is missing in the second record"
    rename = same_numbers.renaming(["loss=ce"])
    assert {verdict for _, verdict in same_numbers.compare(found, other, rename)} == {"equal"}
    other["runs"]["kd full"]["steps"]["1"]["val_forward_kl"] = "0x0p+0"
    assert same_numbers.print_comparison(found, other, "", rename) == 0
    assert "only in the second record: val_forward_kl\n2 of 2 equal" in capsys.readouterr().out


def test_the_exit_code_and_the_cases_asked_for(found: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    other = copy.deepcopy(found)
    other["runs"]["kd lora"]["tensors"]["norm"] += "0"
    for name, content in (("a.json", found), ("b.json", other)):
        (tmp_path / name).write_text(json.dumps(content))

    def code(*options: str) -> int:
        monkeypatch.setattr(
            "sys.argv", ["same_numbers.py", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), *options]
        )
        with pytest.raises(SystemExit) as stopped:
            same_numbers.main()
        return int(stopped.value.code or 0)

    assert code() == 1 and code("--only", "full") == 0
    assert code("--only", "no such case") == 1, "nothing compared is nothing shown"


def test_a_name_is_replaced_as_a_whole() -> None:
    rename = same_numbers.renaming(["parallelism.tp=layout.tp", "kdtune.models.apply_lora=kdtune.apply_lora"])
    assert rename("parallelism.tp=2") == "layout.tp=2"
    assert rename("teacher_parallelism.tp=2") == "teacher_parallelism.tp=2"
    assert rename("adapter=kdtune.models.apply_lora") == "adapter=kdtune.apply_lora"


FAKE = """
import json, sys
from pathlib import Path
import numpy
from safetensors.numpy import save_file
output_dir = Path(sys.argv[-1].removeprefix("output_dir="))
(output_dir / "final").mkdir(parents=True)
(output_dir / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": LOSS + ("lr=1" in sys.argv)}))
save_file({"norm": numpy.ones(1)}, output_dir / "final" / "model.safetensors")
"""


def test_the_checkout_that_is_named_is_run_and_no_other(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # where the processes find the script
    monkeypatch.setattr(same_numbers, "PRELOADED", [])
    for name in ("PYTHONPATH", "OMP_NUM_THREADS", "PYTHONUNBUFFERED"):
        monkeypatch.setenv(name, "1")  # so that they are put back
    only, records = "^kd full, 1 process, bf16$", []
    for loss, settings in ((1.5, []), (1.25, ["lr=1"])):
        package = tmp_path / f"checkout-{loss}" / "kdtune"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(FAKE.replace("LOSS", str(loss)))
        out = tmp_path / f"{loss}.json"
        assert same_numbers.record(out, package.parent, only, None, str, None, settings) == 0
        records.append(json.loads(out.read_text()))
    assert same_numbers.compare(*records)[0][1] == "step 1 loss: 1.5 and 2.25, relative 3.3e-01"
    (tmp_path / "nothing").mkdir()
    assert same_numbers.record(tmp_path / "nothing.json", tmp_path / "nothing", only, None, str, None) == 1
    assert f"not from {tmp_path / 'nothing'}" in capfd.readouterr().out


def test_the_cases_cover_what_has_to_stay_equal() -> None:
    cases = list(same_numbers.tiny_cases())
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    for recipe in ("kd", "finetune"):
        for student in ("full", "lora", "dora", "qlora"):
            assert any(c.resumed_at for c in cases if c.name.startswith(f"{recipe} {student}")), (recipe, student)
            for layout in ("1 process", "FSDP 2"):
                assert f"{recipe} {student}, {layout}" in names
    assert sum(bool(re.fullmatch("kd .*, teacher apart", name)) for name in names) == 5
