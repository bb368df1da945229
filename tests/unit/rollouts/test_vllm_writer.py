"""The student's text by vLLM, whose names and states a fake has that computes with transformers."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kdtune.distributed import SINGLE_PROCESS
from kdtune.errors import ConfigError, DataError, TrainingError
from kdtune.generation import Sampling, complete
from kdtune.models import Transformer, apply_lora, llama
from kdtune.rollouts import Rollouts, Share, VLLMWriter
from kdtune.rollouts.checks import check_writer_ids

PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 8], [9, 8], [20, 21, 22]]
ASKED = {"max_new_tokens": 12, "stop_ids": (3, 7, 11), "seeds": [1, 2, 3, 4, 5]}


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fake_vllm"))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    import vllm

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return vllm


@pytest.fixture
def student() -> Transformer:
    torch.manual_seed(0)
    model = llama(
        vocab_size=32, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_dim=24, max_seq_len=64
    )
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def started(student: Transformer, longest: int = 64, **settings: object) -> VLLMWriter:
    writer = VLLMWriter(**settings)
    writer.start(student, SINGLE_PROCESS, longest=longest)
    return writer


def check_same_texts(writer: VLLMWriter, student: Transformer) -> None:
    """Greedy texts, their ends and their log-probabilities are those of kdtune's decoder."""
    found = writer.complete(PROMPTS, sampling=Sampling(), **ASKED)
    expected = complete(student, PROMPTS, sampling=Sampling(), with_log_probs=True, **ASKED)
    for one, other in zip(found, expected, strict=True):
        assert (one.ids, one.is_finished) == (other.ids, other.is_finished)
        torch.testing.assert_close(torch.tensor(one.log_probs), torch.tensor(other.log_probs), rtol=1e-5, atol=1e-5)


def test_texts_are_those_of_the_students_weights_of_now(vllm: ModuleType, student: Transformer) -> None:
    before = torch.random.get_rng_state()
    writer = started(student)
    assert torch.equal(torch.random.get_rng_state(), before)
    check_same_texts(writer, student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(-0.7)
    check_same_texts(writer, student)
    # Some end by themselves and keep the id that ended them; some are cut and have none.
    found = writer.complete(PROMPTS, sampling=Sampling(1.0), **ASKED)
    assert {one.is_finished for one in found} == {True, False}
    assert all((one.ids[-1] in ASKED["stop_ids"]) == one.is_finished for one in found)
    assert all(len(one.ids) == 12 for one in found if not one.is_finished)


def test_adapters_are_merged_for_the_transfer(vllm: ModuleType, student: Transformer) -> None:
    apply_lora(student, lora_rank=2, lora_alpha=4, lora_attn_modules=["q_proj", "output_proj"], apply_lora_to_mlp=True)
    for name, parameter in student.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    check_same_texts(started(student), student)
    assert any("lora" in name for name, _ in student.named_parameters())


def test_a_text_depends_on_its_own_seed(vllm: ModuleType, student: Transformer) -> None:
    writer = started(student)
    texts = [one.ids for one in writer.complete(PROMPTS, sampling=Sampling(1.0), **ASKED)]
    assert texts[2] != texts[3]  # one prompt, two seeds
    again = writer.complete(PROMPTS[::-1], sampling=Sampling(1.0), **(ASKED | {"seeds": ASKED["seeds"][::-1]}))
    assert [one.ids for one in again[::-1]] == texts
    # log q at temperature 1, whatever it was drawn at.
    (cold,) = writer.complete(PROMPTS[:1], sampling=Sampling(0.5), **(ASKED | {"seeds": [1]}))
    with torch.no_grad():
        logits = student(torch.tensor([[*PROMPTS[0], *cold.ids]]))[0, len(PROMPTS[0]) - 1 : -1]
    expected = logits.log_softmax(-1)[range(len(cold.ids)), cold.ids]
    torch.testing.assert_close(torch.tensor(cold.log_probs), expected, rtol=1e-5, atol=1e-5)


def test_memory_is_given_back_between_writings(vllm: ModuleType, student: Transformer) -> None:
    writer = started(student, dtype="bf16", gpu_memory_utilization=0.4, options={"enforce_eager": True})
    writer.complete(PROMPTS, sampling=Sampling(1.0), **ASKED)
    writer.complete([], max_new_tokens=3, stop_ids=(), sampling=Sampling(), seeds=[])  # a process without prompts
    engine = vllm.made[-1]
    woken = ["wake_up ['weights']", "reload_weights", "wake_up ['kv_cache']"]
    assert engine.calls == [(0.4, "bfloat16"), "sleep", *woken, "generate", "sleep", *woken, "sleep"]
    assert engine.settings["enforce_eager"] and engine.settings["max_model_len"] == 64
    stays = started(student, sleeps=False)
    stays.complete(PROMPTS, sampling=Sampling(), **ASKED)
    assert vllm.made[-1].calls[1:] == ["reload_weights", "generate"]


def test_what_vllm_cannot_do_here_is_told_before_it_starts(vllm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert VLLMWriter().problems() == [
        "sleeps=true: needs CUDA, and torch finds no such device here; set sleeps: false"
    ]
    options = {"enforce_eager": True, "seed": 1, "max_num_seq": 4}
    (problem,) = VLLMWriter(sleeps=False, options=options).problems()
    assert problem.startswith("options.max_num_seq: is no argument of vllm.LLM") and "max_num_seqs" in problem
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert VLLMWriter(options={"max_num_seqs": 4}).problems() == []


def test_limits_and_what_is_refused(vllm: ModuleType, student: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = started(student, longest=10)
    found = writer.complete(PROMPTS, sampling=Sampling(), **(ASKED | {"stop_ids": ()}))
    assert [len(one.ids) for one in found] == [9, 3, 8, 8, 7]
    with pytest.raises(DataError, match=r"prompts\[1\]: 10 tokens"):
        writer.complete([[1], list(range(10))], max_new_tokens=2, stop_ids=(), sampling=Sampling(), seeds=[0, 1])
    with pytest.raises(
        ConfigError, match="the student has 32 ids and the teacher 30, and the writer would draw from all"
    ):
        check_writer_ids(Rollouts(Share(student=1.0), writer=writer), 32, 30)
    with pytest.raises(ConfigError, match=r"options\.load_format: is given to vLLM by kdtune"):
        VLLMWriter(options={"load_format": "auto"})
    with pytest.raises(ConfigError, match="gpu_memory_utilization=0: must be above 0"):
        VLLMWriter(0)
    monkeypatch.setattr(
        vllm.LLM, "_text", lambda *_: vllm.CompletionOutput(0, "", [5], None, [{5: vllm.Logprob(-1.0)}], "abort")
    )
    with pytest.raises(TrainingError, match="vLLM has broken off a text after 1 tokens"):
        writer.complete(PROMPTS, sampling=Sampling(), **ASKED)
