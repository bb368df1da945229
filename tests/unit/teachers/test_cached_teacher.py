"""Rows of a teacher cache as a signal: against float64 by the definitions, in every layout, and what is refused."""

import math
import shutil
import threading
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from written_caches import columns_of, write_cache

from kdtune.data import Batch, DatasetStats, EncodedRow, Loader, TokenizedDataset, batches, mixed_dataset, pack_examples
from kdtune.data.part import part_of
from kdtune.distributed import SINGLE_PROCESS
from kdtune.errors import CheckpointError, ConfigError, DataError
from kdtune.losses import (
    ALM,
    AdaptiveKL,
    ForwardKL,
    HiddenSignal,
    JensenShannon,
    KDLoss,
    ReverseKL,
    SampledSignal,
    Targets,
    TextSignal,
    TopKSignal,
    TotalVariation,
)
from kdtune.models import OutputHead, Transformer, llama
from kdtune.teachers import CachedTeacher, OnlineTeacher
from kdtune.teachers.cache import Header
from kdtune.teachers.cache.signals import able_kinds, kind_problem, loss_problem, stored_signal
from kdtune.tokenizers import byte_tokenizer

V, D, N = 13, 6, 9
LENGTHS = [5, 3, 7, 4, 6, 8, 2, 5, 9, 4, 3]


def header(kind: str, dtype: str = "fp32", **settings: Any) -> Header:
    of_kind = {"hidden": {"dim": D}, "topk": {"num_ids": 4}, "sampled": {"num_ids": 5}, "path": {}}[kind]
    return Header(**{"kind": kind, "dtype": dtype, "vocab_size": V, "num_examples": 1, "dataset_size": 1, "examples_per_shard": 1,
                     **of_kind, **settings})  # fmt: skip


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(signal: Any, kd_loss: Any, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence, and gradient of hidden states and head, of a student in float64."""
    hidden, head = numbers(2, 8, 4, seed=1).requires_grad_(), nn.Linear(4, V, bias=False).double()
    with torch.no_grad():
        head.weight.copy_(numbers(V, 4, seed=2))
    labels = torch.full((16,), -100)
    labels[positions] = torch.arange(len(positions)) % V
    loss, parts = KDLoss(kd_loss, kd_ratio=1.0)(hidden, head, signal, Targets.from_labels(labels.view(2, 8)))
    return parts["kd_loss"], *torch.autograd.grad(loss, (hidden, head.weight))


def brute(value_of: Any, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by autograd from a function of the student's log-probabilities [N, V]."""
    hidden, weight = numbers(2, 8, 4, seed=1).requires_grad_(), numbers(V, 4, seed=2).requires_grad_()
    value = value_of((hidden.view(16, 4)[positions] @ weight.T).log_softmax(-1)).sum()
    return value.detach(), *torch.autograd.grad(value, (hidden, weight))


POSITIONS = torch.tensor([0, 2, 3, 5, 8, 9, 11, 12, 14])


def stored(
    kind: str, dtype: str = "fp32", outside: str = "tail", **settings: Any
) -> tuple[Any, dict[str, Tensor], Tensor, Tensor]:
    """A signal in a batch of 2 x 8, its columns, the teacher's head and its distributions."""
    head, weight = header(kind, dtype, **settings), numbers(V, D, seed=3).float()
    hidden = numbers(N, D, seed=4).float()
    logp = (hidden.double() @ weight.double().T).log_softmax(-1)
    columns = columns_of(head, hidden, logp, torch.arange(N) % V)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))  # rows come in any order
    signal = stored_signal(
        head, POSITIONS[order], {name: one[order] for name, one in columns.items()}, (2, 8),
        head=OutputHead.of(weight) if kind == "hidden" else None, outside=outside,
    )  # fmt: skip
    return signal, columns, weight, logp


def check(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float = 1e-6) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def tempered(logp: Tensor) -> Tensor:
    return (logp / 2).log_softmax(-1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(
    ("kd_loss", "formula"),
    [
        (ForwardKL(2.0), lambda s, t: tempered(t).exp() * (tempered(t) - tempered(s))),
        (ReverseKL(), lambda s, t: s.exp() * (s - t)),
    ],
)
def test_hidden_states_are_the_distribution_of_what_is_stored(dtype: str, kd_loss: Any, formula: Any) -> None:
    signal, columns, weight, _ = stored("hidden", dtype)
    assert isinstance(signal, HiddenSignal) and signal.hidden_BSD.dtype == torch.float32
    states = columns["hidden"].double() * (columns["scale"].double()[:, None] if dtype == "int8" else 1)
    exact = (states @ weight.double().T).log_softmax(-1)
    check(loss_of(signal, kd_loss, POSITIONS), brute(lambda s: formula(s, exact).sum(-1), POSITIONS))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_top_k_with_a_tail(dtype: str) -> None:
    signal, columns, _, _ = stored("topk", dtype)
    assert isinstance(signal, TopKSignal) and signal.outside == "tail"
    ids, logp, tail = columns["ids"].long(), columns["logp"].double(), columns["log_tail"].double()

    def value(s: Tensor) -> Tensor:
        s_tail = s.scatter(1, ids, -torch.inf).logsumexp(-1)
        return (logp.exp() * (logp - s.gather(1, ids))).sum(-1) + tail.exp() * (tail - s_tail)

    check(loss_of(signal, ForwardKL(), POSITIONS), brute(value, POSITIONS))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_top_k_renormalized_at_any_temperature(temperature: float) -> None:
    """Captured at one temperature, compared at another: of what is stored only a constant is unknown, and the softmax drops it."""
    signal, columns, _, exact = stored("topk", outside="renormalize", temperature=temperature)
    ids = columns["ids"].long()
    teacher = torch.full_like(exact, -torch.inf).scatter(1, ids, exact.gather(1, ids))

    def value(s: Tensor) -> Tensor:
        p = (teacher / 2).softmax(-1)
        return torch.special.xlogy(p, p).sum(-1) - (p * (s / 2).log_softmax(-1)).sum(-1)

    check(loss_of(signal, ForwardKL(2.0), POSITIONS), brute(value, POSITIONS))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_top_k_alone_at_any_temperature(temperature: float) -> None:
    signal, columns, _, exact = stored("topk", outside="ignore", temperature=temperature)
    ids = columns["ids"].long()
    t = exact.gather(1, ids).log_softmax(-1)

    def value(s: Tensor) -> Tensor:
        s = s.gather(1, ids).log_softmax(-1)
        return (s.exp() * (s - t)).sum(-1)

    check(loss_of(signal, ReverseKL(), POSITIONS), brute(value, POSITIONS))


@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_draws_with_their_weights(exponent: float) -> None:
    signal, columns, _, exact = stored("sampled", exponent=exponent)
    assert isinstance(signal, SampledSignal)
    ids = columns["ids"].long()
    drawn = (exponent * exact).softmax(-1).gather(1, ids)
    p = exact.gather(1, ids).exp()

    def value(s: Tensor) -> Tensor:
        return (p * (p.log() - s.gather(1, ids)) / (5 * drawn)).sum(-1)

    check(loss_of(signal, ForwardKL(), POSITIONS), brute(value, POSITIONS))


def test_the_text_alone() -> None:
    signal, columns, _, _ = stored("path")
    assert isinstance(signal, TextSignal)
    assert torch.equal(signal.text_log_probs(POSITIONS), columns["logp"])
    with pytest.raises(ConfigError, match=r"kd_loss=kdtune.losses.ALM"):
        signal.log_probs(POSITIONS)


@pytest.mark.parametrize(
    ("kd_loss", "able"),
    [
        (ForwardKL(), ["kind=hidden", "kind=topk", "kind=sampled"]),
        (ForwardKL(2.0), ["kind=hidden", 'kind=topk with outside="renormalize"']),
        (JensenShannon(), ["kind=hidden", "kind=topk", "kind=sampled"]),
        (AdaptiveKL(), ["kind=hidden", 'kind=topk with outside="ignore"']),
        (ALM(), ["kind=hidden", "kind=path"]),
    ],
)
def test_the_kinds_that_can_serve_a_loss(kd_loss: Any, able: list[str]) -> None:
    assert able_kinds(kd_loss) == able
    for kind in ("hidden", "topk", "sampled", "path"):
        assert (kind_problem(kind, kd_loss) is None) == (f"kind={kind}" in able)


def test_a_tail_is_at_temperature_1() -> None:
    warm = header("topk", temperature=2.0)
    assert "at temperature 2" in str(loss_problem(warm, ForwardKL(), "tail"))
    assert loss_problem(warm, ForwardKL(), "renormalize") is None
    assert loss_problem(header("topk"), TotalVariation(), "tail") is None
    assert "allowed are kind=hidden" in str(loss_problem(header("sampled"), ForwardKL(2.0), "tail"))


# The teacher in the loop: which row belongs to which position.


def tiny() -> Transformer:
    torch.manual_seed(0)
    model: Transformer = llama(
        vocab_size=320, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_dim=24, max_seq_len=64
    )
    return model.eval()


def row(number: int, length: int) -> EncodedRow:
    ids = [(7 * number + 3 * place) % 90 + 40 for place in range(length)]
    return EncodedRow(ids, [place > 1 for place in range(length)] if length > 2 else [True] * length)


def rows_of(lengths: list[int] = LENGTHS) -> TokenizedDataset:
    return TokenizedDataset(
        (row(number, length) for number, length in enumerate(lengths)), DatasetStats("rows", len(lengths))
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the rows, hidden states in fp32."""
    return write_cache(tmp_path_factory.mktemp("caches") / "hidden", tiny(), rows_of(), byte_tokenizer(max_seq_len=16))


def started(folder: Path, **settings: Any) -> CachedTeacher:
    teacher = CachedTeacher(str(folder), **settings)
    teacher.start(SimpleNamespace(), SINGLE_PROCESS)
    return teacher


def check_signal(teacher: CachedTeacher, batch: Batch) -> None:
    """The distributions at the labels are those of the model that reads the batch."""
    online, found = OnlineTeacher(tiny())(batch), teacher(batch)
    assert found.shape == online.shape and found.vocab_size == online.vocab_size
    places = batch.targets.positions_N
    torch.testing.assert_close(found.log_probs(places), online.log_probs(places), rtol=1e-5, atol=1e-5)


def packed(size: int = 16, **settings: Any) -> Any:
    return pack_examples(rows_of(), byte_tokenizer(max_seq_len=size), **settings)


@pytest.mark.parametrize(
    ("padding_free", "max_tokens", "rank", "num_workers"),
    [*product([True, False], [None, 14], [0, 1], [0]), (True, None, 0, 1)],
)
def test_rows_are_found_by_example_in_every_layout(
    folder: Path, padding_free: bool, max_tokens: int | None, rank: int, num_workers: int
) -> None:
    """Shuffled, over two epochs, in micro-batches of two processes, announced a step at a time."""
    loader = Loader(
        rows_of(), batch_size=2, pad_id=0, shuffle=True, seed=3, rank=rank, num_ranks=2, padding_free=padding_free,
        tokens_per_micro_batch=max_tokens, batches_per_step=2, num_workers=num_workers,
    )  # fmt: skip
    teacher = started(folder)
    while loader.position[0] < 2:
        step = [next(loader) for _ in range(2)]
        teacher.prefetch(step)
        for batch in step:
            check_signal(teacher, batch)


@pytest.mark.parametrize("make", [packed, lambda: part_of(packed(), 0, len(LENGTHS)), rows_of])
def test_packs_are_found_by_their_documents(folder: Path, make: Any) -> None:
    teacher, found = started(folder), list(batches(make(), 2, 0, padding_free=True))
    teacher.prefetch(found)  # more than are read ahead
    for batch in found:
        check_signal(teacher, batch)
    assert any(len(batch.lengths) > 2 for batch in found) == (make is not rows_of)


def test_examples_without_an_index_are_refused(folder: Path) -> None:
    mixed = mixed_dataset(byte_tokenizer(), datasets=[packed(), packed()], weights=[1.0, 1.0])
    for dataset in (packed(split_across_pack=True), mixed):
        batch = next(iter(batches(dataset, 4, 0, padding_free=True)))
        with pytest.raises(ConfigError, match="do not say which examples they hold"):
            started(folder)(batch).result()
        with pytest.raises(ConfigError, match=r"data.split_across_pack=true|data: is a mixture of packs"):
            CachedTeacher(str(folder)).fit_data("data", byte_tokenizer(max_seq_len=16), dataset)


def test_routes_of_a_mixture_make_no_difference_and_all_of_its_examples_do(tmp_path: Path) -> None:
    tokenizer, weights = byte_tokenizer(max_seq_len=16), [1.0, 1.0]
    parts = [rows_of(), rows_of(), rows_of(LENGTHS[::-1])]
    routed = [rows_of(), rows_of(), rows_of(LENGTHS[::-1])]
    for one in routed:
        one.routes = ["code", "math"] * (len(LENGTHS) // 2) + ["code"] * (len(LENGTHS) % 2)
    plain, with_routes = (mixed_dataset(tokenizer, datasets=one[:2], weights=weights) for one in (parts, routed))
    assert with_routes.fingerprint().count(", routes ") == 2
    for name, captured, trained in (("plain", plain, with_routes), ("routed", with_routes, plain)):
        teacher = CachedTeacher(str(write_cache(tmp_path / name, tiny(), captured, tokenizer)))
        assert len(teacher.fit_data("dataset", tokenizer, trained)) == len(trained)
        for others in (parts, routed):
            other = mixed_dataset(tokenizer, datasets=[others[0], others[2]], weights=weights)
            with pytest.raises(ConfigError, match="their texts, their order or what of them is trained on differs"):
                teacher.fit_data("dataset", tokenizer, other)


def test_a_part_is_trained_on_alone_under_its_own_numbers(tmp_path: Path) -> None:
    settings = {"first_example": 3, "num_examples": 6}
    teacher = started(write_cache(tmp_path / "part", tiny(), rows_of(), byte_tokenizer(max_seq_len=16), settings))
    for whole, size in ((rows_of(), 6), (packed(), 3)):
        part = teacher.fit_data("dataset", byte_tokenizer(max_seq_len=16), whole)
        assert len(part) == size and part.fingerprint() != whole.fingerprint()
        loader = Loader(part, batch_size=2, pad_id=0, seed=1, padding_free=True)
        seen = set()
        while loader.position[0] < 1:
            batch = next(loader)
            check_signal(teacher, batch)
            seen |= set(batch.example_ids)
        assert seen == set(range(3, 9))
    alone = TokenizedDataset((row(number, LENGTHS[number]) for number in range(3, 9)), DatasetStats("alone"))
    orders = [list(one.examples(seed=5, epoch=1, shuffle=True)) for one in (part_of(rows_of(), 3, 6), alone)]
    assert all(np.array_equal(ours.tokens, theirs.tokens) for ours, theirs in zip(*orders, strict=True))
    assert part_of(rows_of(), 3, 6).lengths == LENGTHS[3:9]
    with pytest.raises(ConfigError, match="an epoch of a mixture"):
        part_of(mixed_dataset(byte_tokenizer(), datasets=[rows_of(), rows_of()], weights=[1.0, 1.0]), 3, 6)


def test_the_batch_must_be_the_one_announced(folder: Path) -> None:
    first, second, *_ = batches(rows_of(), 2, 0, padding_free=True)
    teacher = started(folder)
    teacher.prefetch([first, second])
    with pytest.raises(
        RuntimeError, match=r"examples \(2, 3\): the one announced next has \(1, 8\), examples \(0, 1\)"
    ):
        teacher(second)


def test_a_process_without_an_example_left_has_a_signal(folder: Path) -> None:
    for kind in ("hidden", "topk"):
        path = folder
        if kind == "topk":
            path = write_cache(
                folder.parent / "topk", tiny(), rows_of(), byte_tokenizer(max_seq_len=16), {"kind": "topk"}
            )
        *_, last = batches(rows_of(), 4, 0, rank=1, num_ranks=2, padding_free=True)
        assert last.num_tokens == 0
        found = started(path)(last).result()
        assert found.shape == (1, 1) and found.vocab_size == 320


def test_rows_are_read_while_others_compute_and_the_wait_is_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([10.0, 12.5])
    monkeypatch.setattr("kdtune.teachers.cache.cached.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    teacher, all_batches = started(folder), list(batches(rows_of(), 1, 0, padding_free=True))
    gate, read = threading.Event(), teacher.cache.read

    def slow(example_id: int, tokens: Any) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        gate.wait(10)
        return read(example_id, tokens)

    teacher.cache.read = slow  # type: ignore[method-assign]
    teacher.prefetch(all_batches)
    signal = teacher(all_batches[0])  # does not wait
    assert teacher.pop_seconds_waited() == 0.0
    gate.set()
    signal.result()
    assert teacher.pop_seconds_waited() == 2.5 and teacher.pop_seconds_waited() == 0.0
    assert signal.result() is signal.result()


# What is refused.


def changed(folder: Path, copy: Path, change: Any) -> Path:
    """A copy of a cache, one of whose shards is changed."""
    shutil.copytree(folder, copy)
    file = copy / "shard-00000.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return copy


def flip(tensors: dict[str, Tensor]) -> None:
    tensors["hidden"].view(torch.int32)[3, 2] ^= 1


def test_a_flipped_bit_and_a_missing_label(folder: Path, tmp_path: Path) -> None:
    batch = next(iter(batches(rows_of(), 4, 0, padding_free=True)))
    with pytest.raises(DataError, match=r"numbers of example 1 are not those that were written"):
        started(changed(folder, tmp_path / "flipped", flip))(batch).result()
    everything = replace(batch, targets=Targets.from_labels(batch.tokens))
    with pytest.raises(DataError, match=r"example 0 has a label at position 0, and the cache has nothing there"):
        started(folder)(everything).result()


def test_other_tokens_are_refused_at_the_row(folder: Path) -> None:
    batch = next(iter(batches(rows_of(), 4, 0, padding_free=True)))
    shifted = replace(batch, example_ids=(0, 1, 3, 2))
    with pytest.raises(DataError, match="example 3 has 7 tokens in the run, and had 4"):
        started(folder)(shifted).result()
    other = replace(batch, inputs={**batch.inputs, "tokens": batch.tokens + 1})
    with pytest.raises(DataError, match="example 0 has other tokens in the run"):
        started(folder)(other).result()
    with pytest.raises(DataError, match="has no example 99; it was captured of the examples 0 to 10"):
        started(folder)(replace(batch, example_ids=(0, 1, 2, 99))).result()


def test_a_truncated_shard_is_refused_when_the_cache_is_opened(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "cut")
    file = tmp_path / "cut" / "shard-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"shard-00001.*was written with"):
        _ = CachedTeacher(str(tmp_path / "cut")).cache


@pytest.mark.parametrize(
    ("tokenizer", "dataset", "said"),
    [
        (byte_tokenizer(max_seq_len=16), rows_of(LENGTHS[:-1]), "there are 10 examples, and were 11"),
        (byte_tokenizer(max_seq_len=8), rows_of([*LENGTHS[:-1], 4]), "tokenizer.max_seq_len is 8, and was 16"),
        (byte_tokenizer(max_seq_len=16), rows_of(LENGTHS[::-1]), "their texts, their order or what of them is trained on differs"),
    ],
)  # fmt: skip
def test_other_examples_are_refused_before_a_row_is_read(folder: Path, tokenizer: Any, dataset: Any, said: str) -> None:
    with pytest.raises(ConfigError, match="was captured of other examples") as refused:
        CachedTeacher(str(folder)).fit_data("dataset", tokenizer, dataset)
    assert said in str(refused.value)


def test_another_template_is_told(folder: Path) -> None:
    tokenizer = byte_tokenizer(max_seq_len=16)
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ConfigError, match="the chat template is another one"):
        CachedTeacher(str(folder)).fit_data("dataset", tokenizer, rows_of(LENGTHS[::-1]))
    # What the template would print makes no difference where the tokens are the same.
    assert len(CachedTeacher(str(folder)).fit_data("dataset", tokenizer, rows_of())) == len(LENGTHS)


def test_ids_that_the_student_lacks_are_refused(tmp_path: Path) -> None:
    path = write_cache(
        tmp_path / "topk", tiny(), rows_of(), byte_tokenizer(max_seq_len=16), {"kind": "topk", "num_ids": 300}
    )
    teacher = started(path)
    teacher.attach(SimpleNamespace(config=SimpleNamespace(vocab_size=200)))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="is none of the student's 200 ids"):
        teacher(next(iter(batches(rows_of(), 2, 0, padding_free=True)))).result()
    largest = max(int(load_file(file)["ids"].max()) for file in path.glob("shard-*"))
    assert teacher.cache.largest_id == largest
    student = {"_component_": "kdtune.models.llama", "vocab_size": 200, "embed_dim": 8, "num_layers": 1, "num_heads": 1,
               "num_kv_heads": 1, "intermediate_dim": 8, "max_seq_len": 16}  # fmt: skip
    cfg = SimpleNamespace(
        kd_loss={"_component_": "kdtune.losses.ForwardKL"}, model=student, checkpointer=None, dataset_val=None
    )
    (problem,) = teacher.problems(cfg)
    assert problem.startswith(f"teacher.path={path}: the teacher's id {largest} is none of the student's 200 ids; ")
    student["vocab_size"] = largest + 1
    assert not teacher.problems(cfg)


def test_the_fingerprint_is_of_the_numbers(folder: Path, tmp_path: Path) -> None:
    def other(tensors: dict[str, Tensor]) -> None:
        tensors["checksums"][2] += 1

    same, different = (
        CachedTeacher(str(one)).fingerprint() for one in (folder, changed(folder, tmp_path / "x", other))
    )
    assert same == CachedTeacher(str(folder)).fingerprint() and same["kind"] == "hidden"
    assert {key for key in same if same[key] != different[key]} == {"rows"}
    assert math.isclose(same["temperature"], 1.0)
