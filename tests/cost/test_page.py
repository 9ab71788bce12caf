"""docs/parallelism.md stays true: its figures are those of the formulas and of the kept measurement."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest

from quintet.cost.expert_comm import expert_bytes, mean_rows
from quintet.cost.memory import step_memory
from quintet.cost.ring_comm import Payload, ring_bytes
from quintet.cost.sent import Sent
from quintet.cost.tensor_comm import tensor_bytes
from quintet.spec import parse
from quintet.spec.layout import Layout
from tests.conftest import ROOT
from tests.cost.test_flops import V3

PAGE = (ROOT / "docs" / "parallelism.md").read_text()
TOKENS = 4096


def rows(heading: str) -> Iterator[list[str]]:
    """The cells of the first table behind a heading, its own first two lines left out."""
    _, _, text = PAGE.partition(f"\n{heading}")
    assert text, heading
    found = re.search(r"((?:^\|.*\n)+)", text, re.MULTILINE)
    assert found
    for line in found[1].splitlines()[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def layer_of_tp(degree: int) -> Sent:
    """What one more dense layer adds."""
    layouts, model = Layout(tp=degree), replace(V3, num_layers=1, num_dense_layers=1, num_mtp_modules=0)
    one, two = (tensor_bytes(replace(model, num_layers=n, num_dense_layers=n), layouts, tokens=TOKENS, element_bytes=2) for n in (1, 2))
    return Sent(forward=two.forward - one.forward, backward=two.backward - one.backward)


def layer_of_ep(degree: int) -> Sent:
    """One mixture of experts."""
    layout = Layout(dp=degree, ep=degree)
    mean = mean_rows(V3, layout, tokens=TOKENS)
    return expert_bytes(V3, layout, rows_out=mean, rows_in=mean, element_bytes=2)


def layer_of_cp(degree: int, payload: Payload) -> Sent:
    """One attention."""
    ring = ring_bytes(V3, tokens_per_rank=TOKENS, sequences=1, cp=degree, payload=payload, element_bytes=2)
    return Sent(forward=ring.forward, backward=ring.backward)


def test_what_a_layer_sends_is_what_the_formulas_say() -> None:
    found = {(axis, int(degree)): (forward, backward) for axis, degree, forward, backward in rows("## What a layer of V3 sends")}
    expected = {("tp", t): layer_of_tp(t) for t in (2, 8)} | {("ep", e): layer_of_ep(e) for e in (8, 64)}
    expected |= {("cp, latents", 8): layer_of_cp(8, "latent"), ("cp, keys and values", 8): layer_of_cp(8, "kv")}
    assert found == {key: (f"{sent.forward / 2**20:,.0f}", f"{sent.backward / 2**20:,.0f}") for key, sent in expected.items()}


def test_the_estimated_memory_is_the_formulas() -> None:
    run = parse.read(ROOT / "recipes" / "v3-16b.toml")
    found = list(rows("Memory of a step for the 16 B recipe"))
    assert len(found) == 5
    for name, *cells in found:
        degrees = {} if name == "one device" else {key: int(value) for key, value in (word.split("=") for word in name.split())}
        memory = step_memory(run.model, run.train, sequence_length=TOKENS, device="cuda", layout=Layout(**degrees))  # type: ignore[arg-type]
        parts = (memory.weights, memory.gradients, memory.master_weights + memory.moments, memory.activations)
        assert cells == [*(f"{part / 2**30:.1f}" for part in parts), f"{memory.total / 2**30:.0f}"], name


def test_the_measured_memory_is_the_kept_result() -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "zero_memory.json").read_text())
    assert kept["circumstances"]["commit"] in PAGE and max(row[of] for row in kept["rows"] for of in ("largest_error", "peak_error")) < 0.05
    told = {(row["layout"], row["precision"], row["moments"]): row for row in kept["rows"]}
    found = list(rows("What ranks hold, measured"))
    assert len(found) >= 8
    for layout, precision, moments, *cells in found:
        row = told[layout, precision, moments]
        parts = [row["measured"][part] for part in ("weights", "gradients", "master_weights", "moments")]
        peak = row["peak_bytes"]
        assert cells[:5] == [f"{part / 2**20:.0f}" for part in (*parts, peak)], layout
        assert float(cells[5]) == pytest.approx(peak / row["predicted_peak_bytes"], abs=0.006)
