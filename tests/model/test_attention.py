"""Latent attention against the report's formulas, written token by token and head by head in fp64."""

from __future__ import annotations

import cmath
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quintet.model.attention import LatentAttention, Latents
from quintet.model.rope import frequencies, rotation, softmax_scale
from quintet.ops.pointwise import REFERENCE
from quintet.spec.model import Model, Yarn
from tests.checkpoint.models import like_small

YARN = Yarn(factor=4.0, original_context=16, mscale=0.5)


def small_attention(model: Model) -> LatentAttention:
    """An attention layer with weights of unit gain and norms that are not 1."""
    layer = LatentAttention(model, kernels=REFERENCE)
    for parameter in layer.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
        else:
            torch.nn.init.normal_(parameter, 0.0, parameter.shape[1] ** -0.5)
    return layer


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm of one latent vector."""
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def turned(x: Tensor, place: int, speeds: list[float], ratio: float) -> Tensor:
    """RoPE: neighbours as complex numbers, each times exp(i place speed)."""
    out = []
    for pair, speed in enumerate(speeds):
        z = complex(x[2 * pair], x[2 * pair + 1]) * cmath.exp(1j * place * speed) * ratio
        out += [z.real, z.imag]
    return torch.tensor(out, dtype=torch.float64)


def by_the_formulas(layer: LatentAttention, x: Tensor, documents: list[int] | None) -> Tensor:
    """V3 eq. 1-11 for one sequence x [S, D] in fp64."""
    model = layer.model
    w = {name: parameter.detach().double() for name, parameter in layer.named_parameters()}
    heads, nope, rank = model.num_heads, model.qk_nope_head_dim, model.kv_lora_rank
    ratio = float(rotation(model, torch.zeros(1))[0][0, 0])  # cos 0: YaRN's ratio of mscales
    speeds = frequencies(model, torch.device("cpu")).tolist()
    queries, keys, values = [], [], []
    for place, h in enumerate(x.double()):
        c_q = h if model.q_lora_rank is None else norm(w["wq_a.weight"] @ h, w["q_norm.weight"])
        q = (w["wq.weight" if model.q_lora_rank is None else "wq_b.weight"] @ c_q).view(heads, -1)
        compressed = w["wkv_a.weight"] @ h
        c_kv, k_r = norm(compressed[:rank], w["kv_norm.weight"]), turned(compressed[rank:], place, speeds, ratio)
        kv = (w["wkv_b.weight"] @ c_kv).view(heads, -1)
        queries.append([torch.cat((q[i, :nope], turned(q[i, nope:], place, speeds, ratio))) for i in range(heads)])
        keys.append([torch.cat((kv[i, :nope], k_r)) for i in range(heads)])
        values.append([kv[i, nope:] for i in range(heads)])
    scale = softmax_scale(model)
    outs = []
    for t in range(len(x)):
        o = []
        for i in range(heads):
            seen = [j for j in range(t + 1) if documents is None or documents[j] == documents[t]]
            powers = [math.exp(float(queries[t][i] @ keys[j][i]) * scale) for j in seen]
            o.append(sum((values[j][i] * (power / sum(powers)) for j, power in zip(seen, powers, strict=True)), torch.zeros(())))
        outs.append(w["wo.weight"] @ torch.cat(o))
    return torch.stack(outs)


@pytest.mark.parametrize("documents", [None, [0, 0, 0, 1, 1, 2, 2]])
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"yarn": YARN}, {"v_head_dim": 12, "num_heads": 3}], ids=str)
def test_latent_attention_is_what_the_report_says(changes: dict[str, Any], documents: list[int] | None) -> None:
    model = like_small(**changes)
    layer, x = small_attention(model), torch.randn(1, 7, model.hidden_size)
    ids = None if documents is None else torch.tensor([documents])
    ours = layer(x, rotation(model, torch.arange(7)), ids)[0].detach()
    theirs = by_the_formulas(layer, x[0], documents)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_sequences_of_a_batch_do_not_meet() -> None:
    model = like_small()
    layer, x, turn = small_attention(model), torch.randn(3, 6, model.hidden_size), rotation(model, torch.arange(6))
    torch.testing.assert_close(layer(x, turn, None)[1:2], layer(x[1:2], turn, None))


def test_only_the_latent_and_the_shared_key_are_cached() -> None:
    model = like_small()
    layer, turn = small_attention(model), rotation(model, torch.arange(5))
    cache = layer.empty_cache(2)
    layer.decode(torch.randn(2, 5, model.hidden_size), turn, cache)
    assert cache.kv.shape == (2, 5, model.kv_lora_rank) and cache.k_pe.shape == (2, 5, model.qk_rope_head_dim)


@given(parts=st.lists(st.integers(1, 5), min_size=1, max_size=4), compressed=st.booleans(), extended=st.booleans())
def test_decoding_in_parts_with_absorbed_projections_equals_attending_at_once(parts: list[int], compressed: bool, extended: bool) -> None:
    model = like_small(q_lora_rank=12 if compressed else None, yarn=YARN if extended else None)
    layer, x, begin = small_attention(model), torch.randn(2, sum(parts), model.hidden_size), 0
    cache, outs = layer.empty_cache(2), []
    for size in parts:
        outs.append(layer.decode(x[:, begin : begin + size], rotation(model, torch.arange(begin, begin + size)), cache))
        begin += size
    torch.testing.assert_close(torch.cat(outs, 1), layer(x, rotation(model, torch.arange(begin)), None), rtol=1e-4, atol=1e-5)


def test_another_way_to_attend_takes_its_place_in_the_seam() -> None:
    model = like_small()
    layer, x, turn = small_attention(model), torch.randn(1, 4, model.hidden_size), rotation(model, torch.arange(4))
    seen: dict[str, Any] = {}

    def attend(layer: LatentAttention, x: Latents, rotation: tuple[Tensor, Tensor], document_ids: Tensor | None) -> Tensor:
        seen.update(q=x.q.shape, kv=x.kv.shape, k_pe=x.k_pe.shape)
        return torch.zeros(1, model.num_heads, 4, model.v_head_dim)

    layer.attend = attend
    assert not layer(x, turn, None).any()
    assert seen == {"q": (1, 4, model.q_lora_rank), "kv": (1, 4, model.kv_lora_rank), "k_pe": (1, 4, model.qk_rope_head_dim)}
