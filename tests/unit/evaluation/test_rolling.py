import math

import pytest
import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import AutoModelForCausalLM

from kdtune.checkpoint import save_model
from kdtune.errors import ConfigError, DataError
from kdtune.evaluation import read_text, text_perplexity
from kdtune.evaluation.rolling import rolling_windows
from kdtune.models import llama
from kdtune.tokenizers import byte_tokenizer

TEXT = "The kettle sang, the rain came.\nNobody was at home; the lamp burned on. Größe: 12 m²."


@pytest.mark.parametrize("length", [0, 1, 4, 5, 8, 9, 21])
@pytest.mark.parametrize("stride", [None, 1, 3, 4])
def test_windows_are_lm_evals(length, stride):
    ids = list(range(10, 10 + length))
    overlap = 1 if stride is None else 4 - stride + 1
    expected = [make_disjoint_window(pair) for pair in get_rolling_token_windows(ids, 7, 4, overlap)]
    windows = [(list(context), list(continuation)) for context, continuation in rolling_windows(ids, 7, 4, stride)]
    if overlap == 1:
        assert windows == expected
    assert [token for _, continuation in windows for token in continuation] == ids
    assert all(len(context) + len(continuation) <= 5 for context, continuation in windows)
    assert all(context + continuation == expected_context + expected_continuation
               for (context, continuation), (expected_context, expected_continuation) in zip(windows, expected, strict=True))  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = llama(
        vocab_size=260, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_dim=24, max_seq_len=64
    )
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("stride", [None, 5])
def test_as_float64_brute_force_from_transformers(model, stride, tmp_path):
    tokenizer = byte_tokenizer()
    save_model(model, tmp_path / "model", tokenizer=tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").double().eval()
    ids, max_length = tokenizer.encode(TEXT, add_bos=False, add_eos=False), 20
    total = 0.0
    step = stride or max_length
    for position, token in enumerate(ids):
        # The window that predicts this token ends at `end`; its input is the max_length tokens before that.
        end = max_length if position < max_length else max_length + step * ((position - max_length) // step + 1)
        end = min(end, len(ids))
        context = [tokenizer.bos_id, *ids][max(0, end - max_length) : position + 1]
        with torch.no_grad():
            total += float(theirs(torch.tensor([context])).logits[0, -1].log_softmax(-1)[token])
    found = text_perplexity(model, tokenizer, TEXT, max_length=max_length, stride=stride)
    assert found.logprob == pytest.approx(total, rel=1e-5)
    assert (found.tokens, found.words, found.bytes) == (len(ids), len(TEXT.split()), len(TEXT.encode()))
    assert found.metrics["token_perplexity"] == pytest.approx(math.exp(-total / len(ids)), rel=1e-4)
    assert found.metrics["bits_per_byte"] == pytest.approx(-total / len(TEXT.encode()) / math.log(2), rel=1e-4)


def test_a_bos_that_begins_the_text_is_not_predicted(model, monkeypatch):
    tokenizer = byte_tokenizer()
    expected = text_perplexity(model, tokenizer, TEXT, max_length=20)
    monkeypatch.setattr(type(tokenizer), "begins_with_bos", True)
    assert text_perplexity(model, tokenizer, TEXT, max_length=20) == expected


def test_bad_input(model, tmp_path):
    with pytest.raises(ConfigError, match="perplexity_stride=21.*max_seq_length=20"):
        text_perplexity(model, byte_tokenizer(), TEXT, max_length=20, stride=21)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    for name, word in (("empty.txt", "no text"), ("latin.txt", "UTF-8"), ("missing.txt", "No such file")):
        with pytest.raises(DataError, match=word):
            read_text(tmp_path / name)
