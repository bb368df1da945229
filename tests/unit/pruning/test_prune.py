"""Choosing and dropping layers, against recomputation from scratch."""

from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional

from kdtune import models
from kdtune.errors import ConfigError
from kdtune.pruning import prune


@dataclass
class Text:
    tokens: torch.Tensor
    labels: torch.Tensor


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = models.llama(
        vocab_size=31, embed_dim=16, num_layers=6, num_heads=4, num_kv_heads=2, intermediate_dim=24, rope_base=100.0
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(1)
    made = []
    for rows, length in ((3, 9), (2, 14)):
        tokens = torch.randint(0, 31, (rows, length), generator=generator)
        labels = torch.randint(0, 31, (rows, length), generator=generator)
        labels[:, :3] = -100
        labels[0, -4:] = -100
        made.append(Text(tokens, labels))
    return made


def brute_force_loss(model, texts, layers) -> float:
    """Mean over all valid tokens of the pruned model's cross entropy, from its full logits."""
    pruned = prune.keep_layers(model, layers)
    with torch.no_grad():
        logits = torch.cat([pruned(text.tokens).flatten(0, 1) for text in texts]).double()
    labels = torch.cat([text.labels.flatten() for text in texts])
    return functional.cross_entropy(logits, labels, ignore_index=-100).item()


def test_keep_layers_runs_those_layers_and_shares_them(model):
    pruned = prune.keep_layers(model, [0, 2, 5])
    assert pruned.config.num_layers == 3
    assert all(pruned.layers[new] is model.layers[old] for new, old in enumerate((0, 2, 5)))
    assert pruned.output.weight is model.output.weight
    assert len(model.layers) == 6
    tokens = torch.arange(8)[None]
    fresh = models.Transformer(pruned.config)
    fresh.load_state_dict(pruned.state_dict())
    assert torch.equal(fresh(tokens), pruned(tokens))


def test_keeping_all_layers_changes_nothing_and_keeps_the_tie():
    tied = models.llama(
        vocab_size=31, embed_dim=16, num_layers=2, num_heads=2, intermediate_dim=24, tie_embeddings=True
    )
    pruned = prune.keep_layers(tied.eval(), [0, 1])
    assert pruned.output.weight is pruned.tok_embeddings.weight
    assert not pruned.training
    assert torch.equal(pruned(torch.arange(5)[None]), tied(torch.arange(5)[None]))


@pytest.mark.parametrize("layers", [[], [1, 0], [1, 1], [0, 6], [-1, 2]])
def test_keep_layers_refuses_other_indices(model, layers):
    with pytest.raises(ConfigError, match="strictly increasing indices from 0 to 5"):
        prune.keep_layers(model, layers)


def test_block_influence_needs_no_float64_on_the_device(model, texts, monkeypatch):
    seen = set()
    cosine_similarity = functional.cosine_similarity
    monkeypatch.setattr(functional, "cosine_similarity",
                        lambda a, b, dim: seen.update((a.dtype, b.dtype)) or cosine_similarity(a, b, dim=dim))  # fmt: skip
    prune.block_influence(model, texts)
    assert seen == {torch.float32}  # mps has no float64


@pytest.mark.parametrize("num_layers", range(1, 34))
def test_evenly_spaced(num_layers):
    for keep in range(1, num_layers + 1):
        layers = prune.evenly_spaced(num_layers, keep)
        assert len(set(layers)) == keep
        assert layers == sorted(layers)
        if keep > 1:
            assert (layers[0], layers[-1]) == (0, num_layers - 1)
            gap = (num_layers - 1) / (keep - 1)
            assert all(abs(layer - index * gap) <= 0.5 for index, layer in enumerate(layers))


def test_too_many_or_no_layers_are_refused(model, texts):
    for keep in (0, 7):
        with pytest.raises(ConfigError, match=f"keep={keep}: must be from 1 to 6"):
            prune.evenly_spaced(6, keep)
        with pytest.raises(ConfigError, match=f"keep={keep}"):
            prune.greedy_removal(model, texts, keep)


def removal_losses(model, texts):
    """The loss without each layer, as the first removal measures it."""
    texts = list(texts)
    loss, added = prune.mean_loss(model, texts), prune.greedy_removal(model, texts, 5)[0].added
    return [loss + added[layer] for layer in range(6)]


def test_losses_are_those_of_the_pruned_models(model, texts):
    assert prune.mean_loss(model, texts) == pytest.approx(brute_force_loss(model, texts, range(6)), rel=1e-5)
    assert prune.mean_loss(model, texts, [1, 4]) == pytest.approx(brute_force_loss(model, texts, [1, 4]), rel=1e-5)
    expected = [brute_force_loss(model, texts, [i for i in range(6) if i != left_out]) for left_out in range(6)]
    assert removal_losses(model, iter(texts)) == pytest.approx(expected, rel=1e-5)


def brute_force_greedy(model, texts, keep):
    layers, steps = list(range(6)), []
    while len(layers) > keep:
        losses = {i: brute_force_loss(model, texts, [j for j in layers if j != i]) for i in layers}
        cheapest = min(losses, key=losses.get)
        layers.remove(cheapest)
        steps.append((cheapest, losses[cheapest]))
    return steps


@pytest.mark.parametrize("num_candidates", [None, 6, 100])
@pytest.mark.parametrize("seed", range(2))
def test_greedy_removal_is_the_brute_force_choice(model, texts, seed, num_candidates):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []
    steps = prune.greedy_removal(model, iter(texts), 1, num_candidates=num_candidates, on_removal=seen.append)
    expected = brute_force_greedy(model, texts, 1)
    assert [step.layer for step in steps] == [layer for layer, _ in expected]
    assert [step.loss for step in steps] == pytest.approx([loss for _, loss in expected], rel=1e-5)
    assert seen == steps
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("num_candidates", [1, 2, 3])
def test_few_candidates_are_those_that_added_least_when_last_measured(model, texts, num_candidates):
    layers, expected = list(range(6)), []
    added, base = dict.fromkeys(layers, 0.0), brute_force_loss(model, texts, layers)
    while len(layers) > 1:
        tried = sorted(layers, key=added.get)[: num_candidates if expected else None]
        losses = {i: brute_force_loss(model, texts, [j for j in layers if j != i]) for i in tried}
        added |= {i: loss - base for i, loss in losses.items()}
        cheapest = min(losses, key=losses.get)
        base = losses[cheapest]
        layers.remove(cheapest)
        expected.append((cheapest, base))
    steps = prune.greedy_removal(model, texts, 1, num_candidates=num_candidates)
    assert [step.layer for step in steps] == [layer for layer, _ in expected]
    assert [step.loss for step in steps] == pytest.approx([loss for _, loss in expected], rel=1e-5)


@pytest.mark.parametrize("num_candidates", [None, 2])
def test_a_search_continues_where_it_was_stopped(model, texts, num_candidates):
    """To the bit, from each removal on, and with another number of layers to keep."""
    whole = prune.greedy_removal(model, texts, 1, num_candidates=num_candidates)
    for num_done in range(6):
        new = []
        steps = prune.greedy_removal(
            model, texts, 1, num_candidates=num_candidates, done=whole[:num_done], on_removal=new.append
        )
        assert steps == whole and new == whole[num_done:]
    assert prune.greedy_removal(model, texts, 3, num_candidates=num_candidates, done=whole) == whole[:3]


def test_progress_is_the_share_of_what_a_removal_measures(model, texts):
    shares, ends = [], []
    prune.greedy_removal(model, texts, 4, on_progress=shares.append, on_removal=lambda step: ends.append(len(shares)))
    for begin, end in zip([0, *ends], ends, strict=False):
        assert shares[begin:end] == sorted(shares[begin:end]) and shares[begin] > 0 and shares[end - 1] == 1
    # 3 x 9 and 2 x 14 tokens; the stacks without layers 0 to 5 go through 5, 4, ... of the six, and the head.
    assert shares[0] == 27 / ((27 + 28) * (15 + 6))


def test_no_candidates_are_refused(model, texts):
    with pytest.raises(ConfigError, match="num_candidates=0: must be at least 1"):
        prune.greedy_removal(model, texts, 1, num_candidates=0)


def test_memory_bounds_change_nothing(model, texts, monkeypatch):
    expected = removal_losses(model, texts)
    monkeypatch.setattr(prune, "_TOKENS_AT_ONCE", 1)
    monkeypatch.setattr(prune, "_LOGITS_AT_ONCE", 31 * 4)
    assert removal_losses(model, texts) == pytest.approx(expected, rel=1e-5)


def test_block_influence_is_the_formula(model, texts):
    streams = []
    hooks = [
        layer.register_forward_hook(lambda _, inputs, out: streams.append((inputs[0], out))) for layer in model.layers
    ]
    cosines = [[] for _ in model.layers]
    with torch.no_grad():
        for text in texts:
            streams.clear()
            model(text.tokens)
            valid = text.labels != -100
            for index, (x, y) in enumerate(streams):
                for a, b in zip(x[valid].double(), y[valid].double(), strict=True):
                    cosines[index].append((a @ b / (a.norm() * b.norm())).item())
    for hook in hooks:
        hook.remove()
    expected = [1 - sum(values) / len(values) for values in cosines]
    influence = prune.block_influence(model, texts)
    assert influence == pytest.approx(expected, abs=1e-6)
    ranked = sorted(range(6), key=lambda i: expected[i], reverse=True)
    assert prune.most_influential(influence, 2) == sorted(ranked[:2])


def test_a_layer_that_adds_nothing_goes_first(model, texts):
    with torch.no_grad():
        model.layers[3].attn.output_proj.weight.zero_()
        model.layers[3].mlp.down_proj.weight.zero_()
    assert prune.block_influence(model, texts)[3] == pytest.approx(0, abs=1e-6)
    assert removal_losses(model, texts)[3] == pytest.approx(prune.mean_loss(model, texts), rel=1e-6)


def test_text_without_targets_is_an_error(model, texts):
    for text in texts:
        text.labels.fill_(-100)
    for measure in (prune.block_influence, prune.mean_loss):
        with pytest.raises(ConfigError, match="no valid label"):
            measure(model, texts)
        with pytest.raises(ConfigError, match="no valid label"):
            measure(model, [])
