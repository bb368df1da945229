"""Distillation from a teacher cache: the run that a live teacher gives, whatever the order, the epochs, the layout and the restarts."""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import CLI, Fork
from safetensors.torch import load_file
from written_caches import write_cache

from kdtune.checkpoint import load_model, save_model
from kdtune.data import quickstart_dataset
from kdtune.models import llama
from kdtune.tokenizers import byte_tokenizer

# A cache saves the teacher's operations: they are fewer.
MEASURED = {
    "time",
    "step_seconds",
    "data_seconds",
    "teacher_seconds",
    "tokens_per_second",
    "peak_memory_rss",
    "flops",
    "total_flops",
}
LAYOUTS = pytest.mark.slow("two runs; tests/unit/teachers finds the rows of every layout")
TOP = "teacher_targets={_component_: kdtune.losses.TopKTargets"
SPLIT, HELD_OUT = "train[:24]", "test[:6]"
KD = ["knowledge_distillation", "--config", "tiny/knowledge_distillation", "~teacher_model", "optimizer=torch.optim.SGD",
      "optimizer.lr=0.3", "~lr_scheduler", "sample_prompts=[]", "save_every_n_steps=null", "run_val_every_n_steps=null",
      f"dataset.split={SPLIT}", f"dataset_val.split={HELD_OUT}", "max_steps_per_epoch=null"]  # fmt: skip


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in found]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `teacher`, caches of the training data by kind, and `held_out` of that of the validation."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(5)
    model = llama(
        vocab_size=320, embed_dim=48, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_dim=96, max_seq_len=256
    )
    with torch.no_grad():
        model.output.weight.mul_(8)  # far from uniform
    save_model(model, folder / "teacher", tokenizer=byte_tokenizer())
    model, tokenizer = load_model(folder / "teacher").eval(), byte_tokenizer(max_seq_len=256)
    data = {split: quickstart_dataset(tokenizer, split=split) for split in (SPLIT, HELD_OUT)}
    for kind in ("hidden", "topk", "path"):
        write_cache(folder / kind, model, data[SPLIT], tokenizer, {"kind": kind})
    write_cache(folder / "held_out", model, data[HELD_OUT], tokenizer)
    with torch.no_grad():
        model.output.weight.mul_(2)
    write_cache(folder / "other", model, data[HELD_OUT], tokenizer)
    return folder


def online(made: Path) -> list[str]:
    return [f"teacher_checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {made / 'teacher'}}}"]


def cached(made: Path, kind: str = "hidden", more: str = "") -> list[str]:
    return [f"teacher={{_component_: kdtune.teachers.CachedTeacher, path: {made / kind}{more}}}"]


def train(cli: CLI, out: Path, *overrides: str) -> list[dict[str, Any]]:
    done = cli("run", *KD, f"output_dir={out}", *overrides)
    assert done.code == 0, done.err
    return rows(out)


def check(found: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float = 1e-5) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=1e-6), (theirs["step"], name)


def steps(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if not name.startswith("val_")} for row in found if "loss" in row
    ]


@pytest.mark.parametrize(
    "name", [pytest.param("fp32", marks=pytest.mark.slow("two runs; bf16 is the same code")), "bf16"]
)
def test_the_same_bits_as_with_the_teacher_itself(cli: CLI, made: Path, tmp_path: Path, name: str) -> None:
    """Captured in the run's own micro-batches: of others a sum may be rounded elsewhere."""
    done = cli(
        "run", "cache_teacher", "--config", "tiny/cache_teacher", "~teacher_model", *online(made), f"dtype={name}",
        f"stored_dtype={name}", f"dataset.split={SPLIT}", "dataset_val=null", "quality_examples=2", "batch_size=4",
        "examples_per_shard=8", f"output_dir={tmp_path / 'hidden'}",
    )  # fmt: skip
    assert done.code == 0, done.err
    settings = [f"dtype={name}", "dataset_val=null", "shuffle=false", "epochs=2"]
    expected = train(cli, tmp_path / "online", *online(made), *settings)
    assert train(cli, tmp_path / "cached", *cached(tmp_path), *settings) == expected and len(expected) == 7
    ours, theirs = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("cached", "online"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[one], theirs[one]) for one in theirs)


@pytest.mark.parametrize(
    "settings",
    [
        ["epochs=2", "gradient_accumulation_steps=3"],
        pytest.param(["padding_free=false", "kd_ratio=1.0", "kd_loss=kdtune.losses.ReverseKL"], marks=LAYOUTS),
        pytest.param(["tokens_per_micro_batch=500", "epochs=2", "seed=3"], marks=LAYOUTS),
        pytest.param(
            ["dataset.packed=true", "batch_size=2", "kd_loss={_component_: kdtune.losses.ForwardKL, temperature: 2.0}"],
            marks=LAYOUTS,
        ),
        pytest.param([f"{TOP}, k: 5}}"], marks=LAYOUTS),
    ],
)
def test_the_run_of_the_live_teacher(cli: CLI, made: Path, tmp_path: Path, settings: list[str]) -> None:
    expected = train(cli, tmp_path / "online", *online(made), *settings)
    found = train(cli, tmp_path / "cached", *cached(made, more=f", validation: {made / 'held_out'}"), *settings)
    check(found, expected)
    assert "val_kd_loss" in found[0] and found[0].keys() == expected[0].keys()


def test_top_k_is_the_run_of_the_live_teachers_top_k(cli: CLI, made: Path, tmp_path: Path) -> None:
    expected = train(cli, tmp_path / "online", *online(made), f"{TOP}, k: 8}}")
    found = train(cli, tmp_path / "cached", *cached(made, "topk"))
    check(steps(found), steps(expected))
    # Without a teacher for the held-out data, the validation measures the cross entropy alone.
    assert {name for name in found[0] if name.startswith("val_")} == {"val_class_loss"}
    record = json.loads((tmp_path / "cached" / "run.json").read_text())["starts"][0]["inputs"]["teacher"]
    assert (record["kind"], record["num_ids"], record["num_examples"]) == ("topk", 8, 24)
    assert "topk of 24 examples" in (tmp_path / "cached" / "final" / "README.md").read_text()


@pytest.mark.slow("three runs; tests/unit/teachers has parts and mixtures")
def test_a_part_a_live_validation_and_a_mixture(cli: CLI, made: Path, tmp_path: Path) -> None:
    """Two examples in three, judged by the model itself, are the run of those examples; a teacher mixed with itself is itself."""
    tokenizer, model = byte_tokenizer(max_seq_len=256), load_model(made / "teacher").eval()
    part = {"first_example": 4, "num_examples": 16}
    write_cache(tmp_path / "part", model, quickstart_dataset(tokenizer, split=SPLIT), tokenizer, part)
    (weights,) = online(made)
    live = f"{{_component_: kdtune.teachers.LiveTeacher, checkpointer: {weights.partition('=')[2]}}}"
    expected = train(cli, tmp_path / "online", *online(made), "dataset.split=train[4:20]")
    judge = [
        "teacher.validation=kdtune.teachers.LiveTeacher",
        f"teacher.validation.checkpointer={weights.partition('=')[2]}",
    ]
    done = cli("run", *KD, f"output_dir={tmp_path / 'cached'}", *cached(tmp_path, "part"), *judge)
    assert "part has the examples 4 to 19 of 24: the run trains on these" in done.err
    check(rows(tmp_path / "cached"), expected)
    (of_part,) = cached(tmp_path, "part")
    mixture = (
        f"teacher={{_component_: kdtune.teachers.Mixture, teachers: [{live}, {of_part.removeprefix('teacher=')}]}}"
    )
    check(steps(train(cli, tmp_path / "mixture", mixture, "dataset_val=null")), steps(expected))
    done = cli("plan", *KD[2:], mixture)
    assert done.code == 2 and "the memory of Mixture's teachers is not estimated" in done.err


@pytest.mark.slow("three runs; test_compare.py compares runs of a live teacher")
def test_runs_are_compared_by_the_teacher_of_their_validation(cli: CLI, made: Path, tmp_path: Path) -> None:
    for kind in ("hidden", "topk"):
        train(cli, tmp_path / kind, *cached(made, kind, f", validation: {made / 'held_out'}"), "max_steps_per_epoch=1")
    runs = f"runs=[{tmp_path / 'hidden'},{tmp_path / 'topk'}]"
    done = cli("run", "compare", runs, f"output_dir={tmp_path / 'one'}")
    assert done.code == 0 and "KL to teacher" in done.out, done.out + done.err
    train(cli, tmp_path / "other", *cached(made, "hidden", f", validation: {made / 'other'}"), "max_steps_per_epoch=1")
    done = cli("run", "compare", runs.replace("topk", "other"), f"output_dir={tmp_path / 'two'}")
    assert "left out: divergence and agreement" in done.out + done.err, done.out


@pytest.mark.slow("two runs; tests/unit/losses has the loss")
@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_the_text_alone_serves_the_sampled_reverse_kl(cli: CLI, made: Path, tmp_path: Path, estimator: str) -> None:
    loss = f"{{_component_: kdtune.losses.SampledReverseKL, estimator: {estimator}, off_policy: true}}"
    settings = [f"kd_loss={loss}", "kd_ratio=0.7"]
    expected = train(cli, tmp_path / "online", *online(made), *settings)
    found = train(cli, tmp_path / "cached", *cached(made, "path", f", validation: {made / 'held_out'}"), *settings)
    check(found, expected)
    assert {"val_kd_loss", "val_forward_kl", "val_teacher_class_loss"} <= found[0].keys()


@pytest.mark.slow("five runs; tests/unit/teachers reads what is stored")
def test_the_text_alone_serves_alm(cli: CLI, made: Path, tmp_path: Path) -> None:
    """Of examples that are not cut: where one is, the two tokenizations are cut together, and other tokens are left."""
    tokenizer = byte_tokenizer(max_seq_len=2048)
    model = llama(
        vocab_size=320, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_dim=24, max_seq_len=2048
    )
    save_model(model, tmp_path / "teacher", tokenizer=byte_tokenizer())
    for kind in ("path", "hidden"):
        write_cache(
            tmp_path / kind, model.eval(), quickstart_dataset(tokenizer, split=SPLIT), tokenizer, {"kind": kind}
        )
    settings = [
        "kd_loss=kdtune.losses.ALM",
        "kd_ratio=0.9",
        "dataset_val=null",
        "tokenizer.max_seq_len=2048",
        "model.max_seq_len=2048",
    ]
    expected = train(cli, tmp_path / "online", *online(tmp_path), *settings)
    for kind in ("path", "hidden"):
        check(train(cli, tmp_path / f"of_{kind}", *cached(tmp_path, kind), *settings), expected)
    settings.append("kd_loss.debias_threshold=0.001")
    expected = train(cli, tmp_path / "debiased", *online(tmp_path), *settings)
    check(train(cli, tmp_path / "debiased_of_hidden", *cached(tmp_path, "hidden"), *settings), expected)
    done = cli("run", *KD, f"output_dir={tmp_path / 'refused'}", *cached(tmp_path, "path"), *settings)
    assert done.code == 2 and "kind=path cannot serve debiased ALM" in done.err


@pytest.mark.slow("four runs; test_resumed_runs.py resumes others, and rows are found by example")
def test_a_killed_run_goes_on_as_the_whole_one_and_wants_the_same_cache(cli: CLI, made: Path, tmp_path: Path) -> None:
    settings = [*cached(made), "save_every_n_steps=1", "dataset_val=null"]
    expected = train(cli, tmp_path / "whole", *settings, "epochs=2")
    process = Fork("run", *KD, f"output_dir={tmp_path / 'parts'}", *settings, "epochs=2")
    while process.is_running and not (tmp_path / "parts" / "step_2").exists():
        time.sleep(0.005)
    process.send(signal.SIGKILL)
    assert process.end().code == -signal.SIGKILL, "the run ended before it was killed"
    assert train(cli, tmp_path / "parts", *settings, "epochs=2", "resume_from_checkpoint=true") == expected
    settings[0] = settings[0].replace(str(made / "hidden"), str(tmp_path / "copy"))
    shutil.copytree(made / "hidden", tmp_path / "copy")
    train(cli, tmp_path / "third", *settings)
    shutil.rmtree(tmp_path / "copy")
    tokenizer = byte_tokenizer(max_seq_len=256)
    model, data = load_model(made / "teacher").eval(), quickstart_dataset(tokenizer, split=SPLIT)
    write_cache(tmp_path / "copy", model, data, tokenizer, {"dtype": "bf16"})
    done = cli("run", *KD, f"output_dir={tmp_path / 'third'}", *settings, "epochs=3", "resume_from_checkpoint=true")
    assert done.code == 2 and "teacher.dtype: was 'fp32', is 'bf16'" in done.err and "teacher.rows: was" in done.err


@pytest.mark.parametrize(
    ("kind", "more", "settings", "said"),
    [
        ("topk", "", ["kd_loss=kdtune.losses.AdaptiveKL"], "kind=topk cannot serve adaptive KL (0.5): "),
        ("path", "", ["kd_loss=kdtune.losses.SampledReverseKL"], "SampledReverseKL is the reverse KL on text that the student has sampled"),
        ("path", "", [], "kind=path cannot serve KL: it knows the probability of the text's own tokens alone; allowed are "),
        ("topk", "", [f"{TOP}, k: 4}}"], "teacher_targets: what the divergence sees was chosen"),
        ("hidden", ", outside: renormalize", [], "teacher.outside=renormalize: is for a cache of kind=topk"),
        ("hidden", "", ["hidden_loss=kdtune.losses.HiddenStateLoss"], "hidden_loss: needs the hidden states of a teacher in"),
        ("hidden", "", ["teacher_offload=true"], "teacher_offload: has no effect beside teacher"),
        ("none", "", [], "is not a teacher cache: it has no header.json"),
        ("hidden", ", validation: {made}/none", [], "teacher.validation: "),
        ("hidden", "", ["best_metric=val_kd_loss", "run_val_every_n_steps=1", "save_every_n_steps=1"], "teacher.validation is null"),
        ("hidden", ", validation: {made}/held_out", ["~dataset_val"], "teacher.validation: has no effect without dataset_val"),
    ],
)  # fmt: skip
def test_what_a_cache_cannot_serve_is_refused_when_the_config_is_read(
    cli: CLI, made: Path, tmp_path: Path, kind: str, more: str, settings: list[str], said: str
) -> None:
    done = cli(
        "run", *KD, f"output_dir={tmp_path}/x", *cached(made, kind, more.replace("{made}", str(made))), *settings
    )
    assert done.code == 2 and said in done.err, done.err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["tokenizer.max_seq_len=128"], "dataset: {made}/hidden was captured of other examples: tokenizer.max_seq_len is 128, and was 256"),
        (["dataset.split=train[:25]"], "there are 25 examples, and were 24"),
        (["dataset.prompt=plain"], "their texts, their order or what of them is trained on differs"),
    ],
)  # fmt: skip
def test_other_data_is_refused_before_the_student_is_built(
    cli: CLI, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], said: str
) -> None:
    monkeypatch.setattr("kdtune.parallel.build_model", None)
    done = cli("run", *KD, f"output_dir={tmp_path}/x", *cached(made), *settings)
    assert done.code == 2 and said.replace("{made}", str(made)) in done.err, done.err
    assert not (tmp_path / "x").exists()


def test_the_plan_counts_head_and_rows_alone(cli: CLI, made: Path) -> None:
    """The head of 320 x 48 numbers in fp32, 0.0586 MiB, and none of the teacher's layers; with top-k not even that."""
    config, *overrides = KD[2:]
    plans = {kind: cli("plan", config, *overrides, *cached(made, kind)) for kind in ("hidden", "topk")}
    assert all(done.code == 0 and "teacher's weights" not in done.out for done in plans.values())
    (head,) = (line.split() for line in plans["hidden"].out.splitlines() if "teacher's head" in line)
    assert float(head[-1]) == pytest.approx(320 * 48 * 4 / 2**20, rel=0.05)
    assert "teacher's" not in plans["topk"].out
    done = cli("plan", config, *overrides, *cached(made), "kd_loss=kdtune.losses.ULD")
    assert done.code == 2 and "the cost of a cross-tokenizer kd_loss" in done.err
