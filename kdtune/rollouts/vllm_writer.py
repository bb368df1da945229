"""vLLM in place of kdtune's own decoder for the text that the student writes. Needs the [vllm] extra; names as in vLLM 0.20 to 0.33."""

import importlib.util
import inspect
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kdtune._assets import did_you_mean
from kdtune.checkpoint.save import description, file_weights
from kdtune.distributed import World, full_tensor, reshard
from kdtune.errors import ConfigError, TrainingError
from kdtune.generation import Completion, Sampling
from kdtune.generation.generate import new_token_limits
from kdtune.models import Transformer, dtype_from_name

# Arguments of `vllm.LLM` that are given here: without them it would read weights of its own, or give other numbers back.
_OWN = ("model", "load_format", "skip_tokenizer_init", "dtype", "logprobs_mode", "gpu_memory_utilization", "enable_sleep_mode",
        "distributed_executor_backend", "tensor_parallel_size", "quantization")  # fmt: skip


class VLLMWriter:
    """The student's text by vLLM (arXiv 2309.06180), in the process that trains: the key `writer` of `kdtune.rollouts.Rollouts`.

    Before each writing vLLM is given all weights of the student, with the adapters merged into them. Token ids go in and come out. A text
    depends on its seed, but also on its neighbours in the last bits, and is another than that of kdtune's decoder.

    Args:
        gpu_memory_utilization: share of the device's memory that vLLM takes for weights, cache and graphs, above 0 and up to 1.
        sleeps: vLLM gives that memory back while the student trains; needs CUDA.
        dtype: that vLLM rounds the weights to and computes in, such as bf16; None: the student's.
        options: other arguments of `vllm.LLM`, such as `enforce_eager`, `max_model_len` and `max_num_seqs`; None: none. ConfigError if
            one is given here already.
    """

    def __init__(self, gpu_memory_utilization: float = 0.3, *, sleeps: bool = True, dtype: str | None = None,
                 options: Mapping[str, Any] | None = None) -> None:  # fmt: skip
        if not 0 < gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization={gpu_memory_utilization}: must be above 0 and at most 1")
        if own := sorted(set(options or {}) & {*_OWN}):
            raise ConfigError(f"options.{own[0]}: is given to vLLM by kdtune; leave it out")
        self._share, self._sleeps, self._options = gpu_memory_utilization, sleeps, dict(options or {})
        self._dtype = dtype_from_name(dtype) if dtype else None

    def problems(self) -> list[str]:
        """Return why it cannot write on this machine, one sentence each."""
        if importlib.util.find_spec("vllm") is None:
            return ["needs vLLM, which is not installed; run pip install 'kdtune[vllm]', or ~rollouts.writer"]
        found = []
        if self._sleeps and not torch.cuda.is_available():
            found.append("sleeps=true: needs CUDA, and torch finds no such device here; set sleeps: false")
        if self._options:
            vllm = _imported()
            allowed = {*inspect.signature(vllm.LLM).parameters, *(one.name for one in fields(vllm.EngineArgs))}
            found += [
                f"options.{name}: is no argument of vllm.LLM in the version that is installed{did_you_mean(name, allowed)}"
                for name in sorted(self._options.keys() - allowed)
            ]
        return found

    def start(self, student: Transformer, world: World, *, longest: int, base: str | Path | None = None) -> None:
        """Start a vLLM in each process of the `world`, without weights.

        `student` is read before each writing; `longest`: tokens of the longest text, with its prompt; `base`: folder of the student's
        files, whose config is kept, if there is one.
        """
        self._student, self._longest = student, min(longest, self._options.get("max_model_len") or longest)
        reshard(student)
        self._folder = tempfile.TemporaryDirectory(prefix="kdtune-vllm-")
        description(student, base=base, tokenizer=None)(Path(self._folder.name))
        # With several processes it is torchrun that has started them.
        executor = {"distributed_executor_backend": "external_launcher"} if world.size > 1 else {}
        settings: dict[str, Any] = {"max_model_len": self._longest} | self._options | executor
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):  # which vLLM seeds
            self._llm = _imported().LLM(
                self._folder.name, load_format="dummy", skip_tokenizer_init=True, gpu_memory_utilization=self._share,
                dtype=str(self._dtype or student.dtype).removeprefix("torch."), logprobs_mode="raw_logprobs",
                enable_sleep_mode=self._sleeps, **settings,
            )  # fmt: skip
        self._sleep()

    @torch.no_grad()
    def complete(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Collection[int], sampling: Sampling,
                 seeds: Sequence[int]) -> list[Completion]:  # fmt: skip
        """Return a completion of each of the `prompts`, with log-probabilities, in order; all processes call it, also without prompts.

        `max_new_tokens`, `stop_ids`, `sampling` and `seeds` are those of `kdtune.generation.complete`. Raises DataError if a prompt
        leaves no room, TrainingError if vLLM breaks off a text.
        """
        from vllm import SamplingParams

        limits = new_token_limits(prompts, max_new_tokens, self._longest)
        self._take_weights()
        asked = [
            SamplingParams(temperature=sampling.temperature, top_k=sampling.top_k or 0, top_p=sampling.top_p or 1.0, seed=seed,
                           max_tokens=limit, stop_token_ids=sorted(stop_ids), ignore_eos=True, logprobs=0, detokenize=False)
            for seed, limit in zip(seeds, limits, strict=True)
        ]  # fmt: skip
        texts = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        found = self._llm.generate(texts, asked, use_tqdm=False) if texts else []
        self._sleep()
        return [_completion(one.outputs[0], stop_ids) for one in found]

    def _take_weights(self) -> None:
        reshard(self._student)
        if self._sleeps:
            torch.cuda.empty_cache()  # vLLM takes its memory from the device, not from torch
            self._llm.wake_up(tags=["weights"])
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._weights()})
        if self._sleeps:
            self._llm.wake_up(tags=["kv_cache"])
        self._llm.reset_prefix_cache()  # of the weights before

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parts in file_weights(self._student).items():
            whole = [full_tensor(part()) for part in parts]
            yield name, whole[0] if len(whole) == 1 else torch.cat(whole)

    def _sleep(self) -> None:
        if self._sleeps:
            self._llm.sleep(level=2)  # weights are thrown away: new ones come before the next text


def _imported() -> ModuleType:
    """Return vLLM."""
    # In this process, or it could not be given tensors. vLLM reads it when it is imported.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return importlib.import_module("vllm")


def _completion(one: Any, stop_ids: Collection[int]) -> Completion:
    """Return a text of vLLM: an end that the model has written is its last id, one that was cut has none."""
    ids = list(one.token_ids)
    if one.finish_reason not in ("stop", "length"):
        raise TrainingError(
            f"vLLM has broken off a text after {len(ids)} tokens (finish_reason={one.finish_reason!r}); see its log, or ~rollouts.writer"
        )
    log_probs = [of_place[token].logprob for of_place, token in zip(one.logprobs, ids, strict=True)]
    return Completion(ids, ids[-1] in stop_ids, log_probs)
