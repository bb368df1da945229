"""The plan's parts, each against something that it did not compute: hooks, torch's counter, real optimizers and weights."""

import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from exit_codes import run_command
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from kdtune import _assets, losses, teachers, training
from kdtune._assets import find_recipe
from kdtune.config import instantiate, load
from kdtune.config.recipe import import_recipe
from kdtune.data import Batch, collate, make_example
from kdtune.distributed import World, fake_world
from kdtune.losses.products import Buffers
from kdtune.models import Transformer, dtype_from_name
from kdtune.models.float8 import apply_float8
from kdtune.models.quantization import num_bytes, quantize
from kdtune.parallel import apply_activation_checkpointing
from kdtune.planner import estimate_text, text
from kdtune.planner.estimate import Estimate, make_estimate
from kdtune.planner.hardware import GPUS, find_gpu
from kdtune.planner.sizes import state_shapes
from kdtune.planner.teacher import make_teacher_estimate

CPU = torch.device("cpu")
SMALL = ["model.vocab_size=500", "model.embed_dim=64", "model.num_layers=4", "model.intermediate_dim=160", "loss_chunk_size=64",
         "tokenizer.max_seq_len=48", "batch_size=3", "gradient_accumulation_steps=1", "padding_free=false"]  # fmt: skip
ADAPTERS = {
    "full": ["adapter=null"],
    "lora": ["adapter=kdtune.models.apply_lora"],
    "dora": ["adapter=kdtune.models.apply_lora", "adapter.use_dora=true"],
}


@pytest.fixture(autouse=True)
def _no_buffers_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss keeps its buffers from call to call; a tracker would not see those of another test."""
    monkeypatch.setattr(Buffers, "_spare", {})


def config(recipe: str, *overrides: str, source: str | None = None) -> Any:
    return load(source or f"tiny/{recipe}", list(overrides), import_recipe(find_recipe(recipe)).schema)


def estimated(cfg: Any, size: int, **options: Any) -> Estimate:
    if size == 1:
        return make_estimate(cfg, World(CPU), **options)
    with fake_world(size) as world:
        return make_estimate(cfg, world, **options)


def real_model(cfg: Any) -> Transformer:
    model = instantiate(cfg.model).to(dtype_from_name(cfg.dtype))
    return instantiate(cfg.adapter, model=model) if cfg.adapter else model


def tokens_of(cfg: Any) -> Tensor:
    return torch.randint(300, (cfg.batch_size, cfg.tokenizer["max_seq_len"]))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_activations_are_what_autograd_saves(kind: str, dtype: str) -> None:
    cfg = config("finetune", *SMALL, *ADAPTERS[kind], f"dtype={dtype}")
    model, tokens = real_model(cfg), tokens_of(cfg)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(tokens, return_hidden=True)
    saved.setdefault(hidden.untyped_storage()._cdata, hidden)
    found = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    assert estimated(cfg, 1).student.activations == pytest.approx(found, rel=0.1)


def raw(count: Any) -> Any:
    """A function of torch's registry as the counter takes one."""

    def counted(*arguments: Any, **options: Any) -> int:
        return count(*arguments, **options)

    counted._get_raw = True  # type: ignore[attr-defined]
    return counted


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_operations_are_those_that_torch_counts(kind: str, recomputed: bool) -> None:
    """Of a whole real step, teacher and loss among it; torch's counter lacks addmm_ and the CPU's attention kernel."""
    cfg = config(
        "knowledge_distillation", *SMALL, *ADAPTERS[kind], "teacher_model.vocab_size=500", "model.num_layers=6",
        f"enable_activation_checkpointing={recomputed}",
    )  # fmt: skip
    student, teacher, tokens = real_model(cfg), instantiate(cfg.teacher_model), tokens_of(cfg)
    counted_as = {
        torch.ops.aten.addmm_: torch.ops.aten.addmm,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: torch.ops.aten._scaled_dot_product_flash_attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            torch.ops.aten._scaled_dot_product_flash_attention_backward
        ),
    }
    mapping = {operation: raw(flop_registry[known]) for operation, known in counted_as.items()}
    if recomputed:
        apply_activation_checkpointing(student)
    kd_loss = losses.KDLoss(kd_ratio=cfg.kd_ratio, chunk_size=64)
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter:
        with torch.no_grad():
            signal = losses.HiddenSignal(teacher(tokens, return_hidden=True), teacher.output)
        total, _ = kd_loss(student(tokens, return_hidden=True), student.output, signal, tokens)
        total.backward()
    # Torch stops recomputing a layer where backward needs no more of it, the estimate does not.
    tolerance = 0.05 if recomputed and kind == "full" else 0.012
    assert estimated(cfg, 1).flops == pytest.approx(counter.get_total_flops(), rel=tolerance)


WIDE = ["dtype=bf16", "model.intermediate_dim=3200"]
FLOAT8 = [*WIDE, "float8_training=tensorwise"]


@pytest.mark.parametrize(
    "overrides",
    [[], ["dtype=bf16"], WIDE, pytest.param(FLOAT8, marks=pytest.mark.slow("products in float8 take a CPU a minute"))],
    ids=" ".join,
)
def test_peak_of_a_step_is_what_torchs_tracker_finds(overrides: list[str]) -> None:
    """`MemTracker`, which follows tensors, on a step of one process; the profiler is the witness in tests/distributed."""
    cfg = config("finetune", *SMALL, "adapter=null", *overrides)
    model, tokens = real_model(cfg), tokens_of(cfg)
    if cfg.float8_training:
        apply_float8(model, cfg.float8_training)
    optimizer = instantiate(cfg.optimizer, params=training.trainable_parameters(model))
    ce_loss = losses.KDLoss(kd_ratio=0.0, chunk_size=64)

    def step() -> None:
        total, _ = ce_loss(model(tokens, return_hidden=True), model.output, None, tokens)
        total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        step()
    found = tracker.get_tracker_snapshot("peak")[CPU]["Total"]
    # Products in float8 take 6 % more, copies of what they multiply.
    tolerance = 0.02 if cfg.model["intermediate_dim"] == 3200 else 0.1
    assert estimated(cfg, 1).peak.total == pytest.approx(found, rel=tolerance)


@pytest.mark.parametrize(
    "overrides",
    [
        ["dtype=fp32", "padding_free=true"],
        ["dtype=fp32"],
        ["dtype=bf16", "padding_free=true"],
        ["dtype=bf16", "loss_logits_dtype=bf16", "loss_chunk_size=96"],
        ["dtype=fp32", "loss_chunk_size=16", "model.num_layers=8", "model.vocab_size=1000", "batch_size=9",
         "padding_free=true"],
        ["dtype=fp32", "loss_chunk_size=16", "model.num_layers=8", "model.vocab_size=1000", "tokens_per_micro_batch=440",
         "gradient_accumulation_steps=4", "padding_free=true"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_peak_of_a_distillation_step_is_what_torchs_tracker_finds(overrides: list[str]) -> None:
    """With a vocabulary that the loss reads in parts, documents end to end, and a micro-batch as large as its tokens allow."""
    cfg = config(
        "knowledge_distillation", *SMALL, "model.vocab_size=17000", "teacher_model.vocab_size=17000", *overrides
    )
    student, dtype = real_model(cfg), dtype_from_name(cfg.dtype)
    teacher = instantiate(cfg.teacher_model).to(dtype).requires_grad_(False)
    lengths = [48] * 8 + [28, 28] if cfg.tokens_per_micro_batch else [48] * cfg.batch_size
    batch = collate([make_example([5] * length, [True] * length) for length in lengths], 0)
    batch = batch.without_padding() if cfg.padding_free is not False else batch
    optimizer = instantiate(cfg.optimizer, params=training.trainable_parameters(student))
    kd_loss = losses.KDLoss(losses.ForwardKL(), kd_ratio=cfg.kd_ratio, **cfg.loss_settings())
    signal = teachers.OnlineTeacher(teacher)(
        batch
    )  # before the tracker, whose hooks a model without gradients cannot have

    def step() -> None:
        hidden = student(**batch.inputs, return_hidden=True)
        kd_loss(hidden, student.output, signal, batch.targets)[0].backward()

    step()
    optimizer.step()
    if cfg.tokens_per_micro_batch is None:  # with several micro-batches the gradients are there throughout
        optimizer.zero_grad(set_to_none=True)
    tracker = MemTracker()
    tracker.track_external(student, optimizer)
    with tracker:
        step()
        optimizer.step()
    of_teacher = sum(one.nbytes for one in (*teacher.parameters(), signal.hidden_BSD))
    found = tracker.get_tracker_snapshot("peak")[CPU]["Total"] + of_teacher
    # 8 layers: the tracker finds 3.4 MB more, whatever a layer keeps, which is a tenth of so small a model.
    assert estimated(cfg, 1).peak.total == pytest.approx(found, rel=0.11 if len(student.layers) == 8 else 0.1)


def test_the_maps_of_a_term_on_hidden_states_are_counted() -> None:
    """As `MemTracker` finds them in a step, where they are most of what is allocated."""
    cfg = config(
        "knowledge_distillation", *SMALL, "teacher_model.embed_dim=1024", "hidden_loss=kdtune.losses.HiddenStateLoss"
    )
    student, teacher, tokens = real_model(cfg), instantiate(cfg.teacher_model), tokens_of(cfg)
    term = instantiate(cfg.hidden_loss)
    signals = teachers.OnlineTeacher(teacher, term.depths(teacher.config.num_layers))
    kd_loss = training.build_kd_loss(cfg, losses.ForwardKL(), student, signals, World(CPU))
    optimizer, _ = training.build_optimizer(cfg, student, 10, kd_loss)
    batch = Batch.from_labels(tokens, tokens)
    signal = signals(batch)  # before the tracker, whose hooks a model without gradients cannot have

    def step() -> None:
        hidden = student(tokens, return_hidden=True, **kd_loss.forward_options)
        kd_loss(hidden, student.output, signal, batch.targets)[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    tracker = MemTracker()
    tracker.track_external(student, kd_loss.module, optimizer)
    with tracker:
        step()
    of_teacher = {one.data_ptr(): one.nbytes for one in (*teacher.parameters(), signal.hidden_BSD, *signal.layers)}
    found = tracker.get_tracker_snapshot("peak")[CPU]["Total"] + sum(of_teacher.values())
    assert estimated(cfg, 1).peak.total == pytest.approx(found, rel=0.1)
    alone = estimated(config("knowledge_distillation", *SMALL, "teacher_model.embed_dim=1024"), 1)
    maps = sum(parameter.nbytes for parameter in kd_loss.parameters())
    assert maps == 2 * 64 * 1024 * 4
    assert estimated(cfg, 1).step_checkpoint - alone.step_checkpoint == pytest.approx(
        3 * maps, rel=1e-3
    )  # with Adam's moments


@pytest.mark.parametrize(
    "optimizer",
    [
        {"_component_": "torch.optim.AdamW", "lr": 0.1},
        {"_component_": "torch.optim.AdamW", "lr": 0.1, "fused": True, "amsgrad": True},
        {"_component_": "torch.optim.SGD", "lr": 0.1},
        {"_component_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9},
        {"_component_": "torch.optim.Adafactor", "lr": 0.1},
        {"_component_": "torch.optim.RMSprop", "lr": 0.1, "centered": True},
        {"_component_": "kdtune.training.Muon", "lr": 0.1},
        {"_component_": "kdtune.training.adamw", "lr": 0.1},
    ],
    ids=lambda node: ", ".join(map(str, node.values())),
)
def test_optimizer_state_is_that_of_a_real_step(optimizer: dict[str, Any]) -> None:
    cfg = config("finetune", *SMALL, "adapter=null")
    cfg.optimizer = optimizer
    model = real_model(cfg)
    instance = instantiate(optimizer, params=training.trainable_parameters(model))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    instance.step()
    values = [value for entry in instance.state.values() for value in entry.values() if isinstance(value, Tensor)]
    found = sum(value.numel() * value.element_size() for value in values)
    held = estimated(cfg, 1).held
    assert held.state == held.all_state == found
    assert (held.stored, held.gradients) == (sum(p.numel() * 4 for p in model.parameters()),) * 2


def test_state_has_the_parameters_dimensions() -> None:
    shapes = state_shapes(
        {"_component_": "torch.optim.Adafactor", "lr": 0.1}, [("layers.0.w", nn.Parameter(torch.ones(7, 5)))]
    )
    assert sorted(one.pattern for one in shapes["layers.0.w"]) == [(), (-1, 1), (1, -2)]


def test_memory_falls_with_the_number_of_processes() -> None:
    cfg = config("knowledge_distillation", source="llama3_1/70B_to_8B_kd_distributed")
    plans = [estimated(cfg, size, device_type="cuda") for size in (1, 8, 64, 1024)]
    for plan, fewer in zip(plans[1:], plans, strict=False):
        assert plan.peak.total < fewer.peak.total
        assert plan.held.stored * plan.world_size >= plan.held.all_stored
        assert plan.held.all_state == pytest.approx(plans[0].held.state, rel=1e-6)
        assert plan.tokens == plan.world_size * plans[0].tokens
    assert plans[0].held.stored == 4 * 8_030_261_248  # Llama 3.1 8B's parameters, in fp32
    assert plans[2].volume.gather > plans[1].volume.gather > plans[0].volume.gather == 0


def test_hybrid_sharding_copies_over_and_offloading_moves_out() -> None:
    base = ["adapter=null", *SMALL]
    sharded, hybrid, offloaded = (
        estimated(config("finetune", *base, *extra), 4, device_type="cuda")
        for extra in ([], ["parallelism.dp_replicate=2"], ["parallelism.cpu_offload=true"])
    )
    assert hybrid.held.stored == 2 * sharded.held.stored and hybrid.volume.all_reduce > sharded.volume.all_reduce == 0
    held = offloaded.held
    assert offloaded.host_bytes == held.stored + held.gradients + held.state
    assert sharded.peak.total - offloaded.peak.total >= held.stored
    assert offloaded.phases[0].weights == 0


def test_mixed_precision_gathers_in_it() -> None:
    full, mixed = (
        estimated(config("finetune", *SMALL, "adapter=null", *extra), 4)
        for extra in ([], ["parallelism.param_dtype=bf16"])
    )
    assert mixed.held.stored == full.held.stored
    assert 2 * mixed.held.whole == full.held.whole
    assert mixed.held.reduced == full.held.reduced
    assert mixed.student.layer.kept < 0.7 * full.student.layer.kept


def test_a_gpu_keeps_less_than_a_cpu() -> None:
    """Its kernels share heads without copying them, and normalize without copies in fp32."""
    cfg = config("finetune", *SMALL, "adapter=null", "dtype=bf16")
    kept = {kind: estimated(cfg, 1, device_type=kind).student.layer.kept for kind in ("cpu", "cuda")}
    num_tokens, dim = 3 * 48, 64
    heads = 2 * num_tokens * 2 * 2 * (dim // 4)  # two of four heads of keys and values, bf16
    # The inputs of two norms in fp32; on a GPU that of the second as it is, the first's being the layer's input.
    norms = num_tokens * dim * (2 * 4 - 2)
    assert kept["cpu"] - kept["cuda"] == pytest.approx(heads + norms, rel=0.02)


def test_recomputation_keeps_a_layers_input_only() -> None:
    kept, recomputed = (
        estimated(config("finetune", *SMALL, f"enable_activation_checkpointing={flag}"), 1) for flag in (False, True)
    )
    assert recomputed.student.activations < 0.2 * kept.student.activations
    assert recomputed.flops > 1.2 * kept.flops


def test_what_is_on_disk() -> None:
    full = estimated(config("finetune", *SMALL, "adapter=null"), 1)
    assert full.step_checkpoint == full.held.stored + full.held.state
    assert full.final_checkpoint == full.held.stored
    sizes = {
        how: estimated(config("finetune", *SMALL, *ADAPTERS["lora"], f"save_weights={how}"), 1)
        for how in ("both", "merged", "adapter")
    }
    adapter = sizes["adapter"].final_checkpoint
    assert adapter == sizes["adapter"].held.gradients < sizes["merged"].final_checkpoint == full.final_checkpoint
    assert sizes["both"].final_checkpoint == sizes["merged"].final_checkpoint + adapter
    assert sizes["both"].step_checkpoint == adapter + sizes["both"].held.state


# GB of memory; TFLOPS of bf16 and fp32 matrices without sparsity; GB/s of memory; GB/s of NVLink, both ways; Gb/s of network a GPU
# in a DGX: as in NVIDIA's data sheets of A100, H100 SXM, H200 SXM, DGX A100 and DGX H100.
DATA_SHEETS = {
    "a100-40gb": (40, 312, 19.5, 1555, 600, 200),
    "a100-80gb": (80, 312, 19.5, 2039, 600, 200),
    "h100-80gb": (80, 989, 67, 3350, 900, 400),
    "h200-141gb": (141, 989, 67, 4800, 900, 400),
}


def test_figures_are_those_of_the_data_sheets() -> None:
    assert GPUS.keys() == DATA_SHEETS.keys()
    for name, figures in DATA_SHEETS.items():
        gpu = GPUS[name]
        links = (2 * gpu.host_link_gb_s, 8 * gpu.network_gb_s)
        assert (gpu.memory_gib, gpu.bf16_tflops, gpu.fp32_tflops, gpu.memory_gb_s, *links) == figures


@pytest.mark.parametrize(
    ("gib", "word"), [(72.0, "yes, 90%"), (72.8, "tight, 91%"), (80.0, "tight, 100%"), (80.8, "no, 101%")]
)
def test_it_fits_up_to_nine_tenths_of_a_card(gib: float, word: str) -> None:
    assert text._fits(gib, 80.0) == word


def test_times_come_from_stated_figures() -> None:
    plan = estimated(
        config("knowledge_distillation", source="llama3_1/70B_to_8B_kd_distributed"), 8, device_type="cuda"
    )
    slow, fast = find_gpu("a100-80gb"), find_gpu("h100-80gb")
    assert plan.computing(slow) / plan.computing(fast) == pytest.approx(989 / 312, rel=0.01)
    received = plan.volume.gather + plan.volume.reduce_scatter
    assert plan.communicating(slow) == pytest.approx(received / 300e9)


def test_a_teacher_apart_is_not_on_the_students_processes() -> None:
    base = [*SMALL, "adapter=null", "gradient_accumulation_steps=4"]
    cfg = config("knowledge_distillation", *base, "teacher_processes=3")
    together = estimated(config("knowledge_distillation", *base), 2)
    student = estimated(cfg, 2)
    with fake_world(3) as world:
        teacher = make_teacher_estimate(cfg, world, 2)
    assert student.world_size == 5 and student.tokens == together.tokens
    whole = instantiate(cfg.teacher_model)
    head = whole.output.weight
    assert student.teacher.stored == head.numel() * 4
    assert student.peak.weights == student.held.stored + head.numel() * 4
    assert {moment.name for moment in together.phases} - {moment.name for moment in student.phases} == {
        "the teacher's first use",
        "the teacher's forward",
    }
    # Three of the teacher's share the rows of two students: one student's are computed by one process alone.
    assert together.flops - student.flops == teacher.flops
    assert student.volume.answers == 4 * 3 * 48 * head.shape[1] * 4
    assert student.volume.gather < together.volume.gather and teacher.gather > 0
    assert sum(p.numel() * 4 for p in whole.parameters()) == teacher.teacher.sizes.total.all_stored
    assert teacher.peak.total < together.peak.total


def test_time_with_a_teacher_apart_is_the_slower_sides_and_one_wait() -> None:
    gpu, source = find_gpu("a100-80gb"), "llama3_1/70B_to_8B_kd_distributed"
    for students, accumulation in ((8, 1), (8, 4), (64, 1), (64, 4)):
        names = ("teacher_processes=8", f"gradient_accumulation_steps={accumulation}")
        plan = estimated(config("knowledge_distillation", *names, source=source), students, device_type="cuda")
        speed, steps = 0.4 * 312e12, plan.accumulation
        own, answer = plan.flops / steps / speed, plan.teacher.flops / speed
        # A micro-batch after the other: the student computes one as soon as it is answered and the one before is done.
        done = 0.0
        for index in range(steps):
            done = max(done, (index + 1) * answer) + own
        updated = 3 * plan.held.gradients + 2 * plan.held.state
        assert plan.computing(gpu) == pytest.approx(done + updated / (1e9 * gpu.memory_gb_s))


def test_command_line_with_a_teacher_apart(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "llama3_1/70B_to_8B_kd_distributed", "--world-size", "16,24", "teacher_processes=8"]
    assert run_command(argv) == 0
    out = capsys.readouterr().out
    cells = {line[:34].strip(): line[34:].split() for line in out.splitlines()}
    assert cells["processes"] == ["16", "24"] and cells["of these, with the teacher alone"] == ["8", "8"]
    assert cells["teacher's head"] == ["1.96", "1.96"]  # 128,256 x 8,192 in bf16
    assert "\nmemory a process of the teacher, GiB\n" in out


def test_a_plan_for_a_cpu_is_compared_with_this_machines_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, the system ends a run that takes too much without an error that could say what to change."""
    assert run_command(["plan", "tiny/knowledge_distillation"]) == 0
    assert "To fit" not in capsys.readouterr().out
    monkeypatch.setattr(text, "host_memory", lambda: 2**20)
    assert run_command(["plan", "tiny/knowledge_distillation"]) == 0
    out = capsys.readouterr().out
    assert "into 90% of the memory of this machine (0.9 MiB)" in out
    assert "batch_size=2 gradient_accumulation_steps=4" in out
    assert run_command(["plan", "tiny/knowledge_distillation", "--world-size", "2"]) == 0
    assert "this machine" not in capsys.readouterr().out


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    code = run_command(
        ["plan", "llama3_2/1B_full_distributed", "--world-size", "1,4", "--gpu", "h100-80gb", "batch_size=1"]
    )
    out = capsys.readouterr().out
    assert code == 0
    lines = {line[:33].strip(): line[33:].split() for line in out.splitlines() if line.startswith(("processes", "  "))}
    assert lines["processes"] == ["1", "4"]
    first, second = map(float, lines["weights"])
    assert first == pytest.approx(4 * second, rel=0.01) and first > 2
    assert any(line.startswith("fits into h100-80gb") for line in lines)
    assert "2,048 tokens" in out or "512 tokens" in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["quantization"], "does not train"),
        (["tiny/finetune", "--world-size", "0"], "not a number of processes"),
        (["tiny/finetune", "--world-size", "2,x"], "'x'"),
        (["tiny/finetune", "--gpu", "h900"], "a100-80gb"),
        (["tiny/finetune", "--seq-len", "0"], "at least 1"),
        (["tiny/finetune", "--world-size", "3", "parallelism.dp_replicate=2"], "multiple of 2"),
        (["tiny/finetune", "batch_size=0"], "batch_size"),
        (
            ["llama3_1/8B_qlora_single_device", "--world-size", "2", "parallelism.tp=2"],
            "an NF4 base is cut by rows for FSDP alone",
        ),
        (["tiny/knowledge_distillation", "--world-size", "2", "teacher_processes=2"], "leaves none for the student"),
        (
            ["tiny/knowledge_distillation", "--world-size", "4", "teacher_processes=2", "parallelism.tp=2"],
            "tp=1 on both",
        ),
        (["nowhere"], "nowhere"),
    ],
)
def test_command_line_errors(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plan", *argv]) == 2
    assert said in capsys.readouterr().err


def test_the_documented_plan_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(_assets.__file__).parents[1] / "docs" / "plan.md").read_text()
    command = next(line.split() for line in page.splitlines() if line.startswith("    kdtune plan"))
    assert run_command(command[1:]) == 0
    assert textwrap.indent(capsys.readouterr().out, "    ") in page


def test_an_assumed_length_is_said() -> None:
    cfg = config("finetune", *SMALL, "tokenizer.max_seq_len=null", "model.max_seq_len=256")
    assert "256 tokens (assumed" in estimate_text(cfg, [1])
    assert "32 tokens (as asked for)" in estimate_text(cfg, [1], seq_len=32)


def test_a_plan_fits_into_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config("finetune", *SMALL)
    monkeypatch.delenv("COLUMNS", raising=False)
    wide = estimate_text(cfg, [1, 8])
    monkeypatch.setenv("COLUMNS", "60")
    narrow = estimate_text(cfg, [1, 8])
    assert max(map(len, narrow.splitlines())) <= 60 < max(map(len, wide.splitlines()))
    assert narrow.split() == wide.split()


@pytest.mark.parametrize("scheme", ["int8", "nf4", "float8_dynamic"])
def test_a_quantized_teacher_counts_as_it_is_held(scheme: str) -> None:
    sizes = ["teacher_model.embed_dim=64", "teacher_model.intermediate_dim=128", f"teacher_quantization={scheme}"]
    cfg = config("knowledge_distillation", *SMALL, *sizes)
    whole = instantiate(cfg.teacher_model)
    quantize(whole, scheme.replace("dynamic", "weight_only"))
    student = estimated(cfg, 1)
    assert student.teacher.stored == sum(num_bytes(parameter) for parameter in whole.parameters())
