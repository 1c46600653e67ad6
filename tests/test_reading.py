"""Tensors read ahead of their use, into buffers that are used again."""

import threading
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from support.written_formats import TINY, WRITTEN, Tensors

from weights.errors import WrongWeights
from weights.formats.architecture import tensor_shapes
from weights.formats.detect import match_tensors
from weights.formats.headers import read_header
from weights.formats.read import TensorReader, read_gguf
from weights.formats.tensors import TensorInfo

NAMES = list(tensor_shapes(TINY))


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return {name: torch.randn(shape) * 0.1 for name, shape in tensor_shapes(TINY).items()}


def reader_of(tensors: Tensors, file: Path, case: str = "diffusers") -> TensorReader:
    WRITTEN[case][1](tensors, file)
    return TensorReader(match_tensors(read_header(file), TINY))


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("weights")]


@pytest.mark.parametrize("case", WRITTEN)
def test_what_is_read_ahead_is_what_is_read_alone(tensors: Tensors, tmp_path: Path, case: str) -> None:
    with reader_of(tensors, tmp_path / "file", case) as reader:
        found = {name: tensor.clone() for name, tensor in reader.read_all(NAMES)}
        assert found.keys() == set(NAMES)
        for name, tensor in found.items():
            assert tensor.dtype == reader.read(name).dtype
            assert torch.equal(tensor, reader.read(name)), name
    assert not threads()


@pytest.mark.parametrize("case", WRITTEN)
def test_tensors_are_decoded_on_the_device(tensors: Tensors, tmp_path: Path, case: str) -> None:
    """torch's device without values takes the place of a card: nothing is computed beside it."""
    with reader_of(tensors, tmp_path / "file", case) as reader:
        for name, tensor in list(reader.read_all(NAMES, device=torch.device("meta"))):
            assert tensor.device.type == "meta"
            assert (tensor.dtype, tensor.shape) == (reader.read(name).dtype, tensors[name].shape)


def test_all_tensors_lie_in_two_buffers(tensors: Tensors, tmp_path: Path) -> None:
    largest = max(tensor.numel() * 4 for tensor in tensors.values())
    with reader_of(tensors, tmp_path / "file") as reader:
        storages = [tensor.untyped_storage() for _, tensor in reader.read_all(NAMES)]
    assert len({storage.data_ptr() for storage in storages}) == 2
    assert {storage.nbytes() for storage in storages} == {largest}


def test_the_next_tensor_is_read_while_one_is_in_use(
    tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, done = TensorReader._read_stored, threading.Semaphore(0)

    def watched(self: TensorReader, name: str, buffer: torch.Tensor | None = None) -> object:
        stored = read(self, name, buffer)
        done.release()
        return stored

    monkeypatch.setattr(TensorReader, "_read_stored", watched)
    with reader_of(tensors, tmp_path / "file") as reader, closing(reader.read_all(NAMES)) as ahead:
        _, first = next(ahead)
        before = first.clone()
        for _ in range(2):
            assert done.acquire(timeout=60)  # this tensor, and the next one without being asked for
        assert torch.equal(first, before)


def test_an_error_of_the_thread_reaches_the_caller_and_ends_it(tensors: Tensors, tmp_path: Path) -> None:
    with reader_of(tensors, tmp_path / "file") as reader:
        with (tmp_path / "file").open("r+b") as file:
            file.truncate((tmp_path / "file").stat().st_size // 2)
        with pytest.raises(WrongWeights, match="became shorter"):
            list(reader.read_all(NAMES))
    assert not threads()


def test_who_stops_early_leaves_no_thread(tensors: Tensors, tmp_path: Path) -> None:
    with reader_of(tensors, tmp_path / "file") as reader, closing(reader.read_all(NAMES)) as ahead:
        next(ahead)
        assert len(threads()) == 1
    assert not threads()


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS"])
def test_gguf_is_dequantized_in_float32(kind: str) -> None:
    """As the gguf package does it. In float16 each value would be rounded before the file's LoRAs or bfloat16."""
    quantization = gguf.GGMLQuantizationType[kind]
    size = gguf.GGML_QUANT_SIZES[quantization][1]
    stored = np.random.default_rng(5).integers(0, 0x40, (4, 2 * size), np.uint8)  # no scale is infinite
    expected = torch.from_numpy(gguf.quants.dequantize(stored, quantization))
    read = read_gguf(torch.from_numpy(stored), TensorInfo(kind, tuple(expected.shape), Path(), 0, stored.size), None)
    assert read.dtype == torch.float32
    torch.testing.assert_close(read, expected, rtol=1e-6, atol=1e-6)
