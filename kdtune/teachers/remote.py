"""A teacher on its own processes: tokens are sent there, hidden states come back; logits are never sent.

A round is one request of every student process. All teacher processes run the same number of forwards per round, because
a sharded model computes on all of its processes together.
"""

import signal
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdtune.data import Batch
from kdtune.distributed import END, Channel, PendingSend, World
from kdtune.errors import ParallelismError
from kdtune.generation import generate
from kdtune.losses import HiddenSignal
from kdtune.models import Documents, OutputHead, Transformer

# What a process of the student asks for; END is the last that it says.
_START, _HEAD, _HIDDEN, _GENERATE = END + 1, END + 2, END + 3, END + 4
_Request = tuple[torch.Size, list[int], list[PendingSend]]


class RemoteTeacher:
    """Client of a teacher on other processes: holds its output head and receives its hidden states.

    All of the student's processes must construct and call it equally often and in the same order.

    Args:
        channel: channel to the teacher's processes.
        device: device for the head and the hidden states.

    Raises:
        TrainingError: one of those processes is gone, or does not respond before the timeout.
    """

    def __init__(self, channel: Channel, device: torch.device) -> None:
        self._channel = channel
        self._device = device
        self._requested: deque[_Request] = deque()
        self._interrupted = False
        first, *others = channel.peers
        sent = [channel.send(first, _HEAD), *(channel.send(rank, _START) for rank in others)]
        _, head_VD = channel.receive(first)
        _, softcap = channel.receive(first)  # [1], or [0] for none
        _wait(sent)
        self._head = OutputHead.of(head_VD.to(device), softcap=next(iter(softcap.tolist()), None))

    @property
    def vocab_size(self) -> int:
        """Number of rows of its output head."""
        return self._head.out_features

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Request the batches' hidden states, so that they are computed before they are needed.

        If the tokens are on the CPU, this does not wait for the device.
        """
        peers = self._channel.peers
        for batch in batches:
            inputs = batch.teacher_inputs
            if more := sorted(set(inputs) - {"tokens", "documents"}):
                raise ParallelismError(
                    f"teacher_processes: the batch has {', '.join(more)} beside its tokens, and tokens alone are sent to the "
                    "teacher; set teacher_processes=0"
                )
            shares = _shares(inputs["tokens"].cpu(), inputs.get("documents"), len(peers))
            answering = [rank for rank, share in zip(peers, shares, strict=True) if len(share)]
            sent = [self._channel.send(rank, _HIDDEN, share) for rank, share in zip(peers, shares, strict=True)]
            self._requested.append((inputs["tokens"].shape, answering, sent))

    def __call__(self, batch: Batch) -> HiddenSignal:
        """Return the hidden states [B, S, D] of the batch that was requested first, and the head.

        Raises:
            RuntimeError: the batch is not the next one that `prefetch` was given.
        """
        if not self._requested:
            self.prefetch([batch])
        shape, answering, sent = self._requested.popleft()
        if shape != (asked := batch.teacher_inputs["tokens"].shape):
            raise RuntimeError(f"tokens {tuple(asked)}: those asked for next are {tuple(shape)}")
        hidden = [self._receive(rank) for rank in answering]
        _wait(sent)
        joined = hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=int("documents" in batch.teacher_inputs))
        return HiddenSignal(joined.to(self._device), self._head)

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
        sent = [self._channel.send(rank, _GENERATE, request) for rank in self._channel.peers]
        answers = [self._receive(rank) for rank in self._channel.peers]
        _wait(sent)
        return list(answers[0].tolist())

    def _receive(self, rank: int) -> Tensor:
        interrupted, answer = self._channel.receive(rank)
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
        ParallelismError: the model's head is more than one weight.
        TrainingError: a student process is gone, or does not respond before the timeout.
    """
    if world.channel is None or not world.channel.is_teacher:
        raise ValueError("serve: this process is not one of the teacher alone")
    with interrupt, torch.no_grad():
        _serve(build, world.channel, world.device, interrupt)


def _serve(build: Callable[[], Any], channel: Channel, device: torch.device, interrupt: Interrupt) -> None:
    requests = [channel.receive(rank)[0] for rank in channel.peers]
    if END in requests:  # a resumed run that had made all its steps
        return
    model = build().requires_grad_(False).eval()
    check_sendable(model.output)
    # A forward makes the head whole where it is sharded, in the dtype that it is used in.
    nothing_BS = torch.zeros(1, 1, dtype=torch.int64, device=device)
    model(nothing_BS, return_hidden=True)
    head_peers = [rank for rank, tag in zip(channel.peers, requests, strict=True) if tag == _HEAD]
    softcap = getattr(model.output, "softcap", None)  # a plain Linear has none
    softcaps = torch.tensor([] if softcap is None else [softcap], dtype=torch.float64)
    for part in (model.output.weight, softcaps):
        _wait([channel.send(rank, 0, part) for rank in head_peers])

    before: list[PendingSend] = []
    while True:
        batches = [channel.receive(rank) for rank in channel.peers]
        if any(tag == END for tag, _ in batches):
            return _wait(before)
        if batches[0][0] == _GENERATE:  # all of the student's processes ask for the same
            _wait(before)
            new_ids = torch.tensor(_generated(model, batches[0][1].tolist()))
            before = [channel.send(rank, int(interrupt.requested), new_ids) for rank in channel.peers]
            continue
        for number in range(channel.rounds):
            share = batches[number][1] if number < len(batches) else nothing_BS[:0]
            tokens, others = _inputs(share, device) if len(share) else (nothing_BS, {})
            hidden_BSD = model(tokens, **others, return_hidden=True)
            if len(share) == 0:
                continue
            # The answer before must have been fetched: answers that nobody fetches would fill the memory.
            _wait(before)
            before = [channel.send(channel.peers[number], int(interrupt.requested), hidden_BSD)]


def _shares(tokens_BS: Tensor, documents: Documents | None, num_shares: int) -> list[Tensor]:
    """Return what each of the teacher's processes is sent of a batch: some rows [b, S], or some documents, see `_inputs`.

    Documents are cut into shares of about equally many tokens; there may be none for some processes.
    """
    if documents is None:
        return list(tokens_BS.tensor_split(num_shares))
    middles = [end - length / 2 for end, length in zip(accumulate(documents.lengths), documents.lengths, strict=True)]
    owners = [int(middle * num_shares / tokens_BS.numel()) for middle in middles]
    shares, pieces = [], tokens_BS[0].split(documents.lengths)
    for share in range(num_shares):
        own = [piece for piece, owner in zip(pieces, owners, strict=True) if owner == share]
        header = torch.tensor([len(own), *map(len, own)] if own else [], dtype=torch.int64)
        shares.append(torch.cat([header, *own]))
    return shares


def _inputs(share: Tensor, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    """Return the model's tokens and other inputs for what was sent: rows, or the number of documents, their lengths and tokens."""
    if share.ndim == 2:
        return share.to(device), {}
    num_documents = int(share[0])
    documents = Documents.of_lengths(share[1 : 1 + num_documents].tolist())
    return share[None, 1 + num_documents :].to(device), {"documents": documents.to(device)}


def _generated(model: Transformer, request: list[int]) -> list[int]:
    """Return the new ids for a request of `RemoteTeacher.generate`."""
    max_new_tokens, num_stop_ids, *ids = request
    stop_ids, prompt_ids = ids[:num_stop_ids], ids[num_stop_ids:]
    return generate(model, prompt_ids, max_new_tokens=max_new_tokens, stop_ids=stop_ids, sync_tokens=True)


def check_sendable(head: nn.Module, key: str = "teacher_processes") -> None:
    """Raise ParallelismError unless a head is one weight; `key` is that of the config which makes it cross over.

    Raises:
        ParallelismError: it has more than one weight, such as an adapter or a bias.
    """
    if len(list(head.parameters())) > 1:
        raise ParallelismError(
            f"{key}: the teacher's output head has an adapter or a bias, and it is sent to the student as one matrix; leave "
            "the head out of teacher_model's adapters, or merge them (teacher_checkpointer.adapter_dir)"
        )


def _wait(all_sent: Iterable[PendingSend]) -> None:
    for sent in all_sent:
        sent.wait()
