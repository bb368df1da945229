"""vLLM's names, arguments and states (0.33), with whole forwards of transformers in place of its engine."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, make_dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

ENGINE_ARGUMENTS = {
    "enforce_eager", "load_format", "logprobs_mode", "max_model_len", "max_num_batched_tokens", "max_num_seqs", "enable_sleep_mode",
    "enable_prefix_caching", "distributed_executor_backend", "kv_cache_dtype", "model_impl", "cpu_offload_gb", "block_size",
}  # fmt: skip
EngineArgs = make_dataclass("EngineArgs", sorted(ENGINE_ARGUMENTS))
made: list["LLM"] = []  # for a test to look at


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


class Worker:
    """What the methods of `collective_rpc` are found on."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def reload_weights(
        self,
        weights_iterator: Iterable[tuple[str, Tensor]] | None = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        assert weights_iterator is not None and weights_path is None and is_checkpoint_format
        for name, weight in weights_iterator:
            target = self.model.get_parameter(name)
            assert target.shape == weight.shape, name
            target.data.copy_(weight)


class LLM:
    def __init__(
        self,
        model: str,
        *,
        skip_tokenizer_init: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        seed: int = 0,
        gpu_memory_utilization: float = 0.9,
        **kwargs: Any,
    ) -> None:
        assert kwargs.keys() <= ENGINE_ARGUMENTS, kwargs
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"  # else collective_rpc pickles its arguments
        assert kwargs["load_format"] == "dummy" and skip_tokenizer_init and tensor_parallel_size == 1
        assert kwargs.get("logprobs_mode", "raw_logprobs") == "raw_logprobs"
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(model)
        self.dtype, self.settings, self.calls = getattr(torch, dtype), kwargs, [(gpu_memory_utilization, dtype)]
        self.worker = Worker(AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval())
        self.awake, self.is_prefix_cache_old = {"weights", "kv_cache"}, False
        self._discard()
        made.append(self)

    def _discard(self) -> None:
        for parameter in self.worker.model.parameters():
            parameter.data.fill_(math.nan)

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        assert self.settings["enable_sleep_mode"] and level == 2 and mode == "abort"
        self.calls.append("sleep")
        self.awake = set()
        self._discard()

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.calls.append(f"wake_up {tags}")
        self.awake |= {"weights", "kv_cache"} if tags is None else set(tags)

    def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        assert "weights" in self.awake
        self.calls.append(method)
        self.is_prefix_cache_old = True
        return [getattr(self.worker, method)(*args, **(kwargs or {}))]

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self.is_prefix_cache_old = False
        return True

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[dict[str, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: Any = None,
    ) -> list[RequestOutput]:
        assert self.awake == {"weights", "kv_cache"} and not self.is_prefix_cache_old
        assert isinstance(sampling_params, Sequence) and len(prompts) == len(sampling_params)
        self.calls.append("generate")
        pairs = zip(prompts, sampling_params, strict=True)
        return [
            RequestOutput(str(number), prompt["prompt_token_ids"], [self._text(prompt["prompt_token_ids"], one)])
            for number, (prompt, one) in enumerate(pairs)
        ]

    def _text(self, prompt: list[int], params: SamplingParams) -> CompletionOutput:
        assert params.n == 1 and params.logprobs == 0 and not params.detokenize and params.ignore_eos
        assert len(prompt) + params.max_tokens <= self.settings["max_model_len"]
        generator = torch.Generator().manual_seed(params.seed)
        ids: list[int] = []
        log_probs: list[dict[int, Logprob]] = []
        while len(ids) < params.max_tokens:
            logits = self.worker.model(torch.tensor([prompt + ids])).logits[0, -1].float()
            token = self._drawn(logits, params, generator)
            ids.append(token)
            log_probs.append({token: Logprob(float(logits.log_softmax(-1)[token]))})
            if token in params.stop_token_ids:
                return CompletionOutput(0, "", ids, None, log_probs, "stop", token)
        return CompletionOutput(0, "", ids, None, log_probs, "length", None)

    def _drawn(self, logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
        if params.temperature < 1e-5:
            return int(logits.argmax())
        assert params.top_k == 0 and params.top_p == 1.0
        return int(torch.multinomial((logits / params.temperature).softmax(-1), 1, generator=generator))
