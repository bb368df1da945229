"""Mixed and routed teachers, live and cached, against float64 by the definitions."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from written_caches import write_cache

from kdtune.checkpoint import Checkpointer, save_model
from kdtune.config import instantiate
from kdtune.data import Batch, DatasetStats, EncodedRow, Loader, TokenizedDataset, batches, pack_examples
from kdtune.distributed import SINGLE_PROCESS, Parallelism
from kdtune.errors import ConfigError, DataError
from kdtune.losses import ForwardKL, HiddenSignal, KDLoss
from kdtune.losses.several import MixtureSignal
from kdtune.models import OutputHead, Transformer, llama
from kdtune.teachers import CachedTeacher, LiveTeacher, Mixture, Routed
from kdtune.tokenizers import byte_tokenizer

LENGTHS = [5, 3, 7, 4, 6, 8, 3, 5]
ROUTES = ["a", "b", "a", "b", "b", "c", "a", "c"]
CFG = SimpleNamespace(
    dtype="fp32", teacher_parallelism=None, parallelism={"_component_": "kdtune.distributed.Parallelism"}, compile=False,
    kd_loss={"_component_": "kdtune.losses.ForwardKL"}, teacher_targets=None, best_metric=None, dataset_val=None,
    device="cpu", model=None, checkpointer=None,
)  # fmt: skip


def model(seed: int, vocab_size: int = 320) -> Transformer:
    torch.manual_seed(seed)
    made: Transformer = llama(
        vocab_size=vocab_size,
        embed_dim=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        intermediate_dim=24,
        max_seq_len=32,
    )
    with torch.no_grad():
        made.output.weight.mul_(30)
    return made.eval()


def rows(routes: list[str] | None = None) -> TokenizedDataset:
    encoded = [
        EncodedRow(
            [50 + 9 * number + place for place in range(length)],
            [True] * length,
            route=routes[number] if routes else None,
        )
        for number, length in enumerate(LENGTHS)
    ]
    return TokenizedDataset(encoded, DatasetStats("rows", len(LENGTHS)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with three models, and caches of the first two."""
    folder = tmp_path_factory.mktemp("several")
    for seed in range(3):
        save_model(model(seed), folder / f"model{seed}", tokenizer=byte_tokenizer())
        write_cache(folder / f"cache{seed}", model(seed), rows(), byte_tokenizer(max_seq_len=16))
    return folder


def live(made: Path, seed: int) -> LiveTeacher:
    return LiveTeacher(Checkpointer(made / f"model{seed}"))


def cached(made: Path, seed: int, **settings: Any) -> CachedTeacher:
    return CachedTeacher(str(made / f"cache{seed}"), **settings)


def logp_of(seed: int, batch: Batch, places: Tensor) -> Tensor:
    """What a model says in a row of its own, in float64."""
    found = torch.zeros(batch.tokens.numel(), 320, dtype=torch.float64)
    for start, length in zip(batch.row_starts, batch.lengths, strict=True):
        tokens = batch.tokens.flatten()[start : start + length]
        found[start : start + length] = model(seed).double()(tokens[None])[0].detach().log_softmax(-1)
    return found[places]


@pytest.mark.parametrize("kinds", [(live, live), (cached, cached), (live, cached)])
@pytest.mark.parametrize("padding_free", [True, False])
def test_a_mixture_is_the_sum_of_its_weighted_distributions(made: Path, kinds: Any, padding_free: bool) -> None:
    teacher = Mixture([kind(made, seed) for seed, kind in enumerate(kinds)], [1, 3])
    teacher.start(CFG, SINGLE_PROCESS)
    found = list(batches(rows(), 3, 0, padding_free=padding_free))
    teacher.prefetch(found)
    for batch in found:
        places = batch.targets.positions_N
        expected = (0.25 * logp_of(0, batch, places).exp() + 0.75 * logp_of(1, batch, places).exp()).log()
        torch.testing.assert_close(teacher(batch).log_probs(places).double(), expected, rtol=1e-5, atol=1e-4)


def test_the_loss_of_a_mixture_in_float64() -> None:
    """Of heads of 11 and 13 ids: what the smaller one lacks has no probability from it."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((1, 7, 4), (13, 4)))
    teachers = [
        HiddenSignal(
            torch.randn(1, 7, 3, generator=generator, dtype=torch.float64),
            OutputHead.of(torch.randn(size, 3, generator=generator, dtype=torch.float64), softcap=softcap),
        )
        for size, softcap in ((11, None), (13, 2.0))
    ]
    labels = torch.arange(7)[None]
    inputs = hidden.requires_grad_(), OutputHead.of(torch.nn.Parameter(weight))
    found, parts = KDLoss(ForwardKL(2.0), kd_ratio=0.6)(*inputs, MixtureSignal(tuple(teachers), (0.3, 0.7)), labels)
    gradients = torch.autograd.grad(found, (hidden, inputs[1].weight))

    first, second = (one.hidden_BSD @ one.output.weight.T for one in teachers)
    second = 2.0 * (second / 2.0).tanh()
    p = 0.7 * second.softmax(-1) + 0.3 * torch.nn.functional.pad(first.softmax(-1), (0, 2))
    student = (hidden @ inputs[1].weight.T).log_softmax(-1)
    ce = -student.gather(-1, labels[..., None]).sum()
    t, s = ((one / 2).log_softmax(-1) for one in (p.log(), student))
    expected = 0.4 * ce + 0.6 * (t.exp() * (t - s)).sum()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(parts["class_loss"], ce.detach(), rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, (hidden, inputs[1].weight)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("layout", ["end to end", "padded", "packed"])
@pytest.mark.parametrize("kinds", [(live, live), (cached, live)])
def test_each_example_has_the_teacher_of_its_route(made: Path, kinds: Any, layout: str) -> None:
    a, b = (kind(made, seed) for seed, kind in enumerate(kinds))
    teacher = Routed({"a": a, "b": b}, default=live(made, 2))
    dataset: Any = rows(ROUTES)
    tokenizer = byte_tokenizer(max_seq_len=16)
    if layout == "packed":
        dataset = pack_examples(dataset, tokenizer)
    assert teacher.fit_data("dataset", tokenizer, dataset) is dataset
    teacher.start(CFG, SINGLE_PROCESS)
    loader = Loader(dataset, batch_size=3, pad_id=0, seed=2, padding_free=layout != "padded")
    while loader.position[0] < 2:
        step = [next(loader), next(loader)]
        teacher.prefetch(step)
        for batch in step:
            signal, places = teacher(batch), batch.targets.positions_N
            assert signal.shape == tuple(batch.tokens.shape)
            seeds = torch.zeros(batch.tokens.numel(), dtype=torch.int64)
            for start, length, example in zip(batch.row_starts, batch.lengths, batch.example_ids, strict=True):
                seeds[start : start + length] = {"a": 0, "b": 1, "c": 2}[ROUTES[example]]
            all_three = torch.stack([logp_of(seed, batch, places) for seed in range(3)])
            expected = all_three[seeds[places], torch.arange(len(places))]
            torch.testing.assert_close(signal.log_probs(places).double(), expected, rtol=1e-5, atol=1e-4)


def test_routes_without_a_teacher_are_refused_when_the_data_is_read(made: Path) -> None:
    teacher, tokenizer = Routed({"a": live(made, 0), "b": live(made, 1)}), byte_tokenizer(max_seq_len=16)
    with pytest.raises(
        DataError, match=r"dataset: example 5 has the route 'c'; the teachers are for 'a', 'b': add one, or `default`"
    ):
        teacher.fit_data("dataset", tokenizer, rows(ROUTES))
    with pytest.raises(DataError, match="example 0 has no route; give the data set a route_column"):
        teacher.fit_data("dataset", tokenizer, rows())


def test_what_several_teachers_cannot_be(made: Path) -> None:
    for wrong in (
        {"teachers": []},
        {"teachers": [live(made, 0)], "weights": [1, 2]},
        {"teachers": [live(made, 0)], "weights": [0]},
    ):
        with pytest.raises(
            ConfigError, match="teachers: the list is empty|2 values for 1 teachers|must be a positive number"
        ):
            Mixture(**wrong)
    with pytest.raises(ConfigError, match="give one for each value"):
        Routed({})
    with pytest.raises(ConfigError, match="neither checkpointer nor model"):
        LiveTeacher()
    topk = write_cache(made / "topk", model(0), rows(), byte_tokenizer(max_seq_len=16), {"kind": "topk"})
    (problem,) = Mixture([CachedTeacher(str(topk)), live(made, 1)]).problems(CFG)
    assert "is of kind=topk, and several teachers need the probability of each id" in problem
    assert not Mixture([CachedTeacher(str(topk), outside="renormalize"), live(made, 1)]).problems(CFG)
    part = write_cache(made / "part", model(0), rows(), byte_tokenizer(max_seq_len=16), {"num_examples": 3})
    with pytest.raises(ConfigError, match="the teachers' caches are of different parts of it"):
        Mixture([CachedTeacher(str(part)), cached(made, 1)]).fit_data("dataset", byte_tokenizer(max_seq_len=16), rows())
    assert (
        len(
            Mixture([CachedTeacher(str(part)), live(made, 1)]).fit_data(
                "dataset", byte_tokenizer(max_seq_len=16), rows()
            )
        )
        == 3
    )


def test_several_teachers_may_be_among_several(made: Path) -> None:
    inner = Routed({"a": cached(made, 0), "b": live(made, 1), "c": live(made, 2)})
    teacher = Mixture([inner, Mixture([live(made, 2), cached(made, 1)])], [1, 3])
    assert not teacher.problems(CFG)
    teacher.start(CFG, SINGLE_PROCESS)
    (batch,) = batches(rows(ROUTES), len(LENGTHS), 0, padding_free=True)
    teacher.prefetch([batch])
    places = batch.targets.positions_N
    p = [logp_of(seed, batch, places).exp() for seed in range(3)]
    of_route = torch.tensor(["abc".index(route) for route in batch.routes]).repeat_interleave(
        torch.tensor(batch.lengths)
    )
    routed = torch.stack(p)[of_route[places], torch.arange(len(places))]
    expected = (0.25 * routed + 0.75 * (p[2] + p[1]) / 2).log()
    torch.testing.assert_close(teacher(batch).log_probs(places).double(), expected, rtol=1e-5, atol=1e-4)
    assert teacher.pop_seconds_waited() > 0
    # What one of them lacks, all do.
    part = write_cache(made / "some", model(0), rows(), byte_tokenizer(max_seq_len=16), {"num_examples": 3})
    fitted = Mixture([live(made, 1), Mixture([CachedTeacher(str(part))])]).fit_data(
        "dataset", byte_tokenizer(max_seq_len=16), rows()
    )
    assert len(fitted) == 3


def test_a_model_that_cannot_be_built_so_is_refused_when_the_config_is_read(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default two processes have halves of it."""
    weights = Checkpointer(made / "model0")
    (problem,) = LiveTeacher(weights, quantization="int7").problems(CFG)
    assert problem.startswith("teacher: quantization=int7: unknown; one of ")
    assert not LiveTeacher(weights, quantization="int8").problems(CFG)
    monkeypatch.setenv("WORLD_SIZE", "2")
    (problem,) = Mixture([LiveTeacher(weights, quantization="int8"), live(made, 1)]).problems(CFG)
    assert problem.startswith("teacher: quantization=int8: ") and "quantized weights are not divided" in problem


def test_the_validation_asks_the_teachers_that_have_one(made: Path) -> None:
    one, other = live(made, 0), cached(made, 1)
    assert one.held_out is one and Mixture([one, one]).held_out.teachers == (one, one)
    assert Mixture([one, other]).held_out is None and Routed({"a": one, "b": other}).held_out is None
    judged = Mixture([one, cached(made, 1, validation=str(made / "cache2"))], [1, 2]).held_out
    assert judged.teachers[0] is one and judged.teachers[1].path.endswith("cache2") and judged.weights == (1 / 3, 2 / 3)


def test_the_teachers_of_a_routed_validation_are_asked(made: Path) -> None:
    teacher = Routed({"a": live(made, 0), "b": cached(made, 1, validation=str(made / "cache2"))}, default=live(made, 2))
    teacher.start(CFG, SINGLE_PROCESS)
    judge = teacher.held_out
    for batch in batches(rows(ROUTES), 4, 0):
        judge.prefetch([batch])
        signal = judge(batch)
        for start, length, route in zip(batch.row_starts, batch.lengths, batch.routes, strict=True):
            places = batch.targets.positions_N
            places = places[(places >= start) & (places < start + length)]
            expected = logp_of(0 if route == "a" else 2, batch, places)
            torch.testing.assert_close(signal.log_probs(places).double(), expected, rtol=1e-5, atol=1e-4)


def test_a_model_of_a_component_is_built_when_the_run_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"_component_": "kdtune.models.llama", "vocab_size": 320, "embed_dim": 16, "num_layers": 1, "num_heads": 2,
            "num_kv_heads": 1, "intermediate_dim": 24, "max_seq_len": 32}  # fmt: skip
    teacher = instantiate({"_component_": "kdtune.teachers.LiveTeacher", "model": node})
    assert not teacher.problems(CFG)
    with pytest.raises(DataError, match="an example has 40 tokens, and the context of the teacher has 32"):
        teacher.fit_data(
            "dataset", byte_tokenizer(), TokenizedDataset([([65] * 40, [True] * 40)], DatasetStats("long"))
        )
    torch.manual_seed(3)
    teacher.start(CFG, SINGLE_PROCESS)
    torch.manual_seed(3)
    expected = instantiate(node).eval()
    batch = next(iter(batches(rows(), 2, 0)))
    places = batch.targets.positions_N
    torch.testing.assert_close(
        teacher(batch).log_probs(places),
        expected(batch.tokens).log_softmax(-1).flatten(0, 1)[places],
        rtol=1e-5,
        atol=1e-5,
    )
    assert len(teacher.generate([65, 66], max_new_tokens=3, stop_ids=())) == 3
    assert isinstance(instantiate(CFG.parallelism), Parallelism)


def test_some_rows_of_a_batch(made: Path) -> None:
    for padding_free in (True, False):
        batch = replace(next(iter(batches(rows(ROUTES), 4, 0, padding_free=padding_free))))
        some = batch.of_rows([3, 1])
        assert some.lengths == (4, 3) and some.example_ids == (3, 1) and some.routes == ("b", "b")
        for row, at in enumerate((3, 1)):
            ours, theirs = (
                one.tokens.flatten()[start : start + length]
                for one, start, length in (
                    (some, some.row_starts[row], some.lengths[row]),
                    (batch, batch.row_starts[at], batch.lengths[at]),
                )
            )
            assert torch.equal(ours, theirs)
        assert some.num_valid_tokens == sum(LENGTHS[at] - 1 for at in (3, 1))
        assert batch.of_rows([]).num_tokens == 0
