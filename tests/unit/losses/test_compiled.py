"""The compiled softmax, divergence and gradient give what the others give."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from divergence_cases import CASES, Case
from torch import Tensor, nn

from kdtune.losses import ForwardKL, HiddenSignal, KDLoss, SampledTargets, TopKTargets, comparison
from kdtune.models import OutputHead

TARGETS: dict[str, Any] = {"whole": None, "top k": TopKTargets(5), "sampled": SampledTargets(7),
                           "renormalized": TopKTargets(5, outside="renormalize"), "alone": TopKTargets(5, outside="ignore")}  # fmt: skip
# One of each formula, and of each kind of targets.
EVERY = [(case, "whole") for case in CASES if "0.01" not in case.name and "T=" not in case.name]
EVERY += [(case, kind) for case in CASES if case.name in ("forward", "jsd", "sum") for kind in ("top k", "sampled")]
EVERY += [(case, "alone") for case in CASES if case.name == "reverse"]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], list[int]]]:
    """A function that sets the compiler's backend, and returns a list that grows by one with each graph that is compiled."""
    compiled: list[int] = []
    torch_compile = torch.compile

    def with_backend(name: str) -> list[int]:
        def backend(graph: Any, inputs: Any) -> Any:
            compiled.append(len(compiled))
            return torch._dynamo.lookup_backend(name)(graph, inputs)

        monkeypatch.setattr(torch, "compile", lambda f, **options: torch_compile(f, backend=backend, **options))
        monkeypatch.setattr(comparison, "_lacking_compiler", lambda _: None)
        return compiled

    yield with_backend
    torch._dynamo.reset()


def batch(num_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, OutputHead, HiddenSignal, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    hidden, teacher_hidden = (torch.randn(1, num_tokens, d, generator=generator).to(dtype) for d in (16, 24))
    heads = [OutputHead(d, 300) for d in (16, 24)]
    for head in heads:
        nn.init.normal_(head.weight, std=0.3, generator=generator)
        head.to(dtype)
    labels = torch.randint(300, (1, num_tokens), generator=generator)
    return hidden.requires_grad_(), heads[0], HiddenSignal(teacher_hidden, heads[1]), labels


def assert_same(eager: KDLoss, compiled: KDLoss, num_tokens: int, dtype: torch.dtype = torch.float32) -> None:
    """Value, parts and gradients are the same, up to the order of additions."""
    hidden, output, signal, labels = batch(num_tokens, dtype)
    results = []
    for loss_fn in (eager, compiled):
        torch.manual_seed(0)  # the same draws
        loss, parts = loss_fn(hidden, output, signal, labels)
        results.append([loss.detach(), *parts.values(), *torch.autograd.grad(loss, (hidden, output.weight))])
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= tolerance * one.norm() + 1e-6


@pytest.mark.parametrize(("case", "kind"), EVERY, ids=[f"{case.name}, {kind}" for case, kind in EVERY])
def test_every_divergence_is_one_graph(case: Case, kind: str, graphs: Callable[[str], list[int]]) -> None:
    """As torch.compile sees it; whatever the number of tokens, so that a run compiles once. Those by autograd fall apart."""
    compiled = graphs("eager")
    settings = {"teacher_targets": TARGETS[kind], "chunk_size": 5}
    losses = KDLoss(case.divergence, **settings), KDLoss(case.divergence, compile=True, **settings)
    assert_same(*losses, 9)
    first = len(compiled)
    for num_tokens in (16, 3):
        assert_same(*losses, num_tokens)
    if case.name != "mixture geometric":  # its gradient is by autograd
        assert len(compiled) == first == 1


@pytest.mark.slow("a compiler runs for every divergence, some seconds each")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_machine_code_of_every_divergence(case: Case, graphs: Callable[[str], list[int]]) -> None:
    if comparison._lacking_compiler("cpu"):
        pytest.skip("no C++ compiler")
    graphs("inductor")
    pair = (KDLoss(case.divergence, chunk_size=5), KDLoss(case.divergence, chunk_size=5, compile=True))
    for dtype in (torch.float32, torch.bfloat16):
        assert_same(*pair, 9, dtype)


SPARSE = [
    (case, kind)
    for case in CASES
    for kind, is_defined in (("top k", case.tail), ("renormalized", case.renormalized), ("sampled", case.sampled))
    if is_defined and "0.01" not in case.name and "T=" not in case.name
]


@pytest.mark.slow("a compiler runs for each, some seconds each")
@pytest.mark.parametrize(("case", "kind"), SPARSE, ids=[f"{case.name}, {kind}" for case, kind in SPARSE])
def test_machine_code_of_sparse_targets(case: Case, kind: str, graphs: Callable[[str], list[int]]) -> None:
    if comparison._lacking_compiler("cpu"):
        pytest.skip("no C++ compiler")
    graphs("inductor")
    settings = {"teacher_targets": TARGETS[kind], "chunk_size": 5}
    pair = KDLoss(case.divergence, **settings), KDLoss(case.divergence, compile=True, **settings)
    for dtype in (torch.float32, torch.bfloat16):
        assert_same(*pair, 9, dtype)


@pytest.mark.slow("a compiler runs for some seconds")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_machine_code(dtype: torch.dtype, graphs: Callable[[str], list[int]]) -> None:
    if comparison._lacking_compiler("cpu"):
        pytest.skip("no C++ compiler")
    compiled = graphs("inductor")
    for loss_fn in (KDLoss(ForwardKL(), chunk_size=5), KDLoss(ForwardKL(), chunk_size=5, compile=True)):
        pair = KDLoss(ForwardKL(), chunk_size=5), loss_fn
        for num_tokens in (9, 22):
            assert_same(*pair, num_tokens, dtype)
    assert len(compiled) == 1


def test_without_a_compiler_it_says_so_and_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(comparison, "_lacking_compiler", lambda _: "there is no C++ compiler")
    monkeypatch.setattr(comparison.log, "propagate", True)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    assert_same(KDLoss(), KDLoss(compile=True), 4)
    assert "not compiled: there is no C++ compiler" in caplog.text
