"""Cards of some compute capabilities, as far as a compiler asks about them."""

from dataclasses import dataclass
from operator import getitem
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.support.fake_card import CARD

aten = torch.ops.aten
ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # in the order of its arguments
PLAIN = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "enable_gqa": False}


@dataclass(frozen=True)
class Card:
    """A compute capability, and what a card of it says of itself."""

    major: int
    minor: int
    processors: int
    shared_memory: int
    "Bytes that a block of threads may ask for."

    @property
    def properties(self) -> Any:
        """As `torch.cuda.get_device_properties`."""
        return SimpleNamespace(
            name="no card",
            major=self.major,
            minor=self.minor,
            multi_processor_count=self.processors,
            total_memory=80 * 2**30,
            regs_per_multiprocessor=65536,
            max_threads_per_multi_processor=2048 if self.minor == 0 else 1536,
            max_threads_per_block=1024,
            warp_size=32,
            shared_memory_per_block_optin=self.shared_memory,
        )

    @property
    def driver(self) -> Any:
        """As Triton's."""
        from triton.backends.compiler import GPUTarget  # type: ignore[import-not-found]

        target = GPUTarget("cuda", 10 * self.major + self.minor, 32)
        return SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_active_torch_device=lambda: CARD,
            get_device_interface=lambda: torch.cuda,
            is_active=lambda: True,
            utils=SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": self.shared_memory}),
        )

    def attention(self, width: int) -> tuple[Any, tuple[object, ...]]:
        """The kernel that torch takes there for heads of `width` channels, and its arguments after query, key and value
        where there is no mask (`sdp_utils.cpp`)."""
        if width > 256:  # neither of the others has one
            return aten._scaled_dot_product_efficient_attention.default, (None, False)
        if self.major >= 9:
            return aten._scaled_dot_product_cudnn_attention.default, (None, False)
        return aten._scaled_dot_product_flash_attention.default, ()


CARDS = {
    "9.0": Card(9, 0, processors=132, shared_memory=232448),
    "8.9": Card(8, 9, processors=128, shared_memory=101376),
    "8.6": Card(8, 6, processors=82, shared_memory=101376),
    "8.0": Card(8, 0, processors=108, shared_memory=166912),
}


def choose_attention(graph: torch.fx.GraphModule, card: Card) -> None:
    """Put the kernels in the place of attention. Without a driver torch would take it apart into products."""
    for node in graph.graph.find_nodes(op="call_function", target=scaled_dot_product_attention):
        given = dict(zip(ATTENTION, node.args, strict=False)) | node.kwargs
        if any(value_of(given.get(name, value)) != value for name, value in PLAIN.items()):
            raise ValueError(f"attention of another kind than FLUX has: {given}")
        kernel, others = card.attention(value_of(given["query"]).shape[-1])
        inputs = (given["query"], given["key"], given["value"], *others)
        with graph.graph.inserting_before(node):
            made = graph.graph.call_function(kernel, inputs, {"scale": given.get("scale")})
            attended = graph.graph.call_function(getitem, (made, 0))
        node.replace_all_uses_with(attended)
        graph.graph.erase_node(node)
    graph.recompile()


def value_of(argument: Any) -> Any:
    """What a graph computes with: numbers are results of nodes, too, where Dynamo does not fix them."""
    return argument.meta["example_value"] if isinstance(argument, torch.fx.Node) else argument
