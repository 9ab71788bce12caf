"""What is trained can be used, leaves in Hugging Face's format, comes back the same, and trains on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quintet.checkpoint import huggingface
from quintet.checkpoint.load import Stored, list_checkpoints, read_manifest, verify
from quintet.cli.main import main
from quintet.cost.memory import step_memory
from quintet.errors import CheckpointError
from quintet.evaluate.perplexity import evaluate
from quintet.monitor.metrics import Evaluated, read_events
from quintet.parallel.mesh import single
from quintet.spec import parse
from quintet.spec.run import Checkpoint, Data, Precision, Run, Train
from quintet.train import trained as module
from quintet.train.build import build
from quintet.train.state import tensors
from quintet.train.trained import find_checkpoint, open_kept, open_trained, stored_weights
from tests.train.runs import PHASE, checkpoint, make_quick, records, resume, tiny_run, train, where, write_recipe

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def trained(request: pytest.FixtureRequest, data: Data, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run in each precision, with checkpoints of steps 5 and 10."""
    precision: Precision = request.param
    run = tiny_run(data, tmp_path_factory.mktemp("trained"))
    run = replace(run, train=replace(run.train, precision=precision), checkpoint=Checkpoint(every=5))
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        train(run)
    return run


def told(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What a command that goes through prints on stdout."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def losses(capsys: pytest.CaptureFixture[str], path: Path) -> dict[str, float]:
    return json.loads(told(capsys, "evaluate", path, "--json"))["losses"]  # type: ignore[no-any-return]


def test_evaluating_a_run_gives_the_loss_that_its_training_ended_with(trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    ended = [event for event in read_events(where(trained) / "metrics.jsonl") if isinstance(event, Evaluated)][-1]
    evaluated = json.loads(told(capsys, "evaluate", where(trained), "--json"))
    assert evaluated["losses"] == pytest.approx(ended.losses, rel=1e-6)
    assert evaluated["tokens"] == ended.tokens
    assert evaluated["bits_per_byte"] == pytest.approx(ended.bits_per_byte, rel=1e-6)
    shown = told(capsys, "evaluate", where(trained))
    assert all(f"{loss:.4f}" in shown for loss in ended.losses.values())


def test_an_evaluation_tells_how_far_it_is(trained: Run) -> None:
    seen: list[tuple[float, float]] = []
    evaluate(where(trained), on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == trained.evaluation.num_sequences * len(trained.data.sources)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_run_means_its_newest_checkpoint_and_a_checkpoint_itself(trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    older, newer = (found.path for found in list_checkpoints(where(trained) / "checkpoints"))
    assert losses(capsys, newer) == losses(capsys, where(trained)) != losses(capsys, older)
    assert (open_trained(older).step, open_trained(where(trained)).step) == (5, 10)


def test_the_same_seed_draws_the_same_text_and_another_one_another(trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    def drawn(*options: str) -> str:
        return told(capsys, "generate", where(trained), "--prompt", "def alpha", "--tokens", "30", *options)

    assert drawn().startswith("def alpha")
    assert drawn() == drawn("--seed", "0") != drawn("--seed", "1")
    assert drawn("--temperature", "0", "--seed", "1") == drawn("--temperature", "0", "--seed", "2")


def test_more_text_than_the_context_holds_is_a_usage_error(trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(where(trained)), "--prompt", "def ", "--tokens", "100"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "exceed the model's context of 64; ask for at most" in err


@pytest.mark.parametrize("options", [("--tokens", "-1"), ("--seed", "-1"), ("--seed", str(2**63))])
def test_numbers_that_cannot_be_are_usage_errors(trained: Run, capsys: pytest.CaptureFixture[str], options: tuple[str, str]) -> None:
    assert main(["generate", str(where(trained)), "--prompt", "def ", *options]) == 2
    assert f"{options[0]} ({options[1]}) must" in capsys.readouterr().err


def test_resuming_a_checkpoint_is_refused_and_leaves_it_whole(trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    newest = list_checkpoints(where(trained) / "checkpoints")[-1].path
    assert main(["resume", str(newest)]) == 2
    assert f"name its run, which goes on from its newest one: quintet resume {where(trained)}" in capsys.readouterr().err
    verify(newest)


def test_an_exported_model_comes_back_with_the_same_loss_and_trains_on(
    trained: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    told(capsys, "export", where(trained), tmp_path / "hf", "--dtype", trained.train.precision)
    told(capsys, "import", tmp_path / "hf", tmp_path / "runs" / "again")
    imported = parse.read(tmp_path / "runs" / "again" / "recipe.toml")
    assert imported.train.precision == trained.train.precision
    again = replace(
        imported,
        data=replace(trained.data, tokenizer=imported.data.tokenizer),
        phases=(replace(PHASE, length="3 steps"),),
        evaluation=trained.evaluation,
        train=trained.train,
        monitor=trained.monitor,
    )
    # As the person does who has other text: the run's own recipe is edited, then prepared; here nothing is left to prepare.
    recipe = write_recipe(again, where(again) / "recipe.toml")
    told(capsys, "prepare", recipe)
    before = losses(capsys, where(again))
    assert before == pytest.approx(losses(capsys, where(trained)), rel=1e-6)
    told(capsys, "resume", where(again))
    assert [record.step for record in records(again)] == [1, 2, 3]
    assert losses(capsys, where(again)) != before
    first = records(again)[0].main_loss
    assert abs(first - sum(before.values()) / 2) < 0.5, "it goes on from the imported weights"


def test_an_export_in_fp32_is_the_master_weights_bit_for_bit(trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told(capsys, "export", where(trained), tmp_path / "hf", "--dtype", "fp32")
    exported = dict(huggingface.import_(tmp_path / "hf"))
    saved, _ = checkpoint(trained)
    for name, tensor in exported.items():
        kept = saved.get(f"optimizer.master.{name}", saved[f"model.{name}"])
        assert kept.dtype == tensor.dtype == torch.float32
        assert torch.equal(tensor, kept), name
    rounded = [name for name in exported if not torch.equal(exported[name], saved[f"model.{name}"].float())]
    assert bool(rounded) == (trained.train.precision == "bf16")


def test_a_checkpoint_without_master_weights_exports_as_bf16_alone(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = open_kept(where(trained))
    manifest = read_manifest(kept.checkpoint)
    few = replace(manifest, tensors={name: tensor for name, tensor in manifest.tensors.items() if name.startswith("model.")})
    monkeypatch.setattr(module, "read_manifest", lambda path: few)
    assert stored_weights(kept, master=False).keys() == open_trained(where(trained)).model.state_dict().keys()
    if trained.train.precision == "fp32":
        assert len(stored_weights(kept, master=True)) == len(stored_weights(kept, master=False))
    else:
        with pytest.raises(CheckpointError, match=r"lacks \d+ of the \d+ tensors, such as optimizer.master.*export it as bf16"):
            stored_weights(kept, master=True)


def test_an_imported_run_resumes_bit_for_bit_like_any_other(trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told(capsys, "export", where(trained), tmp_path / "hf")
    ends = []
    for name in ("one", "two"):
        told(capsys, "import", tmp_path / "hf", tmp_path / name / "again")
        imported = parse.read(tmp_path / name / "again" / "recipe.toml")
        again = replace(trained, name="again", directory=imported.directory, train=replace(trained.train, precision="bf16", steps=4))
        write_recipe(again, where(again) / "recipe.toml")
        resume(again)
        ends.append(records(again))
    assert ends[0] == ends[1]


def test_an_imported_run_holds_the_weights_of_the_files_and_an_optimizer_without_history(
    trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told(capsys, "export", where(trained), tmp_path / "hf", "--max-shard-gb", "0.00002")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    told(capsys, "import", tmp_path / "hf", tmp_path / "again")
    imported = Stored(tmp_path / "again" / "checkpoints" / "step-00000000")
    files = dict(huggingface.import_(tmp_path / "hf"))
    built = build(parse.read(tmp_path / "again" / "recipe.toml"), single(), torch.device("cpu"), on_message=lambda text: None)
    live = tensors(built)
    assert {name: (tuple(each.shape), each.dtype) for name, each in live.items()} == {
        name: (tuple(each.shape), each.dtype) for name, each in imported.items() if name != "random.cpu"
    }
    for name, value in files.items():
        assert torch.equal(imported[f"model.{name}"], value)
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            if (full := f"optimizer.{kind}.{name}") in imported:
                assert torch.equal(imported[full].float(), value.float() if kind == "master" else torch.zeros(value.shape)), full


def test_an_import_tells_which_mtp_modules_the_files_lack(trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told(capsys, "export", where(trained), tmp_path / "hf")
    (path,) = (tmp_path / "hf").glob("*.safetensors")
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith(f"model.layers.{trained.model.num_layers}.")}
    path.unlink()
    (tmp_path / "hf" / "model.safetensors.index.json").unlink()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "again")]) == 0
    assert "MTP modules: config.json names 1 (num_nextn_predict_layers), but the files hold 0" in capsys.readouterr().err
    assert parse.read(tmp_path / "again" / "recipe.toml").model == replace(trained.model, num_mtp_modules=0)


def test_an_import_without_a_tokenizer_names_the_file_and_where_to_get_it(
    trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told(capsys, "export", where(trained), tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "again")]) == 10
    err = capsys.readouterr().err
    assert f"cannot read the tokenizer {tmp_path / 'hf' / 'tokenizer.json'}: No such file or directory; an import needs it" in err
    assert "data.tokenizer" not in err
    assert not (tmp_path / "again").exists()


def test_an_import_never_overwrites_a_run(trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told(capsys, "export", where(trained), tmp_path / "hf")
    assert main(["import", str(tmp_path / "hf"), str(where(trained))]) == 2
    assert "exists already and is not overwritten" in capsys.readouterr().err


def test_an_export_never_overwrites_a_directory(trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    assert main(["export", str(where(trained)), str(tmp_path / "hf")]) == 2
    assert f"{tmp_path / 'hf'} exists already and is not empty; name a new directory" in capsys.readouterr().err
    assert (tmp_path / "hf" / "config.json").read_text() == "{}"


def test_what_is_neither_run_nor_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is neither a run nor a checkpoint"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("recipe", "length", "expected"), [("laptop", 512, 8), ("v3-671b", 512, 8), ("laptop", 8192, 2), ("laptop", 65_536, 1)]
)
def test_an_imported_recipes_micro_batch_follows_from_the_shape(root: Path, recipe: str, length: int, expected: int) -> None:
    model = parse.read(root / "recipes" / f"{recipe}.toml").model
    count = module._micro_batch(model, sequence_length=length, largest=8, precision="bf16")
    assert count == expected
    memory = step_memory(model, Train(micro_batch=count), sequence_length=length)
    own = memory.weights + memory.gradients + memory.master_weights + memory.moments
    assert count == 1 or memory.total - own <= max(own, 2**30)
