"""Clusters: a catalogue, files, changes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from quintet.errors import SpecError, UsageError
from quintet.spec.cluster import CATALOGUE, as_tree, dumps, named, read


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_cluster_survives_its_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(dumps(named(name, num_gpus=24)))
    assert read(path) == named(name, num_gpus=24)
    assert named(str(path), num_gpus=16).num_gpus == 16


def test_an_unknown_device_answers_did_you_mean_and_how_to_define_one() -> None:
    with pytest.raises(UsageError, match=r"no gpu 'h10' in the catalogue \(did you mean 'h100'\?\).*write a cluster.toml"):
        named("h10", num_gpus=8)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("num_gpu = 8", r"unknown key 'num_gpu' \(did you mean 'num_gpus'\?\)"),
        ("domain = 0", r"domain \(0\) must be larger than 0"),
        ("num_gpus = 9000000000", r"must be at most 1,048,576"),
        ("[network]\nbandwidth = 1e9\nshare = 1.5", r"share \(1.5\) must lie above 0 and at most at 1"),
        ("[gpu]\nmemori = 3", r"gpu: unknown key 'memori'"),
        ("num_gpus = 'many'", r"Expected `int`"),
    ],
)
def test_a_file_that_breaks_a_rule_is_refused_with_the_values(line: str, told: str, tmp_path: Path) -> None:
    tree = as_tree(CATALOGUE["h100"])
    key = line.strip("[").split("]")[0].split(" ")[0]
    tree = {name: value for name, value in tree.items() if name != key}
    if key == "gpu":
        tree["gpu"] = {}
        line = ""
        tree = {**tree, "gpu": {"memori": 3}}
    path = tmp_path / "cluster.toml"
    path.write_text(f"{line}\n{tomli_w.dumps(tree)}" if "[" not in line else f"{tomli_w.dumps(tree)}\n{line}\n")
    with pytest.raises((UsageError, SpecError), match=told):
        read(path)


def test_a_reachable_share_is_needed_for_every_peak(tmp_path: Path) -> None:
    tree = as_tree(CATALOGUE["h100"])
    del tree["gpu"]["reachable"]["fp8"]
    path = tmp_path / "cluster.toml"
    path.write_text(tomli_w.dumps(tree))
    with pytest.raises(SpecError, match=r"reachable.fp8 \(None\)"):
        read(path)


def test_what_if_multiplies_one_thing() -> None:
    cluster = CATALOGUE["h800"].scaled({"link": 2, "compute": 0.5})
    assert cluster.link.bandwidth == 2 * CATALOGUE["h800"].link.bandwidth
    assert cluster.gpu.peak.fp8 == CATALOGUE["h800"].gpu.peak.bf16
    assert cluster.network == CATALOGUE["h800"].network
    with pytest.raises(UsageError, match="did you mean 'network'"):
        cluster.scaled({"netwrk": 2})
    with pytest.raises(UsageError, match="larger than 0"):
        cluster.scaled({"link": 0})
