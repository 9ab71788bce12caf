"""Training step of one DeepSeek-V3-shaped model (108 M parameters, 27 M active): Quintet against transformers and others, side by side.

Each contestant lives in a process of its own; the parent lets them take one step after another in rotating order, so that drift of
the machine hits all alike. A step is forward, backward and AdamW. Printed per contestant: median tokens/s by CPU time and by wall
time, the ratio to the best eager peer, and the peak memory of the process.

    python benchmarks/model_step.py --seq 512 --dtype bf16 --threads 1 --rounds 7 [--compile] [--profile]

A peer that is not built in joins by `--contestant NAME=FILE.py:FUNCTION`, under an interpreter of its own if need be. FUNCTION(dtype:
"bf16" | "fp32", seq, SHAPE, TOKENS) builds the model of SHAPE and returns step(), which trains on a batch of TOKENS // seq sequences.
"compiled" in its name keeps it from being the peer that ratios refer to.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

Build = Callable[[str, int], Callable[[], None]]
"""(dtype, sequence length) -> one training step."""

TOKENS = 2048
SHAPE = dict(
    vocab_size=8192,
    hidden_size=512,
    num_layers=8,
    num_dense_layers=1,
    num_heads=8,
    q_lora_rank=256,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    dense_ffn_size=1536,
    expert_ffn_size=256,
    num_routed_experts=32,
    num_shared_experts=1,
    num_experts_per_token=4,
    num_groups=4,
    num_groups_per_token=2,
    num_mtp_modules=0,
    init_std=0.02,
)


def quintet_step(dtype: str, seq: int, *, compile: bool) -> Callable[[], None]:
    import torch

    from quintet.data.loader import Batch
    from quintet.model.transformer import Transformer, initial_values
    from quintet.ops.pointwise import REFERENCE, fused
    from quintet.parallel.mesh import single
    from quintet.parallel.parallelize import parallelize
    from quintet.spec.curriculum import Settings
    from quintet.spec.model import Model
    from quintet.spec.run import Optimizer, Train
    from quintet.train import device
    from quintet.train.build import Built
    from quintet.train.optimizer import AdamW
    from quintet.train.step import run_step

    train = Train(micro_batch=TOKENS // seq, precision=dtype, balance_weight=0.0)
    device.prepare(train)
    with torch.device("meta"):
        model = Transformer(Model(**SHAPE), kernels=fused() if compile else REFERENCE)
    parameters = parallelize(model, single(), train, device=torch.device("cpu"))
    parameters.fill(lambda piece: initial_values(model.model, piece.name, piece.box, seed=0))
    built = Built(model, parameters, AdamW(parameters, Optimizer()))
    data = torch.randint(0, SHAPE["vocab_size"], (TOKENS // seq, seq + 1), generator=torch.Generator().manual_seed(0))
    batch = Batch(inputs=data[:, :-1], labels=data[:, 1:], sizes=[(data.shape[1], 0)] * len(data))
    settings = Settings(batch_sequences=len(data), learning_rate=1e-4, mtp_weight=0.0, bias_speed=0.001)

    def step() -> None:
        result = run_step(built, batch, settings=settings, train=train, document_mask=False, step=1)
        print("loss", result.loss, file=sys.stderr)

    return step


def transformers_step(dtype: str, seq: int, *, experts: str, compile: bool, amp: bool, onednn: bool) -> Callable[[], None]:
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    if onednn:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    s = SHAPE
    config = DeepseekV3Config(
        vocab_size=s["vocab_size"], hidden_size=s["hidden_size"], intermediate_size=s["dense_ffn_size"],
        moe_intermediate_size=s["expert_ffn_size"], num_hidden_layers=s["num_layers"], num_attention_heads=s["num_heads"],
        num_key_value_heads=s["num_heads"], n_shared_experts=s["num_shared_experts"], n_routed_experts=s["num_routed_experts"],
        routed_scaling_factor=1.0, kv_lora_rank=s["kv_lora_rank"], q_lora_rank=s["q_lora_rank"], qk_rope_head_dim=s["qk_rope_head_dim"],
        v_head_dim=s["v_head_dim"], qk_nope_head_dim=s["qk_nope_head_dim"], n_group=s["num_groups"],
        topk_group=s["num_groups_per_token"], num_experts_per_tok=s["num_experts_per_token"], first_k_dense_replace=s["num_dense_layers"],
        norm_topk_prob=True, max_position_embeddings=4096, use_cache=False, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM._from_config(config, experts_implementation=experts)
    if dtype == "bf16" and not amp:
        model = model.to(torch.bfloat16)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    data = torch.randint(0, s["vocab_size"], (TOKENS // seq, seq), generator=torch.Generator().manual_seed(0))
    forward = torch.compile(model) if compile else model

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = forward(input_ids=data, labels=data).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print("loss", loss.item(), file=sys.stderr)

    return step


CONTESTANTS: dict[str, Build] = {
    "quintet": lambda dtype, seq: quintet_step(dtype, seq, compile=True),
    "quintet eager": lambda dtype, seq: quintet_step(dtype, seq, compile=False),
    "transformers eager": lambda d, s: transformers_step(d, s, experts="eager", compile=False, amp=False, onednn=False),
    "transformers grouped_mm": lambda d, s: transformers_step(d, s, experts="grouped_mm", compile=False, amp=False, onednn=False),
    "transformers grouped_mm oneDNN": lambda d, s: transformers_step(d, s, experts="grouped_mm", compile=False, amp=False, onednn=True),
    "transformers grouped_mm autocast": lambda d, s: transformers_step(d, s, experts="grouped_mm", compile=False, amp=True, onednn=False),
    "transformers compiled": lambda d, s: transformers_step(d, s, experts="grouped_mm", compile=True, amp=False, onednn=False),
}


def joined(spec: str) -> tuple[str, Build]:
    """NAME=FILE.py:FUNCTION as a contestant; the file is imported only to build it."""
    name, _, place = spec.partition("=")
    file, _, function = place.rpartition(":")
    if not (name and file and function) or name in CONTESTANTS:
        raise argparse.ArgumentTypeError(f"{spec!r} is not NAME=FILE.py:FUNCTION with a name other than {', '.join(CONTESTANTS)}")

    def build(dtype: str, seq: int) -> Callable[[], None]:
        found = importlib.util.spec_from_file_location("contestant", file)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        return getattr(module, function)(dtype, seq, SHAPE, TOKENS)

    return name, build


def work(build: Build, dtype: str, seq: int, threads: int, profile: bool) -> None:
    """A contestant: one step per line on standard input, its times as JSON on standard output."""
    import torch

    torch.set_num_threads(threads)
    begin = time.perf_counter()
    step = build(dtype, seq)
    step()
    print(json.dumps({"first": time.perf_counter() - begin}), flush=True)
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        step()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"cpu": cpu, "wall": wall, "peak": peak}), flush=True)
    if profile:
        print(json.dumps(components(step)), flush=True)


COMPONENTS: dict[str, tuple[str, ...]] = {
    "linear maps": ("_Linear", "_LinearBackward", "MmBackward0"),
    "routed experts' products": ("_GroupedMatmul", "_GroupedMatmulBackward"),
    "core attention": ("BlockedAttention", "BlockedAttentionBackward"),
    "head and loss": ("_HeadLoss", "_HeadLossBackward"),
    "norms, rotation, SwiGLU (fused)": ("CompiledFunction", "CompiledFunctionBackward"),
    "routing and moving rows": (
        "_Spread", "_SpreadBackward", "_Collect", "_CollectBackward", "_ExactLinear", "_ExactLinearBackward", "aten::topk", "aten::sort",
        "aten::scatter", "aten::bincount",
    ),
    "embedding": ("aten::embedding", "EmbeddingBackward0"),
    "gradients into buckets": ("gradient sum",),
    "gradient norm": ("gradient norm",),
    "AdamW": ("optimizer",),
}  # fmt: skip
"""Part of Quintet's step -> the profiler's names of it, whose times include what they call."""


def components(step: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of CPU time per part of one step of Quintet's."""
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as record

    from quintet.parallel.bucket import Bucket
    from quintet.parallel.zero import ShardedParameters
    from quintet.train.optimizer import AdamW

    watched = ((AdamW, "step", "optimizer"), (ShardedParameters, "norm_squared", "gradient norm"), (Bucket, "add", "gradient sum"))
    for owner, name, label in watched:
        setattr(owner, name, record_function(label)(getattr(owner, name)))
    with record(activities=[ProfilerActivity.CPU]) as found:
        step()
    times = {entry.key: entry.cpu_time_total / 1e3 for entry in found.key_averages()}
    total = sum(entry.self_cpu_time_total for entry in found.key_averages()) / 1e3
    parts = {part: sum(times.get(name, 0.0) for name in names) for part, names in COMPONENTS.items()}
    return {**parts, "rest (additions, copies, Python)": total - sum(parts.values()), "total": total}


def answer(process: subprocess.Popen[str]) -> dict[str, float]:
    """A contestant's next line; its end instead of one is an error that says how to see why."""
    if line := process.stdout.readline():
        return json.loads(line)
    raise SystemExit(f"a contestant ended with status {process.wait()}; to see why: {shlex.join(process.args)} < /dev/null")


def matmul_peak(dtype: str, threads: int) -> float:
    """FLOP/s of a large product in a process of its own, by the faster library for fp32."""
    code = (
        "import torch; from quintet.spec.run import Train; from quintet.train import device as d; "
        f"torch.set_num_threads({threads}); print(d.measured_peak(d.prepare(Train(device='cpu')), {dtype!r}))"
    )
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def flops_of_a_step(seq: int) -> float:
    """Model FLOPs (causal, no MTP, no recomputation) of one step."""
    from quintet.cost.flops import flops_per_token
    from quintet.spec.model import Model

    return TOKENS * flops_per_token(Model(**SHAPE), sequence_length=seq).total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", type=int, default=512, help="sequence length; the batch is 2048 tokens")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="also transformers under torch.compile (minutes to start)")
    parser.add_argument("--only", nargs="*", help="built-in contestants by name")
    parser.add_argument(
        "--contestant", type=joined, action="append", default=[], metavar="NAME=FILE.py:FUNCTION", help="one more (repeatable)"
    )
    parser.add_argument("--contestant-python", default=sys.executable, metavar="PATH", help="interpreter of these")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--worker")
    args = parser.parse_args()
    guests = dict(args.contestant)
    if args.worker:
        profile = args.profile and args.worker.startswith("quintet")
        return work({**CONTESTANTS, **guests}[args.worker], args.dtype, args.seq, args.threads, profile)
    names = args.only if args.only is not None else [n for n in CONTESTANTS if args.compile or n != "transformers compiled"]
    if args.dtype == "fp32":
        names = [n for n in names if "autocast" not in n]
    names = [*names, *guests]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    crew, first = {}, {}
    for name in names:
        crew[name] = subprocess.Popen(
            [args.contestant_python if name in guests else sys.executable, __file__, *sys.argv[1:], "--worker", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        first[name] = answer(crew[name])["first"]
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for i in range(args.rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            crew[name].stdin.write("step\n")
            crew[name].stdin.flush()
            rows[name].append(answer(crew[name]))
    for name, process in crew.items():
        process.stdin.close()
        if args.profile and name.startswith("quintet"):
            parts = answer(process)
            print(f"\nwhere {name} spends its step (ms of CPU time, share)")
            for part, ms in parts.items():
                print(f"  {part:36}{ms:9.1f}{ms / parts['total']:8.1%}")
        process.wait()
    peak_flops = matmul_peak(args.dtype, args.threads)
    flops = flops_of_a_step(args.seq)
    print(f"\nmatmul peak {peak_flops / 1e9:.0f} GFLOP/s on {args.threads} thread(s); a step needs {flops / 1e9:.0f} GFLOP")
    rate = {n: {k: TOKENS / statistics.median(r[k] for r in rows[n][1:]) for k in ("cpu", "wall")} for n in names}
    peers = [n for n in names if not n.startswith("quintet") and "compiled" not in n]
    best = {k: max((rate[n][k] for n in peers), default=float("nan")) for k in ("cpu", "wall")}
    print(f"{args.dtype}, {TOKENS // args.seq} x {args.seq} tokens, {args.threads} thread(s), {args.rounds} rounds")
    print(f"{'':34}{'tok/s cpu':>10}{'tok/s wall':>11}{'ratio cpu':>10}{'ratio wall':>11}{'MFU wall':>9}{'peak GB':>9}{'first s':>9}")
    for n in names:
        r, peak = rate[n], rows[n][-1]["peak"] / 1e9
        mfu = r["wall"] / TOKENS * flops / peak_flops
        ratios = f"{r['cpu'] / best['cpu']:10.2f}{r['wall'] / best['wall']:11.2f}"
        print(f"{n:34}{r['cpu']:10.0f}{r['wall']:11.0f}{ratios}{mfu:9.1%}{peak:9.2f}{first[n]:9.1f}")


if __name__ == "__main__":
    main()
