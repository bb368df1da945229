"""docs/extending.md: each file and each command, as they stand there, run outside the package."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kdtune._cli.main import main
from kdtune.checkpoint import Checkpointer, load_model
from kdtune.config import resolve
from kdtune.errors import CheckpointError
from kdtune.tokenizers import byte_tokenizer

DOCS = Path(__file__).parent.parent / "docs/extending.md"


def files_and_commands() -> dict[str, list[str]]:
    """The commands below each file, by the heading that both stand under."""
    text = DOCS.read_text()
    sections = re.split(r"^## ", text, flags=re.M)[1:]
    return {
        section.partition("\n")[0]: re.findall(r"^    (kdtune .*)$", section.replace("\\\n", " "), flags=re.M)
        for section in sections
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, code in re.findall(r"```python\n# (\S+)\n(.*?)```", DOCS.read_text(), flags=re.S):
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("cwm", "cwm-sft"):
        write_base(tmp_path / name)
    return tmp_path


def write_base(folder: Path) -> None:
    """A random model of transformers, and the byte tokenizer, which the tiny configs use."""
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 256,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 9}  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.CwmConfig(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    byte_tokenizer().save(folder)


def shown_to(model: Any) -> torch.Tensor:
    """Logits of a few tokens."""
    with torch.no_grad():
        found = model.eval()(torch.arange(30, 60)[None])
    return found if isinstance(found, torch.Tensor) else found.logits


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("heading", files_and_commands())
def test_the_file_of_a_section_is_run(heading: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, command in enumerate(files_and_commands()[heading]):
        arguments, out = shlex.split(command)[1:], folder / f"out{number}"
        if arguments[0] == "run":
            arguments.append(f"output_dir={out}")
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        printed = capsys.readouterr()
        assert ended.value.code == 0, printed.err
        if arguments[0] != "run":
            continue
        trained = [row for row in rows(out) if "loss" in row]
        assert len(trained) == 10 and trained[-1]["class_loss"] < trained[0]["class_loss"]
        assert (out / "final/model.safetensors").is_file()
        if heading == "A divergence":
            assert "Rényi (0.3) to teacher" in printed.out
        if heading == "A teacher":
            assert all(0 < row["kd_loss"] < 20 for row in trained)
        if heading == "A recipe":
            assert trained[0]["loss"] > 1.9 * trained[0]["class_loss"]  # nearly every token is hard at first


def test_every_section_is_a_file_with_its_command(folder: Path) -> None:
    assert len(list(folder.glob("my_*.py"))) == len(files_and_commands()) == 5
    assert all(files_and_commands().values())
    assert os.environ.get("RANK") is None


def test_a_finished_run_of_ones_own_recipe_is_left_as_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = files_and_commands()["A recipe"]
    run = [*shlex.split(command)[1:], f"output_dir={folder / 'out'}", "save_every_n_steps=null"]
    found = []
    for again in ([], ["resume_from_checkpoint=true"]):
        with pytest.raises(SystemExit) as ended:
            main([*run, *again])
        assert ended.value.code == 0, capsys.readouterr().err
        found.append({path.name: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()})
    assert "all 10 steps are done" in capsys.readouterr().out
    for files in found:  # drawn again
        files.pop("loss.png")
    assert found[0] == found[1]


def test_a_family_of_ones_own_is_trained_resumed_and_read_by_transformers(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = files_and_commands()["A model family"][0]
    run = [*shlex.split(command)[1:], "adapter=null", f"output_dir={folder / 'out'}"]

    def kdtune(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        printed = capsys.readouterr()
        assert ended.value.code == 0, printed.err
        return printed.out

    family = resolve("my_cwm.CWM")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "cwm-sft")
    ours = Checkpointer(folder / "cwm-sft", family=family).load()
    torch.testing.assert_close(shown_to(ours), shown_to(theirs), rtol=1e-5, atol=1e-5)

    kdtune("validate", *run[1:])
    kdtune(*run)
    final = transformers.AutoModelForCausalLM.from_pretrained(folder / "out/final")
    assert type(final).__name__ == "CwmForCausalLM"
    assert (final.config.sliding_window, final.config.layer_types) == (9, ["full_attention", "sliding_attention"])
    assert not torch.equal(
        final.model.layers[1].self_attn.q_proj.weight, theirs.model.layers[1].self_attn.q_proj.weight
    )
    trained = shown_to(Checkpointer(folder / "out/final", family=family).load())
    torch.testing.assert_close(shown_to(final), trained, rtol=1e-5, atol=1e-5)

    before = (folder / "out/final/model.safetensors").read_bytes()
    for name in ("final", "step_10"):
        shutil.rmtree(folder / "out" / name)
    kdtune(*run, "resume_from_checkpoint=true")
    assert (folder / "out/final/model.safetensors").read_bytes() == before

    kdtune("run", "evaluate", f"run={folder / 'out'}", "tasks=[]", "batch_size=4")
    with pytest.raises(CheckpointError, match=r"CwmForCausalLM.*want LlamaForCausalLM.*`family`"):
        load_model(folder / "out/final")


OWN_BUILDER = """
from kdtune.models import Transformer, TransformerConfig

def tiny(qk_norm: str | None = None) -> Transformer:
    return Transformer(TransformerConfig(
        vocab_size=320, embed_dim=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_dim=64, max_seq_len=256,
        norm_eps=1e-5, rope_base=1e4, rope_scaling=None, tie_embeddings=False, qk_norm=qk_norm,
    ))
"""


def test_a_builder_of_ones_own_that_names_no_family(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its model is saved and read again as Llama's are; one that no Llama computes is refused before it is trained."""
    (folder / "own_builder.py").write_text(OWN_BUILDER)

    def finetune(name: str, *overrides: str) -> int | str | None:
        few = [
            "max_steps_per_epoch=3",
            "~dataset_val",
            "~run_val_every_n_steps",
            "~sample_prompts",
            "~sample_max_new_tokens",
        ]
        model = "model={_component_: own_builder.tiny}"
        with pytest.raises(SystemExit) as ended:
            main(["run", "finetune", "--config", "tiny/finetune", *few, model, f"output_dir={name}", *overrides])
        return ended.value.code

    assert finetune("first") == 0, capsys.readouterr().err
    stored = ["checkpointer={_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: first/final}"]
    assert finetune("second", *stored) == 0, capsys.readouterr().err
    assert (folder / "second/final/config.json").exists()
    assert finetune("third", "model.qk_norm=head") == 2
    assert "belongs to no family" in capsys.readouterr().err
    assert not list((folder / "third").glob("step_*")) and not (folder / "third/final").exists()
