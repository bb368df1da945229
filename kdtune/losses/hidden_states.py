"""Distillation of hidden states, as a term beside the loss on the logits.

Shapes: B batch, S sequence, N valid tokens, D width of the student, E width of the teacher.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdtune.errors import ConfigError


class HiddenStateLoss(nn.Module):
    """Distance of the student's hidden states from the teacher's, at some depths, through a learned linear map.

    Of each position with a label: the mean over the layers of ``mean over E of (W h - t)^2`` ("mse") or ``1 - cos(W h, t)``
    ("cosine"), in fp32 or wider. W maps the student's width to the teacher's, one for each layer, without bias.

    A layer is a fraction of depth: the hidden states after ``round(fraction * num_layers)`` layers, at least one, of each
    model's own number, so the embeddings are never compared. 1.0 are those after the last layer **and the final norm**, which
    the output head reads (transformers numbers them the same: `hidden_states[num_layers]`); the others are the residual
    stream.

    Args:
        weight: factor of the term in the loss, above 0; "hidden_loss" in metrics.jsonl is without it.
        kind: "mse" or "cosine".
        layers: fractions of depth, above 0 to 1.
        projection: True: learn W; "auto": only if the widths differ, else h itself is compared.
        projection_lr: learning rate of W, which schedules scale as they do the model's; there is no weight decay on W.
    """

    def __init__(
        self,
        weight: float = 1.0,
        kind: Literal["mse", "cosine"] = "mse",
        layers: Sequence[float] = (0.5, 1.0),
        projection: Literal["auto"] | bool = "auto",
        projection_lr: float = 1e-3,
    ) -> None:
        super().__init__()
        if not 0 < weight < float("inf"):
            raise ConfigError(
                f"hidden_loss.weight={weight}: must be a number above 0; ~hidden_loss switches the term off"
            )
        if kind not in ("mse", "cosine"):
            raise ConfigError(f"hidden_loss.kind={kind!r}: must be mse or cosine")
        if not layers or not all(0 < fraction <= 1 for fraction in layers):
            raise ConfigError(
                f"hidden_loss.layers={list(layers)}: must be fractions of depth, above 0 to 1, at least one"
            )
        if projection not in (True, "auto"):
            raise ConfigError(f"hidden_loss.projection={projection!r}: must be true or auto")
        if not 0 < projection_lr < float("inf"):
            raise ConfigError(f"hidden_loss.projection_lr={projection_lr}: must be a number above 0")
        self.weight, self.kind, self.fractions = weight, kind, tuple(layers)
        self.projection, self.projection_lr = projection, projection_lr
        self.student_layers: tuple[int, ...] = ()
        self.maps = nn.ModuleList()

    def depths(self, num_layers: int) -> tuple[int, ...]:
        """Return the numbers of layers after which a model's states are compared.

        Raises:
            ConfigError: two fractions are the same layer.
        """
        found = tuple(max(1, int(fraction * num_layers + 0.5)) for fraction in self.fractions)
        if len(set(found)) < len(found):
            raise ConfigError(
                f"hidden_loss.layers={list(self.fractions)}: of a model with {num_layers} layers they are layers {list(found)}, one of "
                "them twice; give fractions that are further apart"
            )
        return found

    def attach(
        self,
        num_layers: int,
        widths: tuple[int, int],
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Choose the student's layers and draw W from N(0, 1 / D), the same for a seed on every process.

        Args:
            num_layers: the student's.
            widths: D and E.
            seed: of the draw; torch's own generator is not touched.
            dtype: of W; it stays so beside a model in bf16.
            device: of W.
        """
        self.student_layers = self.depths(num_layers)
        if self.projection == "auto" and widths[0] == widths[1]:
            return
        generator = torch.Generator().manual_seed(seed)
        for _ in self.fractions:
            one = nn.Linear(*widths, bias=False, device="meta")
            drawn = torch.randn(widths[1], widths[0], generator=generator, dtype=dtype) / widths[0] ** 0.5
            one.weight = nn.Parameter(drawn.to(device))
            self.maps.append(one)

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        positions_N: Tensor,
        weights_N: Tensor | None = None,
    ) -> Tensor:
        """Return the sum over valid tokens, without `weight`.

        Args:
            student: hidden states [B, S, D] of each layer.
            teacher: the teacher's [B, S, E], constants.
            positions_N: indices of the valid tokens among the flattened [B, S].
            weights_N: factors of the tokens; None: all 1.
        """
        total_N: Tensor | None = None
        for index, (own, theirs) in enumerate(zip(student, teacher, strict=True)):
            own_ND, theirs_NE = (_rows(states, positions_N) for states in (own, theirs.detach()))
            mapped_NE = (
                self.maps[index](own_ND.to(self.maps[index].get_parameter("weight").dtype)) if self.maps else own_ND
            )
            distance_N = self._distance(mapped_NE, theirs_NE.to(mapped_NE.dtype))
            total_N = distance_N if total_N is None else total_N + distance_N
        assert total_N is not None
        total_N = total_N / len(student)
        return (total_N if weights_N is None else total_N * weights_N).sum()

    def _distance(self, own_NE: Tensor, theirs_NE: Tensor) -> Tensor:
        if self.kind == "cosine":
            return 1 - functional.cosine_similarity(own_NE, theirs_NE, dim=-1)
        return (own_NE - theirs_NE).square().mean(-1)


def _rows(states_BSD: Tensor, positions_N: Tensor) -> Tensor:
    rows_ND = states_BSD.flatten(0, 1).index_select(0, positions_N)
    return rows_ND.to(torch.promote_types(rows_ND.dtype, torch.float32))
