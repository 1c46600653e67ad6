"""A CUDA card that is not there.

Tensors of the card are fake (torch's own: shapes without values), those of the host are real: a program runs its real
code, computes the host's real numbers, and every shape on the device. A tensor on the wrong device is torch's error.
Whatever makes the host wait for the device is recorded, with the function that asks for it. What comes back is ones.
It takes a C++ compiler and a second: torch has to be told that one can switch to a CUDA device.
"""

import ctypes
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, _pop_mode_temporarily
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CARD = torch.device("cuda:0")
PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor)
SELECTIONS = (aten.nonzero.default, aten.masked_select.default)  # the host must learn how many there are
TRANSFERS = (aten._to_copy.default, aten.copy_.default, aten.index.Tensor, aten.index_put_.default)
WHOLE = (aten.scaled_dot_product_attention.default,)  # a card has a kernel for all of it, and no matrix of all pairs
GUARD = """
#include <c10/core/impl/FakeGuardImpl.h>
static c10::impl::DeviceGuardImplRegistrar cuda(
    c10::DeviceType::CUDA, new c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>());
"""


@cache
def register_device_guard() -> None:
    """Let this process switch to a CUDA device that does not exist, by torch's own implementation for tests."""
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        flags = ["-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10"]
        subprocess.run(["g++", str(source), "-o", str(library), *flags], check=True)
        ctypes.CDLL(str(library))


class FakeEvent:
    """An event on a stream of the card. To wait for one is meant, and is not recorded."""

    def __init__(self, **_: bool) -> None:
        pass

    def record(self, stream: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


@contextmanager
def fake_card(capability: tuple[int, int] = (9, 0)) -> Iterator["FakeCard"]:
    """Within this context `cuda:0` is a card of a compute capability; what it is asked is recorded in the result."""
    register_device_guard()
    card = FakeCard()

    def call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What is compiled runs with torch's fake tensors alone: Dynamo traces no other mode."""
        if module._compiled_call_impl is None:
            return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        with card.paused():
            return module._compiled_call_impl(*args, **kwargs)

    cuda: dict[str, Any] = {
        "Event": FakeEvent,
        "current_stream": lambda _=None: None,
        "synchronize": lambda _=None: card.note_wait("the whole device"),
        "get_device_capability": lambda _=None: capability,
        "get_device_name": lambda _=None: "no card",
        "empty_cache": lambda: None,
    }
    with patch.multiple(torch.cuda, **cuda), patch.object(torch.nn.Module, "__call__", call), card.mode, card:
        yield card


class CardMemory:
    """Bytes of all tensors on the card: `held` now, and the `peak`. What an operator itself takes is not known."""

    def __init__(self) -> None:
        self.held = self.peak = 0
        self._known = set[int]()

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.held -= size


class FakeCard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs the card's operators on fake tensors and the host's on real ones. `waits` are those of the host so far."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode = FakeTensorMode()
        self.memory = CardMemory()
        self.waits: list[str] = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Torch's fake tensors alone. Nothing is recorded."""
        if _get_current_dispatch_mode() is not self:
            yield
            return
        with _pop_mode_temporarily():
            yield

    @contextmanager
    def recorded(self) -> Iterator[list[str]]:
        """The waits within this context, once it is left."""
        before, waits = len(self.waits), list[str]()
        yield waits
        waits += self.waits[before:]

    def note_wait(self, what: str) -> None:
        """Record that the host waits, with the innermost function outside torch and this module."""
        frame = sys._getframe(1)
        inside = (str(Path(torch.__file__).parent), __file__)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
            frame = frame.f_back
        self.waits.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}: {what}")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "prim":  # asks for a shape or a device
            return function(*args, **kwargs)
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd")
        if composite and function not in WHOLE:
            with self:  # by the operators that it consists of
                if (result := function.decompose(*args, **kwargs)) is not NotImplemented:
                    return result
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not all(type(tensor) in PLAIN for tensor in tensors):
            return NotImplemented  # a tensor made of tensors: its own operators come here one by one
        on_card = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        target = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
        if not on_card and (target is None or target.type != CARD.type):
            with unset_fake_temporarily():
                return run_on_host(function, args, kwargs)
        if on_card and (received := self._receive(function, args, kwargs, target)) is not None:
            return received
        self._note_transfers(function, args, kwargs, tensors)
        args, kwargs = tree_map(self._to_fake, (args, kwargs))
        result = function(*args, **kwargs)
        for made in tree_leaves(result):
            if isinstance(made, FakeTensor):
                self.memory.add(made)
        # Nothing may refer to a parameter weakly: `Module.to` would refuse to replace it.
        self.mode.fake_tensor_converter.meta_converter.tensor_memo.clear()
        return result

    def _receive(self, function: Any, args: Any, kwargs: Any, target: torch.device | None) -> Any:
        """What the host gets from the card; None for an operator whose result stays there."""
        if function is aten._local_scalar_dense.default:
            self.note_wait("a number")
            return 1.0 if args[0].dtype.is_floating_point else 1
        if function is aten.equal.default:
            self.note_wait("a comparison")
            return True
        if function is aten._to_copy.default and target is not None and target.type == "cpu":
            self.note_wait("a tensor to the host")
            with unset_fake_temporarily():
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if function is aten.copy_.default and not isinstance(args[0], FakeTensor):
            self.note_wait("a tensor to the host")
            return args[0]
        if function in SELECTIONS:
            self.note_wait("a selection")
        return None

    def _note_transfers(self, function: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> None:
        """Record a copy to the card, unless it is from pinned memory and nobody waits for it."""
        sent = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)]
        quiet = kwargs.get("non_blocking") or (function is aten.copy_.default and len(args) > 2 and args[2])
        if function in TRANSFERS and any(not (quiet and hasattr(tensor, "pinned")) for tensor in sent):
            self.note_wait("a tensor to the card")

    def _to_fake(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor):
            return self.mode.from_tensor(leaf, static_shapes=True)
        return leaf


def run_on_host(function: Any, args: Any, kwargs: Any) -> Any:
    """An operator of the host. Pinned memory is ordinary memory that bears a mark."""
    if function is aten.is_pinned.default:
        return hasattr(args[0], "pinned")
    if function is aten._pin_memory.default:
        pinned = args[0].clone()
        pinned.pinned = True
        return pinned
    return function(*args, **kwargs)
