"""Which device an engine gets, and which are refused: never silently another one than was meant."""

import structlog
import torch

from pipelines.loading.cards import DriverUnavailable, explain_too_old, explain_unusable, list_cards
from pipelines.loading.placement import GIB, get_placement
from weights.checkpoints import Checkpoint

log = structlog.get_logger("srpo")


class DeviceRefused(Exception):
    """The device is not there, or cannot draw this model; the message says why and what to do."""


def choose_device(name: str, checkpoint: Checkpoint | None = None) -> torch.device:
    """The device that `name` means. `auto` is CUDA, or for small models the CPU where CUDA does not work.

    Raises `DeviceRefused`: a card needs compute capability 8.0, and a full-size model is drawn on a CPU only where that
    is asked for by name. Without a `checkpoint` any model may. So is an AMD card (torch for ROCm calls it `cuda`, too),
    since nothing of this has been tried on one.
    """
    if name.startswith("cpu"):
        return torch.device(name)
    untried = torch.version.hip is not None and name == "auto"
    if torch.cuda.is_available() and not untried:
        device = torch.device("cuda" if name == "auto" else name)
        card = torch.cuda.get_device_name(device)
        if torch.version.hip is not None:  # it has no compute capability
            log.warning("device_untried", card=card, rocm=torch.version.hip)
            return device
        if too_old := explain_too_old(card, torch.cuda.get_device_capability(device)):
            raise DeviceRefused(too_old)
        return device
    reason = explain_missing_cuda()
    if name != "auto":
        raise DeviceRefused(f"{name} cannot be used: {reason}")
    if checkpoint is not None and any(checkpoint.sizes):
        needed = get_placement(checkpoint, "float32", "resident").needed / GIB
        raise DeviceRefused(
            f"{checkpoint.id} needs a GPU, and {reason}. On a CPU it is very slow and needs about {needed:.0f} GiB of "
            "memory in float32: ask for that with --devices cpu"
        )
    log.info("device_is_cpu", reason=reason)
    return torch.device("cpu")


def explain_missing_cuda() -> str:
    """Why torch finds no CUDA device, or one that has to be asked for by name."""
    if torch.version.hip is not None:
        if not torch.cuda.is_available():
            return f"this torch is built for AMD cards (ROCm {torch.version.hip}) and finds none"
        return "AMD cards are untried: --devices cuda uses one all the same"
    try:
        cards = list_cards()
    except DriverUnavailable as error:
        return f"no NVIDIA driver answers ({error})"
    if not cards:
        return "the NVIDIA driver knows no card"
    known = explain_unusable(cards[0], torch.version.cuda, torch.__version__)
    return known or f"torch cannot use {cards[0].name}: is it hidden by CUDA_VISIBLE_DEVICES?"
