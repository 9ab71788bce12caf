"""Another program reads a checkpoint as docs/checkpoints.md describes the format: with json, numpy, zstandard and blake3 alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from blake3 import blake3

from quintet.checkpoint.pieces import Pieces
from quintet.checkpoint.save import save
from quintet.checkpoint.store import bytes_of

BLOCK, ROW = 262_144, 40


def read_checkpoint(directory: Path) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """Tensors as the unsigned integers of their bits, and the plain values."""
    data = (directory / "manifest.json").read_bytes()
    digest, body = data[11:75].decode(), data[88:-2]
    assert data[:11] == b'{"blake3":"' and data[75:88] == b'","manifest":' and blake3(body).hexdigest() == digest
    manifest = json.loads(body)
    assert manifest["format"] == 2 and directory.name == f"step-{manifest['step']:08d}"
    for file in manifest["files"]:
        content = (directory / file["path"]).read_bytes()
        assert len(content) == file["size"] and file["blake3"] in (None, blake3(content).hexdigest())
    tensors = {name: read_pieces(directory, tensor) for name, tensor in manifest["tensors"].items()}
    return {name: values for name, (values, _) in fill_rounded(tensors, manifest["tensors"]).items()}, manifest["values"]


def read_pieces(directory: Path, tensor: dict[str, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The bits of a tensor's elements, and which of them pieces cover."""
    size = {"float32": 4, "bfloat16": 2, "uint8": 1}[tensor["dtype"]]
    values, covered = np.zeros(tensor["shape"], f"<u{size}"), np.zeros(tensor["shape"], bool)
    for piece in tensor["pieces"]:
        content = (directory / piece["file"]).read_bytes()[piece["offset"] : piece["offset"] + piece["length"]]
        numel = int(np.prod(piece["sizes"], dtype=int))
        num_blocks = -(-numel // BLOCK)
        rows, at, blocks = content[-ROW * num_blocks :], 0, []
        assert blake3(rows).hexdigest() == piece["blake3"]
        for i in range(num_blocks):
            length = int.from_bytes(rows[ROW * i : ROW * i + 8], "little")
            stored = content[at : at + length]
            assert blake3(stored).digest() == rows[ROW * i + 8 : ROW * (i + 1)]
            blocks.append(decode(stored, min(BLOCK, numel - BLOCK * i), size, piece["codec"]))
            at += length
        place = tuple(slice(begin, begin + n) for begin, n in zip(piece["offsets"], piece["sizes"], strict=True))
        values[place], covered[place] = np.concatenate(blocks).reshape(piece["sizes"]), True
    return values, covered


def decode(stored: bytes, numel: int, size: int, codec: str) -> np.ndarray[Any, Any]:
    if codec == "raw":
        return np.frombuffer(stored, f"<u{size}")
    widths = [1, 1, 2] if size == 4 else [1, 1]
    lengths = [int.from_bytes(stored[4 * i : 4 * i + 4], "little") for i in range(len(widths))]
    planes, at = [], 4 * len(widths)
    for width, length in zip(widths, lengths, strict=True):
        part = stored[at : at + length]
        planes.append(np.frombuffer(part if length == numel * width else zstandard.decompress(part), f"<u{width}").astype("<u4"))
        at += length
    exponent, rest = planes[0], planes[1]
    high = (rest >> 7) << 15 | exponent << 7 | rest & 0x7F
    return (high << 16 | planes[2]).astype("<u4") if size == 4 else high.astype("<u2")


def fill_rounded(tensors: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    for name, (values, covered) in tensors.items():
        if told[name]["rounded_from"] is None:
            assert covered.all()
        else:
            bits = tensors[told[name]["rounded_from"]][0].astype("<u8")
            rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) % 2**32 >> 16).astype("<u2")
            values[~covered] = rounded[~covered]
    return tensors


@pytest.mark.parametrize("codec", ["planes", "raw"])
def test_a_reader_of_its_own_finds_every_bit(tmp_path: Path, codec: Any, generator: torch.Generator) -> None:
    master = torch.randn(700, 800, generator=generator)  # three blocks
    weight = master.bfloat16()
    weight[650:] *= 2  # whose second piece is no rounding
    halves = [((0, 0), slice(0, 600)), ((600, 0), slice(600, 700))]
    state = {
        "master": Pieces(master.shape, [(offsets, master[rows]) for offsets, rows in halves], dtype=master.dtype),
        "weight": Pieces(master.shape, [(offsets, weight[rows]) for offsets, rows in halves], dtype=weight.dtype),
        "scalar": torch.tensor(1.5),
        "bits": torch.arange(256, dtype=torch.uint8),
        "counts": {"main": 3, "list": [1, None, "x", 0.1]},
    }
    directory = save(state, tmp_path, step=7, extras={"recipe.toml": "x"}, rounded={"weight": "master"}, codec=codec)
    found, values = read_checkpoint(directory)
    assert values == {"counts": state["counts"]}
    for name, expected in {"master": master, "weight": weight, "scalar": state["scalar"], "bits": state["bits"]}.items():
        assert found[name].tobytes() == bytes(bytes_of(expected)), name
    assert (directory / "data-00000.bin").stat().st_size < 4 * master.numel() + 2 * 100 * 800 + 1000
