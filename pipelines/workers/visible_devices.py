"""Which CUDA devices a worker's process sees. No torch."""

from collections.abc import Mapping
from dataclasses import replace

from pipelines.engine.base import EngineConfig

VISIBLE = "CUDA_VISIBLE_DEVICES"


def isolate_devices(config: EngineConfig, environment: Mapping[str, str]) -> tuple[EngineConfig, dict[str, str]]:
    """The worker's configuration and environment, with which it sees only its own numbered CUDA devices.

    A fault of another device, or a library that takes the first device it finds, then cannot affect the worker. A
    device that `CUDA_VISIBLE_DEVICES` hides stays hidden; the variable set to an empty value hides all.
    """
    indices = [device.removeprefix("cuda:") for device in config.device.split("+")]
    if not all(index.isdecimal() for index in indices):
        return config, dict(environment)
    names = indices
    if (visible := environment.get(VISIBLE)) is not None:
        listed = [name for name in visible.split(",") if name]
        names = [listed[int(index)] if int(index) < len(listed) else "none" for index in indices]
    device = "+".join(f"cuda:{index}" for index in range(len(names))) if len(names) > 1 else "cuda"
    return replace(config, device=device), {**environment, VISIBLE: ",".join(names)}
