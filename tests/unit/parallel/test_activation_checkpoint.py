"""Recomputed layers: same numbers, same names, less kept."""

import copy
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdtune import models
from kdtune.parallel import apply_activation_checkpointing, apply_activation_offloading
from kdtune.parallel.activations import is_offloaded


def tiny():
    torch.manual_seed(0)
    return models.llama(vocab_size=31, embed_dim=16, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_dim=24)


def backward(model, tokens) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that autograd keeps between forward and backward, and the gradients."""
    kept = 0

    def pack(tensor):
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens).logsumexp(-1).sum()
    loss.backward()
    return kept, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("times", [1, 2])
def test_gradients_and_names_are_the_same(times):
    plain, checkpointed = tiny(), tiny()
    for _ in range(times):
        apply_activation_checkpointing(checkpointed)
    assert list(checkpointed.state_dict()) == list(plain.state_dict())
    tokens = torch.randint(0, 31, (2, 20), generator=torch.Generator().manual_seed(1))
    kept_plain, expected = backward(plain, tokens)
    kept, grads = backward(checkpointed, tokens)
    assert grads.keys() == expected.keys()
    assert all(torch.equal(grads[name], expected[name]) for name in expected)
    assert kept < kept_plain / 3


def test_each_layer_runs_twice_with_gradients_and_once_without():
    model, runs = tiny(), []
    model.layers[1].attn.register_forward_hook(lambda *_: runs.append(1))
    apply_activation_checkpointing(model)
    tokens = torch.arange(5)[None]
    with torch.no_grad():
        model(tokens)
    assert len(runs) == 1
    model(tokens).sum().backward()
    assert len(runs) == 3


def test_copies_are_independent_and_caches_still_work():
    model = tiny()
    apply_activation_checkpointing(model)
    copied = copy.deepcopy(model)
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        expected = model(tokens)
        for parameter in model.layers.parameters():
            parameter.zero_()
        assert torch.equal(copied(tokens), expected)
        cache = models.KVCache(copied.config, 1, 6)
        parts = [copied(part, kv_cache=cache) for part in tokens.split([4, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)


class Products(TorchDispatchMode):
    """Counts matrix products and attentions."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("which", "share"), [("full", 1.0), ("selective", 0.0), (2, 2 / 3), (3, 1 / 3)])
def test_what_is_computed_again(which, share):
    """Of the products of three layers; the gradients are those of a model that keeps all."""
    plain, checkpointed = tiny(), tiny()
    apply_activation_checkpointing(checkpointed, which)
    tokens = torch.randint(0, 31, (2, 20), generator=torch.Generator().manual_seed(1))
    found = []
    for model in (plain, checkpointed):
        loss = model(tokens).logsumexp(-1).sum()
        with Products() as counted:
            loss.backward()
        found.append((counted.counts, {name: parameter.grad for name, parameter in model.named_parameters()}))
    (before, expected), (after, grads) = found
    assert all(torch.equal(grads[name], expected[name]) for name in expected)
    again = after - before
    assert again["mm"] == 6 * 3 * share, "a layer's last output is not needed"
    assert again["_scaled_dot_product_flash_attention_for_cpu"] == 3 * share
    assert which != "selective" or again["silu"] == 3, "what is cheap runs again"


@pytest.mark.parametrize("checkpointed", [None, "full", "selective"])
def test_offloaded_activations_give_the_same_gradients(checkpointed, monkeypatch):
    """On a CPU, where the moves are copies."""
    plain, offloaded, shapes = tiny(), tiny(), []
    empty = torch.empty
    monkeypatch.setattr(
        "kdtune.parallel.activations.torch.empty", lambda shape, **how: shapes.append(shape) or empty(shape, **how)
    )
    if checkpointed:
        apply_activation_checkpointing(offloaded, checkpointed)
    apply_activation_offloading(offloaded, smallest_bytes=0)
    tokens = torch.randint(0, 31, (2, 20), generator=torch.Generator().manual_seed(1))
    _, expected = backward(plain, tokens)
    moved = len(shapes)
    _, grads = backward(offloaded, tokens)
    assert moved == 0 and all(torch.equal(grads[name], expected[name]) for name in expected)
    weights = {parameter.shape for parameter in plain.parameters()} | {
        parameter.T.shape for parameter in plain.parameters()
    }
    assert shapes and not weights.intersection(shapes)
    assert checkpointed is None or (2, 20, 16) in shapes


def test_what_several_operations_of_a_layer_save_is_moved_once(monkeypatch):
    """The input of q, k and v, for one, which three products save."""
    plain, offloaded, saved, moved = tiny(), tiny(), [], []
    for index, layer in enumerate(plain.layers):

        def recorded(*args, forward=layer.forward, index=index):
            def pack(tensor):
                if is_offloaded(tensor, 0):
                    saved.append((index, tensor.data_ptr(), tensor.shape, tensor.stride()))
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return forward(*args)

        layer.forward = recorded
    tokens = torch.randint(0, 31, (2, 20), generator=torch.Generator().manual_seed(1))
    logits = plain(tokens)
    empty = torch.empty
    monkeypatch.setattr(
        "kdtune.parallel.activations.torch.empty", lambda *a, **how: moved.append(a) or empty(*a, **how)
    )
    apply_activation_offloading(offloaded, smallest_bytes=0)
    assert torch.equal(offloaded(tokens), logits)
    assert len(moved) == len(set(saved)) < len(saved)
