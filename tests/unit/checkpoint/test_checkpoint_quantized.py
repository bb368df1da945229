"""Quantized folders: bit for bit there and back, in a fresh process too, and what they refuse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kdtune.checkpoint import Checkpointer, load_model
from kdtune.checkpoint.quantized import WEIGHTS
from kdtune.checkpoint.save_quantized import write_quantized
from kdtune.errors import CheckpointError, ConfigError
from kdtune.models import apply_lora, llama
from kdtune.models.quantization import is_quantized, quantize
from kdtune.training import trainable_parameters

ON_CPU = ["int8_weight_only", "int8_dynamic", "float8_weight_only", "intx_4bit", "nf4"]
TOKENS = torch.randint(0, 320, (2, 20), generator=torch.Generator().manual_seed(0))
LICENCE = "Do as you like.\n"


def small_model(dtype=torch.bfloat16, **changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 320, "embed_dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
        "intermediate_dim": 128, "max_seq_len": 64, "tie_embeddings": True,
    }  # fmt: skip
    return llama(**{**sizes, **changes}).to(dtype)


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS)


def write(folder: Path, scheme: str, dtype=torch.bfloat16, **changes):
    model = small_model(dtype, **changes)
    quantize(model, scheme, quantize_output=not model.config.tie_embeddings)
    folder.mkdir()
    write_quantized(model, folder, scheme=scheme)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "int8"
    write(path, "int8_weight_only")
    return path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", ON_CPU)
def test_comes_back_bit_for_bit(tmp_path, scheme, dtype):
    model = write(tmp_path / "q", scheme, dtype)
    loaded = load_model(tmp_path / "q")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.output.weight is loaded.tok_embeddings.weight
    for (name, weight), (other_name, other) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other_name and type(weight.data) is type(other.data) and weight.dtype == other.dtype == dtype
        assert not other.requires_grad
    assert is_quantized(loaded.layers[1].mlp.down_proj.weight)


def test_an_untied_head_comes_back_too(tmp_path):
    model = write(tmp_path / "q", "nf4", tie_embeddings=False)
    loaded = load_model(tmp_path / "q")
    assert is_quantized(loaded.output.weight)
    assert torch.equal(logits(loaded), logits(model))


def test_fills_a_builders_model_in_place(folder):
    with torch.device("meta"):
        model = small_model()
    assert Checkpointer(folder).load(model, dtype=torch.bfloat16) is model
    assert torch.equal(logits(model), logits(load_model(folder)))
    with pytest.raises(CheckpointError, match="num_layers=3, stored 2"):
        Checkpointer(folder).load(small_model(num_layers=3))


def test_loads_in_a_fresh_process(folder):
    code = (
        "import sys, torch; from kdtune.checkpoint import load_model; "
        "model = load_model(sys.argv[1]).eval(); tokens = torch.arange(20)[None]; "
        "print(model(tokens).double().sum().item())"
    )
    result = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    with torch.no_grad():
        assert float(result.stdout) == load_model(folder).eval()(torch.arange(20)[None]).double().sum().item()
    assert "Failed to load" not in result.stderr


def test_config_says_how_and_problems_finds_none(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "kdtune", "scheme": "int8_weight_only", "group_size": None
    }  # fmt: skip
    assert Checkpointer(folder).problems() == []
    assert Checkpointer(folder).model_config() == small_model().config
    with safe_open(folder / WEIGHTS, framework="pt") as handle:
        assert handle.get_tensor("model.layers.0.self_attn.q_proj._weight_qdata").dtype == torch.int8


def test_transformers_refuses_it(folder):
    transformers = pytest.importorskip("transformers")
    with pytest.raises(OSError, match="no file named"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_licence_goes_with_it(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "LICENSE").write_text(LICENCE)
    model = small_model()
    quantize(model, "nf4")
    (tmp_path / "q").mkdir()
    write_quantized(model, tmp_path / "q", scheme="nf4", base=tmp_path / "base")
    assert (tmp_path / "q" / "LICENSE").read_text() == LICENCE


def test_another_dtype_is_refused(folder):
    with pytest.raises(CheckpointError, match=r"int8_weight_only weights made from bfloat16.*float32"):
        load_model(folder, dtype=torch.float32)
    assert load_model(folder, dtype=torch.bfloat16)


def test_training_on_it_is_refused(folder):
    with pytest.raises(ConfigError, match="0 trainable parameters"):
        trainable_parameters(load_model(folder))
    with torch.device("meta"):
        adapted = apply_lora(small_model())
    with pytest.raises(CheckpointError, match="for use and not for training"):
        Checkpointer(folder).load(adapted)


def copy_of(folder: Path, target: Path, edit) -> Path:
    """The folder with its tensors and metadata changed by `edit`."""
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / WEIGHTS)
    with safe_open(folder / WEIGHTS, framework="pt") as handle:
        metadata = handle.metadata()
    edit(tensors, metadata)
    save_file(tensors, target / WEIGHTS, metadata=metadata)
    return target


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors, _: tensors.pop("model.norm.weight"), "'model.norm.weight' missing"),
        (lambda tensors, _: tensors.update({"model.extra": torch.zeros(2)}), "'model.extra' unexpected"),
        (lambda _, metadata: metadata.pop(f"{Q_PROJ}.weight"), rf"'{Q_PROJ}.weight' missing"),
    ],
)
def test_a_damaged_folder_is_found_before_a_weight_is_read(folder, tmp_path, edit, message):
    damaged = copy_of(folder, tmp_path / "damaged", edit)
    (problem,) = Checkpointer(damaged).problems()
    with pytest.raises(CheckpointError, match=message):
        raise CheckpointError(problem)
    with pytest.raises(CheckpointError, match=message):
        load_model(damaged)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors, _: tensors.pop(f"{Q_PROJ}._weight_scale"), "do not make a quantized weight"),
        (lambda _, metadata: metadata.update({f"{Q_PROJ}.weight": "{"}), "do not make a quantized weight"),
        (lambda _, metadata: metadata.update({f"{Q_PROJ}.weight": '{"_type": "os.system"}'}), "do not make"),
        (
            lambda tensors, _: tensors.update({"model.norm.weight": torch.ones(3, dtype=torch.bfloat16)}),
            r"'model.norm.weight': shape \[3\] found, \[64\] expected",
        ),
    ],
)
def test_parts_that_do_not_fit_are_named(folder, tmp_path, edit, message):
    with pytest.raises(CheckpointError, match=message):
        load_model(copy_of(folder, tmp_path / "damaged", edit))


def test_a_cut_off_file(folder, tmp_path):
    damaged = copy_of(folder, tmp_path / "damaged", lambda *_: None)
    (damaged / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    assert "cut off or corrupt" in Checkpointer(damaged).problems()[0]


@pytest.mark.parametrize("change", [{"scheme": "int3"}, {"quant_method": "torchao"}])
def test_an_unknown_scheme(folder, tmp_path, change):
    damaged = copy_of(folder, tmp_path / "damaged", lambda *_: None)
    config = json.loads((damaged / "config.json").read_text())
    config["quantization_config"] |= change
    (damaged / "config.json").write_text(json.dumps(config))
    assert "config.json: quantization_config=" in Checkpointer(damaged).problems()[0]


def test_an_adapter_cannot_be_merged_into_it(folder, tmp_path):
    assert "cannot be merged" in Checkpointer(folder, adapter_dir=tmp_path).problems()[0]


def test_a_scheme_the_device_lacks(folder, tmp_path):
    damaged = copy_of(folder, tmp_path / "damaged", lambda *_: None)
    config = json.loads((damaged / "config.json").read_text())
    config["quantization_config"]["scheme"] = "float8_dynamic"
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"float8_dynamic: needs a CUDA device.*nf4 work"):
        load_model(damaged)
