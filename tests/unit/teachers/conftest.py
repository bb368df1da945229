"""CUDA streams that only keep a record, for code that no GPU is here to run."""

import pytest
import torch

from kdtune.teachers import offload, online


class FakeStream:
    """A stream that keeps a record of what is queued on it, and of the events it waits for."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.device, self.count = name, log, torch.device("cuda"), 0

    def record_event(self) -> str:
        self.count += 1
        self.log.append(f"{self.name}: event {self.count}")
        return f"{self.name} {self.count}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name}: wait for {event}")

    def wait_stream(self, other: "FakeStream") -> None:
        self.wait_event(other.record_event())

    def __enter__(self) -> None:
        self.log.append(f"{self.name}: enter")

    def __exit__(self, *error: object) -> None:
        self.log.append(f"{self.name}: exit")


@pytest.fixture
def stream_log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What streams were told to do, in order: `side`, a new one, and `main`, the current one."""
    log: list[str] = []
    main = FakeStream("main", log)
    for module in (offload, online):
        monkeypatch.setattr(module, "side_stream", lambda _: FakeStream("side", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: log.append(f"tensor kept for {stream.name}"))
    return log
