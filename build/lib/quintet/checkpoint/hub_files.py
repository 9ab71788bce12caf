"""The files that stand beside the weights on Hugging Face: tokenizer, generation settings, model card."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from quintet.checkpoint.hub_config import HubConfig
from quintet.checkpoint.place import Place, content
from quintet.errors import CheckpointError
from quintet.spec.model import Model


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer.json and the tokens that begin and end a text."""

    text: str | None
    """Content of tokenizer.json, or None where a model is exported without."""
    bos_id: int | None
    """Id of the token that begins a text."""
    eos_id: int | None
    """Id of the token that ends a text; it also fills up a batch, as in V3."""
    tokens: dict[int, str]
    """Tokens by id."""

    def ids(self) -> dict[str, int]:
        """The ids of `bos`, `eos` and `pad`, as far as there are such tokens."""
        return {role: i for role, i in (("bos", self.bos_id), ("eos", self.eos_id), ("pad", self.eos_id)) if i is not None}


def tokenizer(path: Place | None, model: Model, *, bos_id: int | None, eos_id: int | None) -> Tokenizer:
    """Read a tokenizer.json. Raises CheckpointError if it cannot be read, has more tokens than the model, or lacks the given ones."""
    if path is None:
        return Tokenizer(text=None, bos_id=bos_id, eos_id=eos_id, tokens={})
    try:
        text = content(path).decode()
        tree: dict[str, Any] = json.loads(text)
        vocabulary = tree["model"]["vocab"]
        tokens = {int(i): str(token) for token, i in vocabulary.items()}
        tokens |= {int(token["id"]): str(token["content"]) for token in tree["added_tokens"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a tokenizer.json of a byte-pair encoding: {error!r}") from None
    if max(tokens, default=-1) >= model.vocab_size:
        raise CheckpointError(f"{path} has token ids up to {max(tokens)}, but the model's vocab_size is {model.vocab_size}; name its own")
    for i in (bos_id, eos_id):
        if i is not None and i not in tokens:
            raise CheckpointError(f"{path} has no token of id {i}; give the ids of its own bos and eos tokens")
    return Tokenizer(text=text, bos_id=bos_id, eos_id=eos_id, tokens=tokens)


def texts(tokens: Tokenizer, model: Model, config: HubConfig) -> dict[str, str]:
    """The files' contents by name."""
    ids = tokens.ids()
    generation = {"_from_model_config": True, **{f"{role}_token_id": i for role, i in ids.items()}}
    files = {"generation_config.json": _json(generation), "README.md": _card(model, config, tokens)}
    if tokens.text is not None:
        roles = {f"{role}_token": tokens.tokens[i] for role, i in ids.items()}
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.max_context,
            "clean_up_tokenization_spaces": False,
            **roles,
        }
        files |= {"tokenizer.json": tokens.text, "tokenizer_config.json": _json(settings), "special_tokens_map.json": _json(roles)}
    return files


def _json(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"


def _card(model: Model, config: HubConfig, tokens: Tokenizer) -> str:
    rows = "\n".join(f"| {field.name} | {getattr(model, field.name)} |" for field in dataclasses.fields(model))
    load = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")',
    ]
    if tokens.text is None:
        load = [load[0].replace(", AutoTokenizer", ""), load[1]]
    code = "\n".join(load)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- deepseek_v3
- quintet
---

# A DeepSeek-V3-class language model

Trained with Quintet and exported as `DeepseekV3ForCausalLM`, weights in {config.torch_dtype}. MTP modules, where there are any, are layers
{model.num_layers} and up under V3's published names.

```python
{code}
```

| setting | value |
|---|---|
{rows}
"""
