"""kdtune run cache_teacher: its folder and table, what happens when it is stopped, and what it refuses."""

import contextlib
import io
import json
import re
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from command_line import ROOT, Fork

from kdtune.data import quickstart_dataset
from kdtune.models import llama
from kdtune.teachers.cache import KINDS, Cache, size_text
from kdtune.tokenizers import byte_tokenizer

CONFIG = "tiny/cache_teacher"
SMALL = ["max_examples=20", "examples_per_shard=4", "dataset_val=null", "quality_examples=4", "tokens_per_batch=600"]
# What a capture writes beside its own record.
RECORDS = {"run.json", "config.yaml", ".lock"}


def capture(cli, folder, *overrides):
    return cli("run", "cache_teacher", "--config", CONFIG, f"output_dir={folder}", *SMALL, *overrides)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in RECORDS}


@pytest.fixture(scope="module")
def whole(cli, tmp_path_factory) -> Path:
    """A capture of hidden states that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    done = capture(cli, folder)
    assert done.code == 0, done.err
    assert re.search(r"^hidden, bf16 +100 +\S+ +\S+ [kM]B$", done.out, flags=re.M), done.out
    shown = re.search(r" positions are kept, (\S+ [kM]B)$", done.out, flags=re.M)
    assert shown and shown[1] == size_text(json.loads((folder / "index.json").read_text())["bytes"]), done.out
    assert "the teacher has random weights, drawn with seed=0" in done.err
    return folder


def test_the_folder_is_complete(cli, whole):
    assert {"header.json", "index.json", "quality.json", "head.safetensors", *RECORDS} < {
        file.name for file in whole.iterdir()
    }
    cache = Cache(whole)
    header = cache.header
    assert header.num_shards == 5 and header.teacher["random weights"]["seed"] == 0
    data = quickstart_dataset(byte_tokenizer(max_seq_len=256))
    assert header.dataset == data.fingerprint() and header.dataset_size == len(data)
    quality = json.loads((whole / "quality.json").read_text())
    assert abs(quality["forward_kl"]) < 1e-5
    assert quality["read_back"] == {key: quality[key] for key in ("forward_kl", "num_tokens")}
    torch.manual_seed(0)
    model = llama(
        vocab_size=320, embed_dim=48, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_dim=96, max_seq_len=256
    )
    assert torch.equal(cache.head, model.output.weight)
    example = data.numbered(7)
    row = cache.read(7, example.tokens)
    with torch.no_grad():
        hidden = model(torch.from_numpy(example.tokens)[None], return_hidden=True)[0, row.positions.long()]
    assert torch.allclose(row.columns["hidden"].float(), hidden, rtol=1e-2, atol=1e-3)
    again = capture(cli, whole)
    assert again.code == 0 and "is complete" in again.out and "loading the teacher" not in again.err
    new = capture(cli, whole, "resume_from_checkpoint=false")
    assert new.code == 2 and f"output_dir={whole}: already holds a run" in new.err


def test_a_dry_run_knows_the_size_of_every_kind(cli, whole, tmp_path):
    done = capture(cli, tmp_path / "none", "dry_run=true")
    assert done.code == 0 and not any(tmp_path.iterdir()), done.err
    rows = re.findall(r"^(\w+)(?: (\d+))?, (\w+) +(\d+) +(\S+) +([\d.]+) (\w+) +(\d:\d\d:\d\d)$", done.out, flags=re.M)
    kinds = [(kind, dtype) for kind, dtypes in KINDS.items() for dtype in dtypes]
    assert [(row[0], row[2]) for row in rows] == kinds, done.out
    size = json.loads((whole / "index.json").read_text())["bytes"]
    units = {"kB": 1e3, "MB": 1e6}
    assert float(rows[0][5]) * units[rows[0][6]] == pytest.approx(size, rel=0.01)
    losses = {(row[0], row[2]): float(row[4]) for row in rows}
    assert losses["hidden", "fp32"] == 0
    assert max(losses["hidden", "bf16"], losses["hidden", "int8"]) < losses["topk", "fp32"] < losses["path", "fp32"]


@pytest.mark.parametrize("kind", ["topk", "sampled", "path"])
def test_other_kinds_go_on_where_they_stopped(cli, kind, tmp_path):
    folder = tmp_path / "cache"
    own = {"topk": ["k=8"], "sampled": ["num_draws=6"], "path": []}[kind]
    assert capture(cli, folder, f"kind={kind}", *own).code == 0
    expected = files(folder)
    for name in ("shard-00001.safetensors", "index.json", "quality.json"):
        (folder / name).unlink()
    cut_off = folder / "shard-00003.safetensors"
    cut_off.write_bytes(cut_off.read_bytes()[:-100])
    again = capture(cli, folder, f"kind={kind}", *own)
    assert again.code == 0 and f"{cut_off}: is cut off or damaged, and is captured again" in again.err
    assert files(folder) == expected
    changed = [text.replace("8", "9") for text in own]
    other = capture(
        cli, folder, f"kind={kind}", *changed, "seed=1", "tokenizer.max_seq_len=128", "tokens_per_batch=700"
    )
    assert (
        other.code == 2
        and "max_seq_len: 256 in the folder, 128 now" in other.err
        and "tokens_per_batch: 600 in the folder, 700 now" in other.err
        and "nothing is overwritten" in other.err
    )
    assert ("num_ids: 8 in the folder, 9 now" in other.err) == (kind == "topk")
    assert files(folder) == expected


def stopped(folder: Path, number: signal.Signals, num_shards: int) -> str:
    """Start the capture, and send it a signal when so many shards are there."""
    process = Fork("run", "cache_teacher", "--config", CONFIG, f"output_dir={folder}", *SMALL)
    deadline = time.monotonic() + 60
    while len(list(folder.glob("shard-*"))) < num_shards:
        assert process.is_running and time.monotonic() < deadline, process.end(timeout=0)
        time.sleep(0.0005)
    process.send(number)
    return process.end(timeout=60).err


def test_a_stopped_capture_goes_on(cli, whole, tmp_path):
    """Witness: the capture that nothing has stopped."""
    folder = tmp_path / "cache"
    stopped(folder, signal.SIGKILL, 1)
    told = stopped(folder, signal.SIGTERM, 2)
    if not (folder / "index.json").exists():  # else it came too late
        assert "error: stopped by SIGTERM: whole shards are kept; the same command goes on" in told
    done = capture(cli, folder)
    assert done.code == 0, done.err
    assert files(folder) == files(whole)


def test_the_quality_is_of_what_the_disk_has(cli, tmp_path, monkeypatch):
    """Beside held-out examples, which are in no file, those whose files are read: of numbers that were written wrong."""
    import kdtune.teachers.cache.capture as module

    def of_noise(*arguments):
        return {name: one * 0.5 for name, one in encode(*arguments).items()}

    encode = module.encode
    monkeypatch.setattr(module, "encode", of_noise)
    assert (
        capture(cli, tmp_path / "cache", "dataset_val={_component_: kdtune.data.quickstart_dataset, split: test}").code
        == 0
    )
    quality = json.loads((tmp_path / "cache" / "quality.json").read_text())
    assert abs(quality["forward_kl"]) < 1e-5 and quality["read_back"]["forward_kl"] > 100 * 1e-5


def test_packs_are_captured_by_example(cli, whole, tmp_path):
    assert capture(cli, tmp_path / "cache", "dataset.packed=true").code == 0
    assert files(tmp_path / "cache") == files(whole)


def test_a_student_learns_from_it_what_it_learns_from_the_teacher(cli, good, tmp_path):
    """The config's random teacher is drawn with the same seed in both."""
    assert capture(cli, tmp_path / "cache", "stored_dtype=fp32").code == 0
    found = {}
    for name, teacher in {
        "live": ["dataset.split=train[:20]"],
        "cached": [
            "~teacher_model",
            f"teacher={{_component_: kdtune.teachers.CachedTeacher, path: {tmp_path / 'cache'}}}",
        ],
    }.items():
        done = cli(
            "run", "knowledge_distillation", "--config", "tiny/knowledge_distillation", f"output_dir={tmp_path / name}",
            f"checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {good}/model}}", "dataset_val=null",
            "optimizer=torch.optim.SGD", "optimizer.lr=0.3", "~lr_scheduler", "sample_prompts=[]", "save_every_n_steps=null",
            "run_val_every_n_steps=null", "max_steps_per_epoch=2", *teacher,
        )  # fmt: skip
        assert done.code == 0, done.err
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found[name] = [row[key] for row in rows if "loss" in row for key in ("kd_loss", "grad_norm")]
    assert found["cached"] == pytest.approx(found["live"], rel=1e-5) and len(found["live"]) == 4


@pytest.mark.slow("starts twenty-one captures, a second each, and kills twenty of them at random moments")
def test_a_capture_that_is_killed_twenty_times(cli, tmp_path):
    """A shard for each example; until the last one is there, a killed process leaves what it has written, and hidden files."""
    folder, random, num_unfinished = tmp_path / "cache", np.random.default_rng(0), 0
    one_each = ["examples_per_shard=1", "max_examples=60"]
    assert capture(cli, tmp_path / "whole", *one_each).code == 0
    for _ in range(20):
        process = Fork("run", "cache_teacher", "--config", CONFIG, f"output_dir={folder}", *SMALL, *one_each)
        before, deadline = len(list(folder.glob("shard-*"))), time.monotonic() + random.uniform(0, 0.1)
        while process.is_running and (len(list(folder.glob("shard-*"))) == before or time.monotonic() < deadline):
            time.sleep(random.uniform(0, 0.02))
        process.send(signal.SIGKILL)
        process.end(timeout=60)
        num_unfinished += not (folder / "index.json").exists()
    assert num_unfinished >= 10
    assert capture(cli, folder, *one_each).code == 0
    assert files(folder) == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["kind=path", "stored_dtype=int8"], "stored_dtype=int8: kind=path is stored in fp32; ~stored_dtype"),
        (["temperature=2.0"], "temperature=2.0: is of kind=topk, found kind=hidden; ~temperature, or kind=topk"),
        (["num_draws=8", "k=8"], "num_draws=8: is of kind=sampled, found kind=hidden; ~num_draws, or kind=sampled"),
        (["batch_size=3"], "batch_size=3: examples_per_shard=4 must be a multiple of it"),
        (["kind=topk", "temperature=0"], "temperature=0.0: must be above 0"),
        (["kind=topk", "k=400"], "k=400: the teacher has 320 ids; choose at most so many"),
        (["k=0", "kind=topk"], "k=0: must be at least 1"),
        (["dataset.packed=true", "dataset.split_across_pack=true"], "dataset.split_across_pack=true: examples that are cut"),
        (["first_example=200"], "first_example=200: the data set has 189 examples, counted from 0"),
        (["~teacher_model"], "teacher_checkpointer: missing, and no teacher_model to start from random weights"),
        (["teacher_device=cpu"], "teacher_device=cpu: nothing runs beside this teacher; ~teacher_device"),
        (["parallelism.tp=2"], "parallelism.tp=2: a capture needs whole output heads"),
    ],
)  # fmt: skip
def test_what_is_refused(cli, tmp_path, overrides, words):
    done = capture(cli, tmp_path / "cache", *overrides)
    assert done.code == 2 and words in done.err and not (tmp_path / "cache").exists(), done.err


def test_a_stream_is_refused(cli, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"input": "Why?", "output": "Because."}\n' * 4)
    source = f"{{_component_: kdtune.data.instruct_dataset, source: {tmp_path}/rows.jsonl, streaming: true}}"
    done = capture(cli, tmp_path / "cache", f"dataset={source}")
    assert done.code == 2 and "dataset: is a stream, whose examples have no index" in done.err, done.err


def test_a_disk_without_room_is_refused_and_what_is_there_counts(cli, whole, tmp_path, monkeypatch):
    """Room for all but the files of the first two shards is enough once they are there."""
    half = tmp_path / "half"
    shutil.copytree(whole, half)
    for name in ("index.json", "shard-00002.safetensors", "shard-00003.safetensors", "shard-00004.safetensors"):
        (half / name).unlink()
    free = sum(file.stat().st_size for file in whole.glob("shard-0000[234].safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    done = capture(cli, tmp_path / "new" / "cache")
    assert done.code == 2 and "not enough space" in done.err and f"{size_text(free)} free" in done.err, done.err
    assert "loading the teacher" not in done.err and not (tmp_path / "new").exists()
    assert capture(cli, half).code == 0 and files(half) == files(whole)


def test_a_folder_of_something_else_is_refused(cli, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = capture(cli, tmp_path)
    assert done.code == 2 and "is not empty and holds no teacher cache" in done.err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def scripts() -> dict[str, str]:
    """The scripts of docs/teacher_cache.md, by name."""
    found = re.findall(
        r'```python\n(""".*?python (\w+\.py).*?)```', (ROOT / "docs/teacher_cache.md").read_text(), flags=re.S
    )
    return {name: text for text, name in found}


def run_script(folder: Path, monkeypatch, name: str, *arguments: str, given: str) -> str:
    """What a script prints; in this process, which has imported torch and transformers."""
    text, out = scripts()[name], io.StringIO()
    code = re.sub(r'""".*?"""', "", text, flags=re.S)
    assert "kdtune" not in code
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 30, (
        "a script to read at a glance"
    )
    (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(given))
    with contextlib.redirect_stdout(out):
        runpy.run_path(name)
    return out.getvalue()


@pytest.mark.parametrize("settings", [["kind=hidden", "stored_dtype=fp32"], ["kind=topk", "stored_dtype=fp32", "k=16"]])
def test_the_script_of_the_docs_reads_a_row_beside_transformers(cli, good, tmp_path, monkeypatch, settings):
    """The KL that transformers' logits have from what is stored is what the capture says of it."""
    source = [
        "~teacher_model",
        f"teacher_checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {good}/model}}",
    ]
    done = capture(
        cli, tmp_path / "cache", *source, "first_example=3", "max_examples=1", "quality_examples=1", *settings
    )
    assert done.code == 0, done.err
    ids = quickstart_dataset(byte_tokenizer(max_seq_len=256))[3].tokens.tolist()
    out = run_script(tmp_path, monkeypatch, "read_row.py", "cache", f"{good}/model", "3", given=json.dumps(ids))
    (found,) = re.findall(r"KL (\S+) nats, (\d+) positions", out)
    expected = json.loads((tmp_path / "cache" / "quality.json").read_text())
    assert float(found[0]) == pytest.approx(expected["forward_kl"], rel=1e-3, abs=1e-6)
    assert int(found[1]) == expected["num_tokens"]


def test_the_script_of_the_docs_writes_a_cache(cli, tmp_path, monkeypatch):
    assert capture(cli, tmp_path / "template", "kind=path", "max_examples=1", "quality_examples=1").code == 0
    data = quickstart_dataset(byte_tokenizer(max_seq_len=256))
    random, rows = np.random.default_rng(0), []
    for index in range(2):
        num = len(data[index].tokens) - 1
        logp = np.log(random.dirichlet(np.ones(5), num)[:, :3])
        rows.append(
            {"tokens": data[index].tokens.tolist(), "ids": [[4, 9, 1]] * num, "logp": (-np.sort(-logp)).tolist()}
        )
    run_script(tmp_path, monkeypatch, "write_cache.py", "template", "cache", given="\n".join(map(json.dumps, rows)))
    cache = Cache(tmp_path / "cache")
    for index, row in enumerate(rows):
        found = cache.read(index, data[index].tokens)
        assert found.positions.tolist() == list(range(len(row["ids"]))) and found.columns["ids"].tolist() == row["ids"]
        assert np.allclose(found.columns["logp"], row["logp"])
        rest = 1 - np.exp(row["logp"]).sum(-1)
        assert np.allclose(np.exp(found.columns["log_tail"]), rest, atol=1e-6)


def test_a_quantized_teacher_is_captured(cli, good, tmp_path):
    source = [
        "~teacher_model",
        f"teacher_checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {good}/model}}",
    ]
    done = capture(cli, tmp_path / "cache", *source, "teacher_quantization=int8", "max_examples=2", "kind=path")
    assert done.code == 0, done.err
    assert Cache(tmp_path / "cache").header.teacher["quantization"] == "int8"


def test_a_teacher_that_transformers_computes(cli, tmp_path):
    """Its logits are the witness."""
    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model(
        "gpt_neox", vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(settings).eval()
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save(tmp_path / "model", is_chat=True)
    node = f"{{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {tmp_path}/model, family: kdtune.models.hf_model}}"
    done = capture(cli, tmp_path / "cache", "~teacher_model", f"teacher_checkpointer={node}", "max_examples=3", "kind=topk", "k=4",
                   "stored_dtype=fp32", "positions=all")  # fmt: skip
    assert done.code == 0, done.err
    cache, data = Cache(tmp_path / "cache"), quickstart_dataset(byte_tokenizer(max_seq_len=256))
    for index in range(3):
        row = cache.read(index, data[index].tokens)
        with torch.no_grad():
            logp = model(torch.from_numpy(data[index].tokens)[None]).logits[0, :-1].double().log_softmax(-1)
        expected, ids = logp.topk(4)
        assert torch.allclose(row.columns["logp"].double(), expected, atol=1e-4)
        assert torch.allclose(logp.gather(1, row.columns["ids"].long()), expected, atol=1e-4) and ids.shape == (
            len(logp),
            4,
        )
