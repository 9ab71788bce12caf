"""Recipes: strict reading that names what is wrong, and writing that reads back equal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from quintet.errors import SpecError, UsageError
from quintet.spec import parse
from quintet.spec.run import Run
from tests.spec.strategies import runs

Tree = dict[str, Any]


@pytest.fixture
def recipe() -> Tree:
    """The least that a recipe must say."""
    sizes = (
        "vocab_size hidden_size num_layers num_dense_layers num_heads kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
        "dense_ffn_size expert_ffn_size num_routed_experts num_shared_experts num_experts_per_token"
    ).split()
    return {
        "name": "tiny",
        "model": dict.fromkeys(sizes, 2),
        "data": {"directory": "prepared", "sources": [{"name": "text", "paths": ["text/"], "domain": "prose", "weight": 1.0}]},
        "phases": [{"name": "only", "length": "10 steps", "sequence_length": 8, "batch": ["2"], "learning_rate": ["1e-3"]}],
    }


def complaint(recipe: Tree) -> str:
    with pytest.raises(SpecError) as error:
        parse.build(recipe, origin="tiny.toml")
    assert str(error.value).startswith("tiny.toml: ")
    return str(error.value)


def test_what_a_recipe_leaves_out_has_a_default(recipe: Tree) -> None:
    run = parse.build(recipe, origin="tiny.toml")
    assert run.model.q_lora_rank is None
    assert (run.seed, run.layout.num_ranks, run.optimizer.beta2, run.train.precision) == (0, 1, 0.95, "bf16")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: r.update(modle={}), "unknown key 'modle' (did you mean 'model'?); known here: name, model, data"),
        (lambda r: r["model"].update(hiden_size=2), "unknown key 'model.hiden_size' (did you mean 'hidden_size'?)"),
        (lambda r: r["model"].update(yarn={"facter": 4.0}), "unknown key 'model.yarn.facter' (did you mean 'factor'?)"),
        (lambda r: r["data"]["sources"][0].update(wieght=1.0), "unknown key 'data.sources[0].wieght' (did you mean 'weight'?)"),
        (lambda r: r["phases"][0].update(zzz=1), "unknown key 'phases[0].zzz'; known here: name, length"),
        (lambda r: r["phases"][0].update(bach=["2"]), "unknown key 'phases[0].bach' (did you mean 'batch'?)"),
        (lambda r: r["model"].update(hidden_size="2"), "model.hidden_size: Expected `int`, got `str`; write it as 2"),
        (lambda r: r["model"].update(hidden_size=2.0), "model.hidden_size: Expected `int`, got `float`; write it as 2"),
        (lambda r: r["model"].update(hidden_size=2.5), "model.hidden_size: Expected `int`, got `float`"),
        (lambda r: r["model"].update(rope_theta="1e4"), "model.rope_theta: Expected `float`, got `str`; write it as 10000.0"),
        (lambda r: r["model"].update(vocab_size=2**40), "model: vocab_size (1099511627776) must be at most 2147483647"),
        (lambda r: r["model"].update(yarn={"beta_fast": float("nan")}), "yarn.beta_fast (nan) must be finite and not negative"),
        (lambda r: r["phases"][0].update(length=10), 'phases[0].length: Expected `str`, got `int`; write it as "10 steps"'),
        (lambda r: r["phases"][0].update(batch=["1e30"]), "phase 'only', batch ['1e30'] must lie between 1 and 1000000000 sequences"),
        (lambda r: r["data"].update(directory=" "), "data: directory (' ') names no folder; name one, such as prepared/mine"),
        (lambda r: r.update(directory=""), "recipe: directory ('') names no folder; name one, such as runs"),
        (lambda r: r.update(name="é" * 101), "(202 bytes) must have at most 200: it is a directory's name, too"),
        (lambda r: r.update(train={"arrival_timeout": 0.0}), "train: arrival_timeout (0.0) must be larger than 0 and finite"),
        (lambda r: r["model"].update(tie_embeddings=1), "model.tie_embeddings: Expected `bool`, got `int`"),
        (lambda r: r["phases"][0].update(batch=16), 'phases[0].batch: Expected `array`, got `int`; write batch = ["16"]'),
        (lambda r: r["phases"][0].update(batch=[16]), 'phases[0].batch[0]: Expected `str`, got `int`; write it as "16"'),
        (lambda r: r["data"]["sources"][0].update(paths='a"b'), 'sources[0].paths: Expected `array`, got `str`; write paths = ["a\\"b"]'),
        (lambda r: r.update(phases={}), "phases: Expected `array`, got `object`; begin each one with [[phases]] instead of [phases]"),
        (lambda r: r["data"].update(sources={}), "begin each one with [[data.sources]] instead of [data.sources]"),
        (lambda r: r.update(train=[{}]), "train: Expected `object`, got `array`; write [train] once instead of [[train]]"),
        (lambda r: r["data"]["sources"][0].update(domain="poems"), "data.sources[0].domain: Invalid enum value 'poems'"),
        (lambda r: r.update(train={"precision": "fp8"}), "train.precision: Invalid enum value 'fp8'"),
        (lambda r: r.update(model=[]), "model: Expected `object`, got `array`"),
        (lambda r: r["model"].pop("hidden_size"), "Object missing required field `hidden_size`; add hidden_size = ... under [model]"),
        (lambda r: r.pop("name"), "recipe: Object missing required field `name`; add name = ..."),
        (lambda r: r["model"].update(num_heads=0), "model: num_heads (0) must be larger than 0"),
        (lambda r: r["phases"][0].update(batch=["soon"]), "phases[0]: phase 'only', batch: 'soon' is not a piece of a curve"),
        (lambda r: r.update(seed=-1), "recipe: seed (-1) must lie between 0 and 2^63 - 1"),
    ],
)
def test_a_wrong_recipe_names_the_place_and_what_is_wrong(recipe: Tree, change: Callable[[Tree], object], expected: str) -> None:
    change(recipe)
    assert expected in complaint(recipe)


@given(runs())
@settings(max_examples=30)
def test_a_run_written_as_toml_reads_back_equal(run: Run) -> None:
    text = parse.dumps(run)
    again = parse.loads(text, origin="written")
    assert again == run
    assert parse.dumps(again) == text


@given(runs())
@settings(max_examples=30)
def test_a_run_as_a_tree_of_plain_values_builds_back_equal(run: Run) -> None:
    assert parse.build(parse.tree(run), origin="tree") == run


def test_every_part_of_a_run_is_frozen(recipe: Tree) -> None:
    def refuse(section: Any) -> None:
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(section, field.name, value)
            for inner in value if isinstance(value, tuple) else (value,):
                if dataclasses.is_dataclass(inner):
                    refuse(inner)

    recipe["model"]["yarn"] = {}
    refuse(parse.build(recipe, origin="tiny.toml"))


def test_a_run_can_be_a_key_because_equal_runs_hash_equal(recipe: Tree) -> None:
    assert len({parse.build(recipe, origin="one"), parse.build(recipe, origin="two")}) == 1


def test_a_missing_recipe_names_the_ones_beside_it(tmp_path: Path) -> None:
    (tmp_path / "laptop.toml").touch()
    with pytest.raises(UsageError) as error:
        parse.read(tmp_path / "lapto.toml")
    assert "no recipe at" in str(error.value)
    assert f"did you mean '{tmp_path}/laptop.toml'?" in str(error.value)


def test_broken_toml_and_bytes_that_are_no_text_are_usage_errors(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("name = ")
    with pytest.raises(UsageError, match="is not valid TOML"):
        parse.read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot read the recipe"):
        parse.read(path)
    with pytest.raises(UsageError, match=r"cannot read the recipe .*: it is a folder; recipes in it: .*broken\.toml"):
        parse.read(tmp_path)


def test_a_byte_order_mark_and_line_ends_of_windows_change_nothing(tmp_path: Path, recipe: Tree) -> None:
    run, path = parse.build(recipe, origin="tiny.toml"), tmp_path / "windows.toml"
    path.write_bytes(b"\xef\xbb\xbf" + parse.dumps(run).replace("\n", "\r\n").encode())
    assert parse.read(path) == run


def test_text_in_another_encoding_or_nested_without_end_is_a_usage_error(tmp_path: Path) -> None:
    path = tmp_path / "odd.toml"
    path.write_text('name = "x"', encoding="utf-16")
    with pytest.raises(UsageError, match=r"cannot read the recipe .*; save it as UTF-8"):
        parse.read(path)
    path.write_text(f"x = {'[' * 5000}{']' * 5000}")
    with pytest.raises(UsageError, match="nested hundreds of levels deep"):
        parse.read(path)


def test_a_folder_without_recipes_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="recipes there: none"):
        parse.read(tmp_path / "any.toml")
