"""The training state on disk, written so that a killed run leaves the last whole one."""

from pathlib import Path
from typing import Any

import torch


def save_state(
    file: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: dict[str, Any],
    step: int,
    seconds: float,
) -> None:
    """Everything a stage needs to go on; `seconds` of training so far."""
    partial = file.with_suffix(".partial")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema, "step": step}
    torch.save(state | {"spent": seconds}, partial)
    partial.rename(file)
