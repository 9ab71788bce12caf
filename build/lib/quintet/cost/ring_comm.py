"""Bytes that ranks send, and the seconds that they take, from the spec.

**Ring attention.** What travels round the ring of cp ranks, one rank's tokens at a time, is per token, in elements (C the latent's width, R
that of the rotary key that all heads share, N and V the widths per head of key and value, H_t = H / tp the heads of a rank):

    latent   C + R             the normalised latent and the rotated key; keys and values are expanded where they arrive
    kv       H_t (N + V) + R   the expanded keys and values; the shared key once, not once per head

In forward each rank's payload makes cp - 1 hops. In backward it makes them again and its gradient as many, one behind it, the last of
them home: in the payload's own type for keys and values, in fp32 for latents. A sum that travels in bf16 is rounded at each hop, and
fp32 costs nothing but the last hop, for where latents are chosen the others hide: at V3's shape, 4,096 tokens per rank and 50 GB/s a
latent and its gradient take 0.28 ms and the scores beside them 6.7 ms. Document ids are not sent: all ranks know them.

**Which payload.** With s tokens per rank (zigzag) each of the cp steps computes s^2 / 2 scores per head, H_t (N+R+V) s^2 operations
forward and 5/2 of that backward (scores again, and four gradients). A latent that arrives is expanded by 2 s C H_t (N+V) operations, once
forward and three times backward (again, and two gradients). A step lasts as long as its computation or its message, whichever is longer:
at short s the latents' fewer bytes win; at long s even keys and values hide behind the scores, and the expansion is paid for nothing.
Modelled milliseconds per layer, forward and backward, at V3's shape (C 512, R 64, H 128, N = V 128), bf16, cp 8, 400 TFLOP/s:

    tokens per rank          1,024    2,048    4,096    8,192   16,384   32,768
    50 GB/s     latent         5.5     16.9     57.9      212      809    3,157
    (between    kv            30.0     60.7    124.4      261      791    3,122     crossover at 11,300 tokens
    nodes)
    200 GB/s    latent         5.4     16.9     57.8      212      808    3,156
    (within)    kv             7.8     16.3     49.4      195      775    3,089     crossover at 2,000 tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quintet.cost.sent import Sent
from quintet.spec.model import Model

Payload = Literal["latent", "kv"]

LINK_BYTES_PER_SECOND = 50e9
"""One 400 Gbit/s adapter per device, as V3's nodes have (V3 3.1), in one direction."""
FLOPS_PER_SECOND = 400e12
"""Of bf16 products as they run, a little under half of the 989 TFLOP/s that an H800 states."""


@dataclass(frozen=True, kw_only=True)
class RingSeconds:
    """How long the slowest rank takes for one layer, transfers hidden behind computation where they fit."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


def ring_width(model: Model, *, tp: int = 1, payload: Payload) -> int:
    """Elements that travel per token."""
    if payload == "latent":
        return model.kv_lora_rank + model.qk_rope_head_dim
    return model.num_heads // tp * (model.qk_nope_head_dim + model.v_head_dim) + model.qk_rope_head_dim


def gradient_bytes(payload: Payload, element_bytes: int) -> int:
    """Bytes of one element of the payload's gradient as it travels: of a latent in fp32, of keys and values in their own type."""
    return 4 if payload == "latent" else element_bytes


def ring_bytes(
    model: Model,
    *,
    tokens_per_rank: int,
    sequences: int,
    cp: int,
    tp: int = 1,
    payload: Payload,
    element_bytes: int,
) -> Sent:
    """Bytes that one rank sends for one layer and `sequences` sequences of which it holds `tokens_per_rank` tokens each. Recomputing a
    whole block sends `forward` again."""
    hops, width = (cp - 1) * sequences * tokens_per_rank, ring_width(model, tp=tp, payload=payload)
    payload_bytes = element_bytes * width
    return Sent(forward=hops * payload_bytes, backward=hops * (payload_bytes + gradient_bytes(payload, element_bytes) * width))


def ring_seconds(
    model: Model,
    *,
    tokens_per_rank: int,
    cp: int,
    tp: int = 1,
    payload: Payload,
    element_bytes: int,
    link_bytes_per_second: float = LINK_BYTES_PER_SECOND,
    flops_per_second: float = FLOPS_PER_SECOND,
) -> RingSeconds:
    """Modelled seconds of core attention for one layer and sequence, the expansion of this rank's own latents left out (both pay it)."""
    heads, message = model.num_heads // tp, tokens_per_rank * ring_width(model, tp=tp, payload=payload) / link_bytes_per_second
    widths = model.qk_nope_head_dim + model.v_head_dim
    scores = heads * (widths + model.qk_rope_head_dim) * tokens_per_rank**2 / flops_per_second
    expansion = 2 * tokens_per_rank * model.kv_lora_rank * heads * widths / flops_per_second if payload == "latent" else 0.0

    def passing(scores: float, expansion: float, message: float) -> float:
        """The first message goes out while the own block is computed, each further one while the block before it is."""
        return max(scores, message) + (cp - 2) * max(scores + expansion, message) + scores + expansion

    if cp == 1:
        return RingSeconds(forward=scores, backward=2.5 * scores)
    # The last hop of the gradient has nothing left to hide behind.
    home = message * gradient_bytes(payload, element_bytes)
    return RingSeconds(
        forward=passing(scores, expansion, message * element_bytes),
        backward=passing(2.5 * scores, 3 * expansion, message * element_bytes + home) + home,
    )


def ring_payload(
    model: Model,
    *,
    tokens_per_rank: int,
    cp: int,
    tp: int = 1,
    element_bytes: int,
    link_bytes_per_second: float = LINK_BYTES_PER_SECOND,
    flops_per_second: float = FLOPS_PER_SECOND,
) -> Payload:
    """The payload whose forward and backward take less time; latents where they take the same."""

    def seconds(payload: Payload) -> float:
        return ring_seconds(
            model,
            tokens_per_rank=tokens_per_rank,
            cp=cp,
            tp=tp,
            payload=payload,
            element_bytes=element_bytes,
            link_bytes_per_second=link_bytes_per_second,
            flops_per_second=flops_per_second,
        ).total

    return "latent" if seconds("latent") <= seconds("kv") else "kv"
