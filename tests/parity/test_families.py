"""Every family against transformers, peft and the gguf package: logits, gradients, caches, documents, adapters, files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from family_models import (
    ONE_OF_EACH,
    REFERENCES,
    TOKENS,
    assert_same,
    config_of,
    float64,
    reference,
    reread,
)
from torch.nn import functional

from kdtune.checkpoint import Checkpointer, load_model, save_model, write_quantized
from kdtune.evaluation.scoring import score
from kdtune.generation import Sampling, complete, generate, generate_batch
from kdtune.models import (
    Documents,
    KVCache,
    Transformer,
    apply_lora,
    kv_cache,
    merge_adapters,
    read_hf_config,
    weight_shapes,
)
from kdtune.models.attention import norm_of
from kdtune.models.quantization import quantize
from kdtune.pruning import keep_layers


@pytest.mark.parametrize("name", REFERENCES)
def test_logits_gradients_and_files(name: str, tmp_path: Path) -> None:
    in_fp32 = reference(name, tmp_path / "base")
    theirs, model = reread(tmp_path / "base"), float64(tmp_path / "base")
    assert {key: tuple(weight.shape) for key, weight in model.state_dict().items()} == weight_shapes(model.config)
    assert model.config.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert model.config.family.model_type == REFERENCES[name][0]
    expected = theirs(TOKENS).logits
    assert expected.abs().max() > 1
    assert_same(model(TOKENS), expected)
    assert_same(load_model(tmp_path / "base")(TOKENS), in_fp32(TOKENS).logits, 1e-5)
    rounded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    in_bf16 = load_model(tmp_path / "base", dtype=torch.bfloat16)(TOKENS)
    # Of OLMo 2 and 3, transformers rounds queries and keys after their rotation alone, we before it too, as for the others.
    assert_same(in_bf16, rounded(TOKENS).logits, 0.05 if model.config.qk_norm == "projection" else 0.0)

    model(TOKENS).square().mean().backward()
    expected.square().mean().backward()
    keys = model.config.family.hf_keys
    for key, parameter in theirs.named_parameters():
        ours = [model.get_parameter(keys.to_kdtune(part)).grad for part in keys.parts_of(key)]
        assert_same(torch.cat(ours), parameter.grad, 1e-9)

    save_model(model.float(), tmp_path / "saved", base=tmp_path / "base")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again) is type(in_fp32)
    own = {"_name_or_path": again.config._name_or_path, "head_dim": model.config.head_dim}  # Qwen2's is a quotient
    if model.config.windows:  # unused beside layer_types
        own |= {key: value for key, value in again.config.to_dict().items() if key == "max_window_layers"}
    if model.config.score_softcap is not None:
        own["use_bidirectional_attention"] = False  # null says the same
    if model.config.rope_switch is not None:
        own["rope_parameters"] = again.config.rope_parameters | {"rope_type": "longrope", "type": "longrope"}
    wanted, written = {**in_fp32.config.to_dict(), **own}, again.config.to_dict()
    assert {key: written[key] for key in wanted} == wanted
    assert torch.equal(again(TOKENS).logits, in_fp32(TOKENS).logits)
    assert load_model(tmp_path / "saved").config == model.config


@pytest.mark.parametrize("name", REFERENCES)
@torch.no_grad()
def test_caches_documents_and_padding(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "SLACK", 1)
    monkeypatch.setattr(kv_cache, "_BLOCK", 2)
    in_fp32 = reference(name, tmp_path)
    theirs, model = reread(tmp_path), float64(tmp_path)
    expected = theirs(TOKENS).logits
    for chunks in ([7, 1, 1, 1, 1, 1, 1], [2, 9, 2], [1, 2, 3, 3, 1, 3]):
        cache = KVCache(model.config, 2, 13)
        if chunks[0] <= (model.config.rope_switch or 0) < 13:
            model(TOKENS[:, : chunks[0]], kv_cache=cache)
            with pytest.raises(ValueError, match="beyond 5 tokens all of a text are rotated otherwise"):
                model(TOKENS[:, chunks[0] :], kv_cache=cache)
            continue
        assert_same(torch.cat([model(part, kv_cache=cache) for part in TOKENS.split(chunks, dim=1)], 1), expected)
        for index, layer in enumerate(cache.layers):
            window = model.config.window(index)
            assert layer._keys_BKCE.shape[2] <= (13 if window is None else window + 1)
        if model.config.windows:
            with pytest.raises(ValueError, match="truncate: length=2 of 13: a layer with a window no longer holds"):
                cache.truncate(2)
    texts = TOKENS[:1].split([9, 1, 3], dim=1)
    alone = torch.cat([theirs(text).logits for text in texts], 1)
    assert_same(model(TOKENS[:1], documents=Documents.of_lengths([9, 1, 3])), alone)

    attended = torch.ones(2, 13, dtype=torch.bool)
    attended[1, :4] = False
    positions = (attended.long().cumsum(-1) - 1).clamp(min=0)
    padded = theirs(TOKENS, attention_mask=attended.long(), position_ids=positions).logits
    mask = attended[:, None, :] & torch.ones(13, 13, dtype=torch.bool).tril()
    assert_same(model(TOKENS, input_pos=positions, mask=mask)[attended], padded[attended])
    cache = KVCache(model.config, 2, 13)
    model(TOKENS[:, :12], input_pos=positions[:, :12], mask=mask[:, :12, :12], kv_cache=cache)
    last = model(TOKENS[:, 12:], input_pos=positions[:, 12:], mask=mask[:, 12:], kv_cache=cache)
    assert_same(last, padded[:, 12:])

    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    told = in_fp32.generate(TOKENS[:1], attention_mask=torch.ones_like(TOKENS[:1]), **greedy)[0, 13:].tolist()
    assert generate(load_model(tmp_path), TOKENS[0].tolist(), max_new_tokens=8, stop_ids=[]) == told
    check_samples(model, theirs)


def check_samples(model: Transformer, theirs: Any) -> None:
    """Samples in slots have the probabilities that the whole texts have in transformers, each as long as it was then."""
    prompts = [TOKENS[number, :length].tolist() for number, length in ((0, 13), (1, 4), (1, 4), (0, 1), (1, 5), (1, 6))]
    settings: Any = {"sampling": Sampling(1.0), "max_new_tokens": 7, "stop_ids": (), "with_log_probs": True}
    for prompt, one in zip(prompts, complete(model, prompts, seeds=range(6), slots=2, **settings), strict=True):
        ids, before = prompt + one.ids, range(len(prompt), len(prompt) + 7)
        if model.config.rope_switch is None:
            logits = theirs(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
        else:
            logits = torch.stack([theirs(torch.tensor([ids[:length]])).logits[0, -1] for length in before])
        expected = logits.log_softmax(-1)[range(7), one.ids]
        torch.testing.assert_close(torch.tensor(one.log_probs, dtype=torch.float64), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["phi3, short", "gemma2"])
@torch.no_grad()
def test_texts_that_grow_side_by_side(name: str, tmp_path: Path) -> None:
    """Each as by itself, also where one grows beyond the length from which on it is rotated otherwise."""
    reference(name, tmp_path)
    prompts, model = [TOKENS[0].tolist(), TOKENS[1, :10].tolist(), TOKENS[1, :11].tolist()], float64(tmp_path)
    found = generate_batch(model, prompts, max_new_tokens=9, stop_ids=[])
    theirs = reread(tmp_path)
    for prompt, new_ids in zip(prompts, found, strict=True):
        for _ in range(9):
            prompt = [*prompt, int(theirs(torch.tensor([prompt])).logits[0, -1].argmax())]
        assert new_ids == prompt[-9:]


@pytest.mark.parametrize("name", ["mistral, window", "gemma2", "gemma3", "phi3, long", "phi3, short"])
@torch.no_grad()
def test_continuations_of_one_context(name: str, tmp_path: Path) -> None:
    """Their scores are those of each by itself: a window counts the tokens of one text, not of those that share a row."""
    reference(name, tmp_path)
    context = TOKENS[0].tolist()
    pairs = [
        (context, [1, 2, 3, 4, 5, 6, 7]),
        (context, [7, 8]),
        (context, [7]),
        (context[:4], [50]),
        (context, [9, 9]),
    ]
    theirs = reread(tmp_path)
    found = score(float64(tmp_path), pairs, max_length=60, batch_tokens=200)
    for (before, after), one in zip(pairs, found, strict=True):
        logprobs = theirs(torch.tensor([[*before, *after]])[:, :-1]).logits[0, -len(after) :].log_softmax(-1)
        assert one.logprob == pytest.approx(logprobs[range(len(after)), after].sum().item(), rel=1e-5)


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "qwen3, window"])
@torch.no_grad()
def test_pruned_and_without_a_base(name: str, tmp_path: Path) -> None:
    reference(name, tmp_path / "base")
    model = float64(tmp_path / "base")
    pruned = keep_layers(model, [1, 2])
    for base in (tmp_path / "base", None):
        folder = tmp_path / f"pruned-{base is None}"
        save_model(pruned, folder, base=base)
        assert_same(reread(folder)(TOKENS).logits, pruned(TOKENS))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_step_of_adapters(name: str, use_dora: bool, tmp_path: Path) -> None:
    reference(name, tmp_path / "base")
    model = float64(tmp_path / "base")
    apply_lora(model, lora_rank=2, lora_attn_modules=["q_proj", "k_proj", "output_proj"], use_dora=use_dora)
    assert not any(parameter.requires_grad for key, parameter in model.named_parameters() if key.endswith("bias"))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_b" in key or "magnitude" in key:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    save_model(model, tmp_path / "adapter", base=tmp_path / "base", save_weights="adapter")
    theirs = peft.PeftModel.from_pretrained(reread(tmp_path / "base"), str(tmp_path / "adapter"), is_trainable=True)
    assert not torch.allclose(theirs(TOKENS).logits, reread(tmp_path / "base")(TOKENS).logits, atol=0.1)
    merged = Checkpointer(tmp_path / "base", adapter_dir=tmp_path / "adapter").load(dtype=torch.float64)
    assert_same(merged(TOKENS), model(TOKENS), 1e-6)

    again = float64(tmp_path / "base")
    apply_lora(again, lora_rank=2, lora_attn_modules=["q_proj", "k_proj", "output_proj"], use_dora=use_dora)
    Checkpointer(tmp_path / "base", adapter_dir=tmp_path / "adapter").load(again, dtype=torch.float64)
    assert all(torch.equal(again.get_parameter(key), parameter) for key, parameter in model.named_parameters())

    for compute, parameters in ((model, model.parameters()), (lambda ids: theirs(ids).logits, theirs.parameters())):
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.5)
        functional.cross_entropy(compute(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
        for key, parameter in theirs.named_parameters():
            if "lora_B" in key and parameter.grad is not None:
                # Of a fused matrix, peft would train what is 0 here: k's columns of q's rows, and rows without an adapter.
                parameter.grad *= parameter != 0
                magnitude = (
                    theirs.get_parameter(key.replace("lora_B", "lora_magnitude_vector")) if use_dora else parameter
                )
                magnitude.grad *= (parameter != 0).any(1) if use_dora else 1
        optimizer.step()
    assert not torch.allclose(model(TOKENS), merged(TOKENS), atol=1e-3)
    assert_same(model(TOKENS), theirs(TOKENS).logits, 1e-9)
    assert_same(merge_adapters(model)(TOKENS), theirs(TOKENS).logits, 1e-6)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_quantized(name: str, tmp_path: Path) -> None:
    reference(name, tmp_path / "base")
    model = load_model(tmp_path / "base")
    quantize(model, "int8_weight_only")
    (tmp_path / "int8").mkdir()
    write_quantized(model, tmp_path / "int8", scheme="int8_weight_only", base=tmp_path / "base")
    assert Checkpointer(tmp_path / "int8").problems() == []
    assert torch.equal(Checkpointer(tmp_path / "int8").load()(TOKENS), model(TOKENS))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_an_nf4_base(name: str, tmp_path: Path) -> None:
    """Adapters that start from 0 leave the logits of the base, whose matrices are rounded to 16 values."""
    reference(name, tmp_path, hidden_size=64, intermediate_size=128, head_dim=32)
    model = load_model(tmp_path)
    plain = model(TOKENS)
    adapted = apply_lora(model, lora_rank=2, lora_attn_modules=["q_proj"], quantize_base=True)(TOKENS)
    error = (adapted - plain).norm() / plain.norm()
    assert 0.001 < error < 0.5
    adapted.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_norms_round_as_transformers_do() -> None:
    hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    gain = torch.randn(32, generator=torch.Generator().manual_seed(1)).bfloat16()
    for name in ("mistral", "olmo2"):
        model = transformers.AutoModelForCausalLM.from_config(config_of(name))
        norm = norm_of(read_hf_config(model.config.to_dict()), 32).bfloat16()
        for each in (norm, model.model.norm.bfloat16()):
            each.weight.data = gain
        assert torch.equal(norm(hidden), model.model.norm(hidden))


def test_fresh_weights() -> None:
    """As transformers starts: biases 0, gains 1."""
    tiny = {name: replace(read_hf_config(config_of(name).to_dict()), num_layers=1) for name in ("qwen2", "qwen3")}
    biases = [weight for name, weight in Transformer(tiny["qwen2"]).named_parameters() if name.endswith(".bias")]
    assert [tuple(bias.shape) for bias in biases] == [(32,), (16,), (16,)] and not any(bias.any() for bias in biases)
    assert torch.equal(Transformer(tiny["qwen3"]).layers[0].attn.q_norm.weight, torch.ones(24))
