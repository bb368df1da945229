"""The term on hidden states against brute force on transformers' own hidden states; its norms are fp32 inside, even in float64."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kdtune.errors import ConfigError
from kdtune.losses import HiddenSignal, HiddenStateLoss, KDLoss, Targets
from kdtune.models import Transformer, llama
from kdtune.training import Muon, trainable_parameters

LABELS = torch.tensor([[-100, 3, 4, -100, 5], [6, -100, -100, -100, 7]])
TOKENS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])


def pair(embed_dim: int, num_layers: int, seed: int) -> tuple[Transformer, Any]:
    """A model in float64 and transformers' with the same weights."""
    sizes = {"vocab_size": 32, "embed_dim": embed_dim, "num_layers": num_layers, "num_heads": 4, "num_kv_heads": 4}
    torch.manual_seed(seed)
    model = llama(**sizes, intermediate_dim=48, max_seq_len=32, rope_base=10000.0, norm_eps=1e-5).double()
    theirs = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=embed_dim, num_hidden_layers=num_layers, num_attention_heads=4,
                    num_key_value_heads=4, intermediate_size=48, rms_norm_eps=1e-5, rope_theta=10000.0, attention_bias=False)
    ).double()  # fmt: skip
    names = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    for index in range(num_layers):
        to = f"model.layers.{index}"
        names |= {f"layers.{index}.attn.{one}_proj.weight": f"{to}.self_attn.{one}_proj.weight" for one in "qkv"}
        names |= {
            f"layers.{index}.mlp.{one}_proj.weight": f"{to}.mlp.{one}_proj.weight" for one in ("gate", "up", "down")
        }
        names |= {f"layers.{index}.attn.output_proj.weight": f"{to}.self_attn.o_proj.weight",
                  f"layers.{index}.attn_norm.weight": f"{to}.input_layernorm.weight",
                  f"layers.{index}.mlp_norm.weight": f"{to}.post_attention_layernorm.weight"}  # fmt: skip
    state = model.state_dict()
    theirs.load_state_dict({names[name]: value for name, value in state.items()})
    return model, theirs


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize(("width", "projection"), [(24, "auto"), (16, "auto"), (16, True)])
def test_value_and_gradient_are_those_on_transformers_states(kind: Any, width: int, projection: Any) -> None:
    """4 and 6 layers: half of the depth is after the 2nd and the 3rd, 1.0 after the last one and the norm."""
    (student, theirs), (teacher, teachers) = pair(16, 4, 0), pair(width, 6, 1)
    term = HiddenStateLoss(weight=0.7, kind=kind, projection=projection)
    term.attach(4, (16, width), seed=3, dtype=torch.float64)
    assert len(term.maps) == (0 if width == 16 and projection == "auto" else 2)
    loss = KDLoss(kd_ratio=0.5, hidden_loss=term)
    with torch.no_grad():
        hidden_BSD, states = teacher(TOKENS, return_hidden=True, return_layers=term.depths(6))
    signal = HiddenSignal(hidden_BSD, teacher.output, tuple(states))
    targets = Targets.from_labels(LABELS)
    own = student(TOKENS, return_hidden=True, **loss.forward_options)
    total, parts = loss(own, student.output, signal, targets)
    total.backward()

    maps = [one.weight.detach().clone().requires_grad_() for one in term.maps]
    student_states = theirs(TOKENS, output_hidden_states=True)
    teacher_states = teachers(TOKENS, output_hidden_states=True).hidden_states
    valid, expected = LABELS != -100, torch.zeros((), dtype=torch.float64)
    for index, (one, other) in enumerate(((2, 3), (4, 6))):
        h, t = student_states.hidden_states[one][valid], teacher_states[other][valid].detach()
        h = h @ maps[index].T if maps else h
        if kind == "mse":
            expected = expected + ((h - t) ** 2).sum() / width / 2
        else:
            expected = expected + sum(1 - (a @ b) / (a.norm() * b.norm()) for a, b in zip(h, t, strict=True)) / 2
    assert float(parts["hidden_loss"]) == pytest.approx(float(expected.detach()), rel=1e-6)
    logits = student_states.logits[valid].log_softmax(-1)
    p = teachers(TOKENS).logits[valid].log_softmax(-1).detach()
    rest = 0.5 * -logits.gather(1, LABELS[valid][:, None]).sum() + 0.5 * (p.exp() * (p - logits)).sum()
    (rest + 0.7 * expected).backward()
    assert float(total.detach()) == pytest.approx(float((rest + 0.7 * expected).detach()), rel=1e-6)
    for ours, other in ((student.tok_embeddings.weight, theirs.model.embed_tokens.weight),
                        (student.layers[3].mlp.up_proj.weight, theirs.model.layers[3].mlp.up_proj.weight),
                        *((one.weight, two) for one, two in zip(term.maps, maps, strict=True))):  # fmt: skip
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_layers_are_fractions_of_depth() -> None:
    assert HiddenStateLoss(layers=(0.01, 0.25, 0.5, 1.0)).depths(30) == (1, 8, 15, 30)
    with pytest.raises(ConfigError, match=r"layers \[1, 1\], one of them twice"):
        HiddenStateLoss(layers=(0.5, 0.6)).depths(2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"weight": 0.0}, "weight"), ({"kind": "l1"}, "kind"), ({"layers": [0.0]}, "layers"), ({"layers": []}, "layers"),
     ({"projection": False}, "projection"), ({"projection_lr": 0.0}, "projection_lr")],
)  # fmt: skip
def test_settings_out_of_range(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"hidden_loss.{said}="):
        HiddenStateLoss(**settings)


def test_all_ignored_labels_give_zero_and_a_gradient_of_zero() -> None:
    term = HiddenStateLoss(layers=(1.0,))
    term.attach(1, (4, 6))
    states = torch.randn(1, 2, 4, requires_grad=True)
    term([states], [torch.randn(1, 2, 6)], torch.tensor([], dtype=torch.int64)).backward()
    assert term.maps[0].weight.grad.abs().max() == 0 == states.grad.abs().max()


def test_muon_trains_an_added_group_by_adamw() -> None:
    model, (one, other) = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False)), torch.randn(2, 3, 2)
    added, alone = torch.nn.Parameter(one.clone()), torch.nn.Parameter(one.clone())
    optimizer = Muon(trainable_parameters(model))
    optimizer.add_param_group({"params": [("loss.maps.0.weight", added)], "lr": 0.1, "weight_decay": 0.0})
    expected = torch.optim.AdamW([alone], lr=0.1, weight_decay=0.0, betas=(0.9, 0.95))
    added.grad, alone.grad = other.clone(), other.clone()
    optimizer.step(), expected.step()
    assert torch.equal(added, alone) and not torch.equal(added, one)
