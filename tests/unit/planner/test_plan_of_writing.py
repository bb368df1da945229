"""A plan with texts that models write in training: their keys and values are those of a real writing."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from exit_codes import run_command

from kdtune._assets import find_recipe
from kdtune.config import instantiate, load
from kdtune.config.recipe import import_recipe
from kdtune.distributed import Parallelism, World
from kdtune.generation import Sampling, complete, complete_speculatively, slots
from kdtune.generation.compiled import step
from kdtune.generation.slots import _Slots
from kdtune.models import Transformer, dtype_from_name
from kdtune.planner.advice import changes_to_fit
from kdtune.planner.estimate import Estimate, make_estimate
from kdtune.planner.phases import Phase
from kdtune.planner.sizes import model_sizes
from kdtune.planner.teacher import make_teacher_estimate
from kdtune.planner.writing import writing
from kdtune.rollouts import VLLMWriter

CPU = torch.device("cpu")
WIDE = ["model.embed_dim=64", "model.intermediate_dim=64", "model.num_layers=2", "model.vocab_size=320", "model.max_seq_len=1024",
        "batch_size=20", "tokenizer.max_seq_len=300", "rollouts.max_new_tokens=8", "rollouts.slots=24"]  # fmt: skip


PROMPTS = [[number] * 299 for number in range(42)]
ASKED: dict[str, Any] = {"max_new_tokens": 8, "stop_ids": (), "sampling": Sampling(1.0), "seeds": [*range(42)]}


def config(*overrides: str, source: str = "tiny/on_policy") -> Any:
    return load(source, [*overrides], import_recipe(find_recipe("knowledge_distillation")).schema)


def planned(*overrides: str, source: str = "tiny/on_policy", device_type: str = "cpu") -> Estimate:
    return make_estimate(config(*overrides, source=source), World(CPU), device_type=device_type)


def writing_of(plan: Any) -> Phase | None:
    return next((phase for phase in plan.phases if phase.name == "the writing of the texts"), None)


@pytest.mark.parametrize(
    ("overrides", "windows"),
    [
        (["dtype=fp32"], ()),
        (["dtype=bf16", "rollouts.slots=40"], ()),
        (["dtype=fp32"], (100, None)),
        (["dtype=fp32", "rollouts.compile=true", "rollouts.slots=44"], ()),
        (["dtype=fp32", "rollouts.compile=true"], ()),
    ],
    ids=["fp32", "bf16", "windows", "compiled, more slots than texts", "compiled, more rows than slots"],
)
def test_what_the_writing_takes_is_what_it_takes(
    overrides: list[str], windows: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts as long as there can be: the caches' bytes are equal, and the peak is the allocator's record to 10 %."""
    cfg, plan = config(*WIDE, *overrides), planned(*WIDE, *overrides)
    rollouts, model = instantiate(cfg.rollouts), Transformer(replace(instantiate(cfg.model).config, windows=windows))
    model = model.to(dtype_from_name(cfg.dtype)).requires_grad_(False)
    needed = writing(cfg, model_sizes(deepcopy(model), Parallelism(), World(CPU)), plan.batch)
    phase = writing_of(plan)
    assert phase is not None and ((phase.cache, phase.activations) == (needed.cache, needed.working) or windows)
    held: dict[str, int] = {}
    hidden_of, cache_of = _Slots.hidden, slots._cache_of

    def noting(self: Any, *args: Any) -> torch.Tensor:
        found = hidden_of(self, *args)
        held["slots"] = sum(one.nbytes for layer in self._cache.layers for one in layer.tensors)
        return found

    def noting_read(*args: Any) -> Any:
        found = cache_of(*args)
        of_layers = (layer._keys_BKCE.nbytes + layer._values_BKCE.nbytes for layer in found.layers)
        held["read"] = max(sum(of_layers), held.get("read", 0))
        return found

    monkeypatch.setattr(slots, "_cache_of", noting_read)
    monkeypatch.setattr(_Slots, "hidden", noting)
    monkeypatch.setattr(slots, "compiled_step", lambda _: step)  # the code has the tensors that it is given
    growth = growth_of(
        lambda: complete(model, PROMPTS, **ASKED, slots=rollouts.slots, with_log_probs=True, compile=rollouts.compile)
    )
    assert sum(held.values()) == needed.cache
    assert max(growth) == pytest.approx(needed.cache + needed.working, rel=0.1)
    # Nothing of it is left for Python's collector of garbage.
    assert growth[-1] < 0.02 * needed.cache


@pytest.mark.parametrize(("source", "dtype"), [("mixed", "fp32"), ("speculative", "fp32"), ("speculative", "bf16")])
def test_what_two_models_take_together_is_what_they_take(source: str, dtype: str) -> None:
    """A vocabulary that is large beside the models: most of the peak are logits, and what is made of them."""
    overrides = [*WIDE, f"dtype={dtype}", "tokenizer.max_seq_len=100", "model.vocab_size=8000",
                 "teacher_model.vocab_size=8000", "teacher_model.max_seq_len=1024",
                 f"rollouts.policy={{_component_: kdtune.rollouts.Share, {source}: 1.0}}"]  # fmt: skip
    cfg, batch = config(*overrides, source="tiny/speculative"), planned(*overrides, source="tiny/speculative").batch
    rollouts = instantiate(cfg.rollouts)
    models = [
        instantiate(node).to(dtype_from_name(dtype)).requires_grad_(False) for node in (cfg.model, cfg.teacher_model)
    ]
    needed = [writing(cfg, model_sizes(deepcopy(one), Parallelism(), World(CPU)), batch) for one in models]
    (student, teacher), prompts = models, [ids[:99] for ids in PROMPTS]
    growth = growth_of(
        lambda: (
            complete(student, prompts, **ASKED, slots=rollouts.slots, with_log_probs=True, partner=teacher)
            if source == "mixed"
            else complete_speculatively(student, teacher, prompts, **ASKED, slots=rollouts.slots)
        )
    )
    working = max(one.working for one in needed)
    assert working > 0.6 * max(growth)
    assert max(growth) == pytest.approx(sum(one.cache for one in needed) + working, rel=0.1)


def growth_of(write: Callable[[], object]) -> list[int]:
    """Return the allocator's record of what is held while texts are written."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        write()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [*accumulate(event.nbytes() for event in sorted(events, key=lambda one: one.start_ns()))]


def test_who_writes_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = {
        name: writing_of(planned(source=f"tiny/{name}"))
        for name in ("on_policy", "seqkd", "minillm", "speculative", "gkd")
    }
    assert writing_of(planned(source="tiny/knowledge_distillation")) is None
    assert all(phase is not None and phase.gradients == 0 for phase in caches.values())
    student, teacher = (caches[name].cache for name in ("on_policy", "seqkd"))
    assert teacher == student * 3 * 48 // (2 * 32)  # layers and widths
    assert caches["minillm"].cache == student + teacher
    assert caches["gkd"].cache == student
    # Drafted tokens need places beyond the 256 that the texts have, which come in hundreds, in both.
    assert 1 < caches["speculative"].cache / (student + teacher) < 2
    monkeypatch.setattr(VLLMWriter, "problems", lambda _: [])
    vllm = "rollouts.writer={_component_: kdtune.rollouts.VLLMWriter}"
    assert writing_of(planned(vllm)) is None


def test_a_teacher_on_another_device_writes_there() -> None:
    cfg = config("teacher_device=cuda:1", source="tiny/seqkd")
    here, there = (planned("teacher_device=cuda:1", source="tiny/seqkd", device_type="cuda"),
                   make_teacher_estimate(cfg, World(CPU), 1, device_type="cuda"))  # fmt: skip
    assert writing_of(here) is None
    own = writing_of(there)
    assert own is not None and own.cache == writing_of(planned(source="tiny/seqkd", device_type="cuda")).cache


def test_the_command_line_shows_it_and_says_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    large = ["model.max_seq_len=8192", "rollouts.max_new_tokens=8000", "batch_size=1", "gradient_accumulation_steps=64"]
    assert run_command(["plan", "tiny/on_policy", "device=cuda", *large]) == 0
    text = capsys.readouterr().out
    assert "... keys and values" in text
    assert "The peak is in the writing of the texts." in text
    (change, *_) = changes_to_fit(
        config(*large), 0, lambda cfg: make_estimate(cfg, World(CPU), device_type="cuda").peak.total
    )
    assert change.overrides == "rollouts.slots=16" and change.after < 0.6 * change.before


def test_the_cache_of_compiled_forwards_stays_on_a_gpu() -> None:
    plain, compiled = (planned(*more, device_type="cuda") for more in ((), ("rollouts.compile=true",)))
    phase = writing_of(compiled)
    assert phase is not None and {one.cache for one in compiled.phases} == {phase.cache}
    assert {one.cache for one in plain.phases} == {0, writing_of(plain).cache}
    # 32 slots of 512 places, however few texts and tokens there are; and as many prompts of 254 tokens as 2,048 are.
    assert phase.cache == 2 * (2 * 8 * 4) * 2 * (32 * 512 + 8 * 254)
    # On a CPU they are thrown away: 32 rows of 256 places, and a prompt.
    on_cpu = planned("rollouts.compile=true")
    assert {one.cache for one in on_cpu.phases} == {0, 2 * (2 * 8 * 4) * 2 * (32 * 256 + 254)}
