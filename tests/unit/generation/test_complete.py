"""Samples of many prompts against whole forwards, one text at a time, and against each other in other company."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from test_generate_batch import greedy_by_recomputing

from kdtune.errors import CheckpointError, ConfigError, DataError
from kdtune.generation import Sampling, compiled, complete
from kdtune.generation import slots as slots_module
from kdtune.models import Transformer, apply_lora, llama

GREEDY = {"sampling": Sampling(), "max_new_tokens": 12, "stop_ids": ()}
DRAWN = {"sampling": Sampling(1.0), "max_new_tokens": 12, "stop_ids": (5, 9), "with_log_probs": True}
# Some end in one block of a slot's places, some in the next, some further on; two pairs are equal and follow each other.
LENGTHS = [5, 1, 60, 2, 2, 130, 55, 55, 64, 30, 3]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    texts = [torch.randint(32, (length,), generator=generator).tolist() for length in LENGTHS]
    texts[4], texts[7] = texts[3], texts[6]
    return texts


def new_model(max_seq_len=144):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 32,
        "embed_dim": 16,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_dim": 24,
    }
    model = llama(**sizes, max_seq_len=max_seq_len)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(scope="module")
def model():
    return new_model()


def test_each_text_as_by_whole_forwards(model, prompts):
    found = complete(model, prompts, seeds=[0] * len(prompts), slots=3, **GREEDY)
    for prompt, completion in zip(prompts, found, strict=True):
        assert prompt + completion.ids == greedy_by_recomputing(model, prompt, 12)
        assert not completion.is_finished
        assert completion.log_probs is None
    assert len({tuple(completion.ids) for completion in found}) > 5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_k=8, top_p=0.9)])
@torch.no_grad()
def test_log_probs_are_the_models_own(prompts, dtype, tolerance, sampling):
    model = new_model().to(dtype)
    settings = DRAWN | {"sampling": sampling}
    for prompt, one in zip(prompts, complete(model, prompts, seeds=range(11), slots=4, **settings), strict=True):
        expected = model(torch.tensor([prompt + one.ids]))[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = expected[range(len(one.ids)), one.ids]
        torch.testing.assert_close(torch.tensor(one.log_probs, dtype=dtype), expected, atol=tolerance, rtol=0)


def test_none_depends_on_its_company(model, prompts):
    """To the bit: by the number of slots, the order of the prompts, and in two parts as two processes would."""
    seeds = list(range(100, 111))
    together = complete(model, prompts, seeds=seeds, **DRAWN)
    assert {one.is_finished for one in together} == {True, False}
    assert together[3] != together[4]
    for slots in (1, 8):
        assert complete(model, prompts, seeds=seeds, slots=slots, **DRAWN) == together
    order = [7, 2, 10, 0, 5, 1, 9, 3, 8, 6, 4]
    shuffled = complete(model, [prompts[i] for i in order], seeds=[seeds[i] for i in order], slots=4, **DRAWN)
    assert shuffled == [together[i] for i in order]
    halves = [complete(model, prompts[i::2], seeds=seeds[i::2], slots=4, **DRAWN) for i in range(2)]
    assert [halves[i % 2][i // 2] for i in range(11)] == together


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_longer_neighbour_changes_nothing(softcap):
    """The places of a slot, and so the sums over them, are as many as the longest text in any slot takes."""
    torch.manual_seed(0)
    model = new_model(max_seq_len=1100)
    for layer in model.layers:
        layer.attn.softcap = softcap
    model.config = replace(model.config, score_softcap=softcap)
    prompts = [torch.randint(32, (length,)).tolist() for length in (250, 300, 380, 500, 700, 1000)]
    settings = DRAWN | {"max_new_tokens": 6}
    together = complete(model, prompts, seeds=range(6), **settings)
    assert complete(model, prompts, seeds=range(6), slots=1, **settings) == together


def test_ends_with_a_stop_id_or_where_the_context_is_full(model, prompts):
    free = complete(model, prompts, seeds=range(11), **GREEDY | {"max_new_tokens": 1000})
    assert [len(prompt) + len(one.ids) for prompt, one in zip(prompts, free, strict=True)] == [144] * 11
    stop = free[0].ids[7]
    for one, limited in zip(
        free, complete(model, prompts, seeds=range(11), **GREEDY | {"stop_ids": {stop, 999}}), strict=True
    ):
        expected = one.ids[:12]
        if stop in expected:
            expected = expected[: expected.index(stop) + 1]
        assert limited.ids == expected
        assert limited.is_finished == (expected[-1] == stop)


def test_equal_prompts_share_a_forward(model, prompts):
    lengths = []
    hook = model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    told = []
    complete(model, prompts, seeds=range(11), slots=4, progress=told.append, **DRAWN)
    hook.remove()
    assert [length for length in lengths if length > 1] == [4, 59, 129, 54, 63, 29, 2]  # without the last token
    assert sum(told) == 11


@torch.no_grad()
def test_adapters_are_sampled_from_in_eval_mode(prompts):
    model = apply_lora(new_model(), lora_rank=2, lora_dropout=0.5)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.train()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    found = complete(model, prompts, seeds=range(11), **DRAWN)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    assert found == complete(model.eval(), prompts, seeds=range(11), **DRAWN)
    assert found != complete(new_model(), prompts, seeds=range(11), **DRAWN)


def test_bf16(prompts):
    model = new_model().bfloat16()
    found = complete(model, prompts, seeds=range(11), slots=4, **DRAWN)
    with torch.no_grad():
        logits = model(torch.tensor([prompts[2] + found[2].ids]))[0, len(prompts[2]) - 1 : -1].float()
    expected = logits.log_softmax(-1)[range(len(found[2].ids)), found[2].ids]
    torch.testing.assert_close(torch.tensor(found[2].log_probs), expected, atol=0.2, rtol=0)


def test_bad_arguments(model):
    with pytest.raises(ConfigError, match="slots=0: must be 1 or more"):
        complete(model, [[1]], seeds=[0], slots=0, **GREEDY)
    with pytest.raises(ConfigError, match="seeds: 1 for 2 prompts"):
        complete(model, [[1], [2]], seeds=[0], **GREEDY)
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        complete(model, [[1]], seeds=[0], **GREEDY | {"max_new_tokens": 0})
    with pytest.raises(DataError, match=r"prompts\[1\]: 144 tokens"):
        complete(model, [[1], [1] * 144], seeds=[0, 0], **GREEDY)
    assert complete(model, [], seeds=[], **GREEDY) == []
    broken = new_model()
    broken.norm.weight.data[0] = torch.nan
    with pytest.raises(CheckpointError, match="logits are not numbers"):
        complete(broken, [[1]], seeds=[0], **GREEDY)


@pytest.mark.parametrize("kind", ["plain", "windows", "capped"])
def test_the_step_that_is_compiled_gives_the_same_texts(kind, model, prompts, monkeypatch):
    """As Python runs it: a fixed number of rows, in a cache whose tensors stay the same."""
    changes = {"windows": {"windows": (40, None)}, "capped": {"score_softcap": 4.0}}.get(kind, {})
    if changes:
        other = Transformer(replace(model.config, **changes))
        other.load_state_dict(model.state_dict())
        model = other
    with torch.compiler.set_stance("force_eager"):
        monkeypatch.setattr(torch.compiler, "set_stance", lambda _: nullcontext())
        for sampling in (DRAWN, GREEDY | {"with_log_probs": True}):
            found = complete(model, prompts, seeds=range(len(prompts)), slots=3, compile=True, **sampling)
            expected = complete(model, prompts, seeds=range(len(prompts)), slots=3, **sampling)
            assert [one.ids for one in found] == [one.ids for one in expected]
            for one, another in zip(found, expected, strict=True):
                torch.testing.assert_close(
                    torch.tensor(one.log_probs), torch.tensor(another.log_probs), rtol=1e-5, atol=1e-5
                )


@pytest.mark.slow("two compilations; the quick tests run the same code in Python")
def test_compiled_texts_do_not_depend_on_their_neighbours(model, prompts):
    settings = {"seeds": range(len(prompts)), **DRAWN}
    found = complete(model, prompts, slots=3, compile=True, **settings)
    assert [one.ids for one in found] == [one.ids for one in complete(model, prompts, slots=3, **settings)]
    turned = complete(model, prompts[::-1], slots=7, compile=True, **(settings | {"seeds": range(len(prompts))[::-1]}))
    assert turned[::-1] == found
    layer = model.layers[0]
    with torch.no_grad():
        layer.mlp.up_proj.weight.mul_(-1)  # as an optimizer would
    assert [one.ids for one in complete(model, prompts, slots=3, compile=True, **settings)] == [
        one.ids for one in complete(model, prompts, slots=3, **settings)
    ]
    with torch.no_grad():
        layer.mlp.up_proj.weight.mul_(-1)


def test_the_compiled_step_of_a_device_waits_for_nothing_and_keeps_its_cache(model, monkeypatch):
    """On the meta device, whose tensors have no values to ask for, as on a GPU."""
    monkeypatch.setattr(compiled, "_KEPT", type(compiled._KEPT)())
    meta = torch.device("meta")
    with meta, torch.no_grad():
        on_device = Transformer(model.config)
        cache, layers = compiled.fixed_cache(on_device, 8, 100)
        # Places by 512, so that there is one graph for texts of up to 512 tokens, and tensors whose addresses the graph keeps.
        assert layers[0].keys_RKCE.shape[2] == 512 and layers[0].keys_RKCE.is_meta
        assert all(hasattr(one.keys_RKCE, "_dynamo_static_input_type") for one in layers)
        cache.place([3] * 8, meta)
        cache.fix(on_device.dtype)
        tokens, positions = torch.zeros(8, 1, dtype=torch.int64), torch.full((8, 1), 3)
        assert compiled.step(on_device, tokens, positions, layers).shape == (8, 1, 16)
        assert compiled.fixed_cache(on_device, 8, 90)[0] is cache
        assert compiled.fixed_cache(on_device, 8, 101)[0] is not cache


def test_prompts_are_read_together_where_texts_need_not_be_equal_to_the_bit(model, prompts, monkeypatch):
    """With padding at their ends, each beginning once: the same texts as alone."""
    together, widths = {"alone": 0, "together": 200}, {}
    texts = {}
    for name, most in together.items():
        monkeypatch.setattr(slots_module, "most_read", lambda *_, most=most: most)
        forward, seen = type(model).forward, []

        def noting(self, tokens, *args, seen=seen, forward=forward, **more):
            seen.append(tuple(tokens.shape))
            return forward(self, tokens, *args, **more)

        with monkeypatch.context() as patched:
            patched.setattr(type(model), "forward", noting)
            texts[name] = complete(model, prompts, seeds=range(len(prompts)), slots=8, **DRAWN)
        widths[name] = [shape for shape in seen if shape[1] > 1]
    assert [one.ids for one in texts["together"]] == [one.ids for one in texts["alone"]]
    assert len(widths["together"]) < len(widths["alone"])
    assert all(rows * tokens <= 200 or rows == 1 for rows, tokens in widths["together"])
    assert max(rows for rows, _ in widths["together"]) > 1


def test_how_many_prompts_are_read_together(model):
    bf16 = replace(model.config, windows=(200, None))
    assert slots_module.most_read(model.config, torch.float32, "cpu", 144) == 0
    assert (
        slots_module.most_read(model.config, torch.float32, "cuda", 144)
        == slots_module.most_read(bf16, torch.bfloat16, "cpu", 200)
        == 2048
    )
    assert (
        slots_module.most_read(bf16, torch.bfloat16, "cpu", 201) == 0
    )  # a layer would hold the last tokens of the longest alone
    lengths = [
        len(one) for group in slots_module.together([(1,) * n for n in (9, 2, 5, 40, 3)], 20) for one in [(), *group]
    ]
    assert lengths == [0, 2, 3, 5, 0, 9, 0, 40]
