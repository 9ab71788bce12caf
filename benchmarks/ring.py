"""Ring attention: latents against keys and values round the ring, and how long a context a rank holds that one device cannot.

    python benchmarks/ring.py [--part ring context] [--ranks 2] [--tokens 256 1024 2048] [--links 0 1000 400 100] [--rounds 3] [--json FILE]

Ring: one attention layer (V3's head widths and latent, 16 heads: V3's rank at tp 8), fp32, forward and backward, one gloo process of one
thread per rank. Both payloads take turns in the same processes; a round lasts as long as its slowest rank, and each shape's figure is the
median. Bytes are those that the ranks counted, which must equal `quintet.cost.ring_comm`. A link of so many Mbit/s is made of network
namespaces, one per rank, joined by a bridge and shaped in both directions by tc; that takes root, `ip` and `tc`, and is left out without
them. Link 0 is the loopback device. The link's true speed (half the nominal one between two ranks: gloo uses their one connection in one
direction at a time) and that of one rank's products are measured, and the payload that `ring_payload` then expects to be faster stands
beside the one that was. 2 Mbit/s per GFLOP/s weigh fp32 messages against products as 50 GB/s (between V3's nodes) weigh those in bf16
against 400 TFLOP/s; 8 Mbit/s as 200 GB/s (within a node).

Context: one training forward and backward of a small transformer on a single sequence (--context, 32,768 tokens), on one device and on
--cp ranks, each process under the same limit on its data (RLIMIT_DATA): half of what one device allocates without a limit.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from startup import circumstances, headline, write_json

from quintet.cost.ring_comm import Payload, ring_bytes, ring_payload, ring_seconds
from quintet.model.attention import LatentAttention
from quintet.model.rope import rotation
from quintet.model.transformer import Transformer
from quintet.ops.pointwise import REFERENCE
from quintet.parallel.collectives import Group, Shift, alone
from quintet.parallel.mesh import make_mesh
from quintet.parallel.sequence import RingAttention, shard_positions
from quintet.spec.layout import Layout
from quintet.spec.model import Model

PAYLOADS: tuple[Payload, ...] = ("latent", "kv")
FP32 = 4
LINK_TEST_BYTES = 4 * 2**20


def a_model(*, layers: int, heads: int, hidden: int, latent: int, nope: int, rope: int, context: int) -> Model:
    """Dense layers, queries not compressed, values as wide as keys without rotary embedding."""
    return Model(
        vocab_size=512,
        hidden_size=hidden,
        num_layers=layers,
        num_dense_layers=layers,
        num_heads=heads,
        kv_lora_rank=latent,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=nope,
        dense_ffn_size=2 * hidden,
        expert_ffn_size=hidden,
        num_routed_experts=2,
        num_shared_experts=0,
        num_experts_per_token=1,
        num_mtp_modules=0,
        max_context=context,
    )


# What a rank does.


def ring_worker(task: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of every round and bytes of one, by tokens per rank and payload; the link's bytes/s; and operations/s without a ring."""
    group, model = make_mesh(Layout(cp=dist.get_world_size()))["cp"], a_model(**task["model"])
    layer = _layer(model)
    found: dict[str, Any] = {"link": _link_speed(group), "tokens": {}}
    for tokens in task["tokens"]:
        seconds: dict[str, list[float]] = {payload: [] for payload in PAYLOADS}
        sent: dict[str, int] = {}
        for i in range(task["rounds"] + 1):  # the first round warms up
            for payload in PAYLOADS if i % 2 else PAYLOADS[::-1]:
                before = group.traffic.num_bytes
                seconds[payload].append(_seconds(layer, RingAttention(group, payload), group, tokens))
                sent[payload] = group.traffic.num_bytes - before
        single = statistics.median(_seconds(layer, RingAttention(alone("cp"), "latent"), group, tokens) for _ in range(3))
        # Own expansion included, which the ring's model leaves out: both payloads pay it.
        work = ring_seconds(model, tokens_per_rank=tokens, cp=1, payload="latent", element_bytes=FP32, flops_per_second=1.0).total
        work += 4 * 2 * tokens * model.kv_lora_rank * model.num_heads * (model.qk_nope_head_dim + model.v_head_dim)
        found["tokens"][tokens] = {
            "seconds": {payload: spent[1:] for payload, spent in seconds.items()},
            "sent": sent,
            "flops_per_second": work / single,
        }
    return found


def _layer(model: Model) -> LatentAttention:
    torch.manual_seed(0)
    layer = LatentAttention(model, kernels=REFERENCE)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, parameter.shape[-1] ** -0.5)
    return layer


def _seconds(layer: LatentAttention, attend: RingAttention, group: Group, tokens: int) -> float:
    """Core attention of one sequence, forward and backward, from latents to the heads' outputs."""
    layer.attend = attend
    x = torch.randn(1, tokens, layer.model.hidden_size, requires_grad=True)
    turn = rotation(layer.model, shard_positions(tokens * attend.group.size, attend.group))
    dist.barrier(group.process_group)
    begin = time.perf_counter()
    out = layer(x, turn, None)
    out.backward(out.detach())
    return time.perf_counter() - begin


def _link_speed(group: Group) -> float:
    """Bytes per second in one direction while the other is as busy."""
    message, spent = torch.zeros(LINK_TEST_BYTES // FP32), []
    for _ in range(4):
        dist.barrier(group.process_group)
        begin = time.perf_counter()
        Shift([message], group).wait()
        spent.append(time.perf_counter() - begin)
    return LINK_TEST_BYTES / statistics.median(spent[1:])


def context_worker(task: Mapping[str, Any]) -> dict[str, Any]:
    """Forward and backward of a whole transformer on this rank's part of the sequence, under a limit on what it may allocate."""
    group = make_mesh(Layout(cp=dist.get_world_size()))["cp"] if dist.is_initialized() else alone("cp")
    model = a_model(**task["model"])
    torch.manual_seed(0)
    net = Transformer(model)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, 0.0, parameter.shape[-1] ** -0.5)
    if group.size > 1:
        for layer in net.layers:
            layer.attention.attend = RingAttention(group, "latent")
    positions = shard_positions(model.max_context, group)
    tokens = (positions * 7919 % model.vocab_size)[None]
    before = _memory()
    if task["limit"]:
        resource.setrlimit(resource.RLIMIT_DATA, (before["VmData"] + task["limit"],) * 2)
    begin = time.perf_counter()
    try:
        net.loss(net(tokens, positions=positions).hidden, tokens, chunk=1024).backward()
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        return {"done": False, "message": str(error).splitlines()[0]}
    return {"done": True, "seconds": time.perf_counter() - begin, "bytes": _memory()["VmHWM"] - before["VmRSS"]}


def _memory() -> dict[str, int]:
    """Bytes of this process: resident (VmRSS), at most so far (VmHWM), private and writable (VmData)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if rest.endswith(" kB")}


WORKERS = {"ring": ring_worker, "context": context_worker}


def worker(task: Mapping[str, Any]) -> None:
    """The life of a rank: its place stands in the environment, its task in an argument; the answer goes to standard output."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo", init_method="env://")
    print(json.dumps(WORKERS[task["kind"]](task)), flush=True)
    if dist.is_initialized():
        dist.barrier()
        os._exit(0)  # gloo's threads may not outlive the interpreter


# Who starts them, and where.


def start(task: Mapping[str, Any], *, ranks: int, hosts: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The answer of each rank, which all run at once: on this host, or each in a namespace of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    crew = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": str(port)} if ranks > 1 else {}
        place |= {"MASTER_ADDR": _address(0) if hosts else "127.0.0.1", "GLOO_SOCKET_IFNAME": "eth0" if hosts else "lo"} if place else {}
        environment = {**os.environ, **place, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        prefix = ["ip", "netns", "exec", hosts[rank]] if hosts else []
        command = [*prefix, sys.executable, __file__, "--worker", json.dumps(task)]
        crew.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    try:
        answers = [process.communicate()[0] for process in crew]
    finally:
        for process in crew:
            process.kill()
    if failed := [rank for rank, process in enumerate(crew) if process.wait()]:
        raise RuntimeError(f"ranks {failed} of {ranks} failed; their own messages stand above")
    return [json.loads(answer) for answer in answers]


def can_emulate() -> bool:
    """Whether namespaces with limited links can be made here."""
    return sys.platform == "linux" and os.geteuid() == 0 and all(map(shutil.which, ("ip", "tc")))


def _address(host: int) -> str:
    return f"10.83.61.{host + 1}"


@contextmanager
def emulated_hosts(count: int, *, megabits: int) -> Iterator[list[str]]:
    """Namespaces joined by a bridge, each with a link of `megabits` per second in either direction."""
    mark = f"r{os.getpid()}"
    names, bridge = [f"{mark}h{i}" for i in range(count)], f"{mark}b"
    shape = f"root handle 1: tbf rate {megabits}mbit burst 128kb latency 400ms"
    try:
        _run(f"ip link add {bridge} type bridge", f"ip link set {bridge} up")
        for i, name in enumerate(names):
            _run(
                f"ip netns add {name}",
                f"ip link add {mark}v{i} type veth peer name eth0 netns {name}",
                f"ip link set {mark}v{i} master {bridge} up",
                f"ip -n {name} addr add {_address(i)}/24 dev eth0",
                f"ip -n {name} link set lo up",
                f"ip -n {name} link set eth0 up",
                f"ip netns exec {name} tc qdisc add dev eth0 {shape}",
                f"tc qdisc add dev {mark}v{i} {shape}",
            )
        yield names
    finally:
        for command in (*(f"ip netns del {name}" for name in names), f"ip link del {bridge}"):
            subprocess.run(command.split(), check=False, stderr=subprocess.DEVNULL)


def _run(*commands: str) -> None:
    for command in commands:
        subprocess.run(command.split(), check=True)


def ring(given: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per link and number of tokens."""
    shape = {"layers": 1, "heads": given.heads, "hidden": 256, "latent": 512, "nope": 128, "rope": 64}
    shape["context"] = max(given.tokens) * given.ranks
    task = {"kind": "ring", "model": shape, "tokens": given.tokens, "rounds": given.rounds}
    rows = []
    for megabits in given.links:
        if megabits and can_emulate():
            with emulated_hosts(given.ranks, megabits=megabits) as hosts:
                found = start(task, ranks=given.ranks, hosts=hosts)
        elif megabits:
            print(f"no link of {megabits} Mbit/s: that takes root, ip and tc", file=sys.stderr)
            continue
        else:
            found = start(task, ranks=given.ranks)
        rows += [_row(megabits, tokens, found, a_model(**shape)) for tokens in given.tokens]
    return rows


def _row(megabits: int, tokens: int, found: Sequence[Mapping[str, Any]], model: Model) -> dict[str, Any]:
    """One line of the table from every rank's answers. Raises RuntimeError if a rank sent other bytes than the cost model says."""
    answers, ranks = [rank["tokens"][str(tokens)] for rank in found], len(found)
    row: dict[str, Any] = {"megabits": megabits, "tokens_per_rank": tokens, "ranks": ranks, "payloads": {}}
    for payload in PAYLOADS:
        foretold = ring_bytes(model, tokens_per_rank=tokens, sequences=1, cp=ranks, payload=payload, element_bytes=FP32).total
        if {answer["sent"][payload] for answer in answers} != {foretold}:
            raise RuntimeError(f"ranks sent {[answer['sent'][payload] for answer in answers]} bytes of {payload}, not {foretold}")
        rounds = zip(*(answer["seconds"][payload] for answer in answers), strict=True)
        row["payloads"][payload] = {"bytes": foretold, "seconds": statistics.median(map(max, rounds))}
    speeds = {
        "link_bytes_per_second": min(rank["link"] for rank in found),
        "flops_per_second": min(answer["flops_per_second"] for answer in answers),
    }
    latent, kv = (row["payloads"][payload]["seconds"] for payload in PAYLOADS)
    expected = ring_payload(model, tokens_per_rank=tokens, cp=ranks, element_bytes=FP32, **speeds)
    return {**row, **speeds, "ratio": kv / latent, "faster": PAYLOADS[latent > kv], "expected": expected}


def context(given: argparse.Namespace) -> dict[str, Any]:
    """What one device allocates, and what it and a rank do under half of that."""
    shape = {"layers": given.layers, "heads": 4, "hidden": 256, "latent": 128, "nope": 64, "rope": 32, "context": given.context}
    task = {"kind": "context", "model": shape, "limit": 0}
    (free,) = start(task, ranks=1)
    task["limit"] = free["bytes"] // 2
    (limited,) = start(task, ranks=1)
    ranks = start(task, ranks=given.cp)
    sizes = {"context": given.context, "cp": given.cp, "layers": given.layers}
    return {**sizes, "limit": task["limit"], "free": free, "one": limited, "ranks": ranks}


def show_ring(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table."""
    print(f"\n{'link Mbit/s':>12}{'measured':>10}{'GFLOP/s':>9}{'tokens/rank':>13}{'MB latent':>11}{'MB kv':>9}", end="")
    print(f"{'s latent':>10}{'s kv':>9}{'kv/latent':>11}  {'faster':8}{'expected':8}")
    for row in rows:
        few, many = (row["payloads"][payload] for payload in PAYLOADS)
        print(f"{row['megabits'] or 'loopback':>12}{row['link_bytes_per_second'] * 8e-6:10.0f}", end="")
        print(f"{row['flops_per_second'] / 1e9:9.0f}{row['tokens_per_rank']:13,}", end="")
        print(f"{few['bytes'] / 1e6:11.2f}{many['bytes'] / 1e6:9.1f}{few['seconds']:10.3f}{many['seconds']:9.3f}", end="")
        print(f"{row['ratio']:11.2f}  {row['faster']:8}{row['expected']:8}")


def show_context(found: Mapping[str, Any]) -> None:
    """Print what was allocated and what happened under the limit."""
    def line(what: str, answer: Mapping[str, Any]) -> None:
        spent = f"{answer['bytes'] / 2**20:8.0f}{answer['seconds']:8.1f}" if answer["done"] else f"  {answer['message'][:95]}"
        print(f"{what:28}{spent}")

    print(f"\n{found['context']:,} tokens, {found['layers']} layers: MiB beside weights and libraries, seconds")
    line("one device, no limit", found["free"])
    print(f"{'limit':28}{found['limit'] / 2**20:8.0f}")
    line("one device, limited", found["one"])
    for rank, answer in enumerate(found["ranks"]):
        line(f"rank {rank} of {found['cp']}, limited", answer)


def main() -> None:
    """Measure, print the tables, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("ring", "context"), nargs="+", default=["ring", "context"])
    parser.add_argument("--ranks", type=int, default=2, help="of the ring")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 2048], help="per rank")
    parser.add_argument("--links", type=int, nargs="+", default=[0, 1000, 400, 100], help="Mbit/s; 0 is the loopback device")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--context", type=int, default=32768, help="tokens of the long sequence")
    parser.add_argument("--cp", type=int, default=4, help="ranks that share it")
    parser.add_argument("--layers", type=int, default=2, help="of the transformer that reads it")
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return worker(given.worker)
    facts = circumstances("torch")
    print(headline(facts))
    result: dict[str, Any] = {}
    if "ring" in given.part:
        result["ring"] = ring(given)
        show_ring(result["ring"])
    if "context" in given.part:
        result["context"] = context(given)
        show_context(result["context"])
    write_json(given.json, facts, result)


if __name__ == "__main__":
    main()
