"""What is written beside the weights, and that it comes whole or not at all. transformers reads it in tests/parity."""

import json
import multiprocessing
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoint_samples import assert_same_weights, tiny_model, write_gguf
from safetensors import safe_open
from safetensors.torch import load_file

from kdtune.checkpoint import clean_leftovers, load_model, save_model
from kdtune.checkpoint.atomic import atomic_folder
from kdtune.checkpoint.state import state_writer
from kdtune.errors import CheckpointError
from kdtune.models import llama


class FakeTokenizer:
    bos_id: int | None = 1
    eos_id: int | None = 2
    pad_id = 2
    stop_ids = frozenset({2, 7})

    def trained_stop_ids(self, *, is_chat: bool) -> frozenset[int]:
        return frozenset({2, 7} if is_chat else {2})

    def save(self, folder: Path, *, is_chat: bool) -> None:
        (folder / "tokenizer.json").write_text("{}")


def test_files_of_a_plain_model(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path / "m")
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        # The tied head is the embedding: written once.
        names = set(file.keys())
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == config["torch_dtype"] == "float32"


def test_shards_hold_each_tensor_once_and_the_index_says_where(tmp_path: Path) -> None:
    model = tiny_model(tie=False)
    save_model(model, tmp_path / "m", max_shard_bytes=30_000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    found = {name: file.name for file in files for name in load_file(file)}
    assert found == index["weight_map"]
    assert len(found) == len(model.state_dict())
    assert index["metadata"]["total_size"] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert all(file.stat().st_size < 34_000 for file in files)


def test_ids_come_from_the_tokenizer_where_there_is_no_base(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path / "m", tokenizer=FakeTokenizer())
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, [2, 7], 2)
    assert (tmp_path / "m" / "tokenizer.json").is_file()


def test_what_the_base_says_is_kept_and_its_terms_travel(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    save_model(tiny_model(layers=3, dtype=torch.bfloat16), base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "eos_token_id": [7, 6, 2], "initializer_range": 0.5}))
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": [7, 2]}))
    terms = ["LICENSE", "LICENSE.txt", "license.md", "Licence", "USE_POLICY.md", "Notice", "COPYING"]
    others = ["README.md", "LICENSE.safetensors", "tokenizer.json", "notes.txt"]
    for name in terms + others:
        (base / name).write_text(f"terms in {name}")
    (base / "licenses").mkdir()
    save_model(tiny_model(layers=2), out, base=base, tokenizer=FakeTokenizer())
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*terms, "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    )
    assert all((out / name).read_text() == f"terms in {name}" for name in terms)
    written = json.loads((out / "config.json").read_text())
    assert (written["eos_token_id"], written["initializer_range"]) == ([7, 6, 2], 0.5)
    assert (written["num_hidden_layers"], written["dtype"]) == (2, "float32")
    assert json.loads((out / "generation_config.json").read_text()) == {"temperature": 0.6, "eos_token_id": [7, 2]}


@pytest.mark.parametrize(
    ("of_base", "written"),
    [
        ({"eos_token_id": 0, "bos_token_id": 1}, {"eos_token_id": [2, 0, 7], "bos_token_id": 1, "pad_token_id": 2}),
        ({"eos_token_id": [7, 2], "bos_token_id": 0}, {"eos_token_id": [2, 7], "bos_token_id": 1, "pad_token_id": 2}),
        ({}, {"eos_token_id": [2, 7], "bos_token_id": 1, "pad_token_id": 2}),
        ({"eos_token_id": [7, 2, 9]}, {"eos_token_id": [7, 2, 9]}),
    ],
    ids=["stops elsewhere", "begins otherwise", "silent", "says it already"],
)
def test_what_the_base_does_not_say_of_the_tokens_trained_on_is_added(
    tmp_path: Path, of_base: dict[str, object], written: dict[str, object]
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    save_model(tiny_model(), base)
    for name in ("config.json", "generation_config.json"):
        kept = json.loads((base / name).read_text()) if name == "config.json" else {"temperature": 0.6}
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kept.pop(key, None)
        (base / name).write_text(json.dumps({**kept, **of_base}))
    save_model(tiny_model(), out, base=base, tokenizer=FakeTokenizer(), is_chat=True)
    config = json.loads((out / "config.json").read_text())
    assert {key: config[key] for key in config if key in written or key in of_base} == written
    assert json.loads((out / "generation_config.json").read_text()) == {"temperature": 0.6, **written}


def test_a_gguf_file_is_a_base_too(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    write_gguf(base / "m.gguf", tiny_model())
    (base / "LICENSE").write_text("terms")
    for number, place in enumerate((base, base / "m.gguf")):
        save_model(tiny_model(), tmp_path / str(number), base=place)
        assert (tmp_path / str(number) / "LICENSE").read_text() == "terms"


def test_the_model_is_left_as_it_is(tmp_path: Path) -> None:
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(model, tmp_path / "m")
    assert model.output.weight is model.tok_embeddings.weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_existing_folder_is_refused_and_kept(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"m: exists and is not empty"):
        save_model(tiny_model(seed=1), tmp_path / "m")
    assert_same_weights(load_model(tmp_path / "m"), tiny_model())


def test_tokenizer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class Failing(FakeTokenizer):
        def save(self, folder: Path, *, is_chat: bool) -> None:
            raise CheckpointError(f"{folder / 'tokenizer.json'}: no")

    with pytest.raises(CheckpointError, match=f"^{tmp_path / 'm' / 'tokenizer.json'}: no$"):
        save_model(tiny_model(), tmp_path / "m", tokenizer=Failing())
    assert list(tmp_path.iterdir()) == []


def save_on_a_full_disk(target: Path, told: Path) -> None:
    """A limit on a file's size stands for the full disk."""
    model = llama(vocab_size=64, embed_dim=64, num_layers=2, num_heads=4, intermediate_dim=128)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(8).reshape(1, 8)).sum().backward()
    optimizer.step()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    def save_state(folder: Path) -> None:
        with atomic_folder(folder) as hidden:
            state_writer(model=model, optimizer=optimizer, extra={})(hidden, None)

    for save in (lambda folder: save_model(model, folder), save_state):
        with pytest.raises(CheckpointError) as error:
            save(target)
        with told.open("a") as lines:
            print(error.value, file=lines)


def test_full_disk_is_one_readable_error_and_leaves_nothing(tmp_path: Path) -> None:
    """One for the weights, one for the resume state; the limit is a fork's."""
    told, folder = tmp_path / "told", tmp_path / "folder"
    folder.mkdir()
    process = multiprocessing.get_context("fork").Process(target=save_on_a_full_disk, args=(folder / "m", told))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    lines = told.read_text().splitlines()
    assert len(lines) == 2, lines
    assert all(str(folder / "m") in line and "free" in line and ".partial-" not in line for line in lines), lines
    assert list(folder.iterdir()) == []


SAVER = """
import itertools, sys, torch
from pathlib import Path
from kdtune.checkpoint import CheckpointManager
from kdtune.models import llama
torch.manual_seed(0)
model = llama(vocab_size=96, embed_dim=32, num_layers=2, num_heads=4, intermediate_dim=64, tie_embeddings=True)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.arange(8).reshape(1, 8)).sum().backward()
optimizer.step()
manager = CheckpointManager(Path(sys.argv[1]), keep_last_n=2, async_save=sys.argv[2] == "async")
print("ready", flush=True)
for step in itertools.count(1):
    with torch.no_grad():
        model.norm.weight.fill_(step)
    manager.save(step, model=model, optimizer=optimizer, extra={}, metrics={"loss": 1.0 / step})
"""


@pytest.mark.slow("twelve processes killed at random moments; a whole run is killed once in tests/recipes")
@pytest.mark.parametrize("how", ["sync", "async"])
def test_sigkill_while_saving_steps_leaves_only_folders_that_load(how: str, tmp_path: Path) -> None:
    """Killed in the middle of model files, resume state, renames and deletions."""
    from kdtune.checkpoint import load_state, newest_step, step_folders, step_number

    moments = random.Random(1)
    found = cut_short = 0
    for attempt in range(6):
        root = tmp_path / str(attempt)
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(root), how], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(moments.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        # Whatever has a step's name is whole: there is no half one to skip.
        folders = step_folders(root)
        assert [path for path in root.glob("step_*") if path not in folders] == []
        for folder in folders:
            found += 1
            model = load_model(folder)
            assert torch.equal(model.norm.weight, torch.full((32,), float(step_number(folder))))
            optimizer = torch.optim.AdamW(model.parameters())
            extra = load_state(folder / "state", model=model, optimizer=optimizer)
            assert extra["step"] == step_number(folder)
        assert newest_step(root) == (folders[-1] if folders else None)
        cut_short += len(clean_leftovers(root))
        assert [path.name for path in root.glob(".*")] == []
    print(f"{found} whole folders, {cut_short} cut short")
    assert found > 0 and cut_short > 0
