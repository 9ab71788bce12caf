"""What the model is: the shape of a DeepSeek-V3-class transformer, and every rule between its numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quintet.errors import SpecError

_MOST_LAYERS = 10_000
_LARGEST = 2**31 - 1
"""Of any count or width, as token ids and the indices of many kernels are 32 bits wide."""


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN context extension of the rotary embedding (arXiv 2309.00071, as V3 applies it)."""

    factor: float = 40.0
    """Extended context divided by the original one (s)."""
    original_context: int = 4096
    """Context length that the model was trained with before the extension, in tokens."""
    beta_fast: float = 32.0
    """Rotations within the original context above which a frequency is left as it is."""
    beta_slow: float = 1.0
    """Rotations below which a frequency is divided by the whole factor."""
    mscale: float = 1.0
    """Weight of 0.1 ln(s) in the scale of the rotated part."""
    mscale_all_dim: float = 1.0
    """Weight of 0.1 ln(s) in the scale of the attention logits; 0 leaves them alone."""

    def __post_init__(self) -> None:
        if not 1 <= self.factor < math.inf:
            raise SpecError(f"yarn.factor ({self.factor}) must be at least 1 and finite")
        if self.original_context < 1:
            raise SpecError(f"yarn.original_context ({self.original_context}) must be at least 1 token")
        for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SpecError(f"yarn.{name} ({getattr(self, name)}) must be finite and not negative")
        if self.beta_fast <= self.beta_slow:
            raise SpecError(f"yarn.beta_fast ({self.beta_fast}) must be larger than yarn.beta_slow ({self.beta_slow})")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A DeepSeek-V3 transformer: latent attention, leading dense layers, then mixture-of-experts layers, then MTP modules."""

    vocab_size: int
    """Rows of the embedding and of the output head."""
    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    """Transformer layers of the main model, dense ones included, MTP modules not."""
    num_dense_layers: int
    """Leading layers whose feed-forward is dense."""
    num_heads: int
    """Attention heads."""
    q_lora_rank: int | None = None
    """Width of the compressed query; absent: queries come straight from the hidden state."""
    kv_lora_rank: int
    """Width of the compressed key and value, which is what generation caches."""
    qk_nope_head_dim: int
    """Width per head of the query and key part without rotary embedding."""
    qk_rope_head_dim: int
    """Width of the rotary part: per head in the query, shared by all heads in the key."""
    v_head_dim: int
    """Width per head of the value."""
    dense_ffn_size: int
    """Inner width of the dense feed-forward."""
    expert_ffn_size: int
    """Inner width of one expert, routed or shared."""
    num_routed_experts: int
    """Routed experts of each mixture-of-experts layer."""
    num_shared_experts: int
    """Experts that every token passes; they run as one feed-forward of their summed width."""
    num_experts_per_token: int
    """Routed experts that each token passes (top-k)."""
    num_groups: int = 1
    """Groups (nodes) that the routed experts are divided into."""
    num_groups_per_token: int = 1
    """Groups that a token's experts may come from."""
    routed_scaling_factor: float = 1.0
    """Factor on the sum of the routed experts' outputs."""
    normalize_gates: bool = True
    """Divide the selected gates by their sum (with one expert per token that leaves a constant, and the router learns nothing from it)."""
    capacity_factor: float | None = None
    """Each sequence gives each expert at most ceil(capacity_factor x its tokens x num_experts_per_token / num_routed_experts) of them,
    earlier tokens first (arXiv 2101.03961, section 2.2); the experts beyond are dropped from a token. Absent: nothing is dropped."""
    num_mtp_modules: int = 1
    """Multi-token-prediction modules; module k predicts the token k+1 places further."""
    tie_embeddings: bool = False
    """Use the embedding as the output head."""
    max_context: int = 4096
    """Longest sequence that the model accepts, in tokens."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    yarn: Yarn | None = None
    """Context extension; absent: plain rotary embedding."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm."""
    init_std: float = 0.006
    """Standard deviation of every weight matrix at the start."""

    def __post_init__(self) -> None:
        positive = (
            "vocab_size hidden_size num_layers num_heads kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim dense_ffn_size "
            "expert_ffn_size num_routed_experts num_experts_per_token num_groups num_groups_per_token max_context rope_theta "
            "rms_norm_eps init_std"
        ).split()
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise SpecError(f"{name} ({getattr(self, name)}) must be larger than 0 and finite")
        for name, value in vars(self).items():
            if isinstance(value, int) and value > _LARGEST:
                raise SpecError(f"{name} ({value}) must be at most {_LARGEST}")
        for name in ("num_dense_layers", "num_shared_experts", "num_mtp_modules"):
            if getattr(self, name) < 0:
                raise SpecError(f"{name} ({getattr(self, name)}) must not be negative")
        for name in ("num_layers", "num_mtp_modules"):
            if getattr(self, name) > _MOST_LAYERS:
                raise SpecError(f"{name} ({getattr(self, name)}) must be at most {_MOST_LAYERS}")
        if self.q_lora_rank is not None and self.q_lora_rank <= 0:
            raise SpecError(f"q_lora_rank ({self.q_lora_rank}) must be larger than 0; leave it out for uncompressed queries")
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise SpecError(f"capacity_factor ({self.capacity_factor}) must be larger than 0 and finite; leave it out to drop nothing")
        if self.qk_rope_head_dim % 2:
            raise SpecError(f"qk_rope_head_dim ({self.qk_rope_head_dim}) must be even: rotary embedding turns pairs")
        if self.num_dense_layers > self.num_layers:
            raise SpecError(f"num_dense_layers ({self.num_dense_layers}) must be at most num_layers ({self.num_layers})")
        experts, groups = self.num_routed_experts, self.num_groups
        if experts % groups:
            divisors = [d for d in range(1, experts + 1) if experts % d == 0]
            raise SpecError(f"num_routed_experts ({experts}) must be divisible by num_groups ({groups}); choose num_groups from {divisors}")
        if self.num_groups_per_token > groups:
            raise SpecError(f"num_groups_per_token ({self.num_groups_per_token}) must be at most num_groups ({groups})")
        reachable = experts // groups * self.num_groups_per_token
        if self.num_experts_per_token > reachable:
            raise SpecError(
                f"num_experts_per_token ({self.num_experts_per_token}) must be at most the {reachable} experts of "
                f"{self.num_groups_per_token} of {groups} groups"
            )
        if groups > 1 and experts // groups < 2:
            raise SpecError(
                f"num_groups ({groups}) leaves {experts // groups} expert per group, but a group is scored by its best two; "
                f"use at most {experts // 2} groups"
            )

    @property
    def qk_head_dim(self) -> int:
        """Width per head of query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Mixture-of-experts layers of the main model."""
        return self.num_layers - self.num_dense_layers
