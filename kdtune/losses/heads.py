"""Output heads as two matrices whose product is the logits. Shapes: T positions, V vocabulary, D embedding, K inner width."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor, Replicate

from kdtune.constants import TP_DIM
from kdtune.errors import ConfigError
from kdtune.losses.vocab_shards import VocabShards


@dataclass(frozen=True)
class Projection:
    """Hidden states and the head that maps them to logits: hidden_TD @ weight_VD.T."""

    hidden_TD: Tensor
    weight_VD: Tensor  # of a head in shards, this process's rows
    shards: VocabShards | None = None

    @property
    def vocab_size(self) -> int:
        """Return the number of rows of the full head."""
        return self.shards.vocab_size if self.shards else len(self.weight_VD)

    def num_ids(self, limit: int) -> int:
        """Return the number of local rows among the first `limit` of the full head."""
        return self.shards.own_num_ids(limit) if self.shards else limit


@runtime_checkable
class FactoredHead(Protocol):
    """An output head of more than one weight, such as one with an adapter, that is still one product of two matrices."""

    def projection(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return [T, K] and [V, K], whose product ``first @ second.T`` is the head's output for the hidden states."""


def project(owner: str, hidden_BSD: Tensor, output: nn.Module) -> Projection:
    """Return the projection of a model's hidden states [B, S, D], in shards if tensor parallelism shards the head.

    Args:
        owner: whose head it is, for the message, such as "student".
        hidden_BSD: last hidden states, after the final norm.
        output: the head.

    Raises:
        ConfigError: the head cannot be fused with the loss (see `check_head`), or is sharded by FSDP.
    """
    hidden_TD = hidden_BSD.flatten(0, 1)
    weight = getattr(output, "weight", None)
    mesh = weight.device_mesh if isinstance(weight, DTensor) else None
    if isinstance(output, FactoredHead):
        if mesh is not None:
            hidden_TD = DTensor.from_local(hidden_TD, mesh, [Replicate()], run_check=False)
        hidden_TD, weight_VD = output.projection(hidden_TD)
    else:
        weight_VD = _head_weight(owner, output)
    if mesh is None:
        return Projection(hidden_TD, weight_VD)
    if mesh.mesh_dim_names != (TP_DIM,):
        raise ConfigError(
            f"the {owner}'s output head cannot be fused with the loss: it is in shards over {mesh.mesh_dim_names}; allowed is "
            f"({TP_DIM!r},), and a head that FSDP has all-gathered: call the model's forward first"
        )
    shards = VocabShards(mesh.get_group(), len(weight_VD))
    hidden_TD, weight_VD = (one.to_local() if isinstance(one, DTensor) else one for one in (hidden_TD, weight_VD))
    return Projection(hidden_TD, weight_VD, shards)


def check_head(owner: str, output: nn.Module) -> None:
    """Raise ConfigError, before the first batch, unless the head can be fused with the loss.

    Args:
        owner: whose head it is, for the message, such as "student".
        output: the head.

    Raises:
        ConfigError: it is not a plain weight [V, D], nor a product of two, such as a quantized head or one with a bias.
    """
    if not isinstance(output, FactoredHead):
        _head_weight(owner, output)


def _head_weight(owner: str, output: nn.Module) -> Tensor:
    """Return the head's weight [V, D], if its product with the hidden states is all that the head computes."""
    plain = isinstance(output, nn.Linear) and type(output).forward is nn.Linear.forward
    if not plain:
        found = f"a {type(output).__name__}"
    elif output.bias is not None:
        found = f"a {type(output).__name__} with a bias"
    elif type(output.weight) not in (Tensor, nn.Parameter, DTensor, FakeTensor):
        found = f"a {type(output).__name__} whose weight is a {type(output.weight).__name__}"  # such as a quantized one
    else:
        return output.weight
    raise ConfigError(
        f"the {owner}'s output head cannot be fused with the loss: it is {found}; allowed is a torch.nn.Linear without "
        "bias whose weight is a plain matrix; leave the head out of quantization and sharding"
    )
