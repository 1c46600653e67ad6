"""The training loop of every stage: a time budget, a moving average of the weights, resuming from a checkpoint."""

import copy
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

COOLDOWN = 0.3  # of the time, in which the learning rate falls in a line; a longer run may so resume an ended one's
SAVED_EVERY = 120.0  # seconds
CPU = torch.cpu.get_capabilities()
# Of products: bfloat16 takes forty times as long as float32 on CPUs that have no instructions for it.
FAST = torch.cuda.is_available() or CPU.get("avx512_bf16") or CPU.get("amx_bf16")
PRECISION = torch.bfloat16 if FAST else torch.float32


@dataclass(frozen=True, slots=True)
class Stage:
    """What is trained, and how: `minutes` in all (earlier runs counted in), or `limit` steps of this run."""

    name: str
    file: Path
    model: torch.nn.Module
    optimizers: list[torch.optim.Optimizer]
    lr: float
    warmup: int
    ema: float
    minutes: float
    limit: int | None = None


class Muon(torch.optim.Optimizer):
    """Muon (arXiv 2502.16982) at AdamW's step size, for matrices, and for kernels of convolutions as matrices with a
    row an output channel.

    torch's own takes matrices only, and always multiplies them in bfloat16. Measured on the decoder: after 60 steps as
    far as AdamW after 180; on the transformer: after 277 as far as AdamW after 368.
    """

    def __init__(
        self, kernels: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(kernels, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for kernel in group["params"]:
                gradient = kernel.grad.contiguous()
                average = self.state[kernel].setdefault("average", torch.zeros_like(gradient))
                average.lerp_(gradient, 1 - group["momentum"])
                matrix = orthogonal(gradient.lerp(average, group["momentum"]).flatten(1))
                size = 0.2 * max(matrix.shape) ** 0.5  # of AdamW's steps
                kernel.mul_(1 - group["lr"] * group["weight_decay"])
                kernel.add_(matrix.view(kernel.shape), alpha=-group["lr"] * size)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrix, roughly: five Newton-Schulz steps in `PRECISION`."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix / (matrix.norm() + 1e-7)).to(PRECISION)
    x = x.T if tall else x
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    result: torch.Tensor = (x.T if tall else x).float()
    return result


def mixed_precision(device: str) -> torch.autocast:
    """Products in `PRECISION` inside."""
    return torch.autocast(device, PRECISION, enabled=PRECISION is not torch.float32)


def fast_attention(device: str) -> AbstractContextManager[None]:
    """Attention as plain products on a CPU: of a hundred tokens, with gradients, far faster than the fused kind."""
    if device != "cpu":
        return nullcontext()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    return sdpa_kernel(SDPBackend.MATH)


def train(stage: Stage, loss_at: Callable[[float, int], torch.Tensor], show: Callable[[float], str]) -> list[float]:
    """Lower `loss_at(progress from 0 to 1, step)` until the time is spent. Returns the losses of this run."""
    model, optimizers = stage.model, stage.optimizers
    ema, step, spent = copy.deepcopy(model.state_dict()), 0, 0.0
    if stage.file.exists():
        saved = torch.load(stage.file, weights_only=True, map_location=next(model.parameters()).device)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        ema, step, spent = saved["ema"], saved["step"], saved["spent"]

    def save() -> None:
        """Written so that a killed run leaves the last whole state."""
        partial = stage.file.with_suffix(".partial")
        states = [optimizer.state_dict() for optimizer in optimizers]
        clock = time.monotonic() - start
        torch.save(
            {"model": model.state_dict(), "optimizers": states, "ema": ema, "step": step, "spent": clock}, partial
        )
        partial.rename(stage.file)

    losses: list[float] = []
    start, saved_at = time.monotonic() - spent, time.monotonic()
    while (progress := (time.monotonic() - start) / 60 / stage.minutes) < 1 and len(losses) != stage.limit:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = stage.lr * min(1, (step + 1) / stage.warmup, 0.02 + (1 - progress) / COOLDOWN)
        loss = loss_at(progress, step)
        model.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    ema[name].lerp_(value, 1 - min(stage.ema, (1 + step) / (10 + step)))
        losses.append(loss.item())
        if step % 50 == 0:
            mean = float(np.mean(losses[-50:]))
            print(f"{stage.name} step {step} progress {progress:.2f} {show(mean)}", flush=True)
        if time.monotonic() - saved_at > SAVED_EVERY:
            save()
            saved_at = time.monotonic()
    save()
    return losses


def load_averaged_weights(file: Path) -> dict[str, torch.Tensor]:
    """The averaged weights of a stage's checkpoint."""
    ema: dict[str, torch.Tensor] = torch.load(file, weights_only=True, map_location="cpu")["ema"]
    return ema


class SeededGenerator:
    """One random generator for a run, seeded with the step at which it starts: a resumed run sees new scenes."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._rng: np.random.Generator | None = None

    def at(self, step: int) -> np.random.Generator:
        if self._rng is None:
            self._rng = np.random.default_rng(self._seed + step)
            torch.manual_seed(self._seed + step)
        return self._rng
