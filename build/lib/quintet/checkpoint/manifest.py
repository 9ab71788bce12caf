"""What a checkpoint holds: every file with its hash, every piece of every tensor, every plain value, as one JSON file.

`manifest.json` is one JSON object whose first member is the BLAKE3 of the bytes of the second:

    {"blake3":"<64 hex digits>","manifest":{"format":2,"step":100,"files":[...],"tensors":{...},"values":{...}}}

so a reader hashes before it parses, and `step` binds the directory's name to that hash. A tensor is a list of pieces; a piece is a box of
the tensor (offsets, sizes), whose elements, row by row, are cut into blocks of `BLOCK` elements. At `offset` of a file stand the blocks,
each as its codec says (see `codec`), and behind them one row of 40 bytes for each block: its stored length (8 bytes, little-endian) and the
BLAKE3 of its stored bytes (32). The piece's own hash is that of these rows. So whoever reads a part of a piece reads and verifies just the
blocks that hold it. The pieces of a data file lie one behind the other without a gap: every byte of a checkpoint is under a hash.

A file `step-00000050/data-00000.bin` is that of an earlier checkpoint beside this one, of which some pieces are used here too.

A tensor with `rounded_from` may lack pieces: its other elements are those of that fp32 tensor, rounded to bf16 (`codec.rounded`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NoReturn

import msgspec
from blake3 import blake3

from quintet.errors import CheckpointError

FORMAT = 2
REFERRING = 3
"""The format of a manifest that names files of earlier checkpoints beside its own; all else is as in 2."""
BLOCK = 1 << 18
"""Elements of a block."""
ROW = 40
"""Bytes of a block's row: its stored length and its hash."""
NAME = "manifest.json"
ITEM_SIZE = {
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    **dict.fromkeys(("int8", "uint8", "bool"), 1),
    "complex128": 16,
}
"""Bytes per element of every dtype that a checkpoint may hold, by torch's name."""
PLANES = {"float32": 3, "bfloat16": 2}
"""The dtypes that the codec "planes" takes, and the number of planes."""

Values = dict[str, Any]
"""Plain values by name: None, booleans, integers of any size, finite floats, strings, lists and dictionaries of them."""

_HEAD, _MIDDLE, _TAIL = b'{"blake3":"', b'","manifest":', b"}\n"
_REFERENCE = re.compile(r"(step-\d{8,18})/(data-\d+(?:-[0-9a-f]{8})?\.bin)")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_DIRECTORY_NAME = re.compile(r"step-(\d{8,18})")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class File:
    """One file of the checkpoint's directory, the manifest excepted."""

    path: str
    """Name in the directory; there are no subdirectories. Or an earlier checkpoint's name, a slash and the name there."""
    size: int
    """Bytes."""
    blake3: str | None
    """BLAKE3 of the content, 64 hex digits; null for a data file, which consists of pieces with hashes of their own."""

    @property
    def holder(self) -> str | None:
        """The name of the earlier checkpoint that it belongs to, if it does."""
        return self.path.partition("/")[0] if "/" in self.path else None


Codec = Literal["raw", "planes"]
"""How the elements of a block become bytes: as they are, or as `codec.encode` says."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A box of a tensor and where its bytes lie."""

    offsets: tuple[int, ...]
    """First index of the box in each dim of the whole tensor."""
    sizes: tuple[int, ...]
    """Length of the box in each dim."""
    file: str
    """Name of the file."""
    offset: int
    """First byte in the file."""
    length: int
    """Bytes in the file, the rows included."""
    codec: Codec
    """How elements became bytes."""
    blake3: str
    """BLAKE3 of the rows, 64 hex digits."""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.sizes)

    @property
    def num_blocks(self) -> int:
        """Blocks, and rows."""
        return -(-self.numel // BLOCK)


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A whole tensor, of which the pieces cover every element once, or at most once where it has `rounded_from`."""

    dtype: str
    """torch's name of the dtype."""
    shape: tuple[int, ...]
    """Global shape."""
    pieces: tuple[Piece, ...]
    """The boxes that are stored."""
    rounded_from: str | None = None
    """The fp32 tensor of the same shape of which the elements that no piece covers are the rounding to bf16."""

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A whole checkpoint."""

    step: int
    """Optimizer steps taken."""
    files: tuple[File, ...]
    """Every file beside the manifest."""
    tensors: dict[str, Tensor]
    """Tensors by name."""
    values: Values
    """Plain values by name."""

    @property
    def digest(self) -> str:
        """The BLAKE3 that the file begins with, 64 hex digits; it is over every other hash."""
        return blake3(_body(self)).hexdigest()


def directory_name(step: int) -> str:
    """`step-00000100` for 100."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a directory's name says, or None for any other name."""
    match = _DIRECTORY_NAME.fullmatch(name)
    return int(match[1]) if match and directory_name(int(match[1])) == name else None


def check_file_name(name: str) -> str:
    """`name`, if it may stand in a checkpoint: no folder, no hidden file, not the manifest's own. Raises CheckpointError otherwise."""
    if not _FILE_NAME.fullmatch(name) or name == NAME:
        raise CheckpointError(
            f"{name!r} is not a file name that a checkpoint may hold: use letters, digits, '.', '-' and '_', beginning with a letter or "
            f"digit, without folders, and not {NAME!r}"
        )
    return name


def check_value(value: Any, *, name: str) -> None:
    """Raise CheckpointError, naming the place, unless JSON gives `value` back as it is."""
    if isinstance(value, float) and not math.isfinite(value):
        raise CheckpointError(f"{name} is {value}, which JSON cannot hold; save it as a tensor")
    if value is None or isinstance(value, bool | int | float | str):
        return
    if isinstance(value, list):
        for i, inner in enumerate(value):
            check_value(inner, name=f"{name}[{i}]")
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{name} has the key {key!r}, but a dictionary in a checkpoint has only strings as keys")
            check_value(inner, name=f"{name}.{key}")
    else:
        raise CheckpointError(
            f"{name} is a {type(value).__name__}, but a checkpoint holds only tensors, None, booleans, numbers, strings, lists and "
            "dictionaries: nothing in it is pickled; turn it into one of these"
        )


def dumps(manifest: Manifest) -> bytes:
    """The manifest as the bytes of its file; raises CheckpointError where `loads` would refuse it."""
    for name, value in manifest.values.items():
        check_value(value, name=name)
    _check(manifest)
    body = _body(manifest)
    return _HEAD + blake3(body).hexdigest().encode() + _MIDDLE + body + _TAIL


def _body(manifest: Manifest) -> bytes:
    return b'{"format":%d,"step":%d,"files":%b,"tensors":%b,"values":%b}' % (
        REFERRING if any(file.holder for file in manifest.files) else FORMAT,
        manifest.step,
        msgspec.json.encode(manifest.files),
        msgspec.json.encode(manifest.tensors),
        json.dumps(manifest.values, separators=(",", ":"), allow_nan=False).encode(),
    )


def loads(data: bytes) -> Manifest:
    """The manifest that a file's bytes describe. Raises CheckpointError for damage, another format, or a broken rule."""
    start = len(_HEAD) + 64 + len(_MIDDLE)
    body = data[start : -len(_TAIL)]
    digest = data[len(_HEAD) : len(_HEAD) + 64]
    if data != b"".join((_HEAD, digest, _MIDDLE, body, _TAIL)) or blake3(body).hexdigest().encode() != digest:
        raise CheckpointError(f"{NAME} is damaged: its content does not have the hash that it begins with")
    try:
        tree = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{NAME} is not valid JSON: {error}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("format"), int):
        raise CheckpointError(f"{NAME} does not say its format")
    if tree["format"] not in (FORMAT, REFERRING):
        known = f"{FORMAT} and {REFERRING}; use the version that wrote it"
        raise CheckpointError(f"{NAME} has format {tree['format']}, but this program reads the formats {known}")
    manifest = _convert(tree)
    _check(manifest)
    if any(file.holder for file in manifest.files) != (tree["format"] == REFERRING):
        raise CheckpointError(f"{NAME} has format {tree['format']}, which does not go with the files that it names")
    return manifest


def _convert(tree: dict[str, Any]) -> Manifest:
    """The manifest of a JSON tree: strict about types and about keys, both missing and unknown."""
    content = {key: value for key, value in tree.items() if key != "format"}
    try:
        manifest = msgspec.convert(content, Manifest, strict=True)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{NAME} is not a manifest: {error}") from None
    _exact_keys([content], Manifest)
    _exact_keys(content["files"], File)
    _exact_keys(content["tensors"].values(), Tensor)
    _exact_keys((piece for tensor in content["tensors"].values() for piece in tensor["pieces"]), Piece)
    return manifest


def _exact_keys(trees: Iterable[dict[str, Any]], kind: type) -> None:
    known = {field.name for field in fields(kind)}
    for tree in trees:
        if tree.keys() != known:
            raise CheckpointError(f"{NAME}: a {kind.__name__.lower()} has the keys {sorted(tree)}, not {sorted(known)}")


def _check(manifest: Manifest) -> None:
    """Every rule between the manifest's parts."""
    if manifest.step < 0:
        raise CheckpointError(f"{NAME}: step ({manifest.step}) must not be negative")
    sizes = {_check_path(file, manifest.step): file.size for file in manifest.files}
    if len(sizes) < len(manifest.files):
        raise CheckpointError(f"{NAME} names a file twice")
    for file in manifest.files:
        if file.size < 0 or not _DIGEST.fullmatch(file.blake3 or "0" * 64):
            raise CheckpointError(f"{NAME}: {file.path} has the size {file.size} and the hash {file.blake3!r}")
    for name, tensor in manifest.tensors.items():
        _check_tensor(name, tensor)
        if tensor.rounded_from is not None:
            _check_rounded(name, tensor, manifest.tensors.get(tensor.rounded_from))
    _check_data(manifest)
    if both := manifest.tensors.keys() & manifest.values.keys():
        raise CheckpointError(f"{NAME}: {min(both)!r} is both a tensor and a value")


def _check_path(file: File, step: int) -> str:
    match = _REFERENCE.fullmatch(file.path)
    if match is None:
        return check_file_name(file.path)
    held = step_of(match[1])
    if held is None or held >= step or file.blake3 is not None:
        raise CheckpointError(f"{NAME}: {file.path!r} is no data file of an earlier checkpoint than that of step {step}")
    return file.path


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in ITEM_SIZE:
        raise CheckpointError(f"{NAME}: tensor {name!r} has the unknown dtype {tensor.dtype!r}")
    if any(size < 0 for size in tensor.shape):
        raise CheckpointError(f"{NAME}: tensor {name!r} has the shape {list(tensor.shape)}")
    for piece in tensor.pieces:
        inside = len(piece.offsets) == len(piece.sizes) == len(tensor.shape) and all(
            first >= 0 and size > 0 and first + size <= whole
            for first, size, whole in zip(piece.offsets, piece.sizes, tensor.shape, strict=True)
        )
        if not inside:
            raise CheckpointError(f"{NAME}: tensor {name!r}, {tensor}, has a piece at {piece.offsets} of {piece.sizes}, outside of it")
        _check_length(name, tensor, piece)
    covered = sum(piece.numel for piece in tensor.pieces)
    if _overlap(tensor.pieces) or (covered != math.prod(tensor.shape) and tensor.rounded_from is None):
        raise CheckpointError(f"{NAME}: the pieces of tensor {name!r} do not cover it once")


def _check_length(name: str, tensor: Tensor, piece: Piece) -> None:
    plain = piece.numel * ITEM_SIZE[tensor.dtype] + piece.num_blocks * ROW
    if piece.codec == "planes" and tensor.dtype not in PLANES:
        raise CheckpointError(f"{NAME}: tensor {name!r} has a piece of codec 'planes', which is for {' and '.join(PLANES)} only")
    most = plain + 4 * PLANES.get(tensor.dtype, 0) * piece.num_blocks
    if not (piece.num_blocks * ROW < piece.length <= most if piece.codec == "planes" else piece.length == plain):
        raise CheckpointError(f"{NAME}: tensor {name!r} has a piece of {piece.length} bytes at {piece.offset}, which {tensor} forbids")
    if not _DIGEST.fullmatch(piece.blake3):
        raise CheckpointError(f"{NAME}: tensor {name!r} has a piece with the hash {piece.blake3!r}")


def _check_rounded(name: str, tensor: Tensor, source: Tensor | None) -> None:
    fits = source is not None and source.rounded_from is None and (source.dtype, source.shape) == ("float32", tensor.shape)
    if not fits or tensor.dtype != "bfloat16":
        raise CheckpointError(f"{NAME}: tensor {name!r}, {tensor}, cannot be {tensor.rounded_from!r}, {source}, rounded")


def _check_data(manifest: Manifest) -> None:
    """The pieces of a data file lie one behind the other from its first byte to its last, those in an earlier one's file apart; other files
    have a hash, and no pieces."""
    own = {file.path for file in manifest.files if file.holder is None}
    ends = {file.path: 0 for file in manifest.files if file.blake3 is None}
    pieces = ((piece, name) for name, tensor in manifest.tensors.items() for piece in tensor.pieces)
    for piece, name in sorted(pieces, key=lambda found: (found[0].file, found[0].offset)):
        if piece.file not in ends:
            raise CheckpointError(f"{NAME}: tensor {name!r} has a piece in {piece.file!r}, which is none of its data files")
        if piece.offset != ends[piece.file] if piece.file in own else piece.offset < ends[piece.file]:
            raise CheckpointError(f"{NAME}: tensor {name!r} has a piece at {piece.offset} of {piece.file}, not at {ends[piece.file]}")
        ends[piece.file] = piece.offset + piece.length
    for file in manifest.files:
        if ends.get(file.path, file.size) != file.size and (file.path in own or ends[file.path] > file.size):
            raise CheckpointError(f"{NAME}: {file.path} has {file.size} bytes, but its pieces {ends[file.path]}")


def _overlap(pieces: Sequence[Piece]) -> bool:
    """Whether two boxes share an element: a sweep along the dim with the most different starts."""
    if len(pieces) < 2:
        return False
    num_dims = len(pieces[0].offsets)
    if num_dims == 0:
        return True
    dim = max(range(num_dims), key=lambda d: len({piece.offsets[d] for piece in pieces}))
    active: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: piece.offsets[dim]):
        active = [other for other in active if other.offsets[dim] + other.sizes[dim] > piece.offsets[dim]]
        if any(_share(piece, other) for other in active):
            return True
        active.append(piece)
    return False


def _share(one: Piece, two: Piece) -> bool:
    return all(
        first < other + other_size and other < first + size
        for first, size, other, other_size in zip(one.offsets, one.sizes, two.offsets, two.sizes, strict=True)
    )


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
