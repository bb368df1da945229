"""The recipes' own steps without an operation whose result the host has to wait for, but for one a step.

FakeTensorMode computes shapes and no values: it raises where the host asks for one (`.item()`, `nonzero`, indexing by a mask,
`if tensor:`). On a GPU each of these would stall the host until the device has caught up.
"""

import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)

from kdtune import _assets, config, data, losses, models, parallel, runs, teachers, training
from kdtune.config.load import load
from kdtune.config.recipe import import_recipe
from kdtune.distributed import World
from kdtune.runs import interrupt
from kdtune.training.fp32_updates import update_in_fp32
from kdtune.training.in_backward import step_in_backward

ADAPTER = "adapter={_component_: kdtune.models.apply_lora, lora_rank: 4, lora_dropout: 0.1, use_dora: %s}"
KINDS = {"full": [], "LoRA": [ADAPTER % "false"], "DoRA": [ADAPTER % "true"]}
OPTIONS = {
    "recomputed": ["activation_checkpointing=full"],
    "selectively recomputed": ["activation_checkpointing=selective"],
    "own base": [ADAPTER % "true", "~teacher_model", "teacher=kdtune.teachers.BaseOfStudent"],
    "updated in backward": ["optimizer_in_backward=true", "gradient_accumulation_steps=1", "clip_grad_norm=null"],
    "every second layer recomputed": ["activation_checkpointing=2"],
    "offloaded": ["activation_offloading=true"],
    "QLoRA": ["adapter={_component_: kdtune.models.apply_lora, lora_rank: 4, quantize_base: true}"],
    "cut by tokens": ["tokens_per_micro_batch=30"],
    "8-bit state": ["optimizer=torchao.optim.AdamW8bit", "optimizer.lr=1e-2"],
    "4-bit state": ["optimizer=torchao.optim.AdamW4bit", "optimizer.lr=1e-2"],
    "float8 state": ["optimizer=torchao.optim.AdamWFp8", "optimizer.lr=1e-2"],
    "rounded stochastically": ["dtype=bf16", "weight_update=stochastic"],
    "fp32 master": ["dtype=bf16", "weight_update=fp32_master"],
    "float8": ["float8_training=tensorwise"],
    "float8 by rows": ["dtype=bf16", "float8_training=rowwise"],
    "together": [
        "dtype=bf16",
        "weight_update=stochastic",
        "activation_checkpointing=full",
        "optimizer_in_backward=true",
        "gradient_accumulation_steps=1",
        "clip_grad_norm=null",
        "float8_training=tensorwise",
    ],
    "int8 teacher": ["teacher_quantization=int8"],
    "nf4 teacher": ["teacher_quantization=nf4"],
    "teacher on a named device": ["teacher_device=cpu"],
}
# The fused optimizer keeps its step count with the parameters; the others' is on the CPU, where reading it costs nothing.
OVERRIDES = ["~dataset_val", "sample_prompts=[]", "optimizer.fused=true", "save_every_n_steps=null", "run_val_every_n_steps=null",
             "batch_size=2", "tokenizer.max_seq_len=24"]  # fmt: skip


class EnoughError(Exception):
    """Ends a run in its second step."""


def waits_of(recipe: str, cfg: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Run the recipe under FakeTensorMode until its second step waits; return the number of values of each wait."""
    run = sys.modules[import_recipe(_assets.find_recipe(recipe)).__module__].run
    world, progress = World(torch.device("cpu")), runs.Progress(silent=True)
    # torchao's optimizers hold the learning rate in a tensor on the CPU, with a value, which the run reads.
    mode, waits = FakeTensorMode(allow_non_fake_inputs=True), list[int]()
    offload = parallel.apply_activation_offloading
    monkeypatch.setitem(offload.__kwdefaults__, "smallest_bytes", 0)

    def without_values(function: Callable[..., Any]) -> Callable[..., Any]:
        def computed(*args: Any, **kwargs: Any) -> Any:
            with unset_fake_temporarily():
                made = function(*args, **kwargs)
                with FakeCopyMode(mode):
                    return copy.deepcopy(made)

        return computed

    def tolist(tensor: FakeTensor) -> list[float]:
        waits.append(tensor.numel())
        if len(waits) == 2:
            raise EnoughError
        return [1.0] * tensor.numel()

    def build_optimizer(cfg: Any, model: models.Transformer, num_steps: int, loss: Any = None) -> tuple[Any, Any]:
        """As the library's, which reads the weights too, once before the first step."""
        with unset_fake_temporarily():
            optimizer = config.instantiate(cfg.optimizer, params=training.trainable_parameters(model))
            # In the first step of a process, torchao makes the tables of its codes.
            first = torch.nn.Parameter(torch.ones(64, 64))
            first.grad = torch.ones_like(first)
            config.instantiate(cfg.optimizer, params=[("first", first)]).step()
        if cfg.weight_update != "nearest":
            update_in_fp32(optimizer, cfg.weight_update)
        if cfg.optimizer_in_backward:
            step_in_backward(optimizer)
        steps = {"num_training_steps": num_steps}
        return optimizer, config.instantiate(cfg.lr_scheduler, optimizer=optimizer, optional=steps)

    def read(tensor: torch.Tensor) -> float:
        with nullcontext() if isinstance(tensor, FakeTensor) else unset_fake_temporarily():
            return as_float(tensor)

    # A run answers SIGTERM by saving its weights, which have no values here: whoever ends the tests ends them at once.
    monkeypatch.setattr(interrupt, "_SIGNALS", ())
    as_float = torch.Tensor.__float__
    monkeypatch.setattr(torch.Tensor, "__float__", read)
    # Weights are drawn, and rows read and collated, with values.
    inputs = training.load_inputs(cfg, world, progress)
    monkeypatch.setattr(training, "load_inputs", lambda *_: inputs)
    monkeypatch.setattr(training, "build_trained_model", without_values(training.build_trained_model))
    monkeypatch.setattr(teachers, "build_teacher", without_values(teachers.build_teacher))
    monkeypatch.setattr(teachers, "check_vocabularies", without_values(teachers.check_vocabularies))
    monkeypatch.setattr(data.Loader, "__next__", without_values(data.Loader.__next__))
    monkeypatch.setattr(training, "build_optimizer", build_optimizer)
    monkeypatch.setattr(FakeTensor, "tolist", tolist)
    with mode, pytest.raises(EnoughError):
        run(cfg, world, progress)
    return waits


def check_a_step_waits_once(
    recipe: str, num_parts: int, kind: str, dtype: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str
) -> None:
    """`num_parts`: the loss and its parts. `more`: overrides."""
    schema = import_recipe(_assets.find_recipe(recipe)).schema
    settings = [*OVERRIDES, f"dtype={dtype}", *(KINDS | OPTIONS)[kind], f"output_dir={folder}", *more]
    cfg = load(f"tiny/{recipe}", settings, schema)
    waits = waits_of(recipe, cfg, monkeypatch)
    if cfg.tokens_per_micro_batch is None:  # which cuts the steps differently
        expected = cfg.gradient_accumulation_steps * num_parts + 1
        assert waits == [expected] * 2, "those of the micro-batches, and the norm of the gradient"
    assert len(waits) == 2
    assert runs.read_metrics(folder / "metrics.jsonl")[-1]["step"] == 1, "the first step was made to its end"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_distillation_step_waits_once(kind: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_a_step_waits_once("knowledge_distillation", 4, kind, dtype, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["ULD", "HybridULD", "presets.alm"])
def test_a_step_with_a_teacher_of_another_tokenizer_waits_once(
    name: str, other_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = f"teacher_tokenizer={{_component_: kdtune.tokenizers.load, path: {other_tokenizer}}}"
    more = (own, f"kd_loss=kdtune.losses.{name}", "tokenizer.max_seq_len=40")
    check_a_step_waits_once("knowledge_distillation", 3, "full", "fp32", tmp_path, monkeypatch, *more)


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_step_with_an_option_that_saves_memory_waits_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # torchao compiles its optimizers' step
    check_a_step_waits_once("knowledge_distillation", 4, kind, "fp32", tmp_path, monkeypatch)


@pytest.mark.parametrize(("kind", "dtype"), [("full", "fp32"), ("DoRA", "bf16")])
def test_a_finetuning_step_waits_once(kind: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_a_step_waits_once("finetune", 2, kind, dtype, tmp_path, monkeypatch)


@pytest.mark.parametrize("ask", [torch.Tensor.item, torch.nonzero, lambda values: values[values > 0], bool])
def test_the_mode_raises_where_a_value_is_asked_for(ask: Callable[[torch.Tensor], object]) -> None:
    with FakeTensorMode(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        ask(torch.ones(1))


def test_labels_that_are_searched_on_the_device_are_found() -> None:
    """What the recipes do not do: the loss with a [B, S] tensor of labels."""
    with FakeTensorMode():
        output = torch.nn.Linear(8, 16, bias=False)
        with pytest.raises(DynamicOutputShapeException):
            losses.KDLoss(kd_ratio=0)(torch.zeros(2, 4, 8), output, None, torch.zeros(2, 4, dtype=torch.int64))
