import copy

import pytest
import torch

from kdtune.errors import ConfigError, DataError
from kdtune.generation import Sampling, answer, eval_mode, generate, generate_batch, sample_token
from kdtune.models import llama

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = llama(
        vocab_size=32, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_dim=24, max_seq_len=40
    )
    for parameter in model.parameters():  # larger than the initial scale, so that the arg-max moves from token to token
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def greedy_by_recomputing(model, ids, num_new):
    ids = list(ids)
    with torch.no_grad():
        for _ in range(num_new):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids


def test_the_cache_changes_nothing(model):
    new_ids = generate(model, PROMPT, max_new_tokens=25, stop_ids=())
    assert PROMPT + new_ids == greedy_by_recomputing(model, PROMPT, 25)
    assert len(set(new_ids)) > 5


def test_stops_with_the_stop_id(model):
    free = generate(model, PROMPT, max_new_tokens=25, stop_ids=())
    stop = free[7]
    end = free.index(stop)
    assert generate(model, PROMPT, max_new_tokens=25, stop_ids=frozenset({stop, 10_000})) == free[: end + 1]


def test_ends_where_the_context_is_full(model):
    new_ids = generate(model, PROMPT, max_new_tokens=1000, stop_ids=())
    assert len(PROMPT) + len(new_ids) == 40
    assert new_ids == greedy_by_recomputing(model, PROMPT, 35)[len(PROMPT) :]


def test_sampling_repeats_by_seed_and_leaves_the_global_generator_alone(model):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = generate(model, PROMPT, max_new_tokens=20, stop_ids=(), sampling=Sampling(1.0), seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert generate(model, PROMPT, max_new_tokens=20, stop_ids=(), sampling=Sampling(1.0), seed=1) == first
    assert generate(model, PROMPT, max_new_tokens=20, stop_ids=(), sampling=Sampling(1.0), seed=2) != first


def test_the_only_kept_token_is_the_greedy_one(model):
    greedy = generate(model, PROMPT, max_new_tokens=20, stop_ids=())
    assert generate(model, PROMPT, max_new_tokens=20, stop_ids=(), sampling=Sampling(3.0, top_k=1)) == greedy


def test_samples_follow_the_softmax():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0], dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    draws = [sample_token(logits, Sampling(2.0, top_k=3), generator) for _ in range(4000)]
    weights = torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64).div(2.0).exp()
    found = torch.bincount(torch.tensor(draws), minlength=4)
    assert found[2] == 0
    # Three standard deviations of a binomial share with 4000 draws are at most 0.024.
    torch.testing.assert_close(found[[0, 1, 3]] / 4000, (weights / weights.sum()).float(), atol=0.024, rtol=0)


def test_modes_and_gradients_are_as_before(model):
    model.train()
    model.layers[1].eval()
    before = [module.training for module in model.modules()]
    generate(model, PROMPT, max_new_tokens=2, stop_ids=())
    assert [module.training for module in model.modules()] == before
    assert model(torch.tensor([PROMPT])).requires_grad
    with pytest.raises(RuntimeError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise RuntimeError
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("length", [0, 40, 41])
def test_a_prompt_that_does_not_fit(model, length):
    with pytest.raises(DataError, match=f"prompt: {length} tokens"):
        generate(model, [1] * length, max_new_tokens=2, stop_ids=())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": float("nan")}, "top_p=nan"),
    ],
)
def test_numbers_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)


def test_no_token_to_generate(model):
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        generate(model, PROMPT, max_new_tokens=0, stop_ids=())


def test_as_transformers_generates():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    hf_config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.5,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    reference = transformers.LlamaForCausalLM(hf_config).eval()
    model = ours_from_transformers(reference)
    for prompt in (PROMPT, [60], list(range(1, 21))):  # no 0: transformers would mask it as padding
        expected = reference.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt) :]
        assert generate(model, prompt, max_new_tokens=40, stop_ids=()) == expected.tolist()


def ours_from_transformers(reference):
    """The same weights in our module, by our published names (written out here, not taken from the converter)."""
    config = reference.config
    model = llama(
        vocab_size=config.vocab_size, embed_dim=config.hidden_size, num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads, num_kv_heads=config.num_key_value_heads,
        intermediate_dim=config.intermediate_size, max_seq_len=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps, rope_base=config.rope_parameters["rope_theta"], tie_embeddings=True,
    )  # fmt: skip
    names = {
        "model.embed_tokens": "tok_embeddings", "model.layers": "layers", "model.norm": "norm", "lm_head": "output",
        "self_attn.o_proj": "attn.output_proj", "self_attn": "attn", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "mlp_norm",
    }  # fmt: skip
    state = {}
    for name, value in reference.state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        state[name] = value
    model.load_state_dict(state)
    return model


class LetterTokenizer:
    """Ids are letters; a turn is written as "u" text "a"."""

    stop_ids = frozenset({0})

    def tokenize_messages(self, messages, *, add_generation_prompt=False):
        assert add_generation_prompt
        ((role, content),) = [(message["role"], message["content"]) for message in messages]
        ids = [ord(letter) - 96 for letter in f"{role[0]}{content}a"]
        return ids, [False] * len(ids)

    def decode(self, ids, *, skip_special=True):
        assert skip_special
        return " " + "".join(chr(96 + i) for i in ids if i != 0) + " "


def test_answer_goes_through_the_chat_template(model):
    new_ids = generate(model, [21, 8, 9, 1], max_new_tokens=12, stop_ids={0})
    expected = "".join(chr(96 + i) for i in new_ids if i != 0)
    assert answer(model, LetterTokenizer(), "hi", 12) == expected
    assert expected


PROMPTS = [PROMPT, [7], list(range(2, 20)), [9, 2], [30, 30, 30]]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.5, top_k=8, top_p=0.9)])
def test_a_batch_gives_what_each_prompt_gives_alone(model, sampling):
    alone = [
        generate(model, prompt, max_new_tokens=30, stop_ids={11, 3}, seed=5 + i, sampling=sampling)
        for i, prompt in enumerate(PROMPTS)
    ]
    batch = generate_batch(model, PROMPTS, max_new_tokens=30, stop_ids={11, 3}, seed=5, sampling=sampling)
    assert batch == alone
    assert len({len(ids) for ids in alone}) > 2  # they end at different times


def test_a_batch_gives_what_recomputing_gives(model):
    batch = generate_batch(model, PROMPTS, max_new_tokens=30, stop_ids=())
    for prompt, new_ids in zip(PROMPTS, batch, strict=True):
        assert len(new_ids) == min(30, 40 - len(prompt))
        assert prompt + new_ids == greedy_by_recomputing(model, prompt, len(new_ids))


def test_padding_cannot_spoil_a_sequence(model):
    """Another embedding of the padding id would change the text if anything saw it."""
    expected = generate_batch(model, [[5, 6, 7], [8]], max_new_tokens=4, stop_ids=())
    spoiled = copy.deepcopy(model)
    spoiled.tok_embeddings.weight.data[0] = torch.linspace(-9.0, 5.0, 16)
    assert 0 not in expected[0] + expected[1]
    assert generate_batch(spoiled, [[5, 6, 7], [8]], max_new_tokens=4, stop_ids=()) == expected


def test_tokens_are_reported_as_they_come(model):
    seen = [[] for _ in PROMPTS]
    order = []

    def on_token(index, token):
        seen[index].append(token)
        order.append(index)

    batch = generate_batch(model, PROMPTS, max_new_tokens=6, stop_ids=(), on_token=on_token)
    assert seen == batch
    assert order == list(range(len(PROMPTS))) * 6


def test_one_sequence_can_be_ended_early(model):
    free = generate_batch(model, PROMPTS, max_new_tokens=10, stop_ids=())
    batch = generate_batch(
        model, PROMPTS, max_new_tokens=10, stop_ids=(), should_stop=lambda index, ids: index == 1 and len(ids) == 4
    )
    assert batch == [ids[:4] if i == 1 else ids for i, ids in enumerate(free)]


def test_no_prompts(model):
    assert generate_batch(model, [], max_new_tokens=3, stop_ids=()) == []


def test_the_bad_prompt_of_a_batch_is_named(model):
    with pytest.raises(DataError, match=r"prompts\[1\]: 0 tokens"):
        generate_batch(model, [[1], []], max_new_tokens=3, stop_ids=())


def test_seeds_can_be_given_one_by_one(model):
    settings = {"max_new_tokens": 12, "stop_ids": (), "sampling": Sampling(1.0)}
    seeds = [9, 4, 4, 0, 7]
    alone = [generate(model, prompt, seed=seed, **settings) for prompt, seed in zip(PROMPTS, seeds, strict=True)]
    assert generate_batch(model, PROMPTS, seed=seeds, **settings) == alone
