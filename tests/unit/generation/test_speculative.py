"""Text that the student drafts and the teacher corrects, against its definition one token at a time."""

from dataclasses import replace

import pytest
import torch

from kdtune.errors import ConfigError
from kdtune.generation import Sampling, Speculation, complete, complete_speculatively
from kdtune.models import Transformer, llama

V, STOP = 23, 0
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [2, 2], [11, 12, 13], [3], [9, 1]]
ASKED = {"max_new_tokens": 12, "stop_ids": {STOP}, "sampling": Sampling(1.0), "seeds": range(40, 40 + len(PROMPTS))}


def model(seed: int, layers: int = 1, **more: object) -> Transformer:
    torch.manual_seed(seed)
    made: Transformer = llama(
        vocab_size=V,
        embed_dim=16,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        intermediate_dim=32,
        max_seq_len=64,
        **more,
    )
    with torch.no_grad():
        made.output.weight.mul_(30)
    return made


def test_with_all_ids_it_is_the_student_s_sample() -> None:
    student, teacher = model(0), model(1, layers=2)
    for drafted in (1, 4, 20):
        found = complete_speculatively(student, teacher, PROMPTS, **ASKED, speculation=Speculation(drafted, top_k=V))
        expected = complete(student, PROMPTS, **ASKED, with_log_probs=True)
        assert [one.ids for one in found] == [one.ids for one in expected]
        assert [one.is_finished for one in found] == [one.is_finished for one in expected]
        # Whole drafts are computed, and those of whole texts are kept up to their end.
        assert all(one.num_rejected < drafted and one.num_computed % drafted == 0 for one in found)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-5)


def test_with_one_id_it_is_the_teacher_s_most_likely_text() -> None:
    student, teacher = model(0), model(1, layers=2)
    found = complete_speculatively(student, teacher, PROMPTS, **ASKED, speculation=Speculation(3, top_k=1))
    greedy = complete(teacher, PROMPTS, **{**ASKED, "sampling": Sampling(0.0)})
    assert [one.ids for one in found] == [one.ids for one in greedy]
    assert all(one.num_computed % 3 == 0 for one in found)
    assert max(one.num_rejected for one in found) > 3


@pytest.mark.parametrize("top_k", [2, 6])
def test_every_token_is_the_student_s_or_a_correction(top_k: int) -> None:
    """A token outside the teacher's top k can only be the teacher's own, and that is among the few most likely ones."""
    student, teacher = model(0), model(1, layers=2)
    found = complete_speculatively(student, teacher, PROMPTS, **ASKED, speculation=Speculation(4, top_k, 0.2, 0.5))
    plain = complete(student, PROMPTS, **ASKED)
    assert [one.ids for one in found] != [one.ids for one in plain]
    for prompt, one in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            tokens = torch.tensor([[*prompt, *one.ids]])
            hidden = teacher(tokens, return_hidden=True)[0, len(prompt) - 1 : -1]
            logp = {
                name: each(tokens)[0, len(prompt) - 1 : -1].log_softmax(-1)
                for name, each in (("q", student), ("p", teacher))
            }
        places = range(len(one.ids))
        assert one.log_probs == pytest.approx(logp["q"][places, one.ids].tolist(), abs=1e-4)
        assert one.partner_log_probs == pytest.approx(logp["p"][places, one.ids].tolist(), abs=1e-4)
        torch.testing.assert_close(one.partner_hidden, hidden, atol=1e-4, rtol=1e-4)
        ranks = (logp["p"] > logp["p"][places, one.ids][:, None]).sum(-1)
        assert int(ranks.max()) < max(top_k, 3)
        assert STOP not in one.ids[:-1]
        assert one.is_finished == (one.ids[-1] == STOP)
        assert one.is_finished or len(one.ids) == 12


def test_texts_do_not_depend_on_their_neighbours() -> None:
    student, teacher = model(0), model(1, layers=2)
    asked = {**ASKED, "speculation": Speculation(4, 3)}
    together = complete_speculatively(student, teacher, PROMPTS, **asked)
    for slots in (1, 3):
        assert [one.ids for one in complete_speculatively(student, teacher, PROMPTS, **asked, slots=slots)] == [
            one.ids for one in together
        ]
    alone = [
        complete_speculatively(student, teacher, [prompt], **{**asked, "seeds": [seed]})[0]
        for prompt, seed in zip(PROMPTS, ASKED["seeds"], strict=True)
    ]
    assert [one.ids for one in alone] == [one.ids for one in together]
    assert [one.log_probs for one in alone] == [one.log_probs for one in together]


def test_a_window_shorter_than_the_text_holds_after_tokens_are_taken_back() -> None:
    """Texts that go through all of a window's places, 64 of them, more than once."""
    student, teacher = model(0), model(1, layers=2)
    student, teacher = (
        Transformer(replace(one.config, windows=(62,) * one.config.num_layers, max_seq_len=256))
        for one in (student, teacher)
    )
    with torch.no_grad():
        for one in (student, teacher):
            one.output.weight.mul_(30)
    asked = {**ASKED, "max_new_tokens": 150, "stop_ids": set()}
    found = complete_speculatively(
        student, teacher, PROMPTS[:3], **{**asked, "seeds": range(3)}, speculation=Speculation(4, 3)
    )
    for prompt, text in zip(PROMPTS, found, strict=False):
        with torch.no_grad():
            hidden = teacher(torch.tensor([[*prompt, *text.ids]]), return_hidden=True)[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(text.partner_hidden, hidden, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("numbers", [(0, 5), (5, 0)])
def test_numbers_out_of_range_are_refused(numbers: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="num_drafted="):
        Speculation(*numbers)
