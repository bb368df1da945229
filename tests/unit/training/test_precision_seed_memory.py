import os
import random

import numpy as np
import pytest
import torch

from kdtune.errors import ConfigError
from kdtune.models import dtype_from_name
from kdtune.training import device_problems, memory_stats, resolve_device, set_seed


def test_dtypes():
    assert dtype_from_name("fp32") is torch.float32
    assert dtype_from_name("bf16") is torch.bfloat16
    with pytest.raises(ConfigError, match=r"dtype=fp16: not supported.*loss scaler.*use bf16"):
        dtype_from_name("fp16")
    with pytest.raises(ConfigError, match="dtype=int8: unknown; use fp32 or bf16"):
        dtype_from_name("int8")


def test_null_takes_cuda_then_mps_then_cpu(monkeypatch):
    for cuda, mps, expected in [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert resolve_device(None) == torch.device(expected)


def test_devices(monkeypatch):
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="device=cuda:2: this machine has 2 CUDA devices"):
        resolve_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"device=cuda: torch .* sees no CUDA device; use device=cpu"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device=mps: no Apple GPU here"):
        resolve_device("mps")
    for name in ("tpu", "cuda:x", "cpu:1", ""):
        with pytest.raises(ConfigError, match="unknown; use cpu, cuda"):
            resolve_device(name)


def test_device_problems_collects_all(monkeypatch):
    assert device_problems("cpu", "bf16") == []
    assert [problem.split(":")[0] for problem in device_problems("tpu", "fp16")] == ["device=tpu", "dtype=fp16"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    (problem,) = device_problems("cuda", "bf16")
    assert "Old GPU (compute capability 7.5) has no bf16" in problem
    assert device_problems("cuda", "fp32") == []


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seed_repeats_all_three_generators():
    set_seed(3)
    first = draws()
    set_seed(3)
    assert draws() == first
    set_seed(4)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_a_seed_out_of_range_is_refused():
    with pytest.raises(ConfigError, match=r"seed=-1: must be between 0 and 4294967295"):
        set_seed(-1)


def test_deterministic_modes(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        for mode, number in [("warn", 1), (2, 2), ("error", 2), (0, 0)]:
            set_seed(0, mode)
            assert torch.get_deterministic_debug_mode() == number
            assert torch.backends.cudnn.deterministic is (number > 0)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        with pytest.raises(ConfigError, match=r"cudnn_deterministic_mode=loud: unknown; use null, default"):
            set_seed(0, "loud")
    finally:
        torch.set_deterministic_debug_mode("default")


def test_memory_on_cpu_is_the_resident_peak():
    stats = memory_stats("cpu")
    with open("/proc/self/status", encoding="ascii") as status:
        peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    assert stats == {"peak_memory_rss": pytest.approx(peak_kib / 2**20, rel=0.01)}
