"""Published training runs, as a table of their columns, turned into setups: what the planner is held against.

A row says what ran where; `read` leaves out what it cannot describe and says why. Shapes that the columns have no place for, or that are
left blank, are those of the models' public configurations (`plan.shapes`).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quintet.cost.architecture import Architecture
from quintet.errors import SpecError, UsageError
from quintet.plan.memory import rank_memory
from quintet.plan.setup import Precision, Setup
from quintet.plan.shapes import UNKNOWN, beside, filled
from quintet.plan.software import Software, generation
from quintet.plan.step_time import step_time
from quintet.spec.cluster import CATALOGUE, POWER, Cluster
from quintet.spec.layout import Layout, PipelineName
from quintet.spec.run import Recompute

Row = Mapping[str, str]

GPUS = (
    (r"a100.*40", "a100-40gb"),
    (r"a800", "a800"),
    (r"a100", "a100"),
    (r"h20(?!0)", "h20"),
    (r"h100", "h100"),
    (r"h800", "h800"),
    (r"h200", "h200"),
    (r"gb300", "gb300"),
    (r"gb200", "gb200"),
    (r"b300", "b300"),
    (r"b200", "b200"),
    (r"mi325", "mi325x"),
    (r"mi35", "mi355x"),
    (r"mi3|instinct", "mi300x"),
)
"""Pattern of a device's name -> its name in the catalogue."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A run that can be estimated."""

    row: Row
    setup: Setup
    cluster: Cluster
    tokens_per_second: float
    """Per device."""

    @property
    def family(self) -> str:
        """Generation of the software."""
        return self.setup.software.name

    @property
    def moe(self) -> bool:
        """Whether it has experts."""
        return self.setup.architecture.num_experts > 0


class NotDescribed(Exception):
    """The row does not say enough, or says what the planner does not model."""


def read(path: Path) -> tuple[list[Published], list[tuple[Row, str]]]:
    """The runs of a table and, for each row that is left out, the reason. Raises UsageError for a file that is no such table."""
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read runs from {path}: {error}") from None
    missing = {"model", "gpu", "num_gpus", "hidden", "layers"} - set(rows[0] if rows else ())
    if missing:
        raise UsageError(f"{path} is no table of runs: its first line lacks {', '.join(sorted(missing))}")
    found: list[Published] = []
    left_out: list[tuple[Row, str]] = []
    for row in rows:
        try:
            found.append(published(row))
        except (NotDescribed, SpecError) as reason:
            left_out.append((row, str(reason)))
    return found, left_out


def published(row: Row) -> Published:
    """One row. Raises NotDescribed, or SpecError where it breaks a rule."""
    architecture, cluster, name = _architecture(row), _cluster(row), family(row)
    layout = _layout(row)
    sequence = _whole(row, "seq")
    batch = _number(row, "global_batch") or (_number(row, "micro_batch") or 0) * layout.dp
    if layout.pp > 1 and not _number(row, "global_batch"):
        raise NotDescribed("a pipeline without its global batch")
    if not sequence or not batch:
        raise NotDescribed("no sequence length or no global batch")
    notes = f"{row['overlap_notes']} {row['source']} {row['recompute']}".lower()
    if "lora" in notes:
        raise NotDescribed("LoRA is not modelled")
    precision = _precision(row)
    batch = max(batch, layout.dp)
    micro = _whole(row, "micro_batch") or 1
    setup = Setup(
        architecture=architecture,
        layout=layout,
        sequence_length=sequence,
        batch_sequences=int(batch),
        micro_batch=min(micro, max(1, int(batch) // layout.dp)),
        precision=precision,
        recompute=_recompute(row["recompute"].lower()),
        recompute_share=0.5 if "selective ac" in row["recompute"].lower() else 1.0,
        mtp=_mtp(row, architecture, sequence),
        gradient_bytes=2 if re.search("NVIDIA", row["source"]) else 4,  # their recipes reduce gradients in bf16
        software=_traits(generation(name, device=cluster.gpu.name), notes),
        megatron="DeepSeek" not in row["source"],
    )
    speed = _tokens_per_second(row, setup, int(batch))
    if "DeepSeek" in row["source"]:  # the report tells what was recomputed, and a second paper times the same run
        setup = replace(setup, recompute="selective")
    elif not row["recompute"]:
        setup = _fitting(setup, cluster, some_layers="MaxText" not in row["overlap_notes"], always_selective="NVIDIA" in row["source"])
    return Published(row=row, setup=setup, cluster=cluster, tokens_per_second=speed)


def _fitting(setup: Setup, cluster: Cluster, *, some_layers: bool, always_selective: bool) -> Setup:
    """The least recomputation with which a run fits, without any margin, where a row does not tell what was recomputed."""
    capacity = cluster.gpu.memory_bytes

    def needed(tried: Setup) -> float:
        return max(rank.total - rank.margins for rank in rank_memory(tried, step_time(tried, cluster).parts))

    # NVIDIA's recipes for latent attention compute its up-projections again whether or not memory asks for it.
    policies: tuple[Recompute, ...] = ("none",) if setup.architecture.kv_lora_rank is None else ("none", "selective")
    for recompute in policies[-1:] if always_selective else policies:
        if needed(tried := replace(setup, recompute=recompute)) <= capacity:
            return tried
    if not some_layers:
        return replace(setup, recompute="full")
    shares = [replace(setup, recompute="full", recompute_share=share / 8) for share in range(1, 9)]
    return next((tried for tried in shares if needed(tried) <= capacity), shares[-1])


def _traits(software: Software, notes: str) -> Software:
    """What a row tells of its software: CUDA graphs, and all-to-alls that send a token once per node."""
    if "full-iteration cuda graph" in notes:
        software = replace(software, launch=0.0, launch_moe=0.0, wait=0.0)
    elif "cuda graph" in notes:  # of attention and router only
        software = replace(software, launch=software.launch / 2, launch_moe=software.launch_moe / 2)
    if "token-drop" in notes or "maxtext" in notes:
        software = replace(software, wait=0.0)
    # DeepEP came into NVIDIA's recipes for V3-like models in the middle of 2025.
    if re.search(r"hybridep|deepep|dgxc-benchmarking v25\.(0[7-9]|1)", notes):
        software = replace(software, once_per_node=True)
    return software


FAMILIES = (
    (r"dgxc.*MaxText", "maxtext"),
    (r"dgxc-benchmarking v(24|25\.0[0-2])", "nemo 24"),
    (r"dgxc-benchmarking", "nemo 25"),
    (r"Megatron-Bridge.* 25\.", "bridge 25"),
    (r"Megatron-Bridge", "bridge 26"),
    (r"MegaScale.*\|MegaScale", "megascale"),
    (r"MegaScale", "megatron 2023"),
    (r"llm-foundry.*\|A100", "llm-foundry a100"),
    (r"llm-foundry", "llm-foundry h100"),
    (r"Zero Bubble", "zero-bubble"),
    (r"SimuMax", "megatron b200 blackwell"),
    (r"torchtitan", "torchtitan"),
    (r"AutoModel", "automodel"),
    (r"long-sequence", "nemo 24"),
    (r"DeepSeek", "deepseek"),
    (r"Primus", "primus"),
    (r"Folding|ModelZoo", "nemo 25"),
)
"""Pattern of `source|notes|device` -> the generation of the software, whose pace `plan.software` holds."""


def family(row: Row) -> str:
    """The generation of the software that ran."""
    text = f"{row['source']} {row['overlap_notes'] if 'MaxText' in row['overlap_notes'] else ''}|{row['overlap_notes']}|{row['gpu']}"
    if "llm-foundry" in text:
        return f"llm-foundry {row['gpu'].split()[0].lower()}"
    unknown = "megatron 2021" if row["gpu"].startswith("A") else "plain"
    return next((name for pattern, name in FAMILIES if re.search(pattern, text)), unknown)


def _architecture(row: Row) -> Architecture:
    name = row["model"].lower()
    if re.search(UNKNOWN, name):
        raise NotDescribed("hybrid models are not modelled")
    row, known = filled(row), beside(name)
    hidden, layers, heads = _whole(row, "hidden"), _whole(row, "layers"), _whole(row, "heads")
    if not hidden or not layers or not heads:
        raise NotDescribed("no shape")
    experts = _whole(row, "experts") or 0
    kv = row["kv_heads_or_mla"]
    ffn = _whole(row, "ffn") or 4 * hidden
    values: dict[str, Any] = dict(
        hidden_size=hidden,
        num_layers=layers,
        vocab_size=_whole(row, "vocab") or 51200,
        num_heads=heads,
        num_kv_heads=int(kv) if kv.isdigit() else heads,
        qk_head_dim=hidden // heads,
        v_head_dim=hidden // heads,
        ffn_size=ffn,
        num_dense_layers=0 if experts else layers,
        num_experts=experts,
        experts_per_token=_whole(row, "topk") or 0,
        expert_ffn_size=_whole(row, "moe_ffn") or 0,
    )
    values |= known
    if "proxy" in name and experts and values["num_dense_layers"]:
        values["num_dense_layers"] = min(values["num_dense_layers"], 1)
    if experts and not known and values["num_dense_layers"] == 0:
        values["ffn_size"] = 0
    gated = Architecture(**values, gated=True)
    total = _number(row, "total_params_b")
    if total is None:
        return gated
    plain = replace(gated, gated=False)
    tied = [replace(a, tie_embeddings=True) for a in (gated, plain)]
    main = [replace(a, num_mtp_modules=0) for a in (gated, plain, *tied)]
    best = min(range(4), key=lambda i: abs(main[i].parameters - total * 1e9))
    return (gated, plain, *tied)[best]


def _layout(row: Row) -> Layout:
    notes = row["overlap_notes"]
    devices = _whole(row, "num_gpus")
    if not devices:
        raise NotDescribed("number of devices not told")
    if not row["tp"] and not row["pp"] and not re.search("FSDP", notes):
        raise NotDescribed("layout not told")
    tp, pp, cp = (_whole(row, axis) or 1 for axis in ("tp", "pp", "cp"))
    if devices % (tp * pp * cp):
        raise NotDescribed("its degrees do not divide its devices")
    dp = devices // (tp * pp * cp)
    ep, etp = _whole(row, "ep") or 1, _whole(row, "etp")
    if etp is None:  # Megatron's default was tp until folding came in 2025
        etp = tp if re.search(r"v24\.|v25\.0[0-4]", row["source"]) else 1
    sharded = re.search(r"FSDP|FULL_SHARD|fsdp", notes) is not None or "torchtitan" in row["source"]
    zero: Any = 3 if sharded else 2 if "SHARD_GRAD_OP" in notes else 0 if "ZeRO-0" in notes else 1
    group = re.search(r"FSDP2 (\d+)|FSDP(\d+)", notes)
    group = re.search(r"\d+$", group[0]) if group else None
    shards = int(group[0]) if group and zero == 3 and (dp * cp) % int(group[0]) == 0 else None
    if (dp * cp * tp) % (ep * max(1, etp)):
        raise NotDescribed("its experts do not divide its replicas")
    layout = Layout(tp=tp, pp=pp, cp=cp, dp=dp, ep=ep, expert_tp=tp if etp > 1 else 1, zero=zero, zero_ranks=shards)
    chunks = _whole(row, "vpp") or 1
    if pp > 1 and not row["vpp"] and "dgxc" in row["source"]:  # not told: their other pipelines have one or two layers per stage
        chunks = max(1, (_whole(row, "layers") or pp) // pp)
    lower = notes.lower()
    schedule: PipelineName = "1f1b"
    if re.search(r"zb-2p|v-half|v-min|zbb", lower):
        raise NotDescribed("a schedule that Quintet does not have")
    if "dualpipe" in lower or "DeepSeek" in row["source"]:
        schedule = "dualpipe"
    elif "zb-1p" in lower:
        schedule = "zb1p"
    elif "zbv" in lower:
        schedule = "zbv"
    elif pp > 1 and (chunks > 1 or "interleaved" in lower):
        schedule, chunks = "interleaved", chunks if chunks > 1 else 2
    return replace(layout, schedule=schedule, chunks=max(2, chunks)) if pp > 1 else layout


def _recompute(text: str) -> Recompute:
    """Experts that are computed again take their all-to-alls with them: nearly a whole layer. torchtitan's selective checkpointing
    keeps every second product."""
    if text.startswith("full") or "moe" in text or "selective ac" in text:
        return "full"
    return "selective" if "mla" in text else "none"


def _precision(row: Row) -> Precision:
    text = row["precision"].lower()
    if "nvfp4" in text:
        return "nvfp4"
    return "fp8" if "fp8" in text else "bf16"


def _cluster(row: Row) -> Cluster:
    name = next((gpu for pattern, gpu in GPUS if re.search(pattern, row["gpu"].lower())), None)
    if name is None:
        raise NotDescribed(f"no device like {row['gpu']!r} in the catalogue")
    cluster = CATALOGUE[name]
    if "HBM2e" in row["gpu"]:  # torchtitan's H100 has 500 W and slower memory
        sustained = cluster.gpu.sustained * (500 / cluster.gpu.watts) ** POWER
        gpu = replace(cluster.gpu, memory_bandwidth=2.4e12, memory_bytes=96e9, watts=500, sustained=sustained)
        cluster = replace(cluster, gpu=gpu)
    return replace(cluster, num_gpus=_whole(row, "num_gpus") or 1)


def _mtp(row: Row, a: Architecture, sequence: int) -> bool:
    """Whether MTP modules ran: told by the operations per token that the row implies, where it does."""
    speed, rate = _number(row, "tokens_per_s_per_gpu"), _number(row, "tflops_per_gpu")
    if not a.num_mtp_modules:
        return False
    if "proxy" in row["model"]:
        return False
    if speed and rate:
        with_mtp, without = (a.flops_per_token(sequence_length=sequence, mtp=mtp) for mtp in (True, False))
        implied = rate * 1e12 / speed
        return abs(implied - with_mtp) < abs(implied - without)
    return True


def _tokens_per_second(row: Row, setup: Setup, batch: int) -> float:
    if speed := _number(row, "tokens_per_s_per_gpu"):
        return speed
    if seconds := _number(row, "step_time_s"):
        return batch * setup.sequence_length / seconds / setup.layout.num_ranks
    if rate := _number(row, "tflops_per_gpu"):
        flops = setup.architecture.flops_per_token(sequence_length=setup.sequence_length, mtp=setup.mtp)
        return rate * 1e12 / flops
    raise NotDescribed("no speed whose convention is known")


def _number(row: Row, name: str) -> float | None:
    try:
        value = float(row.get(name) or "nan")
    except ValueError:
        return None
    return value if value == value else None


def _whole(row: Row, name: str) -> int | None:
    value = _number(row, name)
    return None if value is None else int(value)
