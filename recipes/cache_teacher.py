"""Run a teacher once over a data set and keep what it says of each token, for students that are trained without it.

    kdtune run cache_teacher --config tiny/cache_teacher
    kdtune run cache_teacher --config smollm2/cache_teacher dry_run=true
    kdtune run cache_teacher --config smollm2/cache_teacher kind=topk k=256
    kdtune run --nproc_per_node 4 cache_teacher --config llama3_1/8B_cache_teacher

Writes a teacher cache (docs/teacher_cache.md), which `teacher: {_component_: kdtune.teachers.CachedTeacher, path: ...}` reads in
knowledge_distillation. `dry_run=true` says how large it gets and how long it takes, for every kind. A capture that is stopped, or
killed, keeps its shards; the same command goes on, on any number of processes, and the files are the same.
"""

import json
import math
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from kdtune import checkpoint, config, data, runs, teachers, tokenizers, training
from kdtune.distributed import World, lockstep_forwards, raise_on_all_ranks
from kdtune.errors import TrainingError
from kdtune.models import Transformer
from kdtune.paths import user_path
from kdtune.teachers import cache

# Keys that mean something for one kind alone.
_OF_KIND = {"k": "topk", "temperature": "topk", "num_draws": "sampled", "exponent": "sampled"}

# Examples whose files are read again at the end, beside those of dataset_val.
_READ_BACK = 16


@dataclass(kw_only=True)
class Config(teachers.TeacherConfig):
    """Keys of a capture, beside those of a teacher (kdtune/teachers/protocol.py)."""

    output_dir: config.PathText
    """The cache's folder, on a disk that all processes share: a new one, or that of the capture to go on with."""
    resume_from_checkpoint: bool = True
    """Go on with the capture in output_dir, at its first missing file; false: refuse a folder that has one."""
    models_dir: config.PathText = "/tmp"
    """Folder of downloaded models, for a config's own paths: ${models_dir}/Llama-3.2-1B-Instruct."""
    dry_run: bool = False
    """Print what each kind would take in bytes and time, and what it would lose, and write nothing."""

    # What is kept
    kind: Literal["hidden", "topk", "sampled", "path"] = "hidden"
    """Of each token: the last hidden state (any loss, any temperature), the k most likely ids, ids drawn from the teacher, or the
    log-probability of the text's own next token."""
    stored_dtype: Literal["bf16", "int8", "fp32", "fp16"] | None = None
    """Of the numbers. hidden: bf16, int8 or fp32; topk and sampled: fp16 or fp32; path: fp32; null: the kind's default."""
    k: int = config.key(64, at_least=1)
    """Ids of topk."""
    temperature: float = 1.0
    """Of the log-probabilities of topk."""
    num_draws: int = config.key(50, at_least=1)
    """Draws of sampled, with replacement."""
    exponent: float = 1.0
    """Draw in proportion to p^exponent, above 0 to 1; below 1 unlikely ids are drawn more often."""
    positions: Literal["labels", "all"] = "labels"
    """Positions that are kept: those that are trained on, or every one that has a next token."""

    # Data
    tokenizer: Any = config.component(returns=tokenizers.Tokenizer)
    """The tokenizer, as the students' runs have it; max_seq_len is the longest example, in tokens."""
    dataset: Any = config.component("tokenizer", returns=data.Dataset)
    """The data, as the students' runs have it; shuffling, batch sizes and packing may differ from run to run."""
    first_example: int = config.key(0, at_least=0)
    """Index of the first example that is captured."""
    max_examples: int | None = config.key(None, at_least=1)
    """Number of examples that are captured; null: all from the first."""
    dataset_val: Any = config.component("tokenizer", default=None, returns=data.Dataset)
    """Held-out examples on which the stored form is compared with the live teacher; null: the last ones of those captured."""
    quality_examples: int = config.key(64, at_least=1)
    """Number of examples of that comparison."""
    examples_per_shard: int = config.key(512, at_least=1)
    """Examples of a file; a capture that is stopped goes on at the next one."""
    tokens_per_batch: int = config.key(4096, at_least=1)
    """Tokens of a forward pass; a longer example is one by itself."""
    batch_size: int | None = config.key(None, at_least=1)
    """Examples of a forward pass, in the data set's order, in place of tokens_per_batch. A run with this batch_size and shuffle=false
    gets the hidden states of its live teacher to the bit (docs/teacher_cache.md); null: by tokens_per_batch."""

    # The teacher's computation
    device: str | None = None
    """cpu, cuda, cuda:N or mps; null: the best one there is."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """The teacher's weight dtype, unless teacher_dtype says another."""
    parallelism: Any = config.component(
        default={"_component_": "kdtune.distributed.Parallelism", "dp_replicate": -1, "dp_shard": 1}
    )
    """Parallelism of the teacher over the processes that torchrun starts: a full copy on each, or with dp_shard=-1 dp_replicate=1
    a shard."""
    compile: bool = False
    """torch.compile each layer."""
    seed: int = 0
    """Seed of random weights, and of the draws."""

    def problems(self) -> list[str]:
        """Return config problems, one sentence each."""
        found = training.range_problems(self)
        found += training.device_name_problems(self.device) + teachers.place_problems(self)
        if self.teacher_model is None and self.teacher_checkpointer is None:
            found.append(
                "teacher_checkpointer: missing, and no teacher_model to start from random weights; give one of them"
            )
        found += [
            f"{key}={str(value).lower()}: nothing runs beside this teacher; ~{key}, and device=... for its device"
            for key in ("teacher_device", "teacher_overlap")
            if (value := getattr(self, key))
        ]
        if (tp := getattr(config.instantiate(self.teacher_parallelism or self.parallelism), "tp", 1)) > 1:
            found.append(
                f"parallelism.tp={tp}: a capture needs whole output heads; tp=1, and dp_shard=-1 divides the teacher"
            )
        if self.stored_dtype not in (None, *cache.KINDS[self.kind]):
            allowed = ", ".join(cache.KINDS[self.kind])
            found.append(f"stored_dtype={self.stored_dtype}: kind={self.kind} is stored in {allowed}; ~stored_dtype")
        if not self.temperature > 0:
            found.append(f"temperature={self.temperature}: must be above 0")
        if not 0 < self.exponent <= 1:
            found.append(f"exponent={self.exponent}: must be above 0 and at most 1")
        found += [
            f"{key}={getattr(self, key)}: is of kind={kind}, found kind={self.kind}; ~{key}, or kind={kind}"
            for key, kind in _OF_KIND.items()
            if kind != self.kind
            and getattr(self, key) != getattr(Config, key)
            and not self.dry_run  # which shows every kind
        ]
        if self.batch_size is not None and self.examples_per_shard % self.batch_size:
            found.append(
                f"batch_size={self.batch_size}: examples_per_shard={self.examples_per_shard} must be a multiple of it: a file has whole "
                "batches"
            )
        return found + training.builder_problems(self) + data.first_row_problems(self)

    def machine_problems(self) -> list[str]:
        """Return machine problems, found without reading weights."""
        found = training.placement_problems(self) + runs.output_dir_problems(
            self.output_dir, resume=self.resume_from_checkpoint
        )
        if source := config.instantiate(self.teacher_checkpointer):
            found += [f"teacher_checkpointer: {problem}" for problem in source.problems()]
        return found


@config.entry_point(Config)
def main(cfg: Config) -> None:
    """Run the recipe."""
    with (
        config.instantiate(cfg.parallelism).start_world(training.resolve_device(cfg.device)) as world,
        runs.Progress(silent=not world.is_main) as progress,
        world.rank0_stderr(),
    ):
        run(cfg, world, progress)


def run(cfg: Config, world: World, progress: runs.Progress) -> None:
    """Capture what is missing in the folder, and compare it with the live teacher."""
    # Data. It comes first: no weight is read for a folder that holds another capture.
    tokenizer, cfg = training.load_tokenizer(cfg)
    progress.phase("reading the data")
    loaded = {key: data.load_dataset(key, getattr(cfg, key), tokenizer) for key in ("dataset", "dataset_val")}
    training.check_data(cfg, loaded, world, tokenizer)
    sources = {key: cache.Source(cache.checked_dataset(key, one), tokenizer.pad_id, cfg.tokens_per_batch, cfg.batch_size)
               for key, one in loaded.items() if one is not None}  # fmt: skip
    source, held_out = sources["dataset"], sources.get("dataset_val")
    checkpointer = config.instantiate(cfg.teacher_checkpointer)
    teachers.check_tokenizer(tokenizer, checkpointer, path=cfg.tokenizer.get("path"), is_chat=source.dataset.is_chat)
    header, *others = cache.capture_headers(cfg, tokenizer, source.dataset)
    tokenizers.check_vocabulary(tokenizer, header.vocab_size, "teacher")
    amount = cache.amount_of(header, source)
    num_bytes = cache.cache_bytes(header, amount)
    world.print(f"{header.num_examples:,} of {header.dataset_size:,} examples, {amount.num_tokens:,} tokens; "
                f"{amount.num_rows:,} positions are kept, {cache.size_text(num_bytes)}")  # fmt: skip

    folder = user_path(cfg.output_dir)
    missing: list[int] = []
    if not cfg.dry_run:
        missing = cache.start_capture(folder, header, num_bytes, world)
        if world.broadcast(not missing and all((folder / name).is_file() for name in (cache.INDEX, cache.QUALITY))):
            return world.print(f"{folder}: is complete\n{summary(folder)}")
        if world.is_main:
            runs.write_run_files(folder, resolved_config=config.resolved_yaml(cfg), record=config.run_record(cfg))

    # Teacher. Its random weights are those of knowledge_distillation with the same seed.
    progress.phase("loading the teacher")
    training.set_seed(cfg.seed)
    teacher = teachers.build_teacher_model(cfg, world).eval()
    if cfg.dry_run:
        return dry_run([header, *others], amount, source, teacher, folder, world, progress)

    # Shards, each written whole by one process.
    with runs.InterruptFlag() as interrupt:

        def stop() -> None:
            if interrupt.requested:
                raise TrainingError(
                    f"stopped by {interrupt.signal_name}: whole shards are kept; the same command goes on"
                )

        cache.capture_shards(teacher, source, folder, header, missing, world, progress=progress, stop=stop)
    with raise_on_all_ranks():
        if world.is_main:
            cache.finish(folder)

    # Quality: what is stored beside what the teacher says now.
    progress.phase("comparing what is stored with the teacher")
    with lockstep_forwards(teacher, world):
        if world.is_main:
            found = measured_quality(cfg, teacher, header, source, held_out, cache.Cache(folder))
            checkpoint.atomic_write_text(folder / cache.QUALITY, json.dumps(found, indent=2) + "\n")
            print(summary(folder))


def measured_quality(
    cfg: Config,
    teacher: Transformer,
    header: cache.Header,
    source: cache.Source,
    held_out: cache.Source | None,
    written: cache.Cache,
) -> dict[str, Any]:
    """Return the KL from the teacher to the stored form, on the first examples of dataset_val, and to the files, on their last ones."""
    count = cfg.quality_examples if held_out is None else min(cfg.quality_examples, _READ_BACK)
    last = source.batches(header.example_ids[max(0, header.num_examples - count) :])
    (read,) = cache.measure_quality(teacher, source, [header], last, written)
    found = read
    if held_out is not None:
        first = held_out.batches(range(held_out.dataset.size)[: cfg.quality_examples])
        (found,) = cache.measure_quality(teacher, held_out, [header], first)
    return found | {"read_back": {key: read[key] for key in ("forward_kl", "num_tokens")}}


def dry_run(
    headers: list[cache.Header],
    amount: cache.Amount,
    source: cache.Source,
    teacher: Transformer,
    folder: Path,
    world: World,
    progress: runs.Progress,
) -> None:
    """Print bytes, time and loss of every kind, the config's own first; the teacher computes a part of the data for it."""
    progress.phase("timing a part of the capture")
    with lockstep_forwards(teacher, world):
        if not world.is_main:
            return
        seconds = cache.capture_seconds(teacher, source, headers, amount, folder)
        quality = cache.measure_quality(teacher, source, headers, source.batches(headers[0].example_ids[-4:]))
    # Every process takes whole shards.
    rounds = -(-headers[0].num_shards // world.dp_size) / headers[0].num_shards
    rows = [
        cache.described(found)
        | {
            "size": cache.size_text(cache.cache_bytes(header, amount)),
            "time": str(timedelta(seconds=math.ceil(rounds * one))),
        }
        for header, found, one in zip(headers, quality, seconds, strict=True)
    ]
    print(runs.format_table(rows))
    processes = f"{world.dp_size} process{'es' * (world.dp_size > 1)}"
    print(
        f"KL(live || stored) over {quality[0]['num_tokens']:,} tokens; time on {processes}, once the teacher is loaded"
    )


def summary(folder: Path) -> str:
    """Return what a complete cache takes, and how well it keeps the teacher."""
    index, quality = json.loads((folder / cache.INDEX).read_text()), json.loads((folder / cache.QUALITY).read_text())
    rows = [cache.described(quality) | {"size": cache.size_text(index["bytes"])}]
    lines = [runs.format_table(rows), f"KL(live || stored) over {quality['num_tokens']:,} tokens; {folder}"]
    read = quality.get("read_back")
    if read and any(quality[key] != value for key, value in read.items()):  # else it is of the same tokens
        lines.append(
            f"read back from the files: {read['forward_kl']:.2g} over {read['num_tokens']:,} tokens that were captured"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
