import math

import pytest
import torch

from kdtune.constants import IGNORE_INDEX
from kdtune.data import Batch
from kdtune.distributed import SINGLE_PROCESS
from kdtune.errors import DataError
from kdtune.evaluation import evaluate_ce, evaluate_kd, perplexity
from kdtune.losses import ForwardKL, ForwardKLLoss, KDLoss
from kdtune.models import llama
from kdtune.teachers import OnlineTeacher


def tiny(seed, vocab_size=20, embed_dim=8):
    torch.manual_seed(seed)
    model = llama(
        vocab_size=vocab_size, embed_dim=embed_dim, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_dim=12,
        max_seq_len=32,
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def total_variation(student_logp_NV, teacher_logp_NV):
    return 0.5 * (student_logp_NV.exp() - teacher_logp_NV.exp()).abs().sum(-1)


def ragged_batches():
    generator = torch.Generator().manual_seed(1)
    batches = []
    for rows, length in [(12, 7), (3, 2), (8, 11)]:
        tokens = torch.randint(0, 20, (rows, length), generator=generator)
        labels = torch.randint(0, 20, (rows, length), generator=generator)
        labels[torch.rand(rows, length, generator=generator) < 0.4] = IGNORE_INDEX
        batches.append(Batch.from_labels(tokens, labels))
    return batches


def brute_force(student, teacher, batches):
    """Means over valid tokens, token by token, in float64 from the full logits."""
    student, teacher = student.double(), teacher.double()
    losses, teacher_losses, divergences, agreements = [], [], [], []
    for batch in batches:
        with torch.no_grad():
            q = student(batch.tokens).softmax(-1)
            teacher_logits = teacher(batch.tokens)
            p, own_p = (logits.softmax(-1) for logits in (teacher_logits[..., : q.shape[-1]], teacher_logits))
        for row, column in (batch.labels != IGNORE_INDEX).nonzero().tolist():
            q_V, p_V = q[row, column], p[row, column]
            losses.append(-math.log(float(q_V[batch.labels[row, column]])))
            teacher_losses.append(-math.log(float(own_p[row, column, batch.labels[row, column]])))
            divergences.append(float((p_V * (p_V.log() - q_V.log())).sum()))
            agreements.append(float(q_V.argmax() == p_V.argmax()))
    count = len(losses)
    return {
        "class_loss": math.fsum(losses) / count,
        "kd_loss": math.fsum(divergences) / count,
        "forward_kl": math.fsum(divergences) / count,
        "teacher_class_loss": math.fsum(teacher_losses) / count,
        "agreement": sum(agreements) / count,
        "tokens": count,
    }


@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("teacher_vocab_size", [20, 24])
def test_as_float64_brute_force(chunk_size, teacher_vocab_size):
    loss = KDLoss(ForwardKLLoss(), kd_ratio=0.3, chunk_size=chunk_size)
    teacher = OnlineTeacher(tiny(2, teacher_vocab_size, embed_dim=12))
    found = evaluate_kd(tiny(1), teacher, loss, ragged_batches(), world=SINGLE_PROCESS, with_teacher_loss=True)
    expected = brute_force(tiny(1), tiny(2, teacher_vocab_size, embed_dim=12), ragged_batches())
    assert found == pytest.approx(expected, rel=1e-5)
    assert 0 < found["agreement"] < 1
    assert type(found["class_loss"]) is float and type(found["tokens"]) is int


@pytest.mark.parametrize("divergence", [ForwardKL(temperature=3.0), total_variation], ids=["tempered", "another"])
def test_forward_kl_is_measured_whatever_was_trained(divergence):
    """So that runs with different divergences can be compared; the others' numbers stay as they are."""
    loss, teacher = KDLoss(divergence, kd_ratio=1.0), OnlineTeacher(tiny(2))
    found = evaluate_kd(tiny(1), teacher, loss, ragged_batches(), world=SINGLE_PROCESS)
    expected = brute_force(tiny(1), tiny(2), ragged_batches())
    assert found["forward_kl"] == pytest.approx(expected["forward_kl"], rel=1e-5)
    assert found["kd_loss"] != pytest.approx(expected["kd_loss"], rel=1e-2)
    assert found["agreement"] == expected["agreement"]
    found = evaluate_kd(tiny(1), teacher, KDLoss(kd_ratio=0.0), ragged_batches(), world=SINGLE_PROCESS)
    assert found["forward_kl"] == pytest.approx(expected["forward_kl"], rel=1e-5) and "kd_loss" not in found


def test_a_teacher_compared_with_itself():
    model = tiny(1)
    found = evaluate_kd(model, OnlineTeacher(model), KDLoss(kd_ratio=0.5), ragged_batches(), world=SINGLE_PROCESS)
    assert found["kd_loss"] == pytest.approx(0.0, abs=1e-6)
    assert found["agreement"] == 1.0


def test_cross_entropy_alone():
    found = evaluate_ce(tiny(1), ragged_batches(), world=SINGLE_PROCESS)
    expected = brute_force(tiny(1), tiny(1), ragged_batches())
    assert found == pytest.approx(
        {
            "class_loss": expected["class_loss"],
            "perplexity": math.exp(expected["class_loss"]),
            "tokens": expected["tokens"],
        },
        rel=1e-5,
    )
    assert perplexity(1e4) == math.inf


def test_mode_and_gradients_are_left_alone_and_progress_sees_every_batch():
    student = tiny(1).train()
    student.norm.eval()
    modes = [module.training for module in student.modules()]
    seen = []

    def progress(batches):
        for batch in batches:
            seen.append(batch)
            yield batch

    evaluate_kd(student, OnlineTeacher(tiny(2)), KDLoss(), ragged_batches(), world=SINGLE_PROCESS, progress=progress)
    assert len(seen) == 3
    assert [module.training for module in student.modules()] == modes
    assert all(parameter.grad is None and parameter.requires_grad for parameter in student.parameters())


def test_nothing_valid_is_an_error_that_says_so():
    batch = Batch.from_labels(torch.ones(1, 3, dtype=torch.int64), torch.full((1, 3), IGNORE_INDEX))
    for batches in ([], [batch]):
        with pytest.raises(DataError, match="validation: 0 valid tokens"):
            evaluate_ce(tiny(1), batches, world=SINGLE_PROCESS)
