"""Models that transformers computes, behind kdtune's own calls, against transformers' own forward."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from kdtune.checkpoint import Checkpointer, load_adapter, load_model, save_model
from kdtune.errors import CheckpointError, ConfigError
from kdtune.evaluation.scoring import score
from kdtune.generation import Sampling, complete, generate, generate_batch
from kdtune.losses import KDLoss, Targets
from kdtune.models import Documents, KVCache, Transformer, apply_lora, hf_model, merge_adapters, new_model

ROOT = Path(__file__).parents[2]
TOKENS = torch.randint(96, (2, 13), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 96}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
# Windows shorter than the text, caps and scales that bite, fused projections, biases, tied heads and not.
FAMILIES: dict[str, dict[str, Any]] = {
    "stablelm": {**SIZES, "num_key_value_heads": 2, "partial_rotary_factor": 0.5, "use_qkv_bias": True, "use_parallel_residual": True},
    "gpt_neox": {**SIZES, "rotary_pct": 0.5, "attention_bias": True, "hidden_act": "gelu"},
    "falcon": {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False, "ffn_hidden_size": 48, "bias": True},
    "cohere": {**SIZES, "num_key_value_heads": 2, "logit_scale": 0.3},
    "cohere2": {**SIZES, "num_key_value_heads": 2, "logit_scale": 0.25, "sliding_window": 4, "layer_types": KINDS},
    "gemma2": {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 4, "layer_types": KINDS,
               "attn_logit_softcapping": 0.4, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 16},
    "phi3": {**SIZES, "num_key_value_heads": 2, "sliding_window": 5, "resid_pdrop": 0.3},
    "starcoder2": {**SIZES, "num_key_value_heads": 2, "sliding_window": 4},
    "gpt2": {**GPT2, "attn_pdrop": 0.2},
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "granite": {**SIZES, "num_key_value_heads": 2, "logits_scaling": 3.0, "attention_multiplier": 0.6},
}  # fmt: skip


def make(name: str, folder: Path, **settings: Any) -> Any:
    """Write a model with random weights as transformers does; return it in float64, in eval mode."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **FAMILIES.get(name, SIZES) | settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases, gains and the head are all seen
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def load(folder: Path, **settings: Any) -> Transformer:
    return Checkpointer(folder, family=hf_model).load(dtype=torch.float64, **settings)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    return make(request.param, tmp_path / "theirs"), tmp_path / "theirs"


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_a_family_computes_what_transformers_computes(family: tuple[Any, Path], tmp_path: Path) -> None:
    theirs, folder = family
    ours = load(folder)
    assert ours.training and ours.config.vocab_size == 96 and ours.config.max_seq_len == 64 and len(ours.layers) == 3
    # transformers' own softmax is fp32 where a soft-cap leaves no kernel.
    tolerance = 1e-5 if "gemma2" in theirs.config.model_type else 1e-8
    close(ours(TOKENS), theirs(TOKENS).logits, tolerance)
    # Gradients of the loss on hidden states and head, in the dropout-free mode that transformers' eval is.
    labels = TOKENS.roll(-1, 1)
    theirs.zero_grad()
    torch.nn.functional.cross_entropy(theirs(TOKENS).logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    loss, _ = KDLoss(kd_ratio=0.0)(ours(TOKENS, return_hidden=True), ours.output, None, Targets.from_labels(labels))
    loss.backward()
    keys = ours.config.family.hf_keys
    for name, parameter in ours.named_parameters():
        close(parameter.grad, theirs.get_parameter(_in_memory(theirs, keys.from_kdtune(name))).grad, tolerance)
    # Written, it is the folder of transformers again, and loads there as it is.
    save_model(ours.to(torch.float32), tmp_path / "ours", base=folder)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is type(theirs)
    before = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert before.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())


def _in_memory(model: Any, name: str) -> str:
    return "lm_head.weight" if name == "embed_out.weight" else name


def test_documents_never_see_each_other(family: tuple[Any, Path]) -> None:
    """Each as if it were alone, whatever its neighbours are; in one row, whose gradient is that of the rows."""
    _, folder = family
    ours = load(folder)
    lengths = (6, 1, 13, 5)
    rows = [torch.randint(96, (1, length), generator=torch.Generator().manual_seed(length)) for length in lengths]
    documents = Documents.of_lengths(lengths)
    together = ours(torch.cat(rows, dim=1), documents=documents, return_hidden=True)
    alone = torch.cat([ours(row, return_hidden=True) for row in rows], dim=1)
    close(together, alone)
    weights = torch.randn(together.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, expected = (
        torch.autograd.grad((hidden * weights).sum(), list(ours.layers.parameters())) for hidden in (together, alone)
    )
    for one, other in zip(found, expected, strict=True):
        close(one, other, 1e-5)  # some norms are in fp32 whatever the dtype is
    others = [torch.randint(96, (1, length)) for length in lengths]
    changed = ours(torch.cat([*others[:2], rows[2], others[3]], dim=1), documents=documents, return_hidden=True)
    assert torch.equal(changed[:, 7:20], together[:, 7:20])


def test_a_cache_and_prompts_of_different_lengths(family: tuple[Any, Path]) -> None:
    theirs, folder = family
    ours = load(folder).eval()
    cache = KVCache(ours.config, 2, 13)
    parts = [ours(TOKENS[:, start:stop], kv_cache=cache) for start, stop in ((0, 6), (6, 10), (10, 11), (11, 13))]
    close(torch.cat(parts, dim=1), theirs(TOKENS).logits, 1e-5 if "gemma2" in theirs.config.model_type else 1e-9)
    prompts = [TOKENS[0, :9].tolist(), TOKENS[1, :4].tolist(), TOKENS[1, :7].tolist()]
    found = generate_batch(ours, prompts, max_new_tokens=8, stop_ids=())
    assert found == [generate(ours, prompt, max_new_tokens=8, stop_ids=()) for prompt in prompts]
    greedy = complete(ours, prompts, max_new_tokens=8, stop_ids=(), sampling=Sampling(), seeds=range(3), slots=2)
    assert found == [one.ids for one in greedy]
    for prompt, ids in zip(prompts, found, strict=True):
        row = torch.tensor([prompt + ids])
        assert theirs(row).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == ids


def test_continuations_that_share_their_beginning(family: tuple[Any, Path]) -> None:
    theirs, folder = family
    ours = load(folder)
    pairs = [(TOKENS[0, :8].tolist(), TOKENS[0, 8:stop].tolist()) for stop in (10, 13)]
    pairs += [(TOKENS[0, :8].tolist(), TOKENS[1, :3].tolist()), (TOKENS[1, :2].tolist(), [5])]
    found = score(ours, pairs, max_length=32, batch_tokens=64)
    for (context, continuation), one in zip(pairs, found, strict=True):
        logits = theirs(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
        expected = sum(logits[len(context) - 1 + index, token] for index, token in enumerate(continuation))
        assert one.logprob == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", ["stablelm", "gpt_neox"])
def test_adapters_are_pefts_and_merge(name: str, tmp_path: Path) -> None:
    make(name, tmp_path / "base")
    torch.manual_seed(1)
    ours = apply_lora(load(tmp_path / "base"), lora_rank=2, lora_alpha=8)
    assert {name for name, one in ours.named_parameters() if one.requires_grad and ".lora_" not in name} == set()
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    expected = ours(TOKENS)
    save_model(ours, tmp_path / "adapter", base=tmp_path / "base", save_weights="adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    close(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(TOKENS).logits, expected)
    close(load_adapter(load(tmp_path / "base"), tmp_path / "adapter")(TOKENS), expected)
    save_model(ours, tmp_path / "merged", base=tmp_path / "base")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    close(merged.eval()(TOKENS).logits, expected)
    close(merge_adapters(copy.deepcopy(ours))(TOKENS), expected)


def test_which_linears_are_adapted(tmp_path: Path) -> None:
    make("gpt_neox", tmp_path)
    ours = apply_lora(load(tmp_path), lora_modules=["query_key_value"], lora_dropout=0.5, apply_lora_to_output=True)
    adapted = {name.partition(".lora_")[0] for name, one in ours.named_parameters() if one.requires_grad}
    assert adapted == {"output", *(f"layers.{index}.attention.query_key_value" for index in range(3))}
    assert ours.layers[0].attention.query_key_value.training and not ours.base.emb_dropout.training
    for settings, wanted in (
        ({"lora_modules": ["q_proj"]}, r"lora_modules=\['q_proj'\].*'dense', 'dense_4h_to_h'"),
        ({"lora_attn_modules": ["q_proj"]}, "lora_attn_modules: .*lora_modules"),
    ):
        with pytest.raises(ConfigError, match=wanted):
            apply_lora(load(tmp_path), **settings)  # type: ignore[arg-type]
    make("gpt2", tmp_path / "gpt2")
    with pytest.raises(ConfigError, match="no module to adapt"):
        apply_lora(load(tmp_path / "gpt2"))


@pytest.mark.parametrize(
    ("name", "settings", "wanted"),
    [
        ("phi", {"num_key_value_heads": 4}, "output head, lm_head, is a Linear with a bias"),
        ("bloom", {"n_head": 4, "n_layer": 2}, "takes no position_ids"),
        ("mamba", {"num_hidden_layers": 2, "state_size": 4}, "other layers than attention"),
        ("mixtral", {"num_local_experts": 2, "num_key_value_heads": 2}, "joins or splits weights .*: '.*' of the files"),
        ("lfm2", {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention", "conv"]}, "layer_types with|other layers"),
        ("gpt_oss", {"num_local_experts": 2, "num_key_value_heads": 2, "head_dim": 8}, "s_aux.*; use a model of another arch"),
        ("bert", {"is_decoder": True}, "output head"),
        ("doge", {"num_key_value_heads": 4}, "a mask of its own.*; use a model of another"),
        ("openai-gpt", {"n_head": 4, "n_layer": 3, "n_embd": 32}, "takes no past_key_values"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
                                      "original_max_position_embeddings": 32}, "num_key_value_heads": 4}, r"rope_type \['longrope'\]"),
    ],
)  # fmt: skip
def test_what_the_engine_does_not_compute_is_refused_by_name(
    name: str, settings: dict[str, Any], wanted: str, tmp_path: Path
) -> None:
    config = transformers.AutoConfig.for_model(name, **SIZES | settings)
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    with pytest.raises(CheckpointError, match=rf"config.json: .*{wanted}"):
        Checkpointer(tmp_path, checkpoint_files=["model.safetensors"], family=hf_model).model_config()


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        (lambda weights: {}["no such key"], "fails to say how the weights are named in files: .*no such key"),
        (lambda weights: weights | {"new": torch.ones(2)}, "joins or splits weights .*: 'new' of the files"),
        (lambda weights: dict(list(weights.items())[1:]), "its 40 weights have 39 names in files"),
    ],
)
def test_names_in_files_that_are_not_those_of_the_weights(
    written: Callable[[Any], Any], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdtune.models import hf_form

    make("stablelm", tmp_path, vocab_size=97)  # which no other test has inspected
    monkeypatch.setattr(hf_form, "revert_weight_conversion", lambda _, weights: written(weights))
    with pytest.raises(CheckpointError, match=f"StableLmForCausalLM: .*{wanted}.*; use a model of another arch"):
        load(tmp_path)


def test_a_logits_function_that_is_not_known_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("stablelm", tmp_path)
    plain = transformers.StableLmForCausalLM.forward

    def shifted(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = plain(self, *args, **kwargs)
        outputs.logits = outputs.logits + 1.0
        return outputs

    monkeypatch.setattr(transformers.StableLmForCausalLM, "forward", shifted)
    from kdtune.models.hf import _inspected

    _inspected.cache_clear()
    with pytest.raises(CheckpointError, match="more with hidden states or logits than to scale and soft-cap"):
        load(tmp_path)
    _inspected.cache_clear()


def test_scale_and_softcap_are_measured(tmp_path: Path) -> None:
    found = {}
    for name in FAMILIES:
        config = transformers.AutoConfig.for_model(name, **FAMILIES[name])
        (tmp_path / "config.json").write_text(config.to_json_string())
        ours = Checkpointer(tmp_path, checkpoint_files=["model.safetensors"], family=hf_model).model_config()
        found[name] = (pytest.approx(ours.logit_scale, rel=1e-6), ours.logit_softcap)  # type: ignore[attr-defined]
    own = {"cohere": (0.3, None), "cohere2": (0.25, None), "gemma2": (1.0, 0.5), "granite": (1 / 3, None)}
    assert found == {name: own.get(name, (1.0, None)) for name in FAMILIES}


def test_older_names_and_leftovers_in_files(tmp_path: Path) -> None:
    """A folder as the hub has them: the head's older name, no prefix, buffers of the mask."""
    theirs = make("gpt_neox", tmp_path / "one")
    assert "embed_out.weight" in Checkpointer(tmp_path / "one", family=hf_model)._read(hf_model).name_in_file(
        "output.weight"
    )
    plain = make("gpt2", tmp_path / "two")
    weights = {
        name.removeprefix("transformer."): tensor.float().clone()
        for name, tensor in plain.state_dict().items()
        if name != "lm_head.weight"
    }
    weights["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "two" / "model.safetensors", metadata={"format": "pt"})
    for folder, model in ((tmp_path / "one", theirs), (tmp_path / "two", plain)):
        close(load(folder)(TOKENS), model(TOKENS).logits)


def test_weights_that_are_missing_or_of_another_model(tmp_path: Path) -> None:
    make("stablelm", tmp_path / "one")
    document = json.loads((tmp_path / "one" / "config.json").read_text())
    (tmp_path / "one" / "config.json").write_text(json.dumps(document | {"num_hidden_layers": 4}))
    problems = Checkpointer(tmp_path / "one", family=hf_model).problems()
    assert len(problems) == 1 and "model.layers.3" in problems[0] and "missing" in problems[0]
    (tmp_path / "one" / "config.json").write_text(
        json.dumps(document | {"quantization_config": {"quant_method": "awq"}})
    )
    assert "quantization_config" in Checkpointer(tmp_path / "one", family=hf_model).problems()[0]
    (tmp_path / "one" / "config.json").write_text(json.dumps(document | {"model_type": "nothing"}))
    assert "model_type='nothing': transformers" in Checkpointer(tmp_path / "one", family=hf_model).problems()[0]
    (tmp_path / "one" / "config.json").write_text(json.dumps(document))
    assert "or kdtune.models.hf_model, which" in Checkpointer(tmp_path / "one").problems()[0]


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
open({mark!r}, "w").close()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_models_own_code_is_run_only_where_the_config_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, mark = tmp_path / "own", tmp_path / "was-run"
    make("llama", folder, num_key_value_heads=2)
    document = json.loads((folder / "config.json").read_text())
    document |= {
        "model_type": "own", "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(document))
    (folder / "own_code.py").write_text(OWN_CODE.format(mark=str(mark)))
    problem = Checkpointer(folder, family=hf_model).problems()
    assert "auto_map" in problem[0] and "trust_remote_code: true" in problem[0] and not mark.exists()
    trusted = Checkpointer(folder, family=hf_model(trust_remote_code=True))
    caplog.set_level("WARNING", logger="kdtune")
    assert trusted.problems() == [] and mark.exists()
    model = trusted.load(dtype=torch.float32)
    assert [record.message for record in caplog.records] == [f"trust_remote_code=true: the code in {folder} is run"]
    save_model(model, tmp_path / "written", base=folder)
    assert (tmp_path / "written" / "own_code.py").is_file()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "written", trust_remote_code=True)
    close(again(TOKENS).logits, model(TOKENS), 1e-5)


@pytest.mark.real
@pytest.mark.slow("reads the real model four times; the families above are compared in a fraction of it")
def test_the_real_model_has_the_loss_of_the_native_one(smollm2_gguf: Path, tmp_path: Path) -> None:
    save_model(load_model(smollm2_gguf, dtype=torch.float32), tmp_path)
    tokens = torch.randint(49152, (1, 96), generator=torch.Generator().manual_seed(0))
    documents, targets = Documents.of_lengths((40, 1, 55)), Targets.from_labels(tokens.roll(-1, 1))
    found = []
    for family in (None, hf_model):
        model = Checkpointer(tmp_path, family=family).load(dtype=torch.float32)
        loss, _ = KDLoss(kd_ratio=0.0)(
            model(tokens, documents=documents, return_hidden=True), model.output, None, targets
        )
        loss.backward()
        found.append((float(loss), float(torch.nn.utils.get_total_norm([one.grad for one in model.parameters()]))))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_random_weights_come_from_torchs_seed(tmp_path: Path) -> None:
    make("stablelm", tmp_path)
    config = Checkpointer(tmp_path, family=hf_model).model_config()
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(new_model(config))
    assert all(torch.equal(one, other) for one, other in zip(*(model.parameters() for model in drawn), strict=True))
    assert next(drawn[0].parameters()).std() > 0


def test_transformers_is_imported_where_it_is_used_and_named_where_it_is_missing(tmp_path: Path) -> None:
    make("stablelm", tmp_path)
    code = f"""
import sys
import kdtune.models
from kdtune.checkpoint import Checkpointer
family = kdtune.models.hf_model
assert "transformers" not in sys.modules
sys.modules["transformers"] = None
print(Checkpointer({str(tmp_path)!r}, family=family).problems())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip install kdtune[hf]" in done.stdout
