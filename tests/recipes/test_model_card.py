"""The model card in final/: read by huggingface_hub, rendered, and followed to the letter with transformers and peft."""

import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from command_line import CLI
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from kdtune.checkpoint import load_model
from kdtune.distributed import SINGLE_PROCESS
from kdtune.runs import run_facts, write_final
from kdtune.runs.model_card import component_text, model_card
from kdtune.runs.origin import base_model, model_name

CHECKPOINTER = "checkpointer._component_=kdtune.checkpoint.Checkpointer"
BASE_CARD = "---\nlicense: apache-2.0\ntags: [base]\n---\n# The base's own card\n"


@pytest.fixture(scope="module")
def base(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as a hub download leaves it, with a card and a licence of its own."""
    folder = shutil.copytree(good / "model", tmp_path_factory.mktemp("models") / "Tiny-Instruct")
    (folder / "README.md").write_text(BASE_CARD)
    (folder / "LICENSE").write_text("MIT License\n\nCopyright (c) nobody\n")
    (folder / ".kdtune-download").mkdir()
    (folder / ".kdtune-download/record.json").write_text(json.dumps({"source": "acme/Tiny-Instruct", "files": {}}))
    return folder


@pytest.fixture(scope="module")
def adapted(cli: CLI, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Distilled with LoRA from rows in a file; final/ has the merged model and the adapter."""
    folder = tmp_path_factory.mktemp("private")
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"{n} it is"} for n in range(8)]
    (folder / "my rows|<b>.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = cli(
        "run", "knowledge_distillation", "--config", "tiny/knowledge_distillation", f"output_dir={folder}/run", "~model",
        CHECKPOINTER, f"checkpointer.checkpoint_dir={base}", "adapter=kdtune.models.apply_lora", "adapter.lora_rank=2",
        "dataset=kdtune.data.alpaca_dataset", f"dataset.source='{folder}/my rows|<b>.jsonl'", "dataset.split=train[:6]",
        "sample_prompts=[]", "epochs=2", "batch_size=3", "gradient_accumulation_steps=1", "kd_ratio=0.75", "seed=3",
        "save_every_n_steps=null", "max_steps_per_epoch=null",
    )  # fmt: skip
    assert done.code == 0, done.err
    return folder / "run"


def table(card: ModelCard, heading: str) -> list[list[str]]:
    """The cells of the table below a heading, as text."""
    page = MarkdownIt("commonmark").enable("table").render(card.text.split(f"## {heading}")[1].split("\n## ")[0])
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page, flags=re.S)]
    return [[cell.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") for cell in row] for row in rows]


def python_of(card: ModelCard, **folders: Path) -> str:
    code = re.findall(r"```python\n(.*?)```", card.text, flags=re.S)[0]
    for name, folder in folders.items():
        code = code.replace(f'"{name}"', repr(str(folder)))
    return code


def test_the_front_matter_is_the_hubs(adapted: Path) -> None:
    for folder, library in ((adapted / "final", "transformers"), (adapted / "final/adapter", "peft")):
        data = ModelCard.load(folder / "README.md").data
        assert (data.base_model, data.license, data.library_name) == ("acme/Tiny-Instruct", "apache-2.0", library)
        assert data.tags == ["kdtune", "knowledge-distillation", "lora"] and data.pipeline_tag == "text-generation"
    text = (adapted / "final/README.md").read_text()
    assert "The base's own card" not in text and str(adapted.parent) not in text, "nor a path of this machine"
    assert (adapted / "final/LICENSE").is_file()


def test_it_says_what_was_done_and_what_came_out(adapted: Path) -> None:
    card = ModelCard.load(adapted / "final/README.md")
    facts = dict(row for row in table(card, "Training")[1:])
    assert facts["base model"] == "acme/Tiny-Instruct" and facts["teacher"] == "random weights"
    assert facts["loss"] == "(1 - kd_ratio) × cross entropy + kd_ratio × divergence" and facts["kd_ratio"] == "0.75"
    assert facts["data"].startswith("kdtune.data.alpaca_dataset(source=my rows|<b>.jsonl, split=train[:6])")
    assert facts["held-out data"].startswith("kdtune.data.quickstart_dataset(split=test)")
    rows = [json.loads(line) for line in (adapted / "metrics.jsonl").read_text().splitlines()]
    tokens = sum(row.get("num_valid_tokens", 0) for row in rows)
    assert (facts["steps"], facts["examples a step"], facts["tokens with a label"]) == ("4", "3", f"{tokens:,.0f}")
    assert facts["learning rate"] == "0.01" and "get_cosine_schedule_with_warmup(" in facts["schedule"]
    assert facts["seed"] == "3" and f"torch {version('torch')}" in facts["versions"]
    header, before, after, teacher = table(card, "Held-out results")
    assert header == ["model", "cross entropy", "perplexity", "KL to the teacher", "same top token"]
    assert before[1] == f"{rows[0]['val_class_loss']:.4f}" and after[1] == f"{rows[-1]['val_class_loss']:.4f}"
    assert after[3] == f"{rows[-1]['val_kd_loss']:.4f}" and (before[0], after[0]) == ("step 0", "step 4")
    assert "cross entropy and KL in nats" in card.text
    assert teacher[:2] == ["teacher", f"{rows[0]['val_teacher_class_loss']:.4f}"]


def test_its_code_loads_the_model(adapted: Path, base: Path) -> None:
    tokens = torch.tensor([[1, 2, 3]])
    logits = {}
    for kind, folder in (("model", adapted / "final"), ("adapter", adapted / "final/adapter")):
        found: dict[str, object] = {}
        exec(python_of(ModelCard.load(folder / "README.md"), FOLDER=folder, BASE=base), found)
        logits[kind] = found["model"](tokens).logits  # type: ignore[operator]
        assert found["tokenizer"]("abc").input_ids  # type: ignore[operator]
    torch.testing.assert_close(logits["model"], logits["adapter"], rtol=1e-4, atol=1e-5)


def test_its_command_answers(cli: CLI, adapted: Path, base: Path) -> None:
    for folder in (adapted / "final", adapted / "final/adapter"):
        command = re.findall(r"kdtune (run generate .*)", (folder / "README.md").read_text())[0]
        words = command.replace("FOLDER", str(folder)).replace("BASE", str(base)).split()
        done = cli(*words, "prompt=Hi", "max_new_tokens=2", "device=cpu")
        assert done.code == 0, done.err


def test_the_model_that_a_pruned_one_was_made_from(cli: CLI, base: Path, tmp_path: Path) -> None:
    """Pruned, then trained twice, the last time with the quantized base as teacher."""
    own = [CHECKPOINTER, "model=null", "device=cpu"]
    done = cli("run", "prune", "--config", "tiny/prune", f"output_dir={tmp_path}/Small", *own, "num_layers=1",
               f"checkpointer.checkpoint_dir={base}", "method=even")  # fmt: skip
    assert done.code == 0, done.err
    done = cli("run", "quantize", "--config", "tiny/quantize", f"output_dir={tmp_path}/Quick", *own,
               f"checkpointer.checkpoint_dir={base}", "dataset_val=null")  # fmt: skip
    assert done.code == 0, done.err
    card = ModelCard.load(tmp_path / "Small/README.md")
    assert (card.data.base_model, card.data.license, card.data.tags) == (
        "acme/Tiny-Instruct",
        "apache-2.0",
        ["kdtune", "pruned"],
    )
    assert "It has 1 of the 2 layers (0) of acme/Tiny-Instruct, and was not trained since." in card.text
    start = [
        "sample_prompts=[]",
        "max_steps_per_epoch=1",
        "lr_scheduler=null",
        "save_every_n_steps=null",
        "run_val_every_n_steps=null",
        *own,
    ]
    done = cli("run", "finetune", "--config", "tiny/finetune", f"output_dir={tmp_path}/first", *start,
               f"checkpointer.checkpoint_dir={tmp_path}/Small")  # fmt: skip
    assert done.code == 0, done.err
    card = ModelCard.load(tmp_path / "first/final/README.md")
    assert (card.data.base_model, card.data.license) == ("acme/Tiny-Instruct", "apache-2.0")
    facts = dict(table(card, "Training")[1:])
    assert facts["base model"] == "Small (1 of the 2 layers of acme/Tiny-Instruct)"
    assert "# Small (1 of the 2 layers of acme/Tiny-Instruct), finetuned" in card.text
    done = cli("run", "knowledge_distillation", "--config", "tiny/knowledge_distillation", f"output_dir={tmp_path}/second",
               *start, f"checkpointer.checkpoint_dir={tmp_path}/first/final", "teacher_model=null",
               "teacher_checkpointer._component_=kdtune.checkpoint.Checkpointer",
               f"teacher_checkpointer.checkpoint_dir={tmp_path}/Quick")  # fmt: skip
    assert done.code == 0, done.err
    card = ModelCard.load(tmp_path / "second/final/README.md")
    assert (card.data.base_model, card.data.license) == ("acme/Tiny-Instruct", "apache-2.0")
    facts = dict(table(card, "Training")[1:])
    assert facts["base model"] == "first/final"
    assert facts["teacher"] == "Quick (int8_weight_only weights of acme/Tiny-Instruct)"


def test_a_model_of_a_python_package_goes_by_its_files_name(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    (folder / ".kdtune-download").mkdir(parents=True)
    (folder / ".kdtune-download/record.json").write_text(json.dumps({"source": "pypi:acme-models==1.2", "files": {}}))
    assert model_name({"checkpoint_dir": str(folder)}) == "acme-models"
    (folder / "Acme-1.5B-Instruct.Q4_1.gguf").touch()
    for given in (folder, folder / "Acme-1.5B-Instruct.Q4_1.gguf"):
        assert model_name({"checkpoint_dir": str(given)}) == "Acme-1.5B-Instruct"
        assert base_model({"checkpoint_dir": str(given)}) == "Acme-1.5B-Instruct"
    for stored in ("IQ4_XS", "BF16", "F32", "Q4_K_M", "Q8_0"):
        (next(folder.glob("*.gguf"))).rename(folder / f"Acme-1.5B-Q.{stored}.gguf")
        assert model_name({"checkpoint_dir": str(folder)}) == "Acme-1.5B-Q"


def test_of_random_weights(good: Path) -> None:
    card = ModelCard.load(good / "run/final/README.md")
    assert card.data.base_model is None and card.data.license is None
    assert "# A model of random weights, distilled" in card.text


def test_another_divergence_goes_by_its_own_name(good: Path, tmp_path: Path) -> None:
    run = shutil.copytree(good / "run", tmp_path / "run", ignore=shutil.ignore_patterns("step_*", "final"))
    (run / "metrics.jsonl").write_text(
        '{"step": 0, "val_class_loss": null, "val_kd_loss": 1.5, "val_agreement": null}\n'
    )
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("kdtune.losses.ForwardKL", "mine.Skewed"))
    record = json.loads((run / "run.json").read_text())
    del record["starts"][-1]["divergence"]  # as an older version left it
    (run / "run.json").write_text(json.dumps(record))
    text = model_card(run, "model")
    assert "| Skewed to the teacher |" in text and "KL" not in text.split("## Held-out results")[1]
    assert "| step 0 | - | - | 1.5000 | - |" in text


def test_what_the_config_alone_does_not_say_is_in_the_record(
    cli: CLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builder in `model` gives the adapters, and a function of the user's own the forward KL."""
    (tmp_path / "own_losses.py").write_text(
        "from kdtune.losses import ForwardKLLoss\n\n\ndef make_it():\n    return ForwardKLLoss()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    done = cli(
        "run", "knowledge_distillation", "--config", "tiny/knowledge_distillation", f"output_dir={tmp_path}/run",
        "model._component_=kdtune.models.lora_llama", "model.lora_attn_modules=[q_proj]", "model.lora_rank=2",
        "kd_loss._component_=own_losses.make_it", "sample_prompts=[]", "max_steps_per_epoch=2",
        "save_every_n_steps=null", "run_val_every_n_steps=null",
    )  # fmt: skip
    assert done.code == 0, done.err
    start = json.loads((tmp_path / "run/run.json").read_text())["starts"][-1]
    assert start["adapters"] is True and start["divergence"] == "KL"
    card = ModelCard.load(tmp_path / "run/final/README.md")
    assert "lora" in card.data.tags
    trained = dict(table(card, "Training")[1:])["trained"]
    assert trained.startswith("the adapters of kdtune.models.lora_llama(") and "lora_rank=2" in trained
    assert table(card, "Held-out results")[0][3] == "KL to the teacher"
    compared = cli("run", "compare", f"runs=[{tmp_path}/run]")
    assert compared.code == 0 and "KL to teacher" in compared.out


def test_a_model_is_not_lost_for_want_of_its_card(good: Path, tmp_path: Path) -> None:
    """A run of a recipe of the user's own may have another config, and a damaged log."""
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    write_final(tmp_path, load_model(good / "model"), SINGLE_PROCESS, base=None, tokenizer=None)
    assert (tmp_path / "final/model.safetensors").is_file() and not (tmp_path / "final/README.md").exists()


def test_a_teacher_that_was_only_measured_has_not_taught(good: Path, tmp_path: Path) -> None:
    """As the quickstart's finetuned model, of knowledge_distillation with kd_ratio=0."""
    run = shutil.copytree(good / "run", tmp_path / "run", ignore=shutil.ignore_patterns("step_*", "final"))
    config = (run / "config.yaml").read_text()
    assert "kd_ratio: 0.5\n" in config
    (run / "config.yaml").write_text(config.replace("kd_ratio: 0.5\n", "kd_ratio: 0.0\n"))
    card = ModelCard(model_card(run, "model"))
    assert card.data.tags == ["kdtune", "sft"]
    assert "# A model of random weights, finetuned" in card.text and "to follow its teacher" not in card.text
    facts = dict(table(card, "Training")[1:])
    assert facts["loss"] == "cross entropy" and facts["kd_ratio"] == "0" and "teacher" not in facts
    assert facts["teacher of the held-out results"] == "random weights"
    assert table(card, "Held-out results")[0][3:] == ["KL to the teacher", "same top token"]


def test_no_path_of_this_machine_stands_in_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my data/of mine").mkdir(parents=True)
    for value, shown in [
        ({"train": "/home/me/a.jsonl", "test": ["~/b.jsonl"]}, "{train: a.jsonl, test: [b.jsonl]}"),
        ("my private data/rows of mine.jsonl", "rows of mine.jsonl"),
        ("my data/of mine", "of mine"),
        ("acme/rows", "acme/rows"),
        ("Answer with yes/no only", "Answer with yes/no only"),
    ]:
        assert component_text({"_component_": "mine.data", "x": value}) == f"mine.data(x={shown})"


def test_what_a_resume_changed_is_in_the_card() -> None:
    config = {"dataset": {"_component_": "kdtune.data.alpaca_dataset"}, "dtype": "fp32", "seed": 0, "batch_size": 4, "tokenizer": {},
              "gradient_accumulation_steps": 1, "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-4}}  # fmt: skip
    changed = {"optimizer.lr": {"was": 3e-4, "is": 1e-4}, "resume_changes": {"was": [], "is": ["optimizer.lr"]}}
    start = {"versions": {"kdtune": "0.1"}, "step": 4, "changed": changed}
    facts = dict(run_facts(config, start, [{"step": 9, "loss": 1.0, "num_valid_tokens": 3}]))
    assert facts["changed after step 4"] == "optimizer.lr 0.0003 -> 0.0001"
    assert not any(name.startswith("changed") for name in dict(run_facts(config, {**start, "changed": {}}, [])))
