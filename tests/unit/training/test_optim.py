import copy
import inspect

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from kdtune import training
from kdtune.errors import ConfigError
from kdtune.models import Transformer, TransformerConfig


def tiny_model(tie=False, seed=0):
    torch.manual_seed(seed)
    return Transformer(
        TransformerConfig(
            vocab_size=11, embed_dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, intermediate_dim=12,
            max_seq_len=32, norm_eps=1e-5, rope_base=1e4, rope_scaling=None, tie_embeddings=tie,
        )
    )  # fmt: skip


def train(model, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = torch.randint(0, 11, (2, 6), generator=generator)
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def group_names(optimizer):
    return [set(group["param_names"]) for group in optimizer.param_groups]


@pytest.mark.parametrize("tie", [False, True])
def test_muon_takes_exactly_the_hidden_matrices(tie):
    muon, matrices, vectors = group_names(training.Muon(training.trainable_parameters(tiny_model(tie))))
    per_layer = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj")
    per_layer += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert muon == {f"layers.{i}.{name}.weight" for i in range(2) for name in per_layer}
    assert matrices == ({"tok_embeddings.weight"} if tie else {"tok_embeddings.weight", "output.weight"})
    assert vectors == {f"layers.{i}.{name}.weight" for i in range(2) for name in ("attn_norm", "mlp_norm")} | {
        "norm.weight"
    }


def test_compiled_names_split_the_same_way():
    weight = torch.zeros(3, 3)
    assert not training.is_muon_weight("_orig_mod.output.weight", weight)
    assert training.is_muon_weight("layers.0._orig_mod.attn.output_proj.weight", weight)


def test_muon_is_torch_muon_on_one_half_and_adamw_on_the_other():
    model, witness = tiny_model(), tiny_model()
    optimizer = training.Muon(training.trainable_parameters(model), lr=0.02, weight_decay=0.1, betas=(0.8, 0.9))
    named = list(witness.named_parameters())
    hidden = [p for name, p in named if p.ndim == 2 and name not in ("tok_embeddings.weight", "output.weight")]
    rest = [p for _, p in named if all(p is not h for h in hidden)]
    parts = [
        torch.optim.Muon(hidden, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for p in rest if p.ndim == 2], lr=0.02, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-8),
        torch.optim.AdamW([p for p in rest if p.ndim == 1], lr=0.02, weight_decay=0.0, betas=(0.8, 0.9), eps=1e-8),
    ]
    train(model, optimizer, 5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        tokens = torch.randint(0, 11, (2, 6), generator=generator)
        nn.functional.cross_entropy(witness(tokens).flatten(0, 1), tokens.flatten()).backward()
        for part in parts:
            part.step()
            part.zero_grad()
    start = dict(tiny_model().named_parameters())
    for (name, trained), (_, expected) in zip(model.named_parameters(), named, strict=True):
        torch.testing.assert_close(trained, expected, rtol=0, atol=0)
        assert not torch.equal(trained, start[name])


def test_muon_follows_a_schedule_in_both_halves():
    optimizer = training.Muon(training.trainable_parameters(tiny_model()), lr=1.0, adamw_lr=0.1)
    training.get_linear_schedule_with_warmup(optimizer, 4, 8)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.25, 0.025, 0.025])
    model = tiny_model()
    optimizer = training.Muon(training.trainable_parameters(model), lr=0.0)
    train(model, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_model().parameters(), strict=True))


def build(kind, model):
    named = training.trainable_parameters(model)
    if kind == "muon":
        return training.Muon(named, lr=0.01)
    if kind == "adamw":
        return training.adamw(named, lr=0.01)
    if kind == "sgd":
        return torch.optim.SGD(named, lr=0.01, momentum=0.9)
    return torch.optim.AdamW(named, lr=0.01, fused=True)


@pytest.mark.parametrize("kind", ["muon", "adamw", "fused", "sgd"])
@pytest.mark.parametrize("through_distributed_checkpoint", [False, True])
def test_resumed_equals_uninterrupted_to_the_bit(kind, through_distributed_checkpoint):
    model = tiny_model()
    optimizer = build(kind, model)
    train(model, optimizer, 3)
    saved_model = copy.deepcopy(model.state_dict())
    if through_distributed_checkpoint:
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    else:
        saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 3, seed=1)

    resumed = tiny_model(seed=5)
    resumed.load_state_dict(saved_model)
    again = build(kind, resumed)
    if through_distributed_checkpoint:
        set_optimizer_state_dict(resumed, again, saved)
    else:
        again.load_state_dict(saved)
    train(resumed, again, 3, seed=1)
    for expected, found in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_a_deep_copied_muon_still_trains():
    model = tiny_model()
    model_copy, optimizer = copy.deepcopy((model, training.Muon(training.trainable_parameters(model), lr=0.01)))
    before = [p.clone() for p in model_copy.parameters()]
    train(model_copy, optimizer, 1)
    assert not any(torch.equal(a, b) for a, b in zip(before, model_copy.parameters(), strict=True))


def test_adamw_decays_matrices_only():
    model = tiny_model()
    optimizer = training.adamw(training.trainable_parameters(model), lr=0.5, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for (name, parameter), before in zip(model.named_parameters(), tiny_model().parameters(), strict=True):
        factor = 1.0 if "norm" in name else 1 - 0.5 * 0.1
        torch.testing.assert_close(parameter, before * factor)


@pytest.mark.parametrize("name", ["lr", "betas", "eps", "weight_decay"])
def test_adamw_has_torchs_defaults(name):
    model = tiny_model()
    ours = training.adamw(training.trainable_parameters(model))
    assert ours.param_groups[0][name] == torch.optim.AdamW(model.parameters()).param_groups[0][name]


def test_muon_has_torchs_defaults_and_the_papers_for_adamw():
    """The betas and the scale are those of arXiv 2502.16982."""
    ours, theirs = (inspect.signature(one).parameters for one in (training.Muon, torch.optim.Muon))
    for name in ("weight_decay", "momentum", "nesterov", "ns_steps"):
        assert ours[name].default == theirs[name].default, name
    assert (ours["betas"].default, ours["adjust_lr_fn"].default) == ((0.9, 0.95), "match_rms_adamw")
    assert ours["eps"].default == inspect.signature(torch.optim.AdamW).parameters["eps"].default


def test_frozen_parameters_are_left_out():
    model = tiny_model().requires_grad_(False)
    with pytest.raises(ConfigError, match="0 trainable parameters"):
        training.trainable_parameters(model)
    model.norm.requires_grad_(True)
    assert [name for name, _ in training.trainable_parameters(model)] == ["norm.weight"]
    with pytest.raises(ConfigError, match="0 hidden 2-D weights among the 1 trainable"):
        training.Muon(training.trainable_parameters(model))


def test_muon_needs_names():
    with pytest.raises(ConfigError, match=r"parameters without names.*trainable_parameters"):
        training.Muon(tiny_model().parameters())  # type: ignore[arg-type]
