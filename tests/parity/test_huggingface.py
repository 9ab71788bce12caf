"""Our model and transformers' DeepseekV3ForCausalLM are one function: logits, loss and every gradient, in both directions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from torch import Tensor

from quintet.checkpoint import hub_config, hub_names
from quintet.checkpoint.huggingface import export, import_, read_config
from quintet.model.loss import Weights, count_targets, targets_by_depth, training_loss
from quintet.model.transformer import Transformer
from quintet.spec.model import Model
from tests.checkpoint.models import SMALL, VARIANTS, like_small, weights

transformers = pytest.importorskip("transformers")

# transformers has shared experts even where there are none: of width 0.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
each_model = pytest.mark.parametrize("model", VARIANTS.values(), ids=VARIANTS.keys())
BATCH, LENGTH = 2, 40
PRECISION = 1e-5


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _ours(model: Model, state: Mapping[str, Tensor]) -> Transformer:
    ours = Transformer(model)
    ours.load_state_dict(state)
    return ours


def _theirs(directory: Path) -> Any:
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
    )
    num_layers = loaded.config.num_hidden_layers
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["error_msgs"]
    assert all(int(name.split(".")[2]) >= num_layers for name in info["unexpected_keys"]), "only MTP modules are left out"
    return loaded


def _tokens(model: Model, generator: torch.Generator) -> Tensor:
    return torch.randint(0, model.vocab_size, (BATCH, LENGTH), generator=generator)


def _in_our_names(theirs: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
    """Tensors under transformers' names in memory (experts fused) by our names, MTP modules left out."""
    ours = {}
    for name, shape in hub_names.shapes(model).items():
        if not name.startswith("mtp."):
            fused = hub_names.fused_part(name, shape, model)
            parts = [fused] if fused else hub_names.parts(name, shape, model)
            if all(part.name in theirs for part in parts):
                ours[name] = torch.cat([theirs[part.name].flatten() for part in parts]).reshape(shape)
    return ours


@each_model
def test_an_export_gives_transformers_our_logits(tmp_path: Path, model: Model, generator: torch.Generator) -> None:
    state = weights(model, generator)
    export(state, model, tmp_path / "hub", tokenizer_file=None, dtype=torch.float32, max_shard_bytes=30_000)
    tokens = _tokens(model, generator)
    with torch.no_grad():
        theirs, ours = _theirs(tmp_path / "hub")(tokens).logits, _ours(model, state).logits(tokens)
    assert theirs.std() > 0.1, "the logits must differ for their equality to say something"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=PRECISION)


@each_model
def test_an_import_gives_us_transformers_logits(tmp_path: Path, model: Model, generator: torch.Generator) -> None:
    text = hub_config.dumps(hub_config.from_model(model, dtype="float32", bos_token_id=None, eos_token_id=None))
    config = transformers.DeepseekV3Config(**json.loads(text))
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            scale, shift = (
                (0.2, 1.0) if "norm" in name else (0.1, 0.0) if name.endswith("bias") else (0.5 / max(tensor.shape[-1], 1) ** 0.5, 0.0)
            )
            tensor.normal_(generator=generator).mul_(scale).add_(shift)
    theirs.save_pretrained(tmp_path / "hub")
    imported = read_config(tmp_path / "hub")
    assert imported.num_mtp_modules == 0  # transformers does not keep them
    ours = _ours(imported, dict(import_(tmp_path / "hub")))
    tokens = _tokens(model, generator)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(tokens), theirs(tokens).logits, rtol=0, atol=PRECISION)


@each_model
def test_the_loss_and_every_gradient_are_transformers_own(tmp_path: Path, model: Model, generator: torch.Generator) -> None:
    state = weights(model, generator)
    export(state, model, tmp_path / "hub", tokenizer_file=None, dtype=torch.float32)
    theirs, ours = _theirs(tmp_path / "hub"), _ours(model, state)
    tokens = _tokens(model, generator)

    their_loss = theirs(tokens, labels=tokens).loss
    their_loss.backward()
    labels = torch.full_like(tokens, -100)
    labels[:, :-1] = tokens[:, 1:]
    targets = targets_by_depth(labels, model.num_mtp_modules)
    our_loss = training_loss(
        ours, tokens, targets,
        weights=Weights(mtp=0.0, balance=0.0), num_targets=count_targets(targets).tolist(), num_sequences=BATCH, chunk=16,
    ).total  # fmt: skip
    our_loss.backward()  # type: ignore[no-untyped-call]

    torch.testing.assert_close(our_loss, their_loss, rtol=0, atol=PRECISION)
    expected = _in_our_names({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}, model)
    gradients = {name: p.grad for name, p in ours.named_parameters() if not name.startswith("mtp.")}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient is not None and expected[name].abs().max() > 1e-6, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=PRECISION, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", ["small", "two MTP modules", "YaRN as V3", "no shared expert", "tied"])
def test_the_mtp_weights_are_read_by_transformers_as_they_are_used_here(tmp_path: Path, name: str, generator: torch.Generator) -> None:
    model = VARIANTS[name]
    state = weights(model, generator)
    export(state, model, tmp_path / "hub", tokenizer_file=None, dtype=torch.float32)
    ours, theirs = _ours(model, state), _theirs(tmp_path / "hub")
    # transformers knows the MTP layers of the published model alone, by their number.
    theirs._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{model.num_layers + k}\." for k in range(model.num_mtp_modules)]
    mtp = transformers.modeling_layers.MtpModel.from_pretrained(theirs)

    inputs: list[tuple[Any, ...]] = []
    for module in ours.mtp:
        module.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments))
    tokens = _tokens(model, generator)
    labels = tokens.roll(-1, 1)
    with torch.no_grad():
        outputs = ours(tokens, targets=targets_by_depth(labels, model.num_mtp_modules)).mtp
        positions = torch.arange(LENGTH)[None]
        turn = theirs.model.rotary_emb(inputs[0][1], positions)
        mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]
        assert len(outputs) == len(mtp.layers) == model.num_mtp_modules
        for layer, (hidden, embedded, *_), output in zip(mtp.layers, inputs, outputs, strict=True):
            expected = layer(embedded, hidden, turn, mask, positions, None)
            torch.testing.assert_close(output, expected, rtol=0, atol=PRECISION)


def test_an_export_in_bf16_is_loaded_in_bf16(tmp_path: Path, generator: torch.Generator) -> None:
    export(weights(SMALL, generator), SMALL, tmp_path / "hub", tokenizer_file=None)
    assert _theirs(tmp_path / "hub").dtype == torch.bfloat16


def test_config_json_raises_no_complaint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("small", "YaRN as V3", "YaRN without weights"):
        text = hub_config.dumps(hub_config.from_model(VARIANTS[name], dtype="bfloat16", bos_token_id=0, eos_token_id=1))
        (tmp_path / "config.json").write_text(text)
        transformers.logging.set_verbosity_warning()
        transformers.logging.enable_propagation()
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        transformers.logging.disable_propagation()
        assert type(config).__name__ == "DeepseekV3Config" and caplog.records == []


def test_the_tokenizer_is_loaded_with_its_special_tokens(tmp_path: Path, generator: torch.Generator) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=280, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["def f(x):\n    return x\n"] * 3, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = like_small(vocab_size=300)
    export(weights(model, generator), model, tmp_path / "hub", tokenizer_file=tmp_path / "tokenizer.json", eos_token_id=0)

    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub")
    for text in ("def f(x):\n    return x", "naïve — 你好 <|end|>", "  two spaces , kept ", ""):
        ids = tokenizer.encode(text).ids
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False) == text
    assert (loaded.eos_token, loaded.eos_token_id, loaded.pad_token, loaded.bos_token) == ("<|end|>", 0, "<|end|>", None)
    assert loaded.model_max_length == model.max_context


def test_generation_by_transformers_stops_at_the_token_that_ends_a_text(tmp_path: Path, generator: torch.Generator) -> None:
    state = weights(SMALL, generator)
    prompt = _tokens(SMALL, generator)[:1, :5]
    with torch.no_grad():
        likeliest = int(_ours(SMALL, state).logits(prompt)[0, -1].argmax())
    export(state, SMALL, tmp_path / "hub", tokenizer_file=None, eos_token_id=likeliest, dtype=torch.float32)
    text = _theirs(tmp_path / "hub").generate(prompt, max_new_tokens=9, do_sample=False)
    assert text[0].tolist() == [*prompt[0].tolist(), likeliest]
