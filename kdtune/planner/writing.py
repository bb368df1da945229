"""Texts that models write in training, in a plan: their keys and values, and what a forward of one token of each takes.

The cache (`kdtune.models.kv_cache.SlotCache`) grows with the longest text: it is counted for texts that are as long as there can be.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kdtune.config import instantiate
from kdtune.generation.slots import most_read
from kdtune.models import TransformerConfig
from kdtune.models.kv_cache import PART, SLACK, SlotCache
from kdtune.planner.costs import MicroBatch, fixed_bytes, layer_cost
from kdtune.planner.sizes import ModelSizes

# Rows that a CPU computes at least (kdtune.generation), and bytes of a row's logits in sampling besides the logits themselves: on a CPU in
# fp32, less the largest, as probabilities, and their sums in fp64; elsewhere as log-probabilities alone.
_CPU_ROWS, _CPU_BYTES, _BYTES = 32, 20, 8
# Of a mixture besides both models' logits: five tensors in fp32. Of a drafted token: log-probabilities of both models in fp32, and which
# ids the teacher has above it, as bool and as numbers to be summed.
_MIXTURE_BYTES, _DRAFTED_BYTES = 20, 13


@dataclass(frozen=True)
class Writing:
    """What a model needs besides its weights to write a process's texts; bytes."""

    cache: int
    """Keys and values of the texts, and of the prompts that are read in one forward."""
    working: int
    """That forward, or the logits of the next tokens."""


def writers(cfg: Any) -> frozenset[str]:
    """Return which models write texts by kdtune's decoder in a run of a config `cfg`: "student", "teacher", both or none."""
    rollouts = instantiate(getattr(cfg, "rollouts", None))
    found: frozenset[str] = frozenset() if rollouts is None else rollouts.writers()
    return found


def writing(cfg: Any, sizes: ModelSizes, batch: MicroBatch) -> Writing:
    """Return what a model of these sizes needs to write after prompts that are as long as the examples of the largest batch.

    `cfg` has `rollouts`. The cache of a model that transformers computes is not counted: its heads are known only there.
    """
    rollouts, pieces = instantiate(cfg.rollouts), sizes.pieces
    config = pieces.config
    on_cpu, sources = batch.device_type == "cpu", rollouts.policy.sources
    num_new = rollouts.speculation.num_drafted if "speculative" in sources else 1
    slots = min(rollouts.slots, cfg.batch_size * cfg.gradient_accumulation_steps)
    if rollouts.compile:
        slots = rollouts.slots
    rows = max(slots, _CPU_ROWS) if on_cpu else slots
    prompt = batch.seq_len - 1  # its last token goes through the model with those of the other texts
    longest = min(prompt + rollouts.max_new_tokens, config.max_seq_len) + (num_new if num_new > 1 else 0)
    read = MicroBatch(1, prompt - 1, batch.device_type)
    if most := most_read(config, pieces.dtype, batch.device_type, longest):
        read = replace(read, batch_size=max(1, min(slots, most // read.seq_len)))
    cache = 0
    if isinstance(config, TransformerConfig):
        is_fixed = rollouts.compile and not on_cpu
        layout = SlotCache(config, slots, longest, num_new=num_new, block=PART if is_fixed else None)
        windows = [config.window(index) for index in range(config.num_layers)]
        # A compiled forward writes the keys of all of its rows.
        num_kept = rows if rollouts.compile else slots
        places = sum(num_kept * layout.num_places(window, longest) for window in windows)
        lengths = (read.seq_len if window is None else min(read.seq_len, window + SLACK) for window in windows)
        places += sum(read.batch_size * length for length in lengths)
        cache = 2 * places * config.num_kv_heads * config.head_dim * pieces.dtype.itemsize
    logits = config.vocab_size * _logits_bytes(sources, pieces.dtype.itemsize, slots, rows, num_new, on_cpu=on_cpu)
    reading = fixed_bytes(pieces, read) + layer_cost(pieces, read, backward=False).forward_peak
    return Writing(cache, max(reading, logits))


def _logits_bytes(sources: Collection[str], itemsize: int, slots: int, rows: int, num_new: int, *, on_cpu: bool) -> int:
    """Return the bytes of an id of the vocabulary while the next tokens of all slots are drawn, in the costliest of the `sources`.

    Where both models write, the second is taken to have as many ids.
    """
    extra = _CPU_BYTES if on_cpu else _BYTES
    found = [rows * (itemsize + extra)]
    if "mixed" in sources:
        found.append(rows * 2 * itemsize + slots * max(_MIXTURE_BYTES, 4 + extra))  # or the mixture, drawn from
    if "speculative" in sources:
        # The student's logits of all drafted tokens are kept, then copied side by side, and compared with the teacher's.
        found.append(rows * num_new * itemsize + max(slots * num_new * itemsize, rows * extra))
        found.append(slots * num_new * (2 * itemsize + _DRAFTED_BYTES))
    return max(found)


def kept_cache(cfg: Any, needed: Mapping[str, Writing], batch: MicroBatch) -> int:
    """Return the bytes of what `needed` says of the caches that stay while the student trains: those of compiled forwards, on CUDA."""
    stays = needed and batch.device_type == "cuda" and instantiate(cfg.rollouts).compile
    return sum(one.cache for one in needed.values()) if stays else 0
