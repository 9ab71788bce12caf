"""`quintet data explain` and the report: what rules say about a document, for a person and for a program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quintet.cli.main import main
from quintet.data.prepare import prepare
from quintet.data.report import page, write_report
from quintet.data.tokenizer import train_bpe
from quintet.spec.quality import Basic, Dedup, Quality
from quintet.spec.run import Data
from tests.data.corpus import some_texts, source, write_texts


@pytest.fixture
def recipe(tmp_path: Path, root: Path) -> Path:
    """The laptop recipe, its data in a folder of the test."""
    text = (root / "recipes" / "laptop.toml").read_text()
    path = tmp_path / "recipe.toml"
    path.write_text(text.replace("prepared/laptop", str(tmp_path / "prepared")))
    return path


def explained(recipe: Path, *words: str, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    assert main(["data", "explain", str(recipe), *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_rule_is_told_with_its_value_and_limits(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.py").write_text("# DO NOT EDIT\n" + "x = 1\n" * 4)
    found = explained(recipe, str(tmp_path / "x.py"), capsys=capsys)
    by_name = {finding["rule"]: finding for finding in found["findings"]}  # type: ignore[index]
    assert found["reason"] == "basic.mean_line" and by_name["basic.mean_line"]["value"] == pytest.approx((13 + 4 * 5) / 5)
    assert (by_name["basic.mean_line"]["low"], by_name["basic.mean_line"]["high"]) == (10, 200)
    assert not by_name["code.generated"]["passes"] and by_name["basic.code_lines"]["passes"]
    assert "basic.tokens" in str(found["without"])
    assert main(["data", "explain", str(recipe), str(tmp_path / "x.py")]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "dropped by basic.mean_line" in words and "at least 10" in words and "not asked: basic.tokens" in words


def test_a_line_of_jsonl_is_a_document_and_token_rules_need_the_tokenizer(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\nbroken\n{"text": "a b c d e f g h i j k l"}\n')
    (tmp_path / "prepared").mkdir()
    train_bpe(some_texts(50), 300).save(tmp_path / "prepared/tokenizer.json")
    found = explained(recipe, f"{tmp_path / 'x.jsonl'}:3", "--source", "docs", capsys=capsys)
    tokens = {f["rule"]: f["value"] for f in found["findings"]}  # type: ignore[index, union-attr]
    assert tokens["basic.words"] == 12 and tokens["basic.tokens"] >= 12 and found["source"] == "docs"
    for place, message in (
        (f"{tmp_path / 'x.jsonl'}", "holds many documents; name one"),
        (f"{tmp_path / 'x.jsonl'}:2", "no document that can be read: corrupt_json"),
        (f"{tmp_path / 'x.jsonl'}:9", "no document that can be read"),
        (f"{tmp_path / 'nothing.py'}", "does not exist"),
    ):
        assert main(["data", "explain", str(recipe), place]) == 10
        assert message in capsys.readouterr().err
    assert main(["data", "explain", str(recipe), str(tmp_path / "x.jsonl"), "--source", "doks"]) == 10
    assert "did you mean 'docs'" in capsys.readouterr().err


def test_the_report_shows_rates_samples_and_duplicates_and_warns(tmp_path: Path) -> None:
    texts = [f"def f{i}(x):\n    return x + {i}\n\n\nclass A{i}:\n    name = 'a{i}<b>'\n    size = {i}\n" for i in range(20)]
    folder = write_texts(tmp_path / "texts", [*texts, texts[0], *["x = 1\n"] * 5])
    data = Data(
        sources=(source(folder),),
        directory=str(tmp_path / "prepared"),
        quality=Quality(code=("basic",), basic=Basic(min_tokens=10)),
        dedup=Dedup(near=False),
    )
    prepared = prepare(data, vocab_size=300, seed=0)
    statistics = prepared.sources["code"].statistics
    assert statistics.warnings == {"basic.code_lines": pytest.approx(5 / 26)}
    assert (statistics.read, statistics.exact_duplicates, statistics.dropped["basic.code_lines"]) == (26, 1, 5)
    assert [sample.value for sample in statistics.samples["basic.code_lines"]] == [1.0] * 5
    text = write_report(prepared).read_text()
    assert "basic.code_lines dropped 19.2% of the documents" in text
    assert "Some that were kept" in text and "a0&lt;b&gt;" in text and "<b>" not in text
    assert "0020.py" in text and "wanted at least 5" in text
    assert page({"code": statistics}) == text


def test_what_could_not_be_read_is_listed_one_by_one(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts", some_texts(5))
    for i in range(7):
        (folder / f"bad{i}.py").write_bytes(b"\xff\n")
    prepare(Data(sources=(source(folder),), directory=str(tmp_path / "prepared")), vocab_size=400, seed=0)
    (listed,) = (tmp_path / "prepared/code.parts").glob("*/quarantine.jsonl")
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [Path(entry["origin"]).name for entry in entries] == [f"bad{i}.py" for i in range(7)]
    assert {entry["reason"] for entry in entries} == {"invalid_utf8"}
