"""The engine fingerprint: same fingerprint and same request, same bytes.

A hash over everything that can move a bit: the software's versions, the device, the precision, and a digest of the
loaded weights.
"""

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version

import torch

WHOLE = 2**20  # tensors up to this many elements are digested whole
LIBRARIES = ("srpo-server", "torch", "diffusers", "transformers", "pillow", "numpy")


def fingerprint(device: str, precision: str, parts: Mapping[str, torch.nn.Module]) -> str:
    """32 hexadecimal digits."""
    facts = {
        "libraries": {name: version(name) for name in LIBRARIES},
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": device,
        "cuda": torch.version.cuda,
        "precision": precision,
        "weights": {name: digest(part) for name, part in sorted(parts.items())},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def digest(module: torch.nn.Module) -> str:
    """Names, shapes and contents of all tensors; of a large tensor, evenly spaced elements (24 GB take seconds)."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        stride = max(1, flat.numel() // WHOLE)
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(flat[::stride].contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return total.hexdigest()
