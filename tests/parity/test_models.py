"""Our decoder against transformers' Llama, on tiny random models of every generation."""

import json

import pytest
import torch

from kdtune.models import LLAMA, KVCache, Transformer, TransformerConfig, read_hf_config, write_hf_config

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
}
SCALED = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GENERATIONS = {
    "llama2": {"num_key_value_heads": 4, "rope_theta": 10_000.0},
    "llama3": {"num_key_value_heads": 2, "rope_theta": 500_000.0},
    "llama3_1": {"num_key_value_heads": 2, "rope_theta": 500_000.0, "rope_scaling": SCALED | {"factor": 8.0}},
    "llama3_2": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_theta": 500_000.0,
        "rope_scaling": SCALED | {"factor": 32.0},
        "tie_word_embeddings": True,
    },
}


def reference(generation: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, **GENERATIONS[generation], attn_implementation="sdpa")
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Far from the initialization, where attention is nearly uniform and positions hardly matter.
            parameter.add_(torch.randn_like(parameter) * 0.2)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    model = model.to(dtype)
    # from_pretrained(dtype=...) keeps them in fp32; .to() rounds them.
    model.model.rotary_emb.inv_freq = frequencies
    return model


def ours(theirs) -> Transformer:
    model = Transformer(read_hf_config(theirs.config.to_dict())).to(next(theirs.parameters()).dtype)
    state = {LLAMA.hf_keys.to_kdtune(name): tensor for name, tensor in theirs.state_dict().items()}
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.0)])
@torch.no_grad()
def test_logits_beyond_the_original_context(generation, dtype, tolerance):
    theirs = reference(generation, dtype)
    tokens = torch.randint(0, 61, (2, 200), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    logits = ours(theirs)(tokens)
    assert logits.dtype == dtype
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits, expected, atol=tolerance * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("generation", ["llama3_1"])
def test_gradients(generation):
    theirs = reference(generation)
    model = ours(theirs)
    tokens = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(1))
    theirs(tokens).logits.logsumexp(-1).sum().backward()
    model(tokens).logsumexp(-1).sum().backward()
    for name, parameter in theirs.named_parameters():
        grad = model.get_parameter(LLAMA.hf_keys.to_kdtune(name)).grad
        torch.testing.assert_close(grad, parameter.grad, atol=1e-4 * parameter.grad.abs().max().item(), rtol=0)


@torch.no_grad()
def test_padding_mask_and_positions():
    theirs = reference("llama3_1")
    tokens = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(1))
    attended = torch.ones(2, 12, dtype=torch.bool)
    attended[1, :5] = False
    positions = (attended.long().cumsum(-1) - 1).clamp(min=0)
    expected = theirs(tokens, attention_mask=attended.long(), position_ids=positions).logits
    mask = attended[:, None, :] & torch.ones(12, 12, dtype=torch.bool).tril()
    logits = ours(theirs)(tokens, input_pos=positions, mask=mask)
    torch.testing.assert_close(logits[attended], expected[attended], atol=1e-4, rtol=0)


@torch.no_grad()
def test_cached_generation():
    theirs = reference("llama3_2")
    prompt = torch.randint(0, 61, (1, 40), generator=torch.Generator().manual_seed(1))
    attended = torch.ones_like(prompt)
    expected = theirs.generate(prompt, attention_mask=attended, max_new_tokens=20, do_sample=False, eos_token_id=None)
    model = ours(theirs)
    cache = KVCache(model.config, 1, 60)
    new, step = [], prompt
    for _ in range(20):
        step = model(step, kv_cache=cache)[:, -1:].argmax(-1)
        new.append(step.item())
    assert new == expected[0, 40:].tolist()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_config_round_trip_through_transformers(generation, tmp_path):
    config = read_hf_config(reference(generation).config.to_dict())
    written = write_hf_config(config, base={"bos_token_id": 5, "eos_token_id": [6, 7]}, dtype="bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(written))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(read) is transformers.LlamaConfig
    assert read.dtype == torch.bfloat16
    assert (read.bos_token_id, read.eos_token_id) == (5, [6, 7])
    expected = {"rope_type": "default", "rope_theta": config.rope_base}
    assert read.rope_parameters == expected | GENERATIONS[generation].get("rope_scaling", {})
    assert read_hf_config(read.to_dict()) == config

    # Each spelling alone says the same: transformers 4 reads the old one, other readers only the new one.
    old = {key: value for key, value in written.items() if key != "rope_parameters"}
    new = {key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling")}
    assert read_hf_config(old) == read_hf_config(new) == config
    assert transformers.LlamaConfig(**old).rope_parameters == transformers.LlamaConfig(**new).rope_parameters


@pytest.mark.parametrize("generation", ["llama3_1", "llama3_2"])
def test_rope_frequencies_are_transformers(generation):
    from kdtune.models.rope import inverse_frequencies

    theirs = reference(generation)
    config: TransformerConfig = read_hf_config(theirs.config.to_dict())
    frequencies = inverse_frequencies(config.head_dim, config.rope_base, config.rope_scaling)
    assert torch.equal(frequencies, theirs.model.rotary_emb.inv_freq)
