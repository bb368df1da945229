"""Each token has the numbers of full logits in float64, at the position that predicts it."""

import math

import pytest
import torch

from kdtune import models
from kdtune.constants import IGNORE_INDEX
from kdtune.data import Batch
from kdtune.evaluation import inspect_tokens
from kdtune.losses import ForwardKL, TotalVariation


def tiny(seed: int, layers: int, vocab_size: int = 11) -> models.Transformer:
    torch.manual_seed(seed)
    model = models.llama(
        vocab_size=vocab_size,
        embed_dim=16,
        num_layers=layers,
        num_heads=2,
        num_kv_heads=1,
        intermediate_dim=24,
        max_seq_len=32,
    )
    for parameter in model.parameters():
        parameter.data.mul_(8)  # distributions that differ
    return model.eval()


@pytest.fixture
def batch() -> Batch:
    tokens = torch.tensor([[1, 5, 7, 2, 9], [3, 4, 0, 0, 0]])
    labels = torch.tensor([[IGNORE_INDEX, 7, 2, 9, 6], [4, 8, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]])
    return Batch.from_labels(tokens, labels, [5, 2])


@pytest.mark.parametrize("teacher_rows", [11, 10])
def test_numbers_of_each_token(batch: Batch, teacher_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdtune.evaluation.inspection._CHUNK", 2)
    student, teacher = tiny(0, 1), tiny(1, 2, teacher_rows)
    rows = inspect_tokens(student, teacher, ForwardKL(), batch, lambda one: f"<{one}>", top=3)
    assert [[token["text"] for token in row] for row in rows] == [
        ["<1>", "<5>", "<7>", "<2>", "<9>", "<6>"],
        ["<3>", "<4>", "<8>"],
    ]
    assert [["divergence" in token for token in row] for row in rows] == [
        [False, False, True, True, True, True],
        [False, True, True],
    ]
    token = rows[0][3]  # id 2, predicted at position 2
    with torch.no_grad():
        logq, logp = (model(batch.tokens).double()[0, 2].log_softmax(-1) for model in (student, teacher))
    shared = len(logp)
    assert token["divergence"] == pytest.approx(float((logp.exp() * (logp - logq[:shared])).sum()), rel=1e-4, abs=1e-5)
    assert token["teacher_loss"] == pytest.approx(-float(logp[2]), rel=1e-5, abs=1e-5)
    assert token["student_loss"] == pytest.approx(-float(logq[2]), rel=1e-5, abs=1e-5)
    assert token["student_entropy"] == pytest.approx(-float((logq.exp() * logq).sum()), rel=1e-4, abs=1e-5)
    assert token["teacher_entropy"] == pytest.approx(-float((logp.exp() * logp).sum()), rel=1e-4, abs=1e-5)
    best = logp.topk(3).indices.tolist()
    assert [text for text, *_ in token["teacher_top"]] == [f"<{one}>" for one in best]
    assert [p for _, p, _ in token["teacher_top"]] == pytest.approx(logp[best].exp().tolist(), rel=1e-4, abs=1e-5)
    assert [q for *_, q in token["teacher_top"]] == pytest.approx(logq[best].exp().tolist(), rel=1e-4, abs=1e-5)
    assert len(token["student_top"]) == 3


def test_equal_models_agree_everywhere(batch: Batch) -> None:
    model = tiny(0, 1)
    rows = inspect_tokens(model, model, TotalVariation(), batch, str)
    assert {token["divergence"] for row in rows for token in row if "divergence" in token} == {0.0}
    assert all(math.isfinite(token["teacher_entropy"]) for row in rows for token in row if "divergence" in token)
