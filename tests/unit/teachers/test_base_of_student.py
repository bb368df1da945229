"""The base of a LoRA student as its teacher, against a plain model of the same weights."""

import pytest
import torch

from kdtune.data import Batch
from kdtune.errors import ConfigError
from kdtune.losses import KDLoss
from kdtune.models import Transformer, apply_lora, llama
from kdtune.parallel import apply_activation_checkpointing
from kdtune.teachers import BaseOfStudent, OnlineTeacher

TOKENS = torch.tensor([[1, 2, 3, 4], [4, 5, 6, 7]])
BATCH = Batch.from_labels(TOKENS, TOKENS.roll(-1, 1))
KINDS = {"lora": {}, "dora": {"use_dora": True, "apply_lora_to_output": True}, "qlora": {"quantize_base": True}}


def plain() -> Transformer:
    torch.manual_seed(0)
    return llama(vocab_size=16, embed_dim=64, num_layers=2, num_heads=2, intermediate_dim=64, max_seq_len=16)


def student_of(kind: str) -> Transformer:
    return apply_lora(plain(), lora_rank=4, lora_dropout=0.5, **KINDS[kind]).train()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_base_whatever_the_adapters_have_become(kind: str) -> None:
    student, teacher = student_of(kind), BaseOfStudent()
    base = plain() if kind != "qlora" else student_of(kind).eval()  # whose B is zero
    expected = OnlineTeacher(base)(BATCH)
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and "lora_a" not in name:
            torch.nn.init.normal_(parameter)
    teacher.attach(student)
    before = torch.get_rng_state()
    signal = teacher(BATCH)
    assert torch.equal(before, torch.get_rng_state()) and student.training
    assert not signal.hidden_BSD.requires_grad and teacher.vocab_size == 16
    torch.testing.assert_close(signal.hidden_BSD, expected.hidden_BSD, rtol=0, atol=0)
    positions = torch.arange(8)
    torch.testing.assert_close(signal.log_probs(positions), expected.log_probs(positions), rtol=0, atol=0)
    assert teacher.generate([1, 2], max_new_tokens=4, stop_ids=[]) == OnlineTeacher(base).generate(
        [1, 2], max_new_tokens=4, stop_ids=[]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_kl_of_a_new_adapter_and_its_gradient_are_zero(kind: str) -> None:
    student, teacher = student_of(kind).eval(), BaseOfStudent()
    apply_activation_checkpointing(student)  # whose second forward has the adapters again
    teacher.attach(student)
    signal = teacher(BATCH)
    hidden = student(**BATCH.inputs, return_hidden=True)
    loss, _ = KDLoss(kd_ratio=1.0)(hidden, student.output, signal, BATCH.targets)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert all(one.grad.abs().max() < 1e-5 for one in student.parameters() if one.requires_grad)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="this student has none; give `adapter`"):
        BaseOfStudent().attach(plain())
    student = student_of("lora")
    student.norm.weight.requires_grad_()
    with pytest.raises(ConfigError, match=r"needs a frozen base, and norm.weight is trained"):
        BaseOfStudent().attach(student)
    with pytest.raises(RuntimeError, match="attach the student"):
        BaseOfStudent()(BATCH)
