"""Whose failure an error is: the request's, or the device's. CUDA's libraries say it in words, not in classes.

The words are those of torch 2.11 to 2.13, cuDNN 9 and Triton 3.7.
"""

import torch

MEMORY_ERRORS = (
    "CUDA error: out of memory",  # pinned host memory, which torch reports as any other CUDA error
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "GET was unable to find an engine",  # a convolution, after cuDNN has got memory for none of its plans
    "Triton Error [CUDA]: out of memory",
)
DEVICE_ERRORS = ("CUDA error", "Triton Error [CUDA]", "CUDNN_STATUS_EXECUTION_FAILED")


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device or its pinned host memory was too small; nothing is broken by it."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in MEMORY_ERRORS)


def classify_failure(error: Exception, device: torch.device) -> str | None:
    """The name of the `GenerationFailed` class that `error` is; None if the device is lost.

    A lost device may first be noticed by an error that does not name CUDA: after every error but torch's own out of
    memory the device is asked whether it still works.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return "OutOfMemory"
    out_of_memory = is_out_of_memory(error)
    named = isinstance(error, torch.AcceleratorError) or any(words in str(error) for words in DEVICE_ERRORS)
    if (named and not out_of_memory) or not still_works(device):
        return None
    return "OutOfMemory" if out_of_memory else "GenerationFailed"


def still_works(device: torch.device) -> bool:
    """Wait for what was started on the device: on a lost CUDA device this raises."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return False
    return True
