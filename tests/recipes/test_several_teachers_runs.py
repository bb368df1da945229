"""Several teachers with real weights, against float64 by the definitions; and runs whose examples each have a teacher of their own."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from command_line import CLI
from safetensors import safe_open
from torch import Tensor
from written_caches import write_cache

from kdtune.checkpoint import load_model, save_model
from kdtune.data import Batch, batches, instruct_dataset
from kdtune.distributed import SINGLE_PROCESS
from kdtune.losses import ForwardKL, HiddenSignal, KDLoss, PendingSignal
from kdtune.models import OutputHead, Transformer, llama
from kdtune.teachers import CachedTeacher, Mixture, OnlineTeacher, Routed
from kdtune.tokenizers import byte_tokenizer, load

NAMES, SUBJECTS = ("base", "tuned"), ["math", "code", "code", "math", "code"]
ROWS = [{"input": f"What is {number} and one?", "output": f"It is {number + 1}, of course" + "!" * number, "subject": subject}
        for number, subject in enumerate(SUBJECTS)]  # fmt: skip
WEIGHTS = "={_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: %s}"


def of_rows(source: Path, **settings: Any) -> list[str]:
    options = {"_component_": "kdtune.data.instruct_dataset", "source": str(source), **settings}
    return [f"dataset={json.dumps(options)}", "dataset_val=null"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


class Real:
    """SmolLM2 and the same, finetuned for two steps: models in float64, caches in fp32, and what transformers says in fp32."""

    def __init__(self, folders: dict[str, Path], caches: dict[str, Path], student: Transformer, batch: Batch) -> None:
        self.caches, self.batch, self.places = caches, batch, batch.targets.positions_N
        self.models = {name: load_model(path, dtype=torch.float64).eval() for name, path in folders.items()}
        with torch.no_grad():
            self.hidden, self.head = student(**batch.inputs, return_hidden=True), student.output.weight.detach()
            self.live = {name: self._live(model) for name, model in self.models.items()}
        self.theirs = {name: self._transformers(path) for name, path in folders.items()}
        self.stored = {name: self._stored(path) for name, path in caches.items()}

    def _rows(self, of_example: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Log-probabilities [N, V] of the labelled positions, example by example; each gives those of all of its positions."""
        found = []
        for number, (start, length) in enumerate(zip(self.batch.row_starts, self.batch.lengths, strict=True)):
            own = self.places[(self.places >= start) & (self.places < start + length)] - start
            found.append(of_example(number, self.batch.tokens[:, start : start + length])[own])
        return torch.cat(found)

    def _live(self, model: Transformer) -> Tensor:
        return self._rows(lambda _, tokens: model(tokens)[0].log_softmax(-1))

    def _transformers(self, path: Path) -> Tensor:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            return self._rows(lambda _, tokens: model(tokens).logits[0].double().log_softmax(-1))

    def _stored(self, path: Path) -> Tensor:
        """From the files alone."""
        with safe_open(path / "head.safetensors", "pt") as file:
            weight = file.get_tensor("weight").double()
        with safe_open(path / "shard-00000.safetensors", "pt") as file:
            hidden, positions, offsets = (file.get_tensor(name) for name in ("hidden", "positions", "offsets"))

        def of_example(number: int, tokens: Tensor) -> Tensor:
            own, found = (
                slice(*offsets[number : number + 2].tolist()),
                torch.full((tokens.shape[1], len(weight)), torch.nan).double(),
            )
            found[positions[own].long()] = (hidden[own].double() @ weight.T).log_softmax(-1)
            return found

        return self._rows(of_example)

    def teacher(self, name: str, kind: str) -> Any:
        if kind == "live":
            return OnlineTeacher(self.models[name])
        cached = CachedTeacher(str(self.caches[name]))
        cached.start(SimpleNamespace(), SINGLE_PROCESS)
        return cached

    def loss(self, signal: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Cross entropy and forward KL, and their gradient to the student's hidden states and head."""
        hidden, weight = self.hidden.clone().requires_grad_(), torch.nn.Parameter(self.head.clone())
        found, _ = KDLoss(ForwardKL(), kd_ratio=0.6)(hidden, OutputHead.of(weight), signal, self.batch.targets)
        return found.detach(), torch.autograd.grad(found, (hidden, weight))

    def expected(self, logp: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The same by the definitions, from the teacher's log-probabilities [N, V]."""
        hidden, weight = self.hidden.clone().requires_grad_(), self.head.clone().requires_grad_()
        student = (hidden.flatten(0, 1)[self.places] @ weight.T).log_softmax(-1)
        ce = -student.gather(1, self.batch.targets.labels_N[:, None]).sum()
        found = 0.4 * ce + 0.6 * (logp.exp() * (logp - student)).sum()
        return found.detach(), torch.autograd.grad(found, (hidden, weight))


@pytest.fixture(scope="module")
def real(real_pair: Path, source: Path, cli: CLI, tmp_path_factory: pytest.TempPathFactory) -> Real:
    folder = tmp_path_factory.mktemp("real")
    tokenizer = f"tokenizer={{_component_: kdtune.tokenizers.load, path: {real_pair / 'teacher'}, max_seq_len: 64}}"
    common = [tokenizer, *of_rows(source)]
    done = cli("run", "finetune", "--config", "tiny/finetune", "~model", "checkpointer" + WEIGHTS % (real_pair / "teacher"), *common,
               "batch_size=1", "gradient_accumulation_steps=2", "max_steps_per_epoch=2", "optimizer.lr=3e-3", "~lr_scheduler",
               "sample_prompts=[]", "save_every_n_steps=null", "run_val_every_n_steps=null", f"output_dir={folder / 'run'}")  # fmt: skip
    assert done.code == 0, done.err
    folders = {"base": real_pair / "teacher", "tuned": folder / "run" / "final"}
    for name, path in folders.items():
        done = cli("run", "cache_teacher", "--config", "tiny/cache_teacher", "~teacher_model", "teacher_checkpointer" + WEIGHTS % path,
                   *common, "stored_dtype=fp32", "quality_examples=1", f"output_dir={folder / name}")  # fmt: skip
        assert done.code == 0, done.err
    dataset = instruct_dataset(load(real_pair / "teacher", max_seq_len=64), source=str(source), route_column="subject")
    (batch,) = batches(dataset, len(ROWS), 0, padding_free=True)
    student = load_model(real_pair / "student", dtype=torch.float64).eval()
    return Real(folders, {name: folder / name for name in NAMES}, student, batch)


def in_float64(signal: Any) -> Any:
    """A signal whose states and heads are raised: the stored ones are fp32."""
    if isinstance(signal, PendingSignal):
        signal = signal.result()
    if isinstance(signal, HiddenSignal):
        return HiddenSignal(signal.hidden_BSD.double(), OutputHead.of(signal.output.weight.detach().double()))
    return replace(signal, signals=tuple(map(in_float64, signal.signals)))


@pytest.mark.real
@pytest.mark.slow(
    "reads the real model six times, in float64 too, and finetunes it; tiny ones are mixed and routed in tests/unit/teachers"
)
def test_real_teachers_mixed_and_routed(real: Real) -> None:
    """Live ones, cached ones, and one of each: loss and gradient in float64 to 1e-9; and transformers' models to 1e-5."""
    assert (real.live["base"].exp() * (real.live["base"] - real.live["tuned"])).sum(-1).mean() > 1e-3
    is_math = torch.tensor([route == "math" for route in real.batch.routes])
    of_math = is_math.repeat_interleave(torch.tensor(real.batch.lengths))[real.places, None]

    def mixed(base: Tensor, tuned: Tensor) -> Tensor:
        return (0.25 * base.exp() + 0.75 * tuned.exp()).log()

    def routed(base: Tensor, tuned: Tensor) -> Tensor:
        return torch.where(of_math, base, tuned)

    for kinds in (("live", "live"), ("cached", "cached"), ("live", "cached")):
        parts = [(real.live if kind == "live" else real.stored)[name] for name, kind in zip(NAMES, kinds, strict=True)]
        for combined, several in (
            (mixed, lambda *both: Mixture(both, [1, 3])),
            (routed, lambda *both: Routed(dict(zip(("math", "code"), both, strict=True)))),
        ):
            signal = several(*(real.teacher(name, kind) for name, kind in zip(NAMES, kinds, strict=True)))(real.batch)
            loss, gradients = real.loss(in_float64(signal))
            expected, theirs = real.expected(combined(*parts))
            assert float(loss) == pytest.approx(float(expected), rel=1e-9), (kinds, combined.__name__)
            for ours, other in zip(gradients, theirs, strict=True):
                assert float((ours - other).norm() / other.norm()) < 1e-9, (kinds, combined.__name__)
            beside, _ = real.expected(combined(*real.theirs.values()))
            assert float(loss) == pytest.approx(float(beside), rel=1e-5)
            assert float(real.loss(signal)[0]) == pytest.approx(float(expected), rel=1e-5)  # as a run computes it


def kd_losses(cli: CLI, out: Path, source: Path, *overrides: str) -> list[float]:
    done = cli("run", "knowledge_distillation", "--config", "tiny/knowledge_distillation", "~teacher_model", *overrides,
               *of_rows(source, route_column="subject"), "shuffle=false", "batch_size=1", "gradient_accumulation_steps=1",
               "max_steps_per_epoch=null", "optimizer=torch.optim.SGD", "optimizer.lr=0", "~lr_scheduler", "sample_prompts=[]",
               "save_every_n_steps=null", "run_val_every_n_steps=null", f"output_dir={out}")  # fmt: skip
    assert done.code == 0, done.err
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["kd_loss"] for row in found if "loss" in row]


def test_each_step_of_a_routed_run_is_that_of_its_teacher(cli: CLI, source: Path, tmp_path: Path) -> None:
    """One example a step and no update: a run of each teacher alone, live and cached, is the witness."""
    tokenizer, nodes = byte_tokenizer(max_seq_len=256), {}
    for seed, name in enumerate(("live", "cached")):
        torch.manual_seed(seed)
        model = llama(
            vocab_size=320,
            embed_dim=16,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            intermediate_dim=24,
            max_seq_len=256,
        )
        with torch.no_grad():
            model.output.weight.mul_(8 * (1 + seed))  # far from uniform
        save_model(model, tmp_path / name, tokenizer=tokenizer)
    model = load_model(tmp_path / "cached").eval()
    write_cache(tmp_path / "cache", model, instruct_dataset(tokenizer, source=str(source)), tokenizer)
    nodes["math"] = (
        f"{{_component_: kdtune.teachers.LiveTeacher, checkpointer{(WEIGHTS % (tmp_path / 'live')).replace('=', ': ', 1)}}}"
    )
    nodes["code"] = f"{{_component_: kdtune.teachers.CachedTeacher, path: {tmp_path / 'cache'}}}"
    alone = {name: kd_losses(cli, tmp_path / f"of_{name}", source, f"teacher={node}") for name, node in nodes.items()}
    both = (
        f"teacher={{_component_: kdtune.teachers.Routed, teachers: {{math: {nodes['math']}, code: {nodes['code']}}}}}"
    )
    found = kd_losses(cli, tmp_path / "routed", source, both)
    assert found == pytest.approx([alone[subject][step] for step, subject in enumerate(SUBJECTS)], rel=1e-5)
    assert len(found) == len(ROWS) and all(abs(a - b) > 1e-3 for a, b in zip(*alone.values(), strict=True))
