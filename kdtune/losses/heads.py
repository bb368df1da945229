"""Output heads as two matrices whose product is the logits. Shapes: T positions, V vocabulary, D embedding, K inner width."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor, nn

from kdtune.constants import TP_DIM
from kdtune.errors import ConfigError
from kdtune.tensor_types import is_dtensor, is_plain

if TYPE_CHECKING:
    from kdtune.losses.vocab_shards import VocabShards


@dataclass(frozen=True)
class Projection:
    """Hidden states and the head that maps them to logits: hidden_TD @ weight_VD.T, soft-capped."""

    hidden_TD: Tensor
    weight_VD: Tensor  # of a head in shards, this process's rows
    shards: "VocabShards | None" = None
    softcap: float | None = None  # the logits are softcap * tanh(product / softcap)

    @property
    def vocab_size(self) -> int:
        """Return the number of rows of the full head."""
        return self.shards.vocab_size if self.shards else len(self.weight_VD)

    def num_ids(self, limit: int) -> int:
        """Return the number of local rows among the first `limit` of the full head."""
        return self.shards.own_num_ids(limit) if self.shards else limit


@runtime_checkable
class Head(Protocol):
    """An output head that the loss can compute chunk by chunk, such as `kdtune.models.OutputHead`, with an adapter or without."""

    softcap: float | None
    """The logits are ``softcap * tanh(product / softcap)``; None: the product itself."""

    def projection(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return [T, K] and [V, K], whose product is ``first @ second.T``."""

    def projection_problem(self) -> str | None:
        """Return what keeps `projection` from being two plain matrices, such as "has a quantized weight"; None if nothing does."""


def project(owner: str, hidden_BSD: Tensor, output: nn.Module) -> Projection:
    """Return the projection of a model's hidden states [B, S, D], in shards if tensor parallelism shards the head.

    Args:
        owner: whose head it is, for the message, such as "student".
        hidden_BSD: last hidden states, after the final norm.
        output: the head.

    Raises:
        ConfigError: the head cannot be fused with the loss (see `check_head`), or is sharded by FSDP.
    """
    check_head(owner, output)
    hidden_TD = hidden_BSD.flatten(0, 1)
    weight = getattr(output, "weight", None)
    mesh = weight.device_mesh if is_dtensor(weight) else None
    if isinstance(output, Head):
        if mesh is not None:
            from torch.distributed.tensor import DTensor, Replicate

            hidden_TD = DTensor.from_local(hidden_TD, mesh, [Replicate()], run_check=False)
        (hidden_TD, weight_VD), softcap = output.projection(hidden_TD), output.softcap
    else:
        weight_VD, softcap = output.get_parameter("weight"), None
    if mesh is None:
        return Projection(hidden_TD, weight_VD, softcap=softcap)
    if mesh.mesh_dim_names != (TP_DIM,):
        raise ConfigError(
            f"the {owner}'s output head cannot be fused with the loss: it is in shards over {mesh.mesh_dim_names}; allowed is "
            f"({TP_DIM!r},), and a head that FSDP has all-gathered: call the model's forward first"
        )
    from kdtune.losses.vocab_shards import VocabShards  # only tensor parallelism needs it

    shards = VocabShards(mesh.get_group(), len(weight_VD))
    hidden_TD, weight_VD = (one.to_local() if is_dtensor(one) else one for one in (hidden_TD, weight_VD))
    return Projection(hidden_TD, weight_VD, shards, softcap)


def check_head(owner: str, output: nn.Module) -> None:
    """Raise ConfigError, before the first batch, unless the head can be fused with the loss.

    Args:
        owner: whose head it is, for the message, such as "student".
        output: the head: a `Head`, or a plain torch.nn.Linear.

    Raises:
        ConfigError: it is not a plain weight [V, D], nor a product of two, such as a quantized head or one with a bias.
    """
    problem = output.projection_problem() if isinstance(output, Head) else _linear_problem(output)
    if problem is not None:
        raise ConfigError(
            f"the {owner}'s output head cannot be fused with the loss: it {problem}; allowed is a head without bias whose "
            "weight is a plain matrix (kdtune.models.OutputHead, torch.nn.Linear); leave the head out of quantization and sharding"
        )


def _linear_problem(output: nn.Module) -> str | None:
    """Return what keeps the product with its weight from being all that a module computes; None if nothing does."""
    if not isinstance(output, nn.Linear) or type(output).forward is not nn.Linear.forward:
        return f"is a {type(output).__name__}"
    if output.bias is not None:
        return f"is a {type(output).__name__} with a bias"
    if not is_plain(output.weight):  # such as a quantized one
        return f"is a {type(output).__name__} whose weight is a {type(output.weight).__name__}"
    return None
