"""One image on several devices: diffusers' context parallelism (Ulysses), with a process for each device.

Every process holds the whole engine and carries out the same calls in the same order, so each knows every sample.
Inside the transformer each computes a part of the tokens and of the attention's heads; at the end all have the whole
velocity. The worker is the leader: it sends its calls to the followers, and it alone decodes. This is not exact: an
image differs in its last bits from that of one device, so the number of devices is part of the fingerprint.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any
from weakref import WeakKeyDictionary

import structlog
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

from pipelines.child_process import DEVICE_LOST, die_with_parent
from pipelines.engine.base import Engine, EngineConfig, Pixels, Report, Thumbnail
from pipelines.loading.placement import Placement
from pipelines.logs import configure, format_error
from pipelines.request import ImageRequest

JoinGroup = Callable[[Any, int, Placement], None]  # takes the loaded transformer, its text tokens and the placement
Loader = Callable[[EngineConfig, Report, JoinGroup], Engine[Any]]
GRACE = 10.0  # seconds that a process gets to report why it failed
RECENT = 64  # prompts that a message of an error may quote
log = structlog.get_logger("srpo")
SPLIT = {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)}
PLAN = {  # by submodule: a skipped step does not call the whole forward pass
    "x_embedder": SPLIT,
    "context_embedder": SPLIT,
    "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
}


class NotTogether(Exception):
    """These devices cannot draw one image together."""


class ParallelEngine:
    """The leader's engine, which sends its calls to the followers."""

    def __init__(self, engine: Engine[Any], followers: Sequence[Connection]) -> None:
        self.info = engine.info
        self.steps_left = engine.steps_left
        self.batch_limit = engine.batch_limit
        self.select_batch = engine.select_batch
        self.statistics = engine.statistics
        self._engine = engine
        self._followers = followers
        self._numbers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # of the samples in use
        self._next = 0
        self._diverged = False

    def prepare(self, request: ImageRequest) -> list[Any]:
        with self._on_all("prepare", self._next, request):
            samples = self._engine.prepare(request)
        self._numbers.update(zip(samples, range(self._next, self._next + len(samples)), strict=True))
        self._next += len(request.seeds)
        return samples

    def step(self, samples: Sequence[Any]) -> None:
        with self._on_all("step", [self._numbers[sample] for sample in samples], list(self._numbers.values())):
            self._engine.step(samples)

    def preview(self, sample: Any, side: int) -> Thumbnail | None:
        return self._engine.preview(sample, side)

    def finish(self, sample: Any) -> Pixels:
        return self._engine.finish(sample)

    def failure(self, error: Exception) -> str | None:
        """A call that failed here may have succeeded elsewhere: only new processes are in the same state again."""
        return None if self._diverged else self._engine.failure(error)

    @contextmanager
    def _on_all(self, *call: Any) -> Iterator[None]:
        """Let the followers carry out the call that is made inside."""
        for follower in self._followers:
            follower.send(call)
        try:
            yield
        except BaseException:
            self._diverged = True
            raise


def load_group(config: EngineConfig, report: Report, load: Loader) -> ParallelEngine:
    """An engine on all devices of `config.device`, as in `cuda:0+cuda:1`; the death of one process ends all."""
    devices = config.device.split("+")
    context = get_context("spawn")
    followers, sentinels = [], []
    # Groups and NCCL read the file whenever two processes talk for the first time: it lives as long as this process.
    store = f"file:///proc/{os.getpid()}/fd/{os.memfd_create('store')}"
    for rank in range(1, len(devices)):
        ours, theirs = context.Pipe()
        process = context.Process(target=run_follower, args=(config, rank, store, theirs, load), daemon=True)
        process.start()
        theirs.close()  # otherwise the follower's death would not be seen here
        followers.append(ours)
        sentinels.append(process.sentinel)

    def join(transformer: Any, text_tokens: int, placement: Placement) -> None:
        validate_group(transformer, text_tokens, placement, len(devices))
        for device, follower in zip(devices[1:], followers, strict=True):
            try:
                failure = follower.recv()
            except EOFError:
                failure = "its process has died"
            if failure is not None:
                raise NotTogether(f"{device}: {failure}")
        threading.Thread(target=exit_with_followers, args=(sentinels, loaded), name="followers", daemon=True).start()
        connect(devices, 0, store)
        split_tokens(transformer, text_tokens)

    loaded = threading.Event()
    engine = load(configure_process(config, devices[0]), report, join)
    loaded.set()
    return ParallelEngine(engine, followers)


def run_follower(config: EngineConfig, rank: int, store: str, leader: Connection, load: Loader) -> None:
    """Carry out the leader's calls until this process is ended."""
    die_with_parent()
    configure(config.log_format)
    devices = config.device.split("+")

    def join(transformer: Any, text_tokens: int, placement: Placement) -> None:
        validate_group(transformer, text_tokens, placement, len(devices))
        leader.send(None)
        connect(devices, rank, store)
        split_tokens(transformer, text_tokens)

    try:
        engine = load(configure_process(config, devices[rank]), lambda *_: None, join)
    except Exception as error:
        leader.send(f"{type(error).__name__}: {error}")  # nobody reads it after the group has connected
        raise
    follow(leader, engine)


def follow(leader: Connection, engine: Engine[Any]) -> None:
    """Carry out the leader's calls, without end. An error ends this process, and with it the whole group.

    What is logged then quotes no prompt: an uncaught exception would print its message as it is.
    """
    samples: dict[int, Any] = {}
    prompts: deque[str] = deque(maxlen=RECENT)
    try:
        while True:
            match leader.recv():
                case "prepare", first, request:
                    prompts.append(request.prompt)
                    samples |= dict(enumerate(engine.prepare(request), first))
                case "step", numbers, in_use:
                    samples = {number: samples[number] for number in in_use}
                    engine.step([samples[number] for number in numbers])
    except Exception as error:  # noqa: BLE001 - whatever the device raises, only a new process cures it
        log.error("follower_failed", exception=format_error(error, prompts))
        os._exit(DEVICE_LOST)


def exit_with_followers(sentinels: list[int], loaded: threading.Event) -> None:
    """End this process when a follower has ended; while loading, only after this one could report its own failure."""
    wait(sentinels)
    if not loaded.is_set():
        time.sleep(GRACE)
    os._exit(DEVICE_LOST)


def configure_process(config: EngineConfig, device: str) -> EngineConfig:
    """The configuration of one process. Without batches: each would compare the bits of its own tokens only."""
    return replace(config, device=device, batch_sizes=())


def connect(devices: Sequence[str], rank: int, store: str) -> None:
    """Form the group with the other processes, all on this machine."""
    if devices[rank] == "cpu":
        if sys.platform == "linux":
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # otherwise gloo resolves this machine's name by the network
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=len(devices))
    else:
        torch.cuda.set_device(devices[rank])
        dist.init_process_group("nccl", init_method=store, rank=rank, world_size=len(devices))


def group_size() -> int:
    """The number of processes that draw each image together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def validate_group(transformer: Any, text_tokens: int, placement: Placement, count: int) -> None:
    """Raises `NotTogether` for a model or placement that cannot be split between devices."""
    heads = transformer.config.num_attention_heads
    if heads % count or text_tokens % count or 4 % count:  # a size is a multiple of 32 pixels: of 4 tokens
        raise NotTogether(f"{count} devices cannot share an image of this model: take 2 or 4 (it has {heads} heads)")
    if "transformer" in placement.spec.streamed:
        raise NotTogether(f"devices that share an image need the whole model on each, and here it is {placement}")


def split_tokens(transformer: Any, text_tokens: int) -> None:
    """Split the transformer's tokens between the processes of the group."""
    count = group_size()
    if torch.accelerator.device_count() == 0:  # diffusers takes the rank modulo this number, also on a CPU
        torch.accelerator.device_count = lambda: count
    transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=count), cp_plan=PLAN)

    def select_ids(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        """The ids of this process's tokens; text and image are split separately."""
        parts = inputs[0][:text_tokens], inputs[0][text_tokens:]
        return (torch.cat([part.chunk(count)[dist.get_rank()] for part in parts]),)

    transformer.pos_embed.register_forward_pre_hook(select_ids)
