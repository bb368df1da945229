"""Resume state: going on from it equals never having stopped, to the bit."""

import json
import math
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import save_state, tiny_model
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau

from kdtune.checkpoint import load_model, load_state, save_model
from kdtune.errors import CheckpointError
from kdtune.models import Transformer
from kdtune.training import Muon, get_cosine_schedule_with_warmup, trainable_parameters

Build = Callable[[Transformer], Optimizer]


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "lr": 0.03, "weight_decay": 0.0},
    ]


OPTIMIZERS: dict[str, Build] = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.02),
    "adamw, groups": lambda m: torch.optim.AdamW(two_groups(m), lr=0.02, betas=(0.8, 0.95), amsgrad=True),
    "adamw, fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.02, fused=True),
    "adamw, tensor lr": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(0.02)),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.05),
    "sgd, momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9),
    "kdtune Muon": lambda m: Muon(trainable_parameters(m), lr=0.01),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.02),
    "asgd": lambda m: torch.optim.ASGD(m.parameters(), lr=0.02),
}


def train(model: Transformer, optimizer: Optimizer, scheduler: Any, steps: range) -> list[float]:
    """Losses of some steps on data drawn from torch's generator: only a restored generator gives the same."""
    losses = []
    for _ in steps:
        tokens = torch.randint(0, 96, (2, 9))
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) * (1 + random.random())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def cosine(optimizer: Optimizer) -> LambdaLR:
    return get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_resumed_equals_uninterrupted_to_the_bit(tmp_path: Path, name: str, tie: bool, dtype: torch.dtype) -> None:
    build = OPTIMIZERS[name]
    model = tiny_model(tie=tie, dtype=dtype)
    optimizer = build(model)
    scheduler = cosine(optimizer)
    random.seed(5)
    train(model, optimizer, scheduler, range(5))
    save_model(model, tmp_path / "model")
    extra = {"step": 5, "position": [1, 7], "best": 0.1 + 0.2, "name": "ü"}
    save_state(tmp_path / "state", model=model, optimizer=optimizer, scheduler=scheduler, extra=extra)
    expected = train(model, optimizer, scheduler, range(5, 10))

    torch.manual_seed(99)
    random.seed(99)
    resumed = load_model(tmp_path / "model", dtype=dtype)
    new = build(resumed)
    new_scheduler = cosine(new)
    assert load_state(tmp_path / "state", model=resumed, optimizer=new, scheduler=new_scheduler) == extra
    assert train(resumed, new, new_scheduler, range(5, 10)) == expected
    for key, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], tensor), key
    assert optimizer.state_dict()["param_groups"] == new.state_dict()["param_groups"]


def test_saving_changes_nothing(tmp_path: Path) -> None:
    """Also before the first step, where torch's own helper would take one to have a state to save."""
    for name, build in OPTIMIZERS.items():
        model, untouched = tiny_model(), tiny_model()
        optimizer, other = build(model), build(untouched)
        torch.manual_seed(1)
        random.seed(1)
        save_state(tmp_path / name / "0", model=model, optimizer=optimizer, extra={})
        first = train(model, optimizer, None, range(3))
        save_state(tmp_path / name / "3", model=model, optimizer=optimizer, extra={})
        first += train(model, optimizer, None, range(3, 5))
        torch.manual_seed(1)
        random.seed(1)
        assert train(untouched, other, None, range(5)) == first, name


def test_state_saved_before_the_first_step_is_loaded_as_none(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    save_state(tmp_path / "s", model=model, optimizer=optimizer, extra={})
    resumed = tiny_model()
    new = torch.optim.AdamW(resumed.parameters(), lr=0.02)
    train(resumed, new, None, range(2))
    load_state(tmp_path / "s", model=resumed, optimizer=new)
    assert not new.state


def test_parameters_without_a_gradient_have_no_state(tmp_path: Path) -> None:
    def build() -> tuple[Transformer, Optimizer]:
        model = tiny_model()
        model.layers[0].requires_grad_(False)
        return model, torch.optim.AdamW(model.parameters(), lr=0.02)

    model, optimizer = build()
    train(model, optimizer, None, range(3))
    unused = model.layers[1].attn.q_proj.weight
    del optimizer.state[unused]  # as if it had never had a gradient
    save_state(tmp_path / "s", model=model, optimizer=optimizer, extra={})
    resumed, new = build()
    load_state(tmp_path / "s", model=resumed, optimizer=new)
    assert len(new.state) == len(optimizer.state)
    assert resumed.layers[1].attn.q_proj.weight not in new.state


def test_a_later_world_finds_tensors_by_parameter_name(tmp_path: Path) -> None:
    """What is written is ordinary torch.distributed.checkpoint content, each tensor once though the head is tied."""
    from torch.distributed.checkpoint import FileSystemReader

    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, None, range(1))
    save_state(tmp_path / "s", model=model, optimizer=optimizer, extra={})
    entries = FileSystemReader(tmp_path / "s").read_metadata().state_dict_metadata
    names = {name for name, _ in model.named_parameters()}
    keys = ("step", "exp_avg", "exp_avg_sq")
    assert set(entries) == {f"optimizer.{name}.{key}" for name in names for key in keys} | {
        name for name in entries if name.startswith("rng.")
    }
    assert "optimizer.output.weight.exp_avg" not in entries
    assert entries["optimizer.norm.weight.exp_avg"].size == torch.Size([32])


def test_no_warning_about_a_missing_process_group(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, None, range(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_state(tmp_path / "s", model=model, optimizer=optimizer, extra={})
        load_state(tmp_path / "s", model=model, optimizer=optimizer)


@pytest.mark.parametrize(
    "make", [lambda o: CosineAnnealingLR(o, 10), lambda o: ReduceLROnPlateau(o)], ids=["cos", "plateau"]
)
def test_torchs_schedulers(tmp_path: Path, make: Callable[[Optimizer], Any]) -> None:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = make(optimizer)
    for _ in range(3):
        optimizer.step()
        scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
    save_state(tmp_path / "s", model=model, optimizer=optimizer, scheduler=scheduler, extra={})
    new = torch.optim.SGD(model.parameters(), lr=0.1)
    again = make(new)
    load_state(tmp_path / "s", model=model, optimizer=new, scheduler=again)
    assert again.state_dict() == scheduler.state_dict()
    assert new.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_extra_must_be_json_and_floats_are_exact(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    extra = {"a": 1e-323, "b": math.pi, "c": math.inf, "d": -0.0}
    save_state(tmp_path / "s", model=model, optimizer=optimizer, extra=extra)
    found = load_state(tmp_path / "s", model=model, optimizer=optimizer)
    assert found == extra and math.copysign(1, found["d"]) == -1
    with pytest.raises(CheckpointError, match=r"state.json: a value .* is neither a tensor nor JSON"):
        save_state(tmp_path / "t", model=model, optimizer=optimizer, extra={"a": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    train(model, optimizer, None, range(2))
    save_state(tmp_path / "saved", model=model, optimizer=optimizer, scheduler=cosine(optimizer), extra={"step": 2})
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("build", "schedules", "message"),
    [
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.1), 1, "saved by optimizer AdamW, this run has SGD"),
        (OPTIMIZERS["adamw"], 0, "holds 1 schedulers, this run has 0"),
        (lambda m: torch.optim.AdamW(two_groups(m)), 1, "in how they are grouped"),
        (lambda m: torch.optim.AdamW(list(m.parameters())[1:]), 1, r"first: 'tok_embeddings.weight'"),
        (
            lambda m: torch.optim.AdamW(m.parameters(), amsgrad=True),
            1,
            "max_exp_avg_sq': nothing saved, float32 expected",
        ),
    ],
)
def test_another_optimizer_is_refused(saved: Path, build: Build, schedules: int, message: str) -> None:
    model = tiny_model()
    optimizer = build(model)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_state(saved, model=model, optimizer=optimizer, scheduler=cosine(optimizer) if schedules else None)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (tiny_model(layers=3), "trained other parameters than this run's"),
        (tiny_model(vocab=97), "resume state cannot be read.*tok_embeddings.weight"),
        (tiny_model(dtype=torch.bfloat16), "exp_avg': float32 saved, bfloat16 expected"),
    ],
    ids=["layers", "vocabulary", "dtype"],
)
def test_another_model_is_refused(saved: Path, model: Transformer, message: str) -> None:
    optimizer = OPTIMIZERS["adamw"](model)
    with pytest.raises(CheckpointError, match=message):
        load_state(saved, model=model, optimizer=optimizer, scheduler=cosine(optimizer))


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "state.json"])
@pytest.mark.parametrize("how", ["missing", "empty", "half"])
def test_damaged_state_is_one_error(saved: Path, name: str, how: str) -> None:
    file = saved / name
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: 0 if how == "empty" else len(content) // 2])
    model = tiny_model()
    optimizer = OPTIMIZERS["adamw"](model)
    with pytest.raises(CheckpointError) as caught:
        load_state(saved, model=model, optimizer=optimizer, scheduler=cosine(optimizer))
    assert str(saved) in str(caught.value)


def test_state_of_another_version_is_refused(saved: Path) -> None:
    document = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps({**document, "version": 99}))
    model = tiny_model()
    with pytest.raises(CheckpointError, match=r"state.json: version 99 found, 1 expected"):
        load_state(saved, model=model, optimizer=OPTIMIZERS["adamw"](model))


def test_malicious_metadata_is_refused_and_not_run(saved: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.mkdir, (tmp_path / "ran",)

    (saved / ".metadata").write_bytes(pickle.dumps(Bomb()))
    model = tiny_model()
    optimizer = OPTIMIZERS["adamw"](model)
    with pytest.raises(CheckpointError, match="could run"):
        load_state(saved, model=model, optimizer=optimizer, scheduler=cosine(optimizer))
    assert not (tmp_path / "ran").exists()


def test_metadata_of_anything_but_tensors_is_refused(tmp_path: Path) -> None:
    """torch.distributed.checkpoint would unpickle such an entry without restriction."""
    import torch.distributed.checkpoint as dcp

    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    save_state(tmp_path / "s", model=model, optimizer=optimizer, extra={})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"rng.cpu": "not a tensor"}, checkpoint_id=tmp_path / "s", no_dist=True)
    with pytest.raises(CheckpointError, match="BytesStorageMetadata; only tensors are loaded"):
        load_state(tmp_path / "s", model=model, optimizer=optimizer)


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_schedule_of_another_length_goes_on_at_its_own_rate(tensor_lr: bool, tmp_path: Path) -> None:
    """A run of 4 steps has come to rate 0; extended to 8 it goes on with what 8 steps have there, in both groups."""

    def prepare(num_steps: int) -> tuple[Transformer, Optimizer, Any]:
        model = tiny_model()
        groups = two_groups(model)
        if tensor_lr:
            groups[1]["lr"] = torch.tensor(0.03)
        optimizer = torch.optim.AdamW(groups, lr=torch.tensor(0.02) if tensor_lr else 0.02)
        return model, optimizer, get_cosine_schedule_with_warmup(optimizer, 1, num_steps)

    model, optimizer, schedule = prepare(4)
    train(model, optimizer, schedule, range(4))
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.0, 0.0], abs=1e-9)
    save_state(tmp_path / "state", model=model, optimizer=optimizer, scheduler=schedule, extra={})

    longer_model, longer, its_schedule = prepare(8)
    load_state(tmp_path / "state", model=longer_model, optimizer=longer, scheduler=its_schedule)
    share = 0.5 * (1 + math.cos(math.pi * 3 / 7))
    assert [float(group["lr"]) for group in longer.param_groups] == pytest.approx(
        [0.02 * share, 0.03 * share], rel=1e-6
    )
