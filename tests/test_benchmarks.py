"""The benchmark scripts: each explains itself, and a miniature of each runs and says what a result must say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Set
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from quintet.checkpoint.save import save
from quintet.spec import parse

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.glob("*.py"))

RECIPE = """
name = "mini"

[model]
vocab_size = 320
hidden_size = 32
num_layers = 2
num_dense_layers = 1
num_heads = 2
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 16
dense_ffn_size = 32
expert_ffn_size = 16
num_routed_experts = 4
num_shared_experts = 1
num_experts_per_token = 2
num_mtp_modules = 0
max_context = 64

[data]
directory = "{folder}/prepared"
held_out = 0.3

[[data.sources]]
name = "programs"
paths = ["{folder}/text"]
domain = "code"
weight = 1.0

[[phases]]
name = "only"
length = "100 steps"
sequence_length = 32
batch = ["2"]
learning_rate = ["1e-3"]

[train]
micro_batch = 2
compile = false

[evaluation]
num_sequences = 2

[monitor]
tensorboard = false
prompts = []
"""


def run_script(name: str, *arguments: str | Path) -> str:
    """The standard output of a benchmark; fails with its error output."""
    done = subprocess.run([sys.executable, str(BENCHMARKS / name), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def result_of(path: Path, *, more: Set[str] = frozenset()) -> dict[str, Any]:
    """The JSON result, whose circumstances are complete."""
    result = json.loads(path.read_text())
    stated = more | {"date", "commit", "uncommitted_changes", "processor", "cores", "load_average", "versions", "command"}
    assert result["circumstances"].keys() == stated
    return result


@pytest.fixture
def laptop(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/laptop.py as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import laptop

    return laptop


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_explains_itself_and_the_readme_knows_it(script: Path) -> None:
    assert "usage:" in run_script(script.name, "--help")
    assert f"`{script.name}`" in (BENCHMARKS / "README.md").read_text()


def test_startup_compares_every_command_with_a_bare_interpreter(tmp_path: Path) -> None:
    printed = run_script("startup.py", "--rounds", "1", "--json", tmp_path / "r.json")
    seconds = result_of(tmp_path / "r.json")["seconds"]
    assert seconds["python -c pass"]["ratio"] == 1.0
    assert all(name in printed for name in seconds)
    assert not any(row["imports_torch"] for row in seconds.values())


def test_checkpoint_measures_size_rates_stall_and_the_index(tmp_path: Path) -> None:
    weights = torch.linspace(-1, 1, 5000).sin()
    state = {"model.w": weights.bfloat16(), "optimizer.master.w": weights}
    saved = save(state, tmp_path / "run", step=1, rounded={"model.w": "optimizer.master.w"})
    recipe = tmp_path / "mini.toml"
    recipe.write_text(RECIPE.format(folder=tmp_path) + "\n[layout]\ndp = 4\nep = 2\nzero = 1\n")
    small = ("--gigabytes", "0.001", "--rounds", "1", "--ranks", "1", "2", "--compute", "0.01", "--directory", tmp_path)
    run_script("checkpoint.py", *small, "--checkpoint", saved, "--recipe", recipe, "--json", tmp_path / "r.json")
    result = result_of(tmp_path / "r.json", more={"threads_per_rank"})
    assert {row["kind"]: row["stored_in_checkpoint"] for row in result["size"]}["model (bfloat16)"] == 0
    assert all(0.5 < row["share"] < 1 for row in result["size"])
    assert [row["ranks"] for row in result["rates"]] == [1, 2]
    assert all(result["rates"][1][name]["of_disk"] > 0 for name in ("save raw", "save planes", "load raw", "load planes"))
    assert {"synchronous", "background", "dcp.save", "dcp.async_save"} < result["stall"].keys()
    assert result["index"]["ranks"] == 4 and result["index"]["pieces"] > 0


def test_attention_compares_three_ways_that_agree_and_two_allocators(tmp_path: Path) -> None:
    run_script("attention.py", "--rounds", "1", "--shapes", "1x160", "--dtypes", "fp32", "--json", tmp_path / "r.json")
    result = result_of(tmp_path / "r.json")
    (table,) = result["attention"]
    assert (table["batch"], table["length"], table["dtype"]) == (1, 160, "fp32")
    assert {*table["contestants"]} == {"math", "flash, value padded", "quintet blocked"}
    assert all(row["largest_error"] < 1e-5 for row in table["contestants"].values())
    assert table["contestants"]["math"]["both_ratio"] == 1.0
    if sys.platform == "linux":
        returned, kept = result["sum"]["glibc as it is"], result["sum"]["freed memory kept"]
        assert kept["page_faults"] < returned["page_faults"]


def test_permute_counts_what_padding_costs_and_how_many_sizes_it_leaves(tmp_path: Path) -> None:
    run_script("permute.py", "--rounds", "2", "--alignments", "1", "32", "--json", tmp_path / "r.json")
    rows = result_of(tmp_path / "r.json")["alignments"]
    assert rows["1"]["padding"] == 0 < rows["32"]["padding"]
    assert rows["32"]["sizes"] < rows["1"]["sizes"]
    assert rows["1"]["ratio_cpu"] == 1.0


def test_permute_refuses_an_alignment_that_would_not_be_applied() -> None:
    command = [sys.executable, str(BENCHMARKS / "permute.py"), "--alignments", "1", "128"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "[128]: must lie between 1 and 64" in done.stderr


def test_ring_counts_what_each_payload_sends_and_what_a_limit_does(tmp_path: Path) -> None:
    flags = ["--rounds", "1", "--heads", "3", "--tokens", "16", "--links", "0", "--context", "1024", "--cp", "2", "--layers", "1"]
    run_script("ring.py", *flags, "--json", tmp_path / "r.json")
    result = result_of(tmp_path / "r.json")
    (row,) = result["ring"]
    latent, kv = row["payloads"]["latent"], row["payloads"]["kv"]
    assert (latent["bytes"], kv["bytes"]) == (16 * 576 * (4 + 8), 16 * (3 * 256 + 64) * (4 + 8))
    assert row["faster"] == ("latent" if latent["seconds"] < kv["seconds"] else "kv")
    long = result["context"]
    assert long["free"]["done"] and long["limit"] == long["free"]["bytes"] // 2
    assert len(long["ranks"]) == 2


def test_zero_memory_finds_what_the_formulas_say(tmp_path: Path) -> None:
    run_script("zero_memory.py", "--ranks", "2", "--hidden", "64", "--layers", "2", "--bucket", "100000", "--json", tmp_path / "r.json")
    rows = {(row["layout"], row["precision"], row["moments"]): row for row in result_of(tmp_path / "r.json")["rows"]}
    assert len(rows) == 8 and all(row["largest_error"] < 0.05 for row in rows.values())

    def state(*key: str) -> int:
        return rows[key]["measured"]["moments"] + rows[key]["measured"]["master_weights"]

    alone = state("one device", "fp32", "fp32")
    assert state("dp=2", "fp32", "fp32") == pytest.approx(alone, rel=0.02)
    assert all(state(f"dp=2 zero={stage}", "fp32", "fp32") == pytest.approx(alone / 2, rel=0.02) for stage in (1, 2, 3))


@pytest.fixture
def mini(tmp_path: Path) -> Path:
    """A recipe of a tiny model."""
    path = tmp_path / "mini.toml"
    path.write_text(RECIPE.replace("{folder}", str(tmp_path)))
    return path


def test_traffic_sets_the_bytes_foretold_beside_those_counted_and_those_on_the_wire(tmp_path: Path, mini: Path) -> None:
    flags = ["--layouts", "dp=2 ep=2 zero=1", "--recipe", mini, "--sequences", "4", "--ranks", "2", "--mebibytes", "1"]
    printed = run_script("traffic.py", *flags, "--json", tmp_path / "r.json")
    result = result_of(tmp_path / "r.json")
    (step,) = result["steps"]
    assert step["axes"].keys() == {"world", "dp", "ep", "replicated.shard"}
    assert all(row["measured"] == row["counted_rows"] for row in step["axes"].values())
    # Tokens that chose each expert: 8 bytes for each of the 2 on the other rank, in 2 micro-batches of one layer; and their rows.
    assert step["axes"]["ep"]["measured"] > 2 * 2 * 8
    factors = {row["collective"]: row["factor"] for row in result["collectives"]}
    assert factors.keys() == {"all-reduce", "reduce-scatter", "all-gather", "all-to-all", "ring shift"}
    assert all(factor >= 1 for factor in factors.values())
    assert all(axis in printed for axis in step["axes"])


def test_scaling_sets_four_ranks_beside_two_and_one(tmp_path: Path, mini: Path) -> None:
    flags = ["--layouts", "dp=4 ep=4 zero=1", "--links", "0", "--rounds", "1", "--sequences", "2", "--recipe", mini]
    run_script("scaling.py", *flags, "--json", tmp_path / "r.json")
    result = result_of(tmp_path / "r.json")
    one, two, four = result["rows"]
    assert [row["ranks"] for row in (one, two, four)] == [1, 2, 4]
    assert result["tokens_per_rank"] == 2 * 32
    assert one["waiting_by_axis"] == {} and one["efficiency"] == [1.0, 1.0]
    assert one["wire_bytes"] < 1024 < four["wire_bytes"] or not result["emulated_hosts"]  # the system announces a new interface by itself
    assert 0 < sum(four["waiting_by_axis"].values()) < 1 and "ep" in four["waiting_by_axis"]
    assert (four["wire_bytes"] > 0) == result["emulated_hosts"]
    assert 0 < four["off"] < 1e-4


@pytest.mark.parametrize("flags", [["--links", "0", "100"], ["--delay", "1"]], ids=" ".join)
def test_scaling_refuses_a_link_that_it_cannot_limit(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import scaling

    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["scaling.py", *flags])
    with pytest.raises(SystemExit) as ended:
        scaling.main()
    assert ended.value.code == 2
    assert "install iproute2 and run as root, or give --links 0 alone" in capsys.readouterr().err


def test_laptop_gives_both_the_same_time_and_measures_both_with_one_function(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(12):
        (tmp_path / f"text/{i}.py").write_text(f"def number_{i}():\n    return {i}\n\n\n" * (20 + i))
    (tmp_path / "mini.toml").write_text(RECIPE.replace("{folder}", str(tmp_path)))
    flags = ["--recipe", tmp_path / "mini.toml", "--steps", "3", "--points", "1", "--cores", "1", "--json", tmp_path / "r.json"]
    printed = run_script("laptop.py", *flags)
    result = result_of(tmp_path / "r.json")
    ours, theirs = result["courses"]["quintet"], result["courses"]["transformers"]
    assert ours["steps"] == 3
    assert theirs["held_out"][-1]["minutes"] >= ours["held_out"][-1]["minutes"] > 0
    for course in (ours, theirs):
        assert course["startup_seconds"] > 0
        assert course["held_out"][-1]["tokens"] == course["steps"] * 2 * 32
        assert 3 < course["held_out"][-1]["nats"]["programs"] < 9
    assert "code (programs)" in printed
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "r.svg").read_text()


def test_the_peers_sample_is_what_it_drew_behind_the_prompt_without_the_end_token(laptop: ModuleType, root: Path) -> None:
    end = 99
    words = {7: "def ", 8: "f", 9: "():"}

    class Model:
        def eval(self) -> None: ...

        def generate(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:
            assert options["max_new_tokens"] == run.monitor.sample_tokens
            return torch.cat((ids, torch.tensor([[8, 9, end]])), 1)

    class Tokenizer:
        eos_id = end

        def encode_batch(self, texts: list[str]) -> list[Any]:
            return [torch.tensor([7]).numpy() for _ in texts]

        def decode(self, ids: list[int]) -> str:
            return "".join(words[token] for token in ids)

    run = parse.read(root / "recipes/laptop.toml")
    assert laptop.peer_samples(Model(), Tokenizer(), run) == {prompt: "f():" for prompt in run.monitor.prompts}


def test_a_loss_is_reached_where_the_line_between_two_evaluations_crosses_it(laptop: ModuleType) -> None:
    curve = [(1.0, 6.0), (2.0, 5.0), (3.0, 4.0)]
    assert laptop.minutes_to(curve, 4.5) == 2.5
    assert laptop.minutes_to(curve, 6.5) == 1.0
    assert laptop.minutes_to(curve, 3.9) is None


def test_a_step_takes_what_most_steps_of_each_part_take(laptop: ModuleType) -> None:
    assert laptop.steady([1.0, 9.0, 1.0, 3.0, 3.0, 30.0], 2) == 2.0


def test_the_launch_is_where_the_clock_of_the_steps_begins(laptop: ModuleType, tmp_path: Path) -> None:
    losses: dict[str, Any] = {"losses": {"a": 5.0}, "bits_per_byte": {"a": 2.0}}
    lines = [
        {"kind": "message", "text": "hello"},
        {"kind": "record", "step": 1, "tokens": 10, "main_loss": 6.0, "seconds": 20.0},
        {"kind": "record", "step": 2, "tokens": 20, "main_loss": 5.0, "seconds": 2.0},
        {"kind": "evaluated", "step": 2, **losses},
        {"kind": "record", "step": 3, "tokens": 30, "main_loss": 4.0, "seconds": 4.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    course = laptop.course_of(tmp_path / "metrics.jsonl", 28.0, name="x", num_parameters=1)
    assert (course.startup_seconds, course.first_step_seconds, course.step_seconds) == (8.0, 20.0, 3.0)
    assert course.held_out == [laptop.Point(minutes=0.5, step=2, tokens=20, nats={"a": 5.0}, bits={"a": 2.0})]
    assert [loss for _, loss in course.training] == [6.0, 5.0, 4.0]
    assert course.tokens_per_second == 20 / 6


def test_dedup_finds_planted_duplicates_about_as_often_as_the_curve_says(tmp_path: Path) -> None:
    run_script("dedup.py", "--documents", "400", "--words", "120", "--rounds", "1", "--json", tmp_path / "r.json")
    found = result_of(tmp_path / "r.json")["results"]["quintet"]
    assert found["documents"] >= 400 and found["strangers_joined"] == 0
    assert found["recall"]["0.4"]["found"] < 0.2 and found["recall"]["0.95"]["found"] > 0.9
    assert sum(level["pairs"] for level in found["recall"].values()) > 80


def test_prepare_measures_both_parts_on_the_same_corpus(tmp_path: Path) -> None:
    flags = ["--megabytes", "0.3", "--vocab-size", "600", "--rounds", "1"]
    printed = run_script("prepare.py", *flags, "--json", tmp_path / "r.json")
    results = result_of(tmp_path / "r.json")["results"]
    assert results["tokenize quintet"]["tokens"] == results["tokenize tokenizers"]["tokens"] > results["whole quintet"]["tokens"] > 0
    assert "quintet is    1.0x" in printed


def test_loader_is_compared_with_a_memory_map_and_shuffles(tmp_path: Path) -> None:
    run_script("loader.py", "--tokens", "400000", "--sequence-length", "128", "--rounds", "1", "--json", tmp_path / "r.json")
    result = result_of(tmp_path / "r.json")
    assert set(result["mega_tokens_per_second"]) == {"loader", "memory map", "inputs and labels"} and 0.25 < result["distance"] < 0.42
