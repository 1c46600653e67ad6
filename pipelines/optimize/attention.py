"""Which attention kernel of this torch and diffusers is the fastest on this device, among those that are right."""

import time
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

# None of them downloads, and none computes in fewer bits than its inputs have.
CANDIDATES = ("native", "_native_cudnn", "_native_flash", "_native_efficient", "flash", "_flash_3")
TOKENS = {"cuda": 3392, "cpu": 320}  # on CUDA: 1440x512 and 512 text tokens
ROUNDINGS = 16  # how many roundings of the type a kernel may be away from the plain computation
REPEATS = 5


@torch.inference_mode()
def fastest(transformer: Any) -> str:
    """The name of the backend. What raises or computes something else is passed over; `native` is always there."""
    config, device, dtype = transformer.config, transformer.device, transformer.dtype
    shape = (1, TOKENS.get(device.type, 320), config.num_attention_heads, config.attention_head_dim)
    chance = torch.Generator("cpu").manual_seed(1)
    query, key, value = (torch.randn(shape, generator=chance).to(device, dtype) for _ in range(3))
    right = dispatch_attention_fn(
        query.float(), key.float(), value.float(), backend=AttentionBackendName("_native_math")
    )
    allowed = ROUNDINGS * torch.finfo(dtype).eps * right.abs().max()
    seconds = {"native": float("inf")}
    for name in CANDIDATES:
        try:
            backend = AttentionBackendName(name)
            close = (dispatch_attention_fn(query, key, value, backend=backend).float() - right).abs().max() <= allowed
            if close:  # a NaN is not
                seconds[name] = min(timed(query, key, value, backend) for _ in range(REPEATS))
        except torch.AcceleratorError:  # the device is lost, and with it all that would come after
            raise
        except (RuntimeError, ValueError, TypeError, ImportError, NotImplementedError):
            continue  # not built into this torch, not installed, or not for this device or type
    return min(seconds, key=lambda name: seconds[name])


def timed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, backend: AttentionBackendName) -> float:
    """Seconds of one call, the device waited for."""
    if query.is_cuda:
        torch.cuda.synchronize(query.device)
    start = time.perf_counter()
    dispatch_attention_fn(query, key, value, backend=backend)
    if query.is_cuda:
        torch.cuda.synchronize(query.device)
    return time.perf_counter() - start
