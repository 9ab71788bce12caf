"""Checkpoints: how small, how fast against the bare disk, and how long training stands still, against torch's distributed checkpoint.

    python benchmarks/checkpoint.py [--part rates recovery] [--checkpoint RUN] [--gigabytes 1] [--ranks 1 2 4] [--rounds 5] [--json FILE]

size: the tensors of a real checkpoint (`--checkpoint`, of a run in bf16) through the codec, one thread: stored share, GB/s of plain bytes.
rates: a state of bf16 weights, fp32 master and fp32 moments (14 bytes a parameter), its rows shared out over gloo ranks, is saved and
loaded by both codecs; before each of these every rank writes, or reads, as many plain bytes of its own to a file by itself. Writes end
with fsync, through the system's cache and past it, of which the faster counts; reads begin without the file in memory. A ratio is the
median of the disk's times over the median of ours, the least and the largest ratio of one round beside it. Seconds of a core a GB tell
what bounds it where the disk does not; the load of the machine (its average over a minute, which counts what runs here too) is told
before and behind.
stall: one process saves the same state in turn synchronously, in the background, by `dcp.save` and by `dcp.async_save`. Stall is what the
trainer waits: in the call, and before its next update, `--compute` seconds of matrix products later. How many of these products a second
there are while a save is written is told too.
index: what every rank of a recipe holds, without building it (shards of single parameters where training has shards of buckets), the plan
of who writes what, and the manifest, whose hashes are zeros: seconds of each, and of reading it again with all its checks.
recovery: the laptop's recipe is trained in a process of its own, killed by SIGKILL after a checkpoint and resumed, and each resumed one is
killed and resumed again: seconds from the kill to the end of the first step, by the phases that the run tells of itself.
"""

from __future__ import annotations

import argparse
import itertools
import math
import mmap
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import zstandard
from startup import circumstances, headline, write_json

from quintet.checkpoint import codec, hub_names
from quintet.checkpoint.background import Saver, Written
from quintet.checkpoint.load import load, read_manifest
from quintet.checkpoint.manifest import BLOCK, ITEM_SIZE, PLANES, ROW, Codec, File, Manifest, Piece, Tensor, dumps, loads
from quintet.checkpoint.pieces import Box, Pieces, run_of_boxes
from quintet.checkpoint.plan import Item, assign
from quintet.checkpoint.save import save
from quintet.checkpoint.store import Threads, drop_from_cache
from quintet.cost.balance import part_at
from quintet.monitor.metrics import Resumed, Saved, read_events
from quintet.spec import parse
from quintet.spec.layout import GROUPS, Layout
from quintet.spec.placement import holders, local_box
from quintet.spec.run import Checkpoint, Run
from quintet.train.device import keep_freed_memory
from quintet.train.trained import find_checkpoint

PARTS = ("size", "rates", "stall", "index", "recovery")
FORMS: tuple[Codec, ...] = ("raw", "planes")
CHUNK = 1 << 24
ROUNDED = {"model.weight": "optimizer.master.weight"}
COLUMNS = 4096


def seconds(work: Callable[[], object]) -> float:
    """How long work takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


# size


def size(path: Path) -> list[dict[str, Any]]:
    """A row for each kind of tensor."""
    manifest = read_manifest(path)
    kinds: dict[str, list[str]] = {}
    for name, tensor in manifest.tensors.items():
        kind = ".".join(name.split(".")[:2]) if name.startswith("optimizer") else name.split(".")[0]
        if tensor.dtype in PLANES:
            kinds.setdefault(f"{kind} ({tensor.dtype})", []).append(name)
    rows = []
    for kind, names in kinds.items():
        state = {name: torch.empty(manifest.tensors[name].shape, dtype=getattr(torch, manifest.tensors[name].dtype)) for name in names}
        load(state, path, strict=False)
        blocks = [block for tensor in state.values() for block in tensor.flatten().view(torch.uint8).split(BLOCK * tensor.dtype.itemsize)]
        rows.append(size_of(kind, [block.numpy() for block in blocks], manifest.tensors[names[0]].dtype))
        pieces = [piece for name in names for piece in manifest.tensors[name].pieces]
        rows[-1] |= {"numel": sum(t.numel() for t in state.values()), "stored_in_checkpoint": sum(piece.length for piece in pieces)}
    return rows


def size_of(kind: str, blocks: Sequence[codec.Bytes], dtype: str) -> dict[str, Any]:
    """Coding and decoding, and zstd's level 1 on the plain bytes."""
    itemsize = {"float32": 4, "bfloat16": 2}[dtype]
    plain = sum(block.size for block in blocks)
    stored = [np.concatenate(codec.encode(block, dtype)) for block in blocks]
    encoding = min(seconds(lambda: [codec.encode(block, dtype) for block in blocks]) for _ in range(3))
    pairs = list(zip(blocks, stored, strict=True))
    decoding = min(seconds(lambda: [codec.decode(form, block.size // itemsize, dtype) for block, form in pairs]) for _ in range(3))
    squeezer = zstandard.ZstdCompressor(level=1)
    simple = [squeezer.compress(block) for block in blocks]
    simply = seconds(lambda: [squeezer.compress(block) for block in blocks])
    assert all(np.array_equal(codec.decode(form, block.size // itemsize, dtype), block) for block, form in pairs)
    return {
        "kind": kind,
        "plain_bytes": plain,
        "share": sum(form.size for form in stored) / plain,
        "encode_gb_per_s": plain / 1e9 / encoding,
        "decode_gb_per_s": plain / 1e9 / decoding,
        "zstd_1_share": sum(map(len, simple)) / plain,
        "zstd_1_gb_per_s": plain / 1e9 / simply,
    }


# rates


def state_of(gigabytes: float, rank: int, count: int) -> dict[str, Any]:
    """Normal numbers of the sizes that training has; rows of master and moments shared out."""
    rows = max(round(gigabytes * 1e9 / 14 / COLUMNS / count), 1) * count
    generator = torch.Generator().manual_seed(rank)

    def part(scale: float) -> torch.Tensor:
        return torch.randn(rows // count, COLUMNS, generator=generator) * scale

    def pieces(value: torch.Tensor) -> Pieces:
        return Pieces((rows, COLUMNS), [((rank * (rows // count), 0), value)], dtype=value.dtype)

    master, momentum = part(0.02), part(1e-4)
    return {
        "model.weight": pieces(master.bfloat16()),
        "optimizer.master.weight": pieces(master),
        "optimizer.exp_avg.weight": pieces(momentum),
        "optimizer.exp_avg_sq.weight": pieces(momentum.square() * 0.05),
    }


def boxes(state: dict[str, Any]) -> list[torch.Tensor]:
    """This rank's tensors of a state."""
    return [tensor for value in state.values() for tensor in value.boxes.values()]


def empty_like(state: dict[str, Any]) -> dict[str, Any]:
    """The same boxes with zeros, which are in memory already."""
    return {name: Pieces(v.shape, [(at, t * 0) for at, t in v.boxes.items()], dtype=v.dtype) for name, v in state.items()}


def plain_bytes(tensors: Sequence[torch.Tensor]) -> memoryview:
    """The tensors' bytes, in memory that begins and ends where a page does."""
    size = sum(tensor.nbytes for tensor in tensors)
    memory = np.frombuffer(mmap.mmap(-1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE), np.uint8)
    memory[:size] = torch.cat([tensor.view(-1).view(torch.uint8) for tensor in tensors]).numpy()
    return memory.data


def write_plainly(path: Path, view: memoryview, *, flags: int = 0) -> None:
    """The bytes into a new file, then fsync."""
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o644)
    while len(view):
        view = view[os.write(fd, view[:CHUNK]) :]
    os.fsync(fd)
    os.close(fd)


def read_plainly(path: Path, tensors: Sequence[torch.Tensor]) -> None:
    """The bytes, into memory that is there."""
    with path.open("rb", buffering=0) as file:
        for tensor in tensors:
            view = tensor.view(-1).view(torch.uint8).numpy().data
            while len(view):
                view = view[file.readinto(view[:CHUNK]) or sys.exit("a file is too short") :]


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds until all ranks are done, and the seconds of processor time that all took together."""
    if dist.is_initialized():
        dist.barrier()
    begin = time.process_time()
    taken = torch.tensor([seconds(work)])
    cpu = torch.tensor([time.process_time() - begin])
    if dist.is_initialized():
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        dist.all_reduce(cpu)
    return float(taken), float(cpu)


def forget(directory: Path) -> None:
    """Drop a folder's files from memory."""
    for file in directory.iterdir():
        drop_from_cache(file)


def rates(folder: Path, gigabytes: float, rounds: int, rank: int, count: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds, and of processors, of each round, by what was done."""
    state = state_of(gigabytes, rank, count)
    own, plain = folder / f"plain-{rank}", plain_bytes(boxes(state))
    found: dict[str, list[tuple[float, float]]] = {}

    def note(name: str, taken: tuple[float, float]) -> None:
        found.setdefault(name, []).append(taken)

    for number in range(rounds + 1):
        for form in FORMS:
            root = folder / form
            note(f"cached disk before save {form}", timed(lambda: write_plainly(own, plain)))
            note(f"disk before save {form}", timed(lambda: write_plainly(own, plain, flags=os.O_DIRECT)))
            note(f"save {form}", timed(lambda root=root, form=form: save(state, root, step=1, rounded=ROUNDED, codec=form)))
        target = empty_like(state)
        for form in FORMS:
            root = folder / form / "step-00000001"
            drop_from_cache(own)
            note(f"disk before load {form}", timed(lambda target=target: read_plainly(own, boxes(target))))
            timed(lambda root=root: forget(root) if rank == 0 else None)
            note(f"load {form}", timed(lambda root=root, target=target: load(target, root)))
            assert number or all(torch.equal(a, b) for a, b in zip(boxes(state), boxes(target), strict=True))
            timed(lambda root=root: shutil.rmtree(root.parent) if rank == 0 else None)
    return {name: taken[1:] for name, taken in found.items()}


def on_ranks(count: int, work: Callable[[int], Any]) -> Any:
    """What rank 0's `work` returns; every rank is a child of this process."""
    context = multiprocessing.get_context("fork")

    def child(rank: int, folder: str, answer: Connection) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()  # as training does
        if count > 1:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
        answer.send(work(rank))
        if count > 1:
            dist.barrier()
            os._exit(0)  # gloo's threads may not outlive the interpreter

    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(count)]
        crew = [context.Process(target=child, args=(rank, folder, pipes[rank][1]), daemon=True) for rank in range(count)]
        for process in crew:
            process.start()
        for _, writer in pipes:
            writer.close()
        try:
            answers = [reader.recv() for reader, _ in pipes]
        except EOFError:
            raise RuntimeError("a rank failed; its own message stands above") from None
        for process in crew:
            process.join()
    return answers[0]


# stall


class Products:
    """Matrix products, in place of forward and backward."""

    def __init__(self) -> None:
        self.a = torch.randn(512, 512)
        self.rates: list[float] = []

    def run(self, length: float) -> float:
        """So many seconds of them; returns how many a second."""
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < length:
            torch.mm(self.a, self.a)
            count += 1
        return count / (time.perf_counter() - begin)


def stall(folder: Path, gigabytes: float, rounds: int, compute: float) -> dict[str, dict[str, float]]:
    """Medians of stall and of the whole save, by who saves, and products a second while it is written against none."""
    plain = {name: next(iter(value.boxes.values())) for name, value in state_of(gigabytes, 0, 1).items()}
    found: dict[str, dict[str, list[float]]] = {}
    products, settings = Products(), Checkpoint(keep_last=1)
    saver = Saver(folder / "ours", settings)
    buffers = {name: torch.empty_like(tensor) for name, tensor in plain.items()}

    def note(name: str, **values: float) -> None:
        for key, value in values.items():
            found.setdefault(name, {}).setdefault(key, []).append(value)

    def in_background(step: int) -> None:
        saver.save(plain, step=step, extras={}, rounded=ROUNDED)
        rate = products.run(compute)
        saver.settle()
        while not (told := saver.told()):
            products.run(0.05)
        (written,) = told
        assert isinstance(written, Written), written
        note("background", stall=written.stall_seconds, whole=written.seconds, products=rate)

    def synchronously(step: int) -> None:
        taken = seconds(lambda: save(plain, folder / "sync", step=step, rounded=ROUNDED))
        shutil.rmtree(folder / "sync")
        note("synchronous", stall=taken, whole=taken, products=products.run(compute))

    def by_dcp(step: int) -> None:
        taken = seconds(lambda: dcp.save(dict(plain), checkpoint_id=folder / f"dcp-{step}"))
        note("dcp.save", stall=taken, whole=taken, products=products.run(compute))

    def by_dcp_async(step: int) -> None:
        begin = time.perf_counter()
        future: Any = dcp.async_save(dict(plain), checkpoint_id=folder / f"dcp-{step}")
        stalled, end = time.perf_counter() - begin, list[float]()
        future.add_done_callback(lambda done: end.append(time.perf_counter()))
        rate = products.run(compute)
        future.result()
        note("dcp.async_save", stall=stalled, whole=end[0] - begin, products=rate)

    def copy(step: int) -> None:
        note("copy to kept buffers", stall=seconds(lambda: [buffers[name].copy_(tensor) for name, tensor in plain.items()]))

    def nothing(step: int) -> None:
        note("none", products=products.run(compute))

    ways = [nothing, synchronously, in_background, by_dcp, by_dcp_async, copy]
    for number in range(rounds + 1):
        for i, way in enumerate(ways[number % len(ways) :] + ways[: number % len(ways)]):
            plain["optimizer.exp_avg.weight"].add_(1e-9)  # another content
            way(1 + number * len(ways) + i)
            for old in folder.glob("dcp-*"):
                shutil.rmtree(old)
    return {name: {key: median(values[1:]) for key, values in columns.items()} for name, columns in found.items()}


# index


def boxes_of(run: Run, rank: int, peers: Mapping[str, Mapping[Hashable, list[int]]]) -> dict[str, list[Box]]:
    """What a rank keeps of each weight's master: its shard of its part. `peers` are the ranks that divide shards, by holders and group."""
    layout, at = run.layout, run.layout.coordinates(rank)
    part = part_at(run.model, layout, at.pp)
    found: dict[str, list[Box]] = {}
    for name, shape in hub_names.shapes(run.model).items():
        if name.endswith("expert_bias") or not part.holds(name):
            continue
        local, kind = local_box(name, shape, layout, rank), f"{holders(name, layout, run.model)}.shard"
        group = peers[kind][GROUPS[kind](layout, at)]
        numel, place = math.prod(local.sizes), group.index(rank)
        runs = run_of_boxes(local.sizes, numel * place // len(group), numel * (place + 1) // len(group))
        found[name] = [(tuple(a + b for a, b in zip(local.offsets, offsets, strict=True)), sizes) for offsets, sizes in runs]
    return found


def peers_of(layout: Layout) -> dict[str, dict[Hashable, list[int]]]:
    """Which ranks divide one set of shards."""
    found: dict[str, dict[Hashable, list[int]]] = {}
    for kind in (kind for kind in GROUPS if kind.endswith(".shard")):
        for rank in range(layout.num_ranks):
            found.setdefault(kind, {}).setdefault(GROUPS[kind](layout, layout.coordinates(rank)), []).append(rank)
    return found


def index(run: Run) -> dict[str, Any]:
    """Seconds of each part, and counts."""
    clock = [time.perf_counter()]
    peers = peers_of(run.layout)
    kinds = {"optimizer.master": "float32", "optimizer.exp_avg": "bfloat16", "optimizer.exp_avg_sq": "bfloat16"}
    items = [
        [Item(f"{kind}.{name}", box) for name, boxes in boxes_of(run, rank, peers).items() for kind in kinds for box in boxes]
        for rank in range(run.layout.num_ranks)
    ]
    clock.append(time.perf_counter())
    shapes = {name: shape for name, shape in hub_names.shapes(run.model).items() if not name.endswith("expert_bias")}
    assigned = assign(items, {f"{kind}.{name}": ITEM_SIZE[dtype] for name in shapes for kind, dtype in kinds.items()})
    clock.append(time.perf_counter())
    manifest = manifest_of(shapes, kinds, assigned)
    content = dumps(manifest)
    clock.append(time.perf_counter())
    assert loads(content) == manifest
    clock.append(time.perf_counter())
    loads_of = [sum(math.prod(item.box[1]) for item in mine) for mine in assigned]
    return {
        "ranks": run.layout.num_ranks,
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "pieces": sum(len(mine) for mine in assigned),
        "manifest_bytes": len(content),
        "largest_share_of_mean": max(loads_of) * len(loads_of) / sum(loads_of),
        "seconds": dict(zip(("boxes", "plan", "manifest", "read"), (b - a for a, b in itertools.pairwise(clock)), strict=True)),
    }


def manifest_of(shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, str], assigned: Sequence[Sequence[Item]]) -> Manifest:
    """As if every block were stored raw."""
    pieces: dict[str, list[Piece]] = {}
    files = []
    for rank, mine in enumerate(assigned):
        end, file = 0, f"data-{rank:05d}.bin"
        for item in mine:
            numel = math.prod(item.box[1])
            dtype = kinds[".".join(item.name.split(".")[:2])]
            length = numel * ITEM_SIZE[dtype] + -(-numel // BLOCK) * ROW
            offsets, sizes = item.box
            piece = Piece(offsets=offsets, sizes=sizes, file=file, offset=end, length=length, codec="raw", blake3="0" * 64)
            pieces.setdefault(item.name, []).append(piece)
            end += length
        files.append(File(path=file, size=end, blake3=None))
    tensors = {
        f"{kind}.{name}": Tensor(dtype=dtype, shape=shape, pieces=tuple(pieces[f"{kind}.{name}"]))
        for name, shape in shapes.items()
        for kind, dtype in kinds.items()
    }
    for name, shape in shapes.items():
        tensors[f"model.{name}"] = Tensor(dtype="bfloat16", shape=shape, pieces=(), rounded_from=f"optimizer.master.{name}")
    return Manifest(step=1, files=tuple(files), tensors=tensors, values={})


# recovery


def recovery(folder: Path, recipe: Path, rounds: int) -> dict[str, Any]:
    """Medians of the phases of some recoveries, and the size of what was loaded."""
    told = folder / "recovery" / "metrics.jsonl"
    options = ["--name", "recovery", "--directory", str(folder), "--checkpoint.every", "4", "--monitor.no-tensorboard"]
    command = [sys.executable, "-m", "quintet.cli.main"]
    found: dict[str, list[float]] = {}

    def run_until(kind: type[Saved | Resumed], *words: str) -> Saved | Resumed:
        """Start a process, kill it once it has told of something more of this kind."""
        count = count_of(told, kind)
        process = subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while count_of(told, kind) == count:
            if process.poll() is not None:
                raise RuntimeError(f"{words[0]} ended by itself: {process.stderr.read() if process.stderr else ''}")
            time.sleep(0.005)
        process.kill()
        process.communicate()
        return [event for event in read_events(told) if isinstance(event, kind)][-1]

    run_until(Saved, "train", str(recipe), *options)
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        event = run_until(Resumed, "resume", str(folder / "recovery"))
        assert isinstance(event, Resumed)
        whole = time.perf_counter() - begin
        for name, taken in {"kill to step": whole, **event.seconds, **{f"threads: {k}": v for k, v in event.load_seconds.items()}}.items():
            found.setdefault(name, []).append(taken)
    size = sum(file.size for file in read_manifest(find_checkpoint(folder / "recovery")).files)
    return {"num_bytes": size, "seconds": {name: median(taken[1:]) for name, taken in found.items()}}


def count_of(path: Path, kind: type[Saved | Resumed]) -> int:
    """Events of a kind in a run's metrics."""
    return sum(isinstance(event, kind) for event in read_events(path)) if path.exists() else 0


def show_rates(count: int, found: dict[str, list[tuple[float, float]]], gigabytes: float) -> dict[str, Any]:
    """Print a block of the table and return its figures."""
    row: dict[str, Any] = {"ranks": count}
    for name in [f"{what} {form}" for what in ("save", "load") for form in FORMS]:
        ours = found[name]
        ways = [taken for way, taken in found.items() if way.endswith(f"disk before {name}")]
        disk = min(ways, key=lambda taken: median(each[0] for each in taken))
        whole, cpu, bare = median(each[0] for each in ours), median(each[1] for each in ours), median(each[0] for each in disk)
        each = [there[0] / here[0] for there, here in zip(disk, ours, strict=True)]
        row[name] = {
            "gb_per_s": gigabytes / whole,
            "disk_gb_per_s": gigabytes / bare,
            "of_disk": bare / whole,
            "of_disk_by_round": each,
            "cpu_seconds_per_gb": cpu / gigabytes,
        }
        rate = f"{gigabytes / whole:7.2f} GB/s, the disk {gigabytes / bare:5.2f}: {bare / whole:5.2f} of it"
        print(f"{count:3} ranks  {name:12}{rate} ({min(each):.2f} to {max(each):.2f}), {cpu / gigabytes:.2f} s of a core a GB")
    return row


def main() -> None:
    """Measure, print, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS[:-1], help="default: all but recovery")
    parser.add_argument("--checkpoint", type=Path, help="a run or a checkpoint, for the part `size`, which is left out without one")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the state that is saved")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5, help="that count; one more goes before")
    parser.add_argument("--compute", type=float, default=1.0, help="seconds of products between a save and the next update")
    parser.add_argument("--directory", type=Path, default=Path(), help="where the files go for the time")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/v3-671b.toml"), help="for the part `index`")
    parser.add_argument("--json", type=Path, help="write the result there too")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
    facts, result = circumstances("torch", "zstandard", "blake3"), dict[str, Any]()
    facts["threads_per_rank"] = Threads().count
    print(headline(facts))
    if "size" in given.part and given.checkpoint:
        result["size"] = size(find_checkpoint(given.checkpoint))
        for row in result["size"]:
            coded = f"{row['share']:7.3f}{row['encode_gb_per_s']:9.2f} GB/s in{row['decode_gb_per_s']:9.2f} GB/s out"
            print(f"{row['kind']:36}{coded}   zstd level 1:{row['zstd_1_share']:7.3f}{row['zstd_1_gb_per_s']:6.2f} GB/s")
        numel = sum(row["numel"] for row in result["size"] if row["kind"].startswith("model") and "bfloat16" in row["kind"])
        total = sum(row["stored_in_checkpoint"] for row in result["size"])
        result["bytes_per_parameter"] = total / numel
        print(f"stored: {total / numel:.2f} bytes a parameter, of {sum(row['plain_bytes'] for row in result['size']) / numel:.2f}")
    with tempfile.TemporaryDirectory(dir=given.directory) as name:
        if "rates" in given.part:
            result["rates"] = []
            for count in given.ranks:
                before = os.getloadavg()[0]
                found = on_ranks(count, lambda rank, count=count: rates(Path(name), given.gigabytes, given.rounds, rank, count))
                load_averages = [before, os.getloadavg()[0]]
                result["rates"].append(show_rates(count, found, given.gigabytes) | {"load": load_averages})
                print(f"{count:3} ranks  load {load_averages[0]:.1f} before, {load_averages[1]:.1f} behind")
        if "stall" in given.part:
            torch.set_num_threads(1)
            keep_freed_memory()
            result["stall"] = stall(Path(name), given.gigabytes, given.rounds, given.compute)
            for way, row in result["stall"].items():
                print(f"{way:22}" + "".join(f"{key:>10} {value:.3f}" for key, value in row.items()))
    if "index" in given.part:
        row = result["index"] = index(parse.read(given.recipe))
        took = ", ".join(f"{name} {taken:.1f} s" for name, taken in row["seconds"].items())
        size_mb = row["manifest_bytes"] / 1e6
        print(f"{row['parameters']:,} parameters on {row['ranks']} ranks: {row['pieces']:,} pieces, {size_mb:.0f} MB; {took}")
        print(f"the busiest rank writes {row['largest_share_of_mean']:.2f} times the mean")
    if "recovery" in given.part:
        with tempfile.TemporaryDirectory(dir=given.directory) as name:
            row = result["recovery"] = recovery(Path(name), Path("recipes/laptop.toml"), given.rounds)
        print(f"recovery, of a checkpoint of {row['num_bytes'] / 1e6:.0f} MB:")
        print("\n".join(f"{phase:18}{taken:8.3f} s" for phase, taken in row["seconds"].items()))
    write_json(given.json, facts, {"gigabytes": given.gigabytes, "rounds": given.rounds, **result})


if __name__ == "__main__":
    main()
