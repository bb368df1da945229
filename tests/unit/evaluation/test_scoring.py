import pytest
import torch

from kdtune.errors import DataError
from kdtune.evaluation import score
from kdtune.models import llama

VOCAB = 40


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = llama(
        vocab_size=VOCAB, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_dim=24, max_seq_len=64
    )
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def ids(generator, length):
    return torch.randint(0, VOCAB, (length,), generator=generator).tolist()


def requests(count=60):
    """Contexts that begin alike, several continuations of one context, some of one token, some requests twice."""
    generator = torch.Generator().manual_seed(1)
    prompt, pairs = ids(generator, 9), []
    for number in range(count):
        context = [*(prompt if number % 3 else []), *ids(generator, 1 + number % 7)]
        pairs += [(context, ids(generator, 1 + (number + i) % 5)) for i in range(1 + number % 4)]
        pairs += [(context, [token]) for token in ids(generator, 2)]
    return [*pairs, *pairs[:5]]


def brute_force(model, pairs, max_length):
    """One request at a time, from the full logits in float64."""
    model = model.double()
    found = []
    for context, continuation in pairs:
        whole = [*context, *continuation][-(max_length + 1) :]
        with torch.no_grad():
            logp_SV = model(torch.tensor([whole[:-1]]))[0, -len(continuation) :].log_softmax(-1)
        picked = logp_SV[range(len(continuation)), continuation]
        found.append((float(picked.sum()), logp_SV.argmax(-1).tolist() == list(continuation)))
    model.float()
    return found


@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
@pytest.mark.parametrize("max_length", [64, 8])
def test_as_float64_brute_force_whatever_the_batches(model, batch_tokens, max_length):
    pairs = requests()
    expected = brute_force(model, pairs, max_length)
    found = score(model, pairs, max_length=max_length, batch_tokens=batch_tokens)
    assert [one.logprob for one in found] == pytest.approx([one for one, _ in expected], abs=1e-4)
    assert [one.is_greedy for one in found] == [one for _, one in expected]
    assert any(one.is_greedy for one in found) and not all(one.is_greedy for one in found)


def test_what_is_shared_is_computed_once_and_only_continuations_are_projected(model):
    seen, projected = [], []
    hooks = [
        model.tok_embeddings.register_forward_hook(lambda module, args, out: seen.append(args[0].numel())),
        model.output.register_forward_hook(lambda module, args, out: projected.append(len(args[0]))),
    ]
    context = list(range(20))
    pairs = [(context, [1, 2, 3]), (context, [1, 2, 4]), (context, [5]), (context, [6]), (context, [7, 8])]
    score(model, pairs, max_length=64, batch_tokens=1000)
    for hook in hooks:
        hook.remove()
    assert sum(seen) == 20 + 2 + 1, "the context, 1 2 and 7: the last token of a continuation is never an input"
    assert sum(projected) == 1 + 2 + 1, "the context's last position, and those of 1, 2 and 7"


def test_one_long_row_of_many_questions_with_one_prompt(model):
    generator = torch.Generator().manual_seed(3)
    prompt = ids(generator, 40)
    pairs = [([*prompt, *ids(generator, 3)], ids(generator, 4)) for _ in range(300)]
    expected = brute_force(model, pairs, 64)
    found = score(model, pairs, max_length=64, batch_tokens=4096)
    assert [one.logprob for one in found] == pytest.approx([one for one, _ in expected], abs=1e-4)


def test_progress_counts_requests_and_the_mode_is_restored(model):
    model.train()
    counts = []
    score(model, requests(), max_length=64, batch_tokens=100, on_scored=counts.append)
    assert sum(counts) == len(requests()) and len(counts) > 1 and model.training
    assert score(model, [], max_length=64, batch_tokens=100) == []


@pytest.mark.parametrize(
    ("pair", "word"),
    [(([], [1]), "0 context"), (([1], []), "0 continuation"), (([1], [2] * 9), "max_seq_length=8")],
)
def test_requests_that_cannot_be_scored(model, pair, word):
    with pytest.raises(DataError, match=word):
        score(model, [pair], max_length=8, batch_tokens=100)
