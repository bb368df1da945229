"""A teacher on its own processes: tokens are sent there, hidden states come back; logits are never sent.

A round is one request of every student process. All teacher processes run the same number of forwards per round, because
a sharded model computes on all of its processes together.
"""

import signal
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdtune.data import Batch
from kdtune.distributed import END, Bridge, World
from kdtune.distributed.channel import Sent
from kdtune.errors import LayoutError
from kdtune.generation import generate
from kdtune.losses import FactoredHead, HiddenSignal
from kdtune.models import Transformer

# What a process of the student asks for; END is the last that it says.
_START, _HEAD, _HIDDEN, _GENERATE = END + 1, END + 2, END + 3, END + 4
_Request = tuple[torch.Size, list[Sent]]


class RemoteTeacher:
    """Client of a teacher on other processes: holds its output head and receives its hidden states.

    All of the student's processes must construct and call it equally often and in the same order.

    Args:
        bridge: channel to the teacher's processes.
        device: device for the head and the hidden states.

    Raises:
        TrainingError: one of those processes is gone, or does not respond before the timeout.
    """

    def __init__(self, bridge: Bridge, device: torch.device) -> None:
        self._bridge = bridge
        self._device = device
        self._requested: deque[_Request] = deque()
        self._interrupted = False
        first, *others = bridge.partners
        sent = [bridge.send(first, _HEAD), *(bridge.send(rank, _START) for rank in others)]
        _, head_VD = bridge.receive(first)
        _wait(sent)
        self._head = nn.Linear(head_VD.shape[1], head_VD.shape[0], bias=False, device="meta")
        self._head.weight = nn.Parameter(head_VD.to(device), requires_grad=False)

    @property
    def vocab_size(self) -> int:
        """Number of rows of its output head."""
        return self._head.out_features

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Request the batches' hidden states, so that they are computed before they are needed.

        If the tokens are on the CPU, this does not wait for the device.
        """
        partners = self._bridge.partners
        for batch in batches:
            if more := sorted(set(batch.inputs) - {"tokens"}):
                raise LayoutError(
                    f"teacher_processes: the batch has {', '.join(more)} beside its tokens, and tokens alone are sent to the "
                    "teacher; set teacher_processes=0"
                )
            shares = batch.tokens.cpu().tensor_split(len(partners))
            sent = [self._bridge.send(rank, _HIDDEN, share) for rank, share in zip(partners, shares, strict=True)]
            self._requested.append((batch.tokens.shape, sent))

    def __call__(self, batch: Batch) -> HiddenSignal:
        """Return the hidden states [B, S, D] of the batch that was requested first, and the head.

        Raises:
            RuntimeError: the batch is not the next one that `prefetch` was given.
        """
        if not self._requested:
            self.prefetch([batch])
        shape, sent = self._requested.popleft()
        if shape != batch.tokens.shape:
            raise RuntimeError(f"tokens {tuple(batch.tokens.shape)}: those asked for next are {tuple(shape)}")
        hidden = [self._receive(rank) for rank, _ in zip(self._bridge.partners, range(shape[0]), strict=False)]
        _wait(sent)
        return HiddenSignal((hidden[0] if len(hidden) == 1 else torch.cat(hidden)).to(self._device), self._head)

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        stop_ids: Collection[int],
        sync_tokens: bool = False,
    ) -> list[int]:
        """Return the greedy ids after a prompt, computed by the teacher's processes, which synchronize the ids."""
        request = torch.tensor([max_new_tokens, len(stop_ids), *sorted(stop_ids), *prompt_ids])
        sent = [self._bridge.send(rank, _GENERATE, request) for rank in self._bridge.partners]
        answers = [self._receive(rank) for rank in self._bridge.partners]
        _wait(sent)
        return list(answers[0].tolist())

    def _receive(self, rank: int) -> Tensor:
        interrupted, answer = self._bridge.receive(rank)
        if interrupted and not self._interrupted:
            # A signal to any process stops the run after the step; the teacher's processes have no other way to say so.
            self._interrupted = True
            signal.raise_signal(signal.SIGTERM)
        return answer


class Interrupt(Protocol):
    """A context manager in which signals only set `requested`, such as `kdtune.runs.InterruptFlag`."""

    @property
    def requested(self) -> bool:
        """Return whether a signal has arrived."""

    def __enter__(self) -> object: ...

    def __exit__(self, *error: Any) -> None: ...


def serve(build: Callable[[], Transformer], world: World, interrupt: Interrupt) -> None:
    """Answer the student's requests until they end; called by all of the teacher's processes.

    Args:
        build: builds the model, once the student's data has passed its checks.
        world: the teacher's world.
        interrupt: entered meanwhile. A signal reaches all processes of a run, and the student's need answers until their
            step is finished; if only this process got it, it is passed on to them.

    Raises:
        LayoutError: the model's head is more than one weight.
        TrainingError: a student process is gone, or does not respond before the timeout.
    """
    if world.bridge is None or not world.bridge.is_teacher:
        raise ValueError("serve: this process is not one of the teacher alone")
    with interrupt, torch.no_grad():
        _serve(build, world.bridge, world.device, interrupt)


def _serve(build: Callable[[], Any], bridge: Bridge, device: torch.device, interrupt: Interrupt) -> None:
    requests = [bridge.receive(rank)[0] for rank in bridge.partners]
    if END in requests:  # a resumed run that had made all its steps
        return
    model = build().requires_grad_(False).eval()
    check_sendable(model.output)
    # A forward makes the head whole where it is sharded, in the dtype that it is used in.
    nothing_BS = torch.zeros(1, 1, dtype=torch.int64, device=device)
    model(nothing_BS, return_hidden=True)
    askers = [rank for rank, asked in zip(bridge.partners, requests, strict=True) if asked == _HEAD]
    _wait([bridge.send(rank, 0, model.output.weight) for rank in askers])

    before: list[Sent] = []
    while True:
        batches = [bridge.receive(rank) for rank in bridge.partners]
        if any(asked == END for asked, _ in batches):
            return _wait(before)
        if batches[0][0] == _GENERATE:  # all of the student's processes ask for the same
            _wait(before)
            new_ids = torch.tensor(_generated(model, batches[0][1].tolist()))
            before = [bridge.send(rank, int(interrupt.requested), new_ids) for rank in bridge.partners]
            continue
        for turn in range(bridge.turns):
            tokens_BS = batches[turn][1] if turn < len(batches) else nothing_BS[:0]
            hidden_BSD = model(tokens_BS.to(device) if len(tokens_BS) else nothing_BS, return_hidden=True)
            if len(tokens_BS) == 0:
                continue
            # The answer before must have been fetched: answers that nobody fetches would fill the memory.
            _wait(before)
            before = [bridge.send(bridge.partners[turn], int(interrupt.requested), hidden_BSD)]


def _generated(model: Transformer, request: list[int]) -> list[int]:
    """Return the new ids for a request of `RemoteTeacher.generate`."""
    max_new_tokens, num_stop_ids, *ids = request
    stop_ids, prompt_ids = ids[:num_stop_ids], ids[num_stop_ids:]
    return generate(model, prompt_ids, max_new_tokens=max_new_tokens, stop_ids=stop_ids, sync_tokens=True)


def check_sendable(head: nn.Module) -> None:
    """Raise LayoutError unless a head is one weight.

    Raises:
        LayoutError: it has an adapter beside it.
    """
    if isinstance(head, FactoredHead):
        raise LayoutError(
            "teacher_processes: the teacher's output head has an adapter, and it is sent to the student as one matrix; leave "
            "the head out of teacher_model's adapters, or merge them (teacher_checkpointer.adapter_dir)"
        )


def _wait(all_sent: Iterable[Sent]) -> None:
    for sent in all_sent:
        sent.wait()
