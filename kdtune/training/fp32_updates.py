"""Updates of bf16 weights computed in fp32, whose results are rounded stochastically or kept beside the weights."""

import types
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kdtune.distributed import to_local
from kdtune.tensor_types import is_dtensor

Rounding = Literal["stochastic", "fp32_master"]

# Entries of a bf16 weight's optimizer state: its fp32 copy, and the number of its updates.
MASTER = "fp32_master"
UPDATES = "num_updates"


def update_in_fp32(optimizer: Optimizer, rounding: Rounding, *, seed: int = 0) -> None:
    """Make an optimizer's step update each bf16 weight as an fp32 one, from its fp32 gradient and with fp32 state; others as before.

    The weights are updated one after the other, so that a single one is in memory in fp32 besides what is kept. The optimizer is
    asked for each by itself, as in `step_in_backward`, with which it works together. Apply it before a schedule is made.

    Args:
        optimizer: in place; of any kind that updates each parameter from its own gradient and state.
        rounding: "fp32_master" keeps the fp32 weight in the optimizer's state (arXiv 1710.03740); the bf16 one is it, rounded to
            nearest. "stochastic" keeps the bf16 weight alone, rounded up or down with the probabilities that make its mean the
            fp32 one (arXiv 2010.06192).
        seed: of the random bits, which depend besides on the parameter, the number of its updates and the shard: the same in a
            resumed run, and on processes that hold copies.
    """
    step = optimizer.step

    @torch.no_grad()
    def wide_step(self: Optimizer, closure: Any = None) -> Any:
        assert closure is None, "the recipes step without"
        params = [group["params"] for group in self.param_groups]
        numbers = {one: number for number, one in enumerate(one for group in params for one in group)}
        narrow = [[one for one in group if one.dtype == torch.bfloat16 and one.grad is not None] for group in params]
        try:
            for group, own in zip(self.param_groups, params, strict=True):
                group["params"] = [one for one in own if one.dtype != torch.bfloat16]
            step()
            for group in self.param_groups:
                group["params"] = []
            for group, own in zip(self.param_groups, narrow, strict=True):
                for one in own:
                    wide = _widened(self, one)
                    group["params"] = [wide]
                    step()
                    _narrow(self, one, wide, rounding, (seed, numbers[one]))
                group["params"] = []
        finally:
            for group, own in zip(self.param_groups, params, strict=True):
                group["params"] = own

    optimizer.step = types.MethodType(wide_step, optimizer)  # type: ignore[method-assign]


def _widened(optimizer: Optimizer, parameter: Tensor) -> nn.Parameter:
    """Return the parameter in fp32, with its gradient; the optimizer's state of it is moved to the result."""
    assert parameter.grad is not None
    state = optimizer.state.pop(parameter, {})
    wide = nn.Parameter(state.pop(MASTER) if MASTER in state else parameter.detach().float())
    wide.grad = parameter.grad.float()
    optimizer.state[wide] = state
    return wide


def _narrow(
    optimizer: Optimizer, parameter: Tensor, wide: nn.Parameter, rounding: Rounding, seed: tuple[int, ...]
) -> None:
    """Round the updated weight into the parameter, and move the optimizer's state back to it."""
    state = optimizer.state.pop(wide)
    if rounding == MASTER:
        to_local(parameter).copy_(to_local(wide))
        state[MASTER] = wide.detach()
    else:
        state[UPDATES] = state.get(UPDATES, 0) + 1
        to_local(parameter).copy_(round_stochastically(to_local(wide), (*seed, state[UPDATES], *_shard(parameter))))
    optimizer.state[parameter] = state


def round_stochastically(values: Tensor, seed: tuple[int, ...]) -> Tensor:
    """Round fp32 values to one of their two neighbours in bf16 each, with probabilities that make the mean exact.

    `seed` gives the random bits.
    """
    generator = torch.Generator(values.device)
    generator.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
    # The upper 16 bits of an fp32 number are a bf16 one: random lower bits carry over as often as the lower bits are large.
    noise = torch.randint(0, 2**16, values.shape, generator=generator, dtype=torch.int32, device=values.device)
    return noise.add_(values.detach().view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32).bfloat16()


def _shard(parameter: Tensor) -> list[int]:
    """Return this process's place among those that hold other shards of the parameter."""
    if not is_dtensor(parameter):
        return []
    places = zip(parameter.placements, parameter.device_mesh.get_coordinate() or (), strict=True)
    return [place for placement, place in places if not placement.is_replicate()]
