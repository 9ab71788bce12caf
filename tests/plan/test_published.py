"""Published runs: how a row is read, what is left out, and that the planner's errors stay what docs/planner.md says."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

import pytest

from quintet.errors import UsageError
from quintet.plan.estimate import estimate
from quintet.plan.published import NotDescribed, published, read

TABLE = Path(__file__).parents[2] / "benchmarks" / "published_runs.csv"
LLAMA = {
    "source": "NVIDIA dgxc-benchmarking v25.02.01",
    "model": "Llama-3(.1)-70B",
    "total_params_b": "70.6",
    "hidden": "8192",
    "layers": "80",
    "heads": "64",
    "kv_heads_or_mla": "8",
    "ffn": "28672",
    "vocab": "128256",
    "seq": "8192",
    "gpu": "H100",
    "num_gpus": "64",
    "tp": "4",
    "pp": "4",
    "vpp": "5",
    "cp": "2",
    "micro_batch": "1",
    "global_batch": "128",
    "precision": "BF16",
    "tokens_per_s_per_gpu": "1121",
}


def row(**changes: str) -> dict[str, str]:
    with TABLE.open(newline="") as file:
        names = next(csv.reader(file))
    return {name: "" for name in names} | LLAMA | changes


def test_a_row_becomes_a_setup() -> None:
    run = published(row())
    layout, setup = run.setup.layout, run.setup
    assert (layout.tp, layout.pp, layout.cp, layout.dp, layout.zero) == (4, 4, 2, 2, 1)
    assert (layout.pipeline, layout.chunks, setup.num_microbatches, setup.recompute) == ("interleaved", 5, 64, "none")
    assert setup.architecture.gated and not run.moe
    assert run.family == "nemo 24"
    assert estimate(setup, run.cluster).tokens_per_second == pytest.approx(1121, rel=0.1)


def test_speed_comes_from_whatever_is_told() -> None:
    step = published(row(tokens_per_s_per_gpu="", step_time_s="14.61"))
    rate = published(row(tokens_per_s_per_gpu="", tflops_per_gpu="503.6"))
    assert step.tokens_per_second == pytest.approx(1121.4, rel=1e-3)
    assert rate.tokens_per_second == pytest.approx(1121.4, rel=2e-3)


def test_mtp_ran_where_the_operations_per_token_say_so() -> None:
    v3 = {
        "model": "DeepSeek-V3",
        "total_params_b": "671",
        "hidden": "7168",
        "layers": "61",
        "heads": "128",
        "kv_heads_or_mla": "MLA",
        "experts": "256",
        "topk": "8",
        "ffn": "18432",
        "moe_ffn": "2048",
        "vocab": "129280",
        "seq": "4096",
        "num_gpus": "1024",
        "tp": "2",
        "pp": "8",
        "ep": "64",
        "cp": "1",
        "vpp": "4",
        "global_batch": "8192",
        "tokens_per_s_per_gpu": "1297",
    }
    assert published(row(**v3, tflops_per_gpu="338")).setup.mtp
    assert not published(row(**v3, tflops_per_gpu="324")).setup.mtp


def test_recomputation_that_is_not_told_is_as_much_as_memory_asks_for() -> None:
    sharded = {"tp": "1", "pp": "1", "cp": "1", "vpp": "", "micro_batch": "2", "overlap_notes": "FSDP64; MaxText (JAX)"}
    assert published(row(**sharded)).setup.recompute == "full"
    assert published(row(**sharded, recompute="none")).setup.recompute == "none"
    assert published(row(**sharded)).setup.layout.zero == 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden": "", "model": "Palm"}, "no shape"),
        ({"model": "Nemotron-H-56B (hybrid Mamba)"}, "hybrid models are not modelled"),
        ({"global_batch": ""}, "a pipeline without its global batch"),
        ({"num_gpus": "60"}, "its degrees do not divide its devices"),
        ({"gpu": "TPU v5p"}, "no device like 'TPU v5p' in the catalogue"),
        ({"tokens_per_s_per_gpu": "", "mfu_pct": "50"}, "no speed whose convention is known"),
        ({"overlap_notes": "ZB-2p; 24 microbatches"}, "a schedule that Quintet does not have"),
    ],
)
def test_a_row_that_says_too_little_is_left_out_with_the_reason(changes: dict[str, str], reason: str) -> None:
    with pytest.raises(NotDescribed, match=reason):
        published(row(**changes))


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="lacks gpu, hidden, layers, model, num_gpus"):
        read(path)


@pytest.mark.parametrize(
    ("model", "parameters", "active"),
    [
        ("Mixtral-8x7B", 46.7e9, 12.9e9),
        ("Mixtral-8x22B", 141e9, 39e9),
        ("Qwen3-235B-A22B", 235e9, 22e9),
        ("gpt-oss-120b", 116.8e9, 5.1e9),
        ("DeepSeek-V2", 236e9, 21e9),
        ("Kimi-K2", 1.04e12, 32.6e9),
        ("Llama-4-Maverick-400B", 400e9, 17e9),
        ("Qwen2.5-32B", 32.5e9, 32.5e9),
    ],
)
def test_a_public_models_shape_is_known_where_its_columns_are_blank(model: str, parameters: float, active: float) -> None:
    shape = ("hidden", "layers", "heads", "kv_heads_or_mla", "ffn", "vocab", "experts", "topk", "moe_ffn")
    blank = dict.fromkeys((*shape, "total_params_b"), "")
    found = published(row(**blank, model=model, gpu="B200", tp="1", pp="1", vpp="", cp="1", ep="8")).setup.architecture
    assert found.parameters == pytest.approx(parameters, rel=0.06)
    beside = found.attention_flops(keys=4096) * found.num_layers + 2 * found.vocab_size * found.hidden_size
    used = (found.flops_per_token(sequence_length=8192, mtp=False) / 3 - beside) / 2 + 2 * found.vocab_size * found.hidden_size
    assert used == pytest.approx(active, rel=0.13)  # some count the input embedding, some do not


def test_errors_on_published_runs_stay_within_what_the_docs_say(tmp_path: Path) -> None:
    """On every fourth run of 64 devices and more, calibration included; benchmarks/planner.py holds all of it against held-out runs."""
    with TABLE.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["num_gpus"] or "0").isdigit() and int(row["num_gpus"] or 0) >= 64]
    path = tmp_path / "some.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows[::4])
    runs, left_out = read(path)
    assert len(runs) > 80 and len(left_out) < 50
    errors = {
        moe: [estimate(r.setup, r.cluster).tokens_per_second / r.tokens_per_second - 1 for r in runs if r.moe == moe] for moe in (0, 1)
    }
    assert statistics.mean(map(abs, errors[0])) < 0.055
    assert statistics.mean(map(abs, errors[1])) < 0.09
    assert abs(statistics.mean(errors[0])) < 0.03
