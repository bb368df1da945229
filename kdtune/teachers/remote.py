"""A teacher on processes of its own: tokens go there, hidden states come back, and the logits exist on neither way.

A round is one request of every process of the student. Those of the teacher make as many forwards a round, all of them,
because a sharded model computes on all of its processes together.
"""

import signal
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdtune.distributed import END, Bridge, World
from kdtune.distributed.bridge import Sent
from kdtune.errors import LayoutError
from kdtune.losses import FactoredHead
from kdtune.models import KVCache, Transformer, TransformerConfig

# What a process of the student asks for; END is the last that it says.
_START, _HEAD, _HIDDEN = END + 1, END + 2, END + 3
_Asked = tuple[Tensor, list[Sent]]


class RemoteModel(nn.Module):
    """What a student's process sees of a model on other processes: hidden states and the output head, no other weight.

    Made and called by all of the student's processes alike, as often and in the same order.

    Args:
        config: of the model, for those who ask for it.
        bridge: to the processes that hold it.
        device: where the head and the hidden states are wanted.

    Raises:
        TrainingError: one of those processes is gone, or keeps this one waiting for too long.
    """

    def __init__(self, config: TransformerConfig, bridge: Bridge, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self._bridge = bridge
        self._device = device
        self._asked: deque[_Asked] = deque()
        self._interrupted = False
        self._so_far = torch.empty(0)
        first, *others = bridge.partners
        sent = [bridge.send(first, _HEAD), *(bridge.send(rank, _START) for rank in others)]
        _, head_VD = bridge.receive(first)
        _wait(sent)
        self.output = nn.Linear(head_VD.shape[1], head_VD.shape[0], bias=False, device="meta")
        self.output.weight = nn.Parameter(head_VD.to(device), requires_grad=False)

    def request(self, batches_of_tokens: Iterable[Tensor]) -> None:
        """Asks for the hidden states of these tokens, each [B, S], so that they are computed before they are waited for.

        They are then fetched by `forward` with the same tokens in the same order. On the CPU the tokens cost no wait.
        """
        partners = self._bridge.partners
        for tokens_BS in batches_of_tokens:
            shares = tokens_BS.cpu().tensor_split(len(partners))
            sent = [self._bridge.send(rank, _HIDDEN, share) for rank, share in zip(partners, shares, strict=True)]
            self._asked.append((tokens_BS, sent))

    def forward(self, tokens: Tensor, *, kv_cache: KVCache | None = None, return_hidden: bool = False) -> Tensor:
        """The model's hidden states [B, S, D] for these tokens with `return_hidden`, else its logits [B, S, V].

        With a cache they are those of tokens that follow the ones before. It counts them only: nothing is kept where the
        model is, and all of them go there again, which is good enough for an answer or two.
        """
        held, tokens_BS = 0, tokens
        if kv_cache is not None:
            kv_cache.check_room(tokens_BS)
            held = kv_cache.length
            tokens_BS = self._so_far = tokens_BS if held == 0 else torch.cat([self._so_far, tokens_BS], dim=1)
            kv_cache.length = tokens_BS.shape[1]
        if not self._asked:
            self.request([tokens_BS])
        asked_BS, sent = self._asked.popleft()
        if asked_BS.shape != tokens_BS.shape:
            raise RuntimeError(f"tokens {tuple(tokens_BS.shape)}: those asked for next are {tuple(asked_BS.shape)}")
        hidden_BSD = self._fetch(len(tokens_BS))[:, held:]
        _wait(sent)
        return hidden_BSD if return_hidden else self.output(hidden_BSD)

    def _fetch(self, num_rows: int) -> Tensor:
        """The hidden states of the batch that was asked for first: its rows, each part from another process."""
        answers = [self._bridge.receive(rank) for rank, _ in zip(self._bridge.partners, range(num_rows), strict=False)]
        if any(interrupted for interrupted, _ in answers) and not self._interrupted:
            # A signal to any process stops the run after the step; the teacher's processes have no other way to say so.
            self._interrupted = True
            signal.raise_signal(signal.SIGTERM)
        hidden = [hidden_BSD for _, hidden_BSD in answers]
        return (hidden[0] if len(hidden) == 1 else torch.cat(hidden)).to(self._device)

    @property
    def tok_embeddings(self) -> nn.Module:
        """What has the dtype and the device of the model's embeddings, for those who ask; the embeddings are not here."""
        return self.output


class Interrupt(Protocol):
    """A context in which signals only set `requested`, such as `kdtune.training.InterruptFlag`."""

    @property
    def requested(self) -> bool:
        """Whether one has come."""

    def __enter__(self) -> object: ...

    def __exit__(self, *error: Any) -> None: ...


def serve(build: Callable[[], Transformer | RemoteModel], world: World, interrupt: Interrupt) -> None:
    """Answers the student's processes until they say that they have ended; called by all of the teacher's.

    Args:
        build: makes the model, once the student's data is known to be good.
        world: of the teacher alone.
        interrupt: entered meanwhile. A signal goes to all processes of a run, and the student's need answers until their
            step is made; where it came to this one alone, it is passed on to them.

    Raises:
        LayoutError: the model's head is more than one weight.
        TrainingError: a process of the student is gone, or keeps this one waiting for too long.
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
        for turn in range(bridge.turns):
            tokens_BS = batches[turn][1] if turn < len(batches) else nothing_BS[:0]
            hidden_BSD = model(tokens_BS.to(device) if len(tokens_BS) else nothing_BS, return_hidden=True)
            if len(tokens_BS) == 0:
                continue
            # The answer before must have been fetched: answers that nobody fetches would fill the memory.
            _wait(before)
            before = [bridge.send(bridge.partners[turn], int(interrupt.requested), hidden_BSD)]


def check_sendable(head: nn.Module) -> None:
    """Raise unless a head is one weight.

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
