"""Whether bfloat16 pays on this machine."""

from __future__ import annotations

from functools import cache

import torch

__all__ = ["fast_bf16"]


@cache
def fast_bf16() -> bool:
    """Does the GPU, or where there is none the processor, compute in bfloat16 at more than float32's speed?

    A processor without such instructions (AVX512-BF16, AMX) emulates them, many times slower than float32. The profiles
    ask here; every run's recipe says what it used.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
