"""Changes to a config that make a run fit into a device's memory, in order of what they cost."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from kdtune.errors import KDTuneError

_GIB = 2**30
# A change that saves less is not worth a line.
_WORTH = 0.02


@dataclass(frozen=True)
class Change:
    """A change to a config, and the peak memory before and after it, in bytes."""

    overrides: str
    price: str
    before: int
    after: int

    def text(self) -> str:
        """Return a line such as "enable_activation_checkpointing=true: 61.0 GiB -> 38.0 GiB (a third more time)"."""
        return f"{self.overrides}: {_gib(self.before)} -> {_gib(self.after)} ({self.price})"


def changes_to_fit(cfg: Any, room: float, peak_of: Callable[[Any], int]) -> Iterator[Change]:
    """Yield changes, each in addition to those before it, until the peak is at most `room` bytes or none is left.

    First those that leave the gradient as it is, then those that round the teacher, then those that train something else.

    Args:
        cfg: config of a recipe that trains.
        room: bytes that the device has for it.
        peak_of: returns the peak of a config in bytes, or raises KDTuneError for one that cannot be.
    """
    peak = peak_of(cfg)
    for overrides, price, values in _candidates(cfg):
        if peak <= room:
            return
        changed = replace(cfg, **{key: value(getattr(cfg, key)) for key, value in values.items()})
        try:
            after = peak_of(changed)
        except KDTuneError:  # not for this model, such as adapters on one that has some
            continue
        if after < (1 - _WORTH) * peak:
            yield Change(overrides, price, peak, after)
            cfg, peak = changed, after


def advice_text(changes: list[Change], room: float, where: str) -> str:
    """Return the changes as lines for the terminal; `where` names what has the room."""
    if not changes:
        return f"No single change makes it fit into {where} ({_gib(room)}): more processes, or smaller models."
    fits = changes[-1].after <= room
    head = f"To fit into {where} ({_gib(room)}), one after the other:" if fits else (
        f"Even all of these together do not fit into {where} ({_gib(room)}); more processes or smaller models do:"
    )  # fmt: skip
    return "\n".join([head, *(f"  {change.text()}" for change in changes)])


_Candidate = tuple[str, str, dict[str, Callable[[Any], Any]]]


def _candidates(cfg: Any) -> Iterator[_Candidate]:
    """Yield overrides, their price, and for each key a function from its value to the new one."""
    size, accumulation, limit = cfg.batch_size, cfg.gradient_accumulation_steps, cfg.tokens_per_micro_batch
    while limit and limit > (cfg.tokenizer.get("max_seq_len") or limit):
        limit = max(limit // 2, cfg.tokenizer["max_seq_len"])
        yield _one("tokens_per_micro_batch", limit, "the same gradient")
    while size > 1 and not limit:
        factor = 2 if size % 2 == 0 else size
        size, accumulation = size // factor, accumulation * factor
        yield (
            f"batch_size={size} gradient_accumulation_steps={accumulation}",
            "the same gradient",
            {"batch_size": _constant(size), "gradient_accumulation_steps": _constant(accumulation)},
        )
    slots = (getattr(cfg, "rollouts", None) or {"slots": 1}).get("slots", 32)
    while slots > 1:
        slots //= 2
        yield f"rollouts.slots={slots}", "the texts take longer to write", {"rollouts": _with("slots", slots)}
    yield _one("enable_activation_checkpointing", True, "a third more time")
    if getattr(cfg, "teacher_checkpointer", None) or getattr(cfg, "teacher_model", None):
        yield _one("teacher_quantization", "int8", "a teacher in 8 bits, see docs/benchmarks.md")
        yield _one("teacher_quantization", "nf4", "a teacher in 4 bits, see docs/benchmarks.md")
    if cfg.adapter is None:
        lora = {"_component_": "kdtune.models.apply_lora"}
        yield "adapter=kdtune.models.apply_lora", "trains adapters only", {"adapter": _constant(lora)}
    yield (
        "adapter.quantize_base=true",
        "adapters on a base in 4 bits (QLoRA)",
        {"adapter": lambda node: {**(node or {"_component_": "kdtune.models.apply_lora"}), "quantize_base": True}},
    )


def _one(key: str, value: Any, price: str) -> _Candidate:
    return f"{key}={str(value).lower()}", price, {key: _constant(value)}


def _constant(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def _with(name: str, value: Any) -> Callable[[Any], Any]:
    return lambda node: {**node, name: value}


def _gib(size: float) -> str:
    return f"{size / _GIB:.3g} GiB" if size >= _GIB else f"{size / 2**20:.3g} MiB"
