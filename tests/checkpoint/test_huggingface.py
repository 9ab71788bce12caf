"""The Hugging Face format, without transformers: names, files, configuration, and what an import refuses."""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from torch import Tensor

from quintet.checkpoint import hub_config, hub_names
from quintet.checkpoint.huggingface import dequantized, export, import_, read_config
from quintet.checkpoint.load import Stored
from quintet.checkpoint.pieces import Box
from quintet.checkpoint.save import save
from quintet.errors import CheckpointError, UsageError
from quintet.spec.model import Model, Yarn
from quintet.spec.parse import build
from tests.checkpoint.models import SMALL, VARIANTS, like_small, weights
from tests.spec.strategies import models


def _exported(directory: Path, model: Model, generator: torch.Generator, **options: Any) -> dict[str, Tensor]:
    state = weights(model, generator)
    export(state, model, directory, **({"tokenizer_file": None, "dtype": torch.float32} | options))
    return state


def _tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("model", VARIANTS.values(), ids=VARIANTS.keys())
def test_what_is_exported_is_imported_bit_for_bit(tmp_path: Path, model: Model, generator: torch.Generator) -> None:
    state = _exported(tmp_path / "hub", model, generator, max_shard_bytes=10_000)
    assert read_config(tmp_path / "hub") == model
    imported = dict(import_(tmp_path / "hub"))
    assert imported.keys() == state.keys()
    assert all(torch.equal(imported[name], state[name]) and imported[name].dtype == state[name].dtype for name in state)


def test_an_export_reads_of_a_checkpoint_no_more_at_a_time_than_a_tensor_of_the_files(
    tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = weights(SMALL, generator)
    saved = save({**state}, tmp_path / "run", step=1)
    _exported(tmp_path / "plain", SMALL, torch.Generator().manual_seed(generator.initial_seed()))
    read: list[int] = []
    real = Stored.box

    def box(self: Stored, name: str, box: Box) -> Tensor:
        read.append(math.prod(box[1]))
        return real(self, name, box)

    monkeypatch.setattr(Stored, "box", box)
    export(Stored(saved), SMALL, tmp_path / "hub", tokenizer_file=None, dtype=torch.float32, max_shard_bytes=20_000)
    parts = [part for name, shape in hub_names.shapes(SMALL).items() for part in hub_names.parts(name, shape, SMALL)]
    assert max(read) == max(math.prod(part.shape) for part in parts) < max(tensor.numel() for tensor in state.values())
    left, right = _tensors(tmp_path / "hub"), _tensors(tmp_path / "plain")
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    sizes = [sum(tensor.nbytes for tensor in load_file(path).values()) for path in (tmp_path / "hub").glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) <= 20_000


def test_progress_is_told_from_nothing_to_all(tmp_path: Path, generator: torch.Generator) -> None:
    told: list[tuple[float, float]] = []
    state = _exported(tmp_path / "hub", SMALL, generator, on_progress=lambda done, total: told.append((done, total)))
    shares = [done for done, _ in told]
    assert shares[0] == 0 and shares == sorted(shares)
    assert {total for _, total in told} == {sum(tensor.nbytes for tensor in _tensors(tmp_path / "hub").values())}
    told.clear()
    dict(import_(tmp_path / "hub", on_progress=lambda done, total: told.append((done, total))))
    size = sum(tensor.numel() for tensor in state.values())
    assert told[-1] == (size, size) and len(told) == len(state)


def test_the_names_are_those_that_v3_was_published_with(tmp_path: Path, generator: torch.Generator) -> None:
    state = _exported(tmp_path / "hub", SMALL, generator)
    found = _tensors(tmp_path / "hub")
    expert, mtp = "model.layers.2.mlp.experts.7", "model.layers.3"
    assert torch.equal(found[f"{expert}.gate_proj.weight"], state["layers.2.ffn.experts.w13"][7, 0])
    assert torch.equal(found[f"{expert}.up_proj.weight"], state["layers.2.ffn.experts.w13"][7, 1])
    assert torch.equal(found[f"{expert}.down_proj.weight"], state["layers.2.ffn.experts.w2"][7])
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight"], state["layers.0.ffn.w13"][1])
    assert torch.equal(found["model.layers.1.mlp.gate.e_score_correction_bias"], state["layers.1.ffn.router.expert_bias"])
    assert torch.equal(found["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"], state["layers.1.attention.wkv_a.weight"])
    assert torch.equal(found[f"{mtp}.enorm.weight"], state["mtp.0.embed_norm.weight"])
    assert torch.equal(found[f"{mtp}.hnorm.weight"], state["mtp.0.hidden_norm.weight"])
    assert torch.equal(found[f"{mtp}.eh_proj.weight"], state["mtp.0.eh_proj.weight"])
    assert torch.equal(found[f"{mtp}.shared_head.norm.weight"], state["mtp.0.norm.weight"])
    assert torch.equal(found[f"{mtp}.shared_head.head.weight"], state["head.weight"])
    assert torch.equal(found[f"{mtp}.embed_tokens.weight"], state["embed.weight"])
    assert torch.equal(found[f"{mtp}.mlp.experts.0.up_proj.weight"], state["mtp.0.block.ffn.experts.w13"][0, 1])


def test_the_published_model_has_the_published_names_and_parameters(root: Path) -> None:
    recipe = tomllib.loads((root / "recipes" / "v3-671b.toml").read_text())
    model = build(recipe, origin="v3-671b").model
    parts = [part for name, shape in hub_names.shapes(model).items() for part in hub_names.parts(name, shape, model)]
    sizes = {part.name: torch.Size(part.shape).numel() for part in parts}
    assert len(sizes) == len(parts)
    main = sum(size for name, size in sizes.items() if not name.startswith("model.layers.61.") and not name.endswith("_bias"))
    assert f"{main / 1e9:.2f}" == "671.03"
    # The index of the published weights has 61 + 1 layers: 59 of experts (256 x 3 + 3 shared + gate + bias), 3 dense, attention 7, norms 2.
    assert len(sizes) + 2 == 59 * (256 * 3 + 3 + 2) + 3 * 3 + 62 * 9 + 3 + 6


def test_the_published_config_json_is_the_published_model(tmp_path: Path, root: Path) -> None:
    published = """{"architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1,
        "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
        "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
        "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true,
        "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "quantization_config":
        {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}, "rms_norm_eps": 1e-06,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn"}, "rope_theta": 10000, "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid", "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1", "use_cache": true, "v_head_dim": 128, "vocab_size": 129280}"""
    (tmp_path / "config.json").write_text(published)
    ours = build(tomllib.loads((root / "recipes" / "v3-671b.toml").read_text()), origin="v3-671b").model
    # The hub's init is transformers' default, the report's is 0.006; the context is the extended one.
    assert read_config(tmp_path) == replace(ours, init_std=0.02, max_context=163840, yarn=Yarn())


def test_shards_respect_their_size_and_the_index_names_every_tensor(tmp_path: Path, generator: torch.Generator) -> None:
    directory = tmp_path / "hub"
    _exported(directory, SMALL, generator, max_shard_bytes=5_000)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(files) > 5 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["weight_map"] == {name: file for file in files for name in load_file(directory / file)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in _tensors(directory).values())
    for file in files:
        tensors = load_file(directory / file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 5_000 or len(tensors) == 1


def test_bf16_is_rounded_once_and_the_router_bias_stays_fp32(tmp_path: Path, generator: torch.Generator) -> None:
    state = _exported(tmp_path / "hub", SMALL, generator, dtype=torch.bfloat16)
    imported = dict(import_(tmp_path / "hub"))
    assert all(torch.equal(imported[name], state[name] if name.endswith("expert_bias") else state[name].bfloat16()) for name in state)
    assert {tensor.dtype for name, tensor in import_(tmp_path / "hub", dtype=torch.float32)} == {torch.float32}


def test_config_json_is_what_both_generations_of_transformers_read(tmp_path: Path, generator: torch.Generator) -> None:
    _exported(tmp_path / "hub", VARIANTS["YaRN as V3"], generator, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    yarn = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0}
    yarn |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    assert config["rope_theta"] == 10000.0 and config["rope_scaling"] == yarn | {"type": "yarn", "rope_type": "yarn"}
    assert config["rope_parameters"] == yarn | {"rope_type": "yarn", "rope_theta": 10000.0}
    assert (config["architectures"], config["model_type"]) == (["DeepseekV3ForCausalLM"], "deepseek_v3")
    assert (config["num_nextn_predict_layers"], config["first_k_dense_replace"], config["torch_dtype"]) == (1, 1, "bfloat16")
    assert not {"auto_map", "quantization_config"} & config.keys()


@settings(max_examples=100)
@given(models())
def test_any_model_survives_config_json(model: Model) -> None:
    config = hub_config.from_model(model, dtype="bfloat16", bos_token_id=None, eos_token_id=3)
    tree = json.loads(hub_config.dumps(config))
    for absent in ((), ("rope_scaling",), ("rope_parameters",)):
        with tempfile.TemporaryDirectory() as directory:
            text = json.dumps({key: value for key, value in tree.items() if key not in absent})
            (Path(directory) / "config.json").write_text(text)
            assert read_config(Path(directory)) == model


def test_fused_experts_as_transformers_keeps_them_are_read(tmp_path: Path, generator: torch.Generator) -> None:
    state = _exported(tmp_path / "hub", SMALL, generator)
    for path in tmp_path.glob("hub/*.safetensors"):
        tensors = load_file(path)
        fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        for ours, hub in {"layers.1": "model.layers.1", "layers.2": "model.layers.2", "mtp.0.block": "model.layers.3"}.items():
            fused[f"{hub}.mlp.experts.gate_up_proj"] = state[f"{ours}.ffn.experts.w13"].flatten(1, 2)
            fused[f"{hub}.mlp.experts.down_proj"] = state[f"{ours}.ffn.experts.w2"]
        save_file(fused, tmp_path / "hub" / "model.safetensors")
        path.unlink()
    (tmp_path / "hub" / "model.safetensors.index.json").unlink()
    imported = dict(import_(tmp_path / "hub"))
    assert all(torch.equal(imported[name], state[name]) for name in state)


def test_fp8_blocks_are_multiplied_by_their_scales(tmp_path: Path, generator: torch.Generator) -> None:
    weight = torch.tensor([[1.0, 2.0, 4.0], [0.5, -1.0, 8.0], [1.0, 1.0, 1.0]])
    scale = torch.tensor([[2.0, 10.0], [3.0, 0.0]])
    assert dequantized(weight, scale, (2, 2)).tolist() == [[2, 4, 40], [1, -2, 80], [3, 3, 0]]
    state = _exported(tmp_path / "hub", SMALL, generator)
    (path,) = tmp_path.glob("hub/*.safetensors")
    tensors = load_file(path)
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name] = torch.ones_like(tensors[name]).to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.full((1, 1), 0.25)
    path.unlink()
    (tmp_path / "hub" / "model.safetensors.index.json").unlink()
    save_file(tensors, tmp_path / "hub" / "model.safetensors")
    wo = dict(import_(tmp_path / "hub"))["layers.0.attention.wo.weight"]
    assert wo.dtype == torch.float32 and wo.shape == state["layers.0.attention.wo.weight"].shape and wo.unique().tolist() == [0.25]


def _change(directory: Path, change: Any) -> None:
    """Rewrite the one file of an export without an index."""
    (path,) = directory.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(tensors, directory / "model.safetensors")


def test_missing_unknown_and_wrongly_shaped_tensors_are_all_named(tmp_path: Path, generator: torch.Generator) -> None:
    _exported(tmp_path / "hub", SMALL, generator)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.wieght"] = tensors.pop("model.norm.weight")
        tensors["lm_head.weight"] = torch.zeros(3, 3)

    _change(tmp_path / "hub", change)
    with pytest.raises(CheckpointError) as error:
        import_(tmp_path / "hub")
    assert "model.norm.weight is missing" in str(error.value)
    assert "model.norm.wieght is unknown (did you mean 'model.norm.weight'?)" in str(error.value)
    assert "lm_head.weight is [3, 3] instead of [48, 16]" in str(error.value)


def test_a_copy_that_differs_is_refused(tmp_path: Path, generator: torch.Generator) -> None:
    _exported(tmp_path / "hub", SMALL, generator)
    _change(tmp_path / "hub", lambda tensors: tensors["model.layers.3.embed_tokens.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.embed_tokens\.weight differs from model\.embed_tokens\.weight"):
        dict(import_(tmp_path / "hub"))


def test_absent_copies_and_absent_mtp_modules_are_no_error(tmp_path: Path, generator: torch.Generator) -> None:
    state = _exported(tmp_path / "hub", SMALL, generator)
    copies = ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight")
    _change(tmp_path / "hub", lambda tensors: [tensors.pop(name) for name in copies])
    assert dict(import_(tmp_path / "hub")).keys() == state.keys()
    _change(tmp_path / "hub", lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("model.layers.3.")])
    assert read_config(tmp_path / "hub") == replace(SMALL, num_mtp_modules=0)
    assert dict(import_(tmp_path / "hub")).keys() == hub_names.shapes(replace(SMALL, num_mtp_modules=0)).keys()


@pytest.mark.parametrize("indexed", [True, False], ids=["index", "one file"])
@pytest.mark.parametrize("held", [0, 1, 2])
def test_the_mtp_modules_are_those_that_the_files_hold_and_what_is_absent_is_told(
    tmp_path: Path, generator: torch.Generator, held: int, indexed: bool
) -> None:
    model = like_small(num_mtp_modules=2)
    _exported(tmp_path / "hub", model, generator)
    absent = tuple(f"model.layers.{layer}." for layer in range(model.num_layers + held, model.num_layers + 2))
    if indexed:
        path = tmp_path / "hub" / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if not name.startswith(absent)}
        path.write_text(json.dumps(index))
    else:
        _change(tmp_path / "hub", lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(absent)])
    told: list[str] = []
    expected = replace(model, num_mtp_modules=held)
    assert read_config(tmp_path / "hub", on_message=told.append) == expected
    assert told == [
        f"MTP modules: config.json names 2 (num_nextn_predict_layers), but the files hold {held}; counted is what they hold"
    ] * (held < 2)
    if not indexed:
        assert dict(import_(tmp_path / "hub")).keys() == hub_names.shapes(expected).keys()


@pytest.mark.parametrize("file", ["../outside.safetensors", "/tmp/outside.safetensors", "a/b.safetensors", "pytorch_model.bin", ".."])
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, generator: torch.Generator, file: str) -> None:
    _exported(tmp_path / "hub", SMALL, generator)
    index = {"weight_map": dict.fromkeys(_tensors(tmp_path / "hub"), file)}
    (tmp_path / "hub" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is not the name of a safetensors file beside the index"):
        import_(tmp_path / "hub")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": [', "\udcff"])
def test_a_broken_index_is_a_clear_error(tmp_path: Path, generator: torch.Generator, text: str) -> None:
    _exported(tmp_path / "hub", SMALL, generator)
    (tmp_path / "hub" / "model.safetensors.index.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match="is not an index"):
        import_(tmp_path / "hub")


def test_missing_and_truncated_files_are_clear_errors(tmp_path: Path, generator: torch.Generator) -> None:
    _exported(tmp_path / "hub", SMALL, generator, max_shard_bytes=20_000)
    first = min(tmp_path.glob("hub/*.safetensors"))
    os.truncate(first, first.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"model-00001-of-\d+.safetensors is not a readable safetensors file"):
        import_(tmp_path / "hub")
    first.unlink()
    with pytest.raises(CheckpointError, match=r"has no model-00001-of"):
        import_(tmp_path / "hub")
    with pytest.raises(CheckpointError, match=r"no config.json in .*name a directory in Hugging Face's format"):
        import_(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1"),
        ({"rope_interleave": False}, "rope_interleave is False"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "the rotary embedding's type is 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 3.0}}, r"attention_factor \(3.0\) must be"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'factor'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq'"),
        ({"hidden_size": "16"}, "Expected `int`, got `str`"),
        ({"n_group": 3}, r"must be divisible by num_groups \(3\)"),
    ],
)
def test_another_architecture_is_refused_by_the_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads(hub_config.dumps(hub_config.from_model(SMALL, dtype="float32", bos_token_id=None, eos_token_id=None)))
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_an_export_of_another_models_state_is_refused(tmp_path: Path, generator: torch.Generator) -> None:
    state = weights(SMALL, generator)
    state["layers.0.attention.wo.wieght"] = state.pop("layers.0.attention.wo.weight")
    state["norm.weight"] = torch.ones(3)
    with pytest.raises(CheckpointError) as error:
        export(state, SMALL, tmp_path / "hub", tokenizer_file=None)
    assert "layers.0.attention.wo.weight is missing" in str(error.value)
    assert "norm.weight is [3] instead of [16]" in str(error.value)
    assert "layers.0.attention.wo.wieght is unknown (did you mean 'layers.0.attention.wo.weight'?)" in str(error.value)
    assert not (tmp_path / "hub").exists()


def test_a_directory_that_holds_something_is_left_alone(tmp_path: Path, generator: torch.Generator) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UsageError, match="exists already and is not empty"):
        export(weights(SMALL, generator), SMALL, tmp_path, tokenizer_file=None)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_full_disk_leaves_no_half_export(tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    real, written = os.write, [0]

    def write(fd: int, data: memoryview) -> int:
        written[0] += len(data)
        if written[0] > 10_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(CheckpointError, match=r"exporting to .* failed: No space left on device"):
        export(weights(SMALL, generator), SMALL, tmp_path / "hub", tokenizer_file=None)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path, generator: torch.Generator) -> None:
    path = tmp_path / "tokenizer.json"
    tree = {"added_tokens": [{"id": 48, "content": "<|end|>", "special": True}], "model": {"vocab": {"a": 0}}}
    path.write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match="has token ids up to 48, but the model's vocab_size is 48"):
        export(weights(SMALL, generator), SMALL, tmp_path / "hub", tokenizer_file=path)
    with pytest.raises(CheckpointError, match="has no token of id 7"):
        model = like_small(vocab_size=64)
        export(weights(model, generator), model, tmp_path / "hub", tokenizer_file=path, eos_token_id=7)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match=r"is not a tokenizer\.json"):
        export(weights(SMALL, generator), SMALL, tmp_path / "hub", tokenizer_file=path)
