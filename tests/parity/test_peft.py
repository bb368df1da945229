"""Adapters against peft: folders that we write there, and folders that it writes here."""

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from kdtune.checkpoint import Checkpointer, load_model, save_model
from kdtune.models import Transformer, adapter_parameters, apply_lora, merge_adapters

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
CASES = [
    pytest.param(tie, use_dora, id=f"{'tied' if tie else 'untied'}-{'dora' if use_dora else 'lora'}")
    for tie in (True, False)
    for use_dora in (False, True)
]


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    """peft warns of tied heads, which is what is tested here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def write_base(folder: Path, *, tie: bool) -> Path:
    """A random Llama as transformers writes it, its weights large enough for logits of a few units."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def theirs(base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base).eval()


def with_adapters(base: Path, **settings: Any) -> Transformer:
    """Our model with adapters that do something."""
    model = apply_lora(load_model(base), **settings).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def trained(model: Any) -> Any:
    """Their model with adapters that do something."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize(("tie", "use_dora"), CASES)
@torch.no_grad()
def test_peft_gives_our_logits(tmp_path: Path, tie: bool, use_dora: bool, head: bool) -> None:
    base = write_base(tmp_path / "base", tie=tie)
    model = with_adapters(base, lora_rank=4, lora_alpha=6, use_dora=use_dora, apply_lora_to_output=head)
    save_model(model, tmp_path / "out", base=base, save_weights="both")
    expected = model(TOKENS)
    found = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "out" / "adapter").eval()(TOKENS).logits
    assert_close(found, expected)
    assert (theirs(base)(TOKENS).logits - expected).abs().max() > 0.05 * expected.abs().max()
    merged = theirs(tmp_path / "out")
    assert_close(merged(TOKENS).logits, expected)
    assert merged.config.tie_word_embeddings is (tie and not head)


def test_peft_finds_the_base_by_its_name(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tie=True)
    model = with_adapters(base)
    save_model(model, tmp_path / "out", base=base, save_weights="adapter")
    with torch.no_grad():
        found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()(TOKENS).logits
        assert_close(found, model(TOKENS))


SETTINGS: dict[str, dict[str, Any]] = {
    "some layers": {"target_modules": ["q_proj", "o_proj", "down_proj"]},
    "with head": {"target_modules": ["v_proj", "gate_proj", "lm_head"]},
    "all linear": {"target_modules": "all-linear"},
    "by pattern": {"target_modules": r".*layers\.1\..*(up|k)_proj"},
    "one layer": {"target_modules": ["k_proj"], "layers_to_transform": [1]},
    "stabilized": {"target_modules": ["q_proj"], "use_rslora": True},
    "different ranks": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"v_proj": 2, "layers.1.mlp.up_proj": 3},
        "alpha_pattern": {"q_proj": 11},
        "use_rslora": True,
    },
    "but one": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["model.layers.0.self_attn.v_proj"]},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("tie", "use_dora"), CASES)
@torch.no_grad()
def test_we_give_pefts_logits(tmp_path: Path, settings: dict[str, Any], tie: bool, use_dora: bool) -> None:
    base = write_base(tmp_path / "base", tie=tie)
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", use_dora=use_dora, **settings)
    model = trained(peft.get_peft_model(theirs(base), config))
    model.save_pretrained(tmp_path / "theirs")
    checkpointer = Checkpointer(base, adapter_dir=tmp_path / "theirs")
    assert checkpointer.problems() == []
    expected = model(TOKENS).logits
    assert_close(checkpointer.load().eval()(TOKENS), expected)
    assert (theirs(base)(TOKENS).logits - expected).abs().max() > 0.02 * expected.abs().max()


@pytest.mark.parametrize(("tie", "use_dora"), CASES)
def test_training_goes_on_from_pefts_adapter(tmp_path: Path, tie: bool, use_dora: bool) -> None:
    """Filled into our adapters: same logits, and a step of SGD leads both to the same weights."""
    base = write_base(tmp_path / "base", tie=tie)
    targets = ["q_proj", "v_proj", "o_proj", "lm_head"]
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", use_dora=use_dora, target_modules=targets)
    model = trained(peft.get_peft_model(theirs(base), config))
    model.save_pretrained(tmp_path / "theirs")
    ours = apply_lora(
        load_model(base),
        lora_rank=4,
        lora_alpha=6,
        apply_lora_to_mlp=False,
        apply_lora_to_output=True,
        use_dora=use_dora,
    )
    ours = Checkpointer(base, adapter_dir=tmp_path / "theirs").load(ours).eval()
    for parameters, logits in ((model.parameters(), model(TOKENS).logits), (ours.parameters(), ours(TOKENS))):
        optimizer = torch.optim.SGD([parameter for parameter in parameters if parameter.requires_grad], lr=0.1)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
        optimizer.step()
    with torch.no_grad():
        assert_close(ours(TOKENS), model(TOKENS).logits)


def test_defaults_are_pefts_and_an_alpha_of_twice_the_rank() -> None:
    ours, theirs = inspect.signature(apply_lora).parameters, peft.LoraConfig()
    found = {name: ours[name].default for name in ("lora_rank", "lora_alpha", "lora_dropout", "use_dora")}
    assert found == {
        "lora_rank": theirs.r,
        "lora_alpha": 2 * theirs.r,
        "lora_dropout": theirs.lora_dropout,
        "use_dora": theirs.use_dora,
    }


def test_a_folder_goes_through_both_unchanged(tmp_path: Path) -> None:
    """Ours to peft and back: the tensors are the same bits."""
    base = write_base(tmp_path / "base", tie=False)
    model = with_adapters(base, use_dora=True)
    save_model(model, tmp_path / "ours", base=base, save_weights="adapter")
    peft.PeftModel.from_pretrained(theirs(base), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = Checkpointer(base, adapter_dir=tmp_path / "theirs").load(apply_lora(load_model(base), use_dora=True))
    for name, parameter in adapter_parameters(model).items():
        assert torch.equal(again.get_parameter(name), parameter), name


@pytest.mark.real
@pytest.mark.slow("four copies of a real model; tiny ones have peft's logits, merged too")
@torch.no_grad()
def test_real_smollm2(smollm2_gguf: Path, tmp_path: Path) -> None:
    """The real model: fp32 logits are peft's; merging costs no more than fp32 itself does, and in float64 nothing."""
    base = tmp_path / "base"
    save_model(load_model(smollm2_gguf, dtype=torch.float32), base)
    model = apply_lora(load_model(base), lora_rank=8, lora_alpha=16)
    torch.manual_seed(1)
    for name, parameter in adapter_parameters(model).items():
        if "lora_b" in name:
            parameter.copy_(torch.randn_like(parameter) * 0.01)
    unmerged = model(TOKENS)
    save_model(model, tmp_path / "out", base=base, save_weights="both")
    found = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "out" / "adapter").eval()(TOKENS).logits
    assert_close(found, unmerged)
    merged = load_model(tmp_path / "out")(TOKENS)
    exact = model.double()(TOKENS)
    largest = exact.abs().max()
    assert (merge_adapters(model)(TOKENS) - exact).abs().max() < 1e-10 * largest
    # Rounding alone moves the logits of this model by 1e-5 of the largest.
    assert (merged - exact).abs().max() < 2 * (unmerged - exact).abs().max() < 1e-4 * largest
    assert (load_model(base)(TOKENS) - unmerged).abs().max() > 0.01 * largest
