"""What a cache keeps of hidden states, against sums in float64 over all ids; how much it is, and what is lost."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from kdtune.data import DatasetStats, TokenizedDataset
from kdtune.losses import fused_linear
from kdtune.models import OutputHead, llama
from kdtune.models.lora import LoRAHead
from kdtune.teachers.cache import (
    KINDS,
    Cache,
    Header,
    Source,
    begin,
    cache_bytes,
    decode,
    encode,
    finish,
    measure_quality,
    write_head,
    write_shard,
)
from kdtune.teachers.cache.capture import draws_of, kept_positions, teacher_rows
from kdtune.teachers.cache.encode import head_weight, uniforms
from kdtune.teachers.cache.forecast import amount_of

DIM, VOCAB, ROWS = 16, 60, 9
ALL_KINDS = [(kind, dtype) for kind, dtypes in KINDS.items() for dtype in dtypes]


def make_header(kind, dtype=None, **changes):
    sizes = {"hidden": {"dim": DIM}, "topk": {"num_ids": 5}, "sampled": {"num_ids": 7}, "path": {}}[kind]
    values = {"kind": kind, "dtype": dtype or KINDS[kind][0], "vocab_size": VOCAB, "num_examples": 6, "dataset_size": 8,
              "examples_per_shard": 4, **sizes}  # fmt: skip
    return Header(**values | changes)


@pytest.fixture
def states():
    """Hidden states, a head, and the next tokens."""
    random = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, DIM, generator=random) for size in (ROWS, VOCAB))
    return hidden, OutputHead.of(weight), torch.randint(VOCAB, (ROWS,), generator=random)


def exact(hidden, weight, temperature=1.0):
    """Log-probabilities in float64."""
    return ((hidden.double() @ weight.double().T) / temperature).log_softmax(-1)


def test_hidden_states_are_rounded_once(states):
    hidden, head, labels = states
    assert torch.equal(encode(make_header("hidden", "fp32"), hidden, head, labels, None)["hidden"], hidden)
    assert torch.equal(encode(make_header("hidden", "bf16"), hidden, head, labels, None)["hidden"], hidden.bfloat16())
    hidden[2] = 0
    found = encode(make_header("hidden", "int8"), hidden, head, labels, None)
    largest = hidden.abs().amax(-1)
    assert torch.allclose(found["scale"], largest / 127) and found["hidden"].dtype == torch.int8
    error = (found["hidden"].double() * found["scale"].double()[:, None] - hidden.double()).abs().amax(-1)
    assert (error <= largest / 254 * (1 + 1e-6)).all() and error[2] == 0


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_most_likely_ids_and_their_tail(states, temperature, monkeypatch):
    """In chunks of two positions."""
    monkeypatch.setattr(fused_linear, "CHUNK_BYTES", 2 * VOCAB * 4)
    hidden, head, labels = states
    found = encode(make_header("topk", "fp32", temperature=temperature), hidden, head, labels, None)
    logp = exact(hidden, head.weight, temperature)
    expected, ids = logp.topk(5)
    assert torch.equal(found["ids"].long(), ids) and found["ids"].dtype == torch.int32
    assert torch.allclose(found["logp"].double(), expected, atol=1e-5)
    tail = (1 - expected.exp().sum(-1)).log()
    assert torch.allclose(found["log_tail"].double(), tail, atol=1e-5)


def test_the_texts_own_tokens_under_a_soft_cap(states):
    hidden, head, labels = states
    head = OutputHead.of(head.weight, softcap=3.0)
    found = encode(make_header("path"), hidden, head, labels, None)["logp"]
    logits = hidden.double() @ head.weight.double().T
    expected = (3 * (logits / 3).tanh()).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    assert torch.allclose(found.double(), expected, atol=1e-5)


@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_draws_are_in_proportion_and_their_weights_unbiased(states, exponent):
    hidden, head, labels = states
    header = make_header("sampled", "fp32", num_ids=20_000, exponent=exponent)
    found = encode(header, hidden, head, labels, uniforms(header, 3, ROWS))
    logp = exact(hidden, head.weight)
    drawn = (exponent * logp).softmax(-1)
    counts = torch.stack([torch.bincount(row, minlength=VOCAB) for row in found["ids"].long()])
    deviation = (20_000 * drawn * (1 - drawn)).sqrt()
    assert ((counts - 20_000 * drawn).abs() < 5 * deviation + 3).all()
    assert torch.allclose(found["logp"].double(), logp.gather(1, found["ids"].long()), atol=1e-5)
    normalizer = found["log_normalizer"].double() if exponent != 1 else torch.zeros(ROWS, dtype=torch.float64)
    assert torch.allclose(normalizer, (exponent * logp).logsumexp(-1), atol=1e-5)
    weights = (normalizer[:, None] - exponent * found["logp"].double()).exp() / 20_000
    # The sum over ids of p * id, estimated from the draws.
    estimate = (weights * found["logp"].double().exp() * found["ids"]).sum(-1)
    assert torch.allclose(estimate, (logp.exp() * torch.arange(VOCAB)).sum(-1), rtol=0.05)


def test_an_examples_draws_depend_on_seed_and_example_alone():
    header = make_header("sampled")
    assert np.array_equal(uniforms(header, 3, 5), uniforms(header, 3, 9)[:5])
    for other in (uniforms(header, 4, 5), uniforms(make_header("sampled", seed=1), 3, 5)):
        assert not np.array_equal(uniforms(header, 3, 5), other)


def test_what_is_stored_stands_for_a_distribution(states):
    """Ids that are not known share the rest evenly."""
    hidden, head, labels = states
    logp = exact(hidden, head.weight)
    for kind, dtype in ALL_KINDS:
        header = make_header(kind, dtype)
        drawn = uniforms(header, 0, ROWS) if kind == "sampled" else None
        found = encode(header, hidden, head, labels, drawn)
        stored = decode(header, {**found, "labels": labels}, head.weight)
        assert torch.allclose(stored.exp().sum(-1), torch.ones(ROWS), atol=1e-5)
        if kind == "hidden":
            assert torch.allclose(stored.double(), logp, atol={"fp32": 1e-5, "bf16": 0.1, "int8": 0.3}[dtype])
            continue
        for row in range(ROWS):
            ids = labels[row : row + 1] if kind == "path" else found["ids"][row].long()
            known = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, ids, True)
            rest = (1 - logp[row][known].exp().sum()) / (~known).sum()
            expected = torch.where(known, logp[row], rest.log())
            assert torch.allclose(stored[row].double(), expected, atol=0.02 if dtype == "fp16" else 1e-4)


def test_a_head_with_an_adapter_is_stored_as_one_product(states):
    hidden, base, labels = states
    head = LoRAHead(base, rank=2, alpha=4.0, dropout=0.0, use_dora=False, quantize_base=False)
    nn.init.normal_(head.lora_a.weight)
    nn.init.normal_(head.lora_b.weight)
    head.requires_grad_(False)
    weight = head_weight(head)
    assert weight.shape == (VOCAB, DIM + 2)
    header = make_header("hidden", "fp32", dim=DIM + 2)
    found = encode(header, hidden, head, labels, None)
    assert torch.allclose(decode(header, found, weight), head(hidden).log_softmax(-1), atol=1e-5)


@pytest.fixture
def teacher_and_data():
    torch.manual_seed(0)
    model = llama(vocab_size=VOCAB, embed_dim=DIM, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_dim=32,
                  max_seq_len=64)  # fmt: skip
    random = np.random.default_rng(0)
    encoded = []
    for index in range(8):
        ids = random.integers(1, VOCAB, 4 + 3 * (index % 4)).tolist()
        encoded.append((ids, [False, False, *[True] * (len(ids) - 2)]))
    dataset = TokenizedDataset(encoded, DatasetStats("test", rows=8))
    return model.eval(), Source(dataset, pad_id=0, tokens_per_batch=14)


@pytest.mark.parametrize(("kind", "dtype"), ALL_KINDS)
def test_the_size_is_known_before_and_rows_come_back(kind, dtype, teacher_and_data, tmp_path):
    """Each example's row is what the teacher says of it alone."""
    model, source = teacher_and_data
    header = make_header(
        kind, dtype, first_example=1, positions="all" if kind == "path" else "labels", teacher={"dtype": "fp32"}
    )
    with torch.no_grad():
        for shard in begin(tmp_path, header):
            batches = source.batches(header.examples_of(shard))
            assert max(sum(len(one.tokens) for one in batch) for batch in batches) <= 14 and len(batches) > 1 - (
                len(header.examples_of(shard)) < 4
            )
            rows = [row for batch in batches for row in teacher_rows(model, header, source, batch)]
            write_shard(tmp_path, header, shard, sorted(rows, key=lambda row: row.example_id))
        if kind == "hidden":
            write_head(tmp_path, head_weight(model.output))
        index = finish(tmp_path)
        assert index["bytes"] == cache_bytes(header, amount_of(header, source))
        cache = Cache(tmp_path)
        for example_id in header.example_ids:
            example = source.dataset.numbered(example_id)
            row = cache.read(example_id, example.tokens)
            kept = kept_positions(example, header.positions)
            first = 0 if kind == "path" else 1
            assert row.positions.tolist() == kept.tolist() == list(range(first, len(example.tokens) - 1))
            hidden = model(torch.from_numpy(example.tokens)[None], return_hidden=True)[0, kept]
            labels = torch.from_numpy(example.tokens[kept + 1])
            alone = encode(header, hidden, model.output, labels, draws_of(header, [example], [kept]))
            for name, values in row.columns.items():
                steps = 1 if values.dtype in (torch.int8, torch.int32) else 1e-2
                assert torch.allclose(values.double(), alone[name].double(), atol=steps)


def test_what_is_lost_is_the_forward_kl(teacher_and_data):
    model, source = teacher_and_data
    headers = [make_header("topk", "fp32"), make_header("hidden", "fp32"), make_header("hidden", "int8")]
    batches = source.batches(range(8))
    of_topk, of_exact, of_int8 = measure_quality(model, source, headers, batches)
    total, count = 0.0, 0
    with torch.no_grad():
        for example in (one for batch in batches for one in batch):
            logp = model(torch.from_numpy(example.tokens)[None])[0, 1:-1].double().log_softmax(-1)
            top, ids = logp.topk(5)
            share = ((1 - top.exp().sum(-1)) / (VOCAB - 5)).log()
            stored = share[:, None].repeat(1, VOCAB).scatter(1, ids, top)
            total += float((logp.exp() * (logp - stored)).sum())
            count += len(logp)
    assert of_topk["num_tokens"] == count and of_topk["bytes_per_token"] == 8 + 8 * 5
    assert of_topk["forward_kl"] == pytest.approx(total / count, rel=1e-4)
    assert of_exact["forward_kl"] == pytest.approx(0, abs=1e-7)
    assert 0 < of_int8["forward_kl"] < 1e-3 and math.isfinite(of_int8["forward_kl"])


def test_a_teacher_that_is_no_number_is_told(teacher_and_data):
    model, source = teacher_and_data
    with torch.no_grad():
        model.tok_embeddings.weight[source.dataset[3].tokens[-2]] = torch.nan
    with pytest.raises(Exception, match=r"example \d: the teacher's hidden states are not numbers"):
        for batch in source.batches([3]):
            teacher_rows(model, make_header("path"), source, batch)
