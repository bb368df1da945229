"""Weight dtypes by the names that configs use."""

import torch

from kdtune.errors import ConfigError

_DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}


def dtype_from_name(name: str) -> torch.dtype:
    """Return the torch dtype for a config's `dtype`: "fp32" or "bf16" (also "float32" and "bfloat16").

    Raises:
        ConfigError: any other name, including fp16, whose gradients below 6e-8 would need a loss scaler.
    """
    if name in _DTYPES:
        return _DTYPES[name]
    if name in {"fp16", "float16", "half"}:
        raise ConfigError(
            f"dtype={name}: not supported, because gradients below 6e-8 become 0 in fp16 without a loss scaler; "
            "use bf16 (the same memory, the range of fp32) or fp32"
        )
    raise ConfigError(f"dtype={name}: unknown; use fp32 or bf16")
