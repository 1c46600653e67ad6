"""One image on several devices: diffusers' context parallelism (Ulysses), a process for each device.

Every process holds the whole engine and takes the same verbs in the same order, so each knows every sample; inside the
transformer each works on its share of the tokens and a part of the attention's heads, and at the end all have the whole
velocity. The worker is the first of them: it tells the others what it does, and it alone decodes. It is not exact: an
image differs in its last bits from that of one device, so the number of devices is part of the fingerprint.
"""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

from pipelines.engine.base import Engine, EngineConfig, Pixels, Report, Thumbnail
from pipelines.loading.placement import Placement
from pipelines.request import ImageRequest
from pipelines.workers.step_loop import DEVICE_LOST
from pipelines.workers.worker import die_with_parent

Meet = Callable[[Any, int, Placement], None]  # called with the loaded transformer, its text tokens and the placement
Loader = Callable[[EngineConfig, Report, Meet], Engine[Any]]
GRACE = 10.0  # seconds
SPLIT = {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)}
PLAN = {  # by submodule, not by the whole forward pass, which a skipped step does not call
    "x_embedder": SPLIT,
    "context_embedder": SPLIT,
    "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
}


class NotTogether(Exception):
    """These devices cannot draw one image together."""


class ParallelEngine:
    """The first process's engine, which tells the others what it does."""

    def __init__(self, engine: Engine[Any], others: Sequence[Connection]) -> None:
        self.info = engine.info
        self.steps_left = engine.steps_left
        self.batch_limit = engine.batch_limit
        self.select_batch = engine.select_batch
        self._engine = engine
        self._others = others
        self._numbers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # of the samples that somebody still wants
        self._next = 0
        self._torn = False

    def prepare(self, request: ImageRequest) -> list[Any]:
        with self._all("prepare", self._next, request):
            samples = self._engine.prepare(request)
        self._numbers.update(zip(samples, range(self._next, self._next + len(samples)), strict=True))
        self._next += len(request.seeds)
        return samples

    def step(self, samples: Sequence[Any]) -> None:
        with self._all("step", [self._numbers[sample] for sample in samples], list(self._numbers.values())):
            self._engine.step(samples)

    def preview(self, sample: Any, side: int) -> Thumbnail | None:
        return self._engine.preview(sample, side)

    def finish(self, sample: Any) -> Pixels:
        return self._engine.finish(sample)

    def failure(self, error: Exception) -> str | None:
        """What failed here may have succeeded elsewhere: then only new processes agree again."""
        return None if self._torn else self._engine.failure(error)

    @contextmanager
    def _all(self, *what: Any) -> Iterator[None]:
        """Do with the others what is inside."""
        for other in self._others:
            other.send(what)
        try:
            yield
        except BaseException:
            self._torn = True
            raise


def load_group(config: EngineConfig, report: Report, load: Loader) -> ParallelEngine:
    """An engine on all devices of `config.device`, as in `cuda:0+cuda:1`; the death of one process ends all."""
    devices = config.device.split("+")
    context = get_context("spawn")
    others, ends = [], []
    # Stays: groups and NCCL ask it for each other whenever they first speak.
    place = f"file://{tempfile.mkdtemp(prefix='srpo-')}/meeting"
    for rank in range(1, len(devices)):
        ours, theirs = context.Pipe()
        process = context.Process(target=follow, args=(config, rank, place, theirs, load), daemon=True)
        process.start()
        theirs.close()  # so that the death of the other end is seen here
        others.append(ours)
        ends.append(process.sentinel)

    def meet(transformer: Any, text_tokens: int, placement: Placement) -> None:
        check(transformer, text_tokens, placement, len(devices))
        for device, other in zip(devices[1:], others, strict=True):
            try:
                failed = other.recv()
            except EOFError:
                failed = "its process has died"
            if failed is not None:
                raise NotTogether(f"{device}: {failed}")
        threading.Thread(target=end_with, args=(ends, loaded), name="others", daemon=True).start()
        join(devices, 0, place)
        share(transformer, text_tokens)

    loaded = threading.Event()
    engine = load(own(config, devices[0]), report, meet)
    loaded.set()
    return ParallelEngine(engine, others)


def follow(config: EngineConfig, rank: int, place: str, told: Connection, load: Loader) -> None:
    """Do what the first process does, without end."""
    die_with_parent()
    devices = config.device.split("+")

    def meet(transformer: Any, text_tokens: int, placement: Placement) -> None:
        check(transformer, text_tokens, placement, len(devices))
        told.send(None)
        join(devices, rank, place)
        share(transformer, text_tokens)

    try:
        engine = load(own(config, devices[rank]), lambda *_: None, meet)
    except Exception as error:
        told.send(f"{type(error).__name__}: {error}")  # read only by who still waits for this one
        raise
    samples: dict[int, Any] = {}
    while True:
        match told.recv():
            case "prepare", first, request:
                samples |= dict(enumerate(engine.prepare(request), first))
            case "step", numbers, wanted:
                samples = {number: samples[number] for number in wanted}
                engine.step([samples[number] for number in numbers])


def end_with(ends: list[int], loaded: threading.Event) -> None:
    """End this process when another one has ended; while loading, after what went wrong here too could be told."""
    wait(ends)
    if not loaded.is_set():
        time.sleep(GRACE)
    os._exit(DEVICE_LOST)


def own(config: EngineConfig, device: str) -> EngineConfig:
    """For one process. Without batches: each would judge its own tokens' bits."""
    return replace(config, device=device, batch_sizes=())


def join(devices: Sequence[str], rank: int, place: str) -> None:
    """Meet the other processes, all of this machine."""
    if devices[rank] == "cpu":
        if sys.platform == "linux":
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # else it asks the network for this machine's name
        dist.init_process_group("gloo", init_method=place, rank=rank, world_size=len(devices))
    else:
        torch.cuda.set_device(devices[rank])
        dist.init_process_group("nccl", init_method=place, rank=rank, world_size=len(devices))


def world() -> int:
    """The number of processes that draw together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def check(transformer: Any, text_tokens: int, placement: Placement, count: int) -> None:
    """Raises `NotTogether` for a model or placement that cannot be shared."""
    heads = transformer.config.num_attention_heads
    if heads % count or text_tokens % count or 4 % count:  # a size is a multiple of 32 pixels: of 4 tokens
        raise NotTogether(f"{count} devices cannot share an image of this model: take 2 or 4 (it has {heads} heads)")
    if "transformer" in placement.way.streamed:
        raise NotTogether(f"devices that share an image need the whole model on each, and here it is {placement}")


def share(transformer: Any, text_tokens: int) -> None:
    """Split the transformer's tokens between the processes that have met."""
    count = world()
    with patch.object(torch.accelerator, "device_count", return_value=count):  # 0 on a CPU, which diffusers divides by
        transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=count), cp_plan=PLAN)

    def own_ids(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        """The ids of this process's tokens; text and image are split each by itself."""
        parts = inputs[0][:text_tokens], inputs[0][text_tokens:]
        return (torch.cat([part.chunk(count)[dist.get_rank()] for part in parts]),)

    transformer.pos_embed.register_forward_pre_hook(own_ids)
