"""Several processes of one run, forked from the test: what torchrun would start, without importing torch anew in each."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# What runs import on their way is imported here once, not in every forked process.
import matplotlib.backends.backend_agg  # noqa: F401
import pytest
import torch._dynamo
import torch.profiler
from run_parts import SIZES

from kdtune._cli.main import main
from kdtune.checkpoint import save_model
from kdtune.models import llama
from kdtune.models.transformer import INIT_STD
from kdtune.tokenizers import byte_tokenizer
from recipes import evaluate, finetune, generate, knowledge_distillation  # noqa: F401


@dataclass(frozen=True)
class Rank:
    """One process: its exit code and what it printed."""

    process: "multiprocessing.context.ForkProcess"
    output: Path

    @property
    def code(self) -> int | None:
        """The exit code once it has ended; a negative one is a signal's."""
        return self.process.exitcode

    @property
    def text(self) -> str:
        """What it printed, on either stream."""
        return self.output.read_text()


class Launcher:
    """Starts ranks and waits for them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start(self, function: Callable[..., None], *arguments: object, ranks: int) -> list[Rank]:
        """`function(*arguments)` in each of so many processes, with the environment that torchrun gives them."""
        port = _free_port()
        context = multiprocessing.get_context("fork")
        started = []
        for rank in range(ranks):
            output = self._folder / f"{port}-{rank}.txt"
            process = context.Process(target=_run, args=(function, arguments, rank, ranks, port, output))
            process.start()
            started.append(Rank(process, output))
        return started

    def wait(self, started: list[Rank], timeout: float = 120) -> list[Rank]:
        """The ranks once all of them have ended; those that have not by the timeout are killed, and the test fails."""
        for rank in started:
            rank.process.join(timeout)
        late = [rank for rank in started if rank.process.is_alive()]
        for rank in late:
            rank.process.kill()
        assert not late, "\n".join(rank.text for rank in started)
        return started

    def call(self, function: Callable[..., None], *arguments: object, ranks: int, timeout: float = 120) -> None:
        """`function(*arguments)` in each of so many processes, all of which must end well."""
        ended = self.wait(self.start(function, *arguments, ranks=ranks), timeout)
        assert [rank.code for rank in ended] == [0] * ranks, "\n".join(rank.text for rank in ended)

    def kdtune(self, *argv: str, ranks: int) -> list[Rank]:
        """`kdtune ARGV...` as each of so many processes runs it, once all have ended."""
        return self.wait(self.start(main, list(argv), ranks=ranks))


def _run(
    function: Callable[..., None], arguments: tuple[object, ...], rank: int, ranks: int, port: int, output: Path
) -> None:
    # Open until the process ends: what it raises is printed there too, after this function.
    sys.stdout = sys.stderr = output.open("w")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(1)
    function(*arguments)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(autouse=True)
def runs_are_undrawn(undrawn: None) -> None:
    """No test here looks at a plot."""


@pytest.fixture
def launch(tmp_path: Path) -> Launcher:
    """Starts several processes of one run."""
    folder = tmp_path / "ranks"
    folder.mkdir()
    return Launcher(folder)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with the tiny config's student."""
    return _write_model(tmp_path_factory.mktemp("small") / "model", INIT_STD)


@pytest.fixture(scope="session")
def loud_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with weights so large that answers depend on the question."""
    return _write_model(tmp_path_factory.mktemp("loud") / "model", 0.15)


def _write_model(folder: Path, std: float) -> Path:
    torch.manual_seed(0)
    model = llama(**SIZES, tie_embeddings=True)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=std)
    save_model(model, folder, tokenizer=byte_tokenizer())
    return folder
