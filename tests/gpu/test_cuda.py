"""The device against the CPU: on CUDA where there is one (bench/gpu.sh), else the CPU against itself, which shows that this runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kdtune import losses, models
from kdtune._cli.main import main
from kdtune.generation import generate
from kdtune.losses import HiddenSignal, KDLoss
from kdtune.tokenizers import byte_tokenizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIVERGENCES = ("ForwardKL", "ReverseKL", "JensenShannon", "SkewForwardKL", "TotalVariation", "AlphaBeta", "AdaptiveKL")


def head(rows: int, dim: int, seed: int) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(dim, rows, bias=False, dtype=torch.float64)


def loss_and_gradient(loss: KDLoss, dtype: torch.dtype, device: str) -> tuple[float, torch.Tensor]:
    """Of 70 tokens over 1,003 ids, as float64 has them or as the device computes them in a dtype."""
    torch.manual_seed(0)
    hidden, teacher_hidden = (torch.randn(2, 35, dim, dtype=torch.float64) for dim in (32, 48))
    labels = torch.randint(1003, (2, 35))
    labels[0, :7] = -100
    # What bf16 holds, in every dtype.
    hidden, teacher_hidden = (x.bfloat16().to(device, dtype) for x in (hidden, teacher_hidden))
    ours, theirs = (head(1003, dim, dim).bfloat16().to(device, dtype) for dim in (32, 48))
    hidden.requires_grad_()
    total, _ = loss(
        hidden,
        ours.requires_grad_(False),
        HiddenSignal(teacher_hidden, theirs.requires_grad_(False)),
        labels.to(device),
    )
    total.backward()
    assert hidden.grad is not None
    return float(total.detach()), hidden.grad.double().cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_loss_is_that_of_float64(name: str, dtype: torch.dtype) -> None:
    value, gradient = loss_and_gradient(KDLoss(getattr(losses, name)(), chunk_size=32), dtype, DEVICE)
    exact, exact_gradient = loss_and_gradient(KDLoss(getattr(losses, name)(), chunk_size=32), torch.float64, "cpu")
    assert value == pytest.approx(exact, rel=1e-5)
    bound = 1e-5 if dtype == torch.float32 else 5e-3
    assert (gradient - exact_gradient).norm() < bound * exact_gradient.norm()


def metrics(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    command = [
        "run",
        "knowledge_distillation",
        "--config",
        "tiny/knowledge_distillation",
        f"output_dir={folder}",
        "sample_prompts=[]",
    ]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "max_steps_per_epoch=4", *overrides])
    assert stopped.value.code == 0
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


SLOW = pytest.mark.slow("whole runs, on a CPU of what other tests see there; for CUDA")


@SLOW
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "override", ["seed=0", "adapter=kdtune.models.apply_lora", "enable_activation_checkpointing=true", "dtype=bf16"]
)
def test_a_tiny_run_is_the_cpus(override: str, tmp_path: Path) -> None:
    ours = metrics(tmp_path / "cpu", "device=cpu", override)
    theirs = metrics(tmp_path / "device", f"device={DEVICE}", override)
    tolerance = 5e-2 if "bf16" in override else 2e-3
    for here, there in zip(ours, theirs, strict=True):
        for name in {"loss", "class_loss", "kd_loss", "val_kd_loss"} & here.keys():
            assert there[name] == pytest.approx(here[name], rel=tolerance), name


@SLOW
@pytest.mark.usefixtures("undrawn")
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    settings = (f"device={DEVICE}", "save_every_n_steps=2", "~lr_scheduler")
    whole = metrics(tmp_path / "whole", *settings)
    metrics(tmp_path / "cut", *settings, "max_steps_per_epoch=2")
    resumed = metrics(tmp_path / "cut", *settings, "resume_from_checkpoint=true")
    losses_of = [[row["loss"] for row in rows if "loss" in row] for rows in (whole, resumed)]
    assert len(losses_of[0]) == 4 and losses_of[1] == pytest.approx(losses_of[0], rel=1e-6)


def test_greedy_answers_are_the_cpus() -> None:
    torch.manual_seed(0)
    model = models.llama(
        vocab_size=320, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_dim=64, max_seq_len=128
    )
    tokenizer = byte_tokenizer()
    prompt = tokenizer.encode("What is the capital of France?")
    answers = [generate(model.to(device), prompt, max_new_tokens=16, stop_ids=[]) for device in ("cpu", DEVICE)]
    assert answers[0] == answers[1]


@pytest.mark.skipif(DEVICE != "cuda", reason="only CUDA says where the host waits for it")
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_host_does_not_wait_for_the_loss(name: str) -> None:
    loss = KDLoss(getattr(losses, name)(), chunk_size=32)
    targets = losses.Targets.from_labels(torch.randint(1003, (2, 35))).map(lambda tensor: tensor.cuda())
    ours, theirs = (head(1003, dim, dim).bfloat16().cuda().requires_grad_(False) for dim in (32, 48))
    hidden, teacher_hidden = (torch.randn(2, 35, dim, dtype=torch.bfloat16, device="cuda") for dim in (32, 48))

    def run() -> None:
        loss(hidden.requires_grad_(), ours, HiddenSignal(teacher_hidden, theirs), targets)[0].backward()

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
