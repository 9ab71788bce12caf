"""The whole model: embedding, dense and mixture-of-experts blocks, final norm, head, and multi-token-prediction modules.

Letters: B batch, S sequence, D hidden, C vocabulary, M number of MTP modules.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from quintet.model.attention import LatentAttention, LatentCache
from quintet.model.block import Block
from quintet.model.crossing import Steps, begin, carrying, straight
from quintet.model.layers import FeedForward, RMSNorm
from quintet.model.moe import MixtureOfExperts, MoEStatistics
from quintet.model.mtp import MtpModule
from quintet.model.rope import rotation, softmax_scale
from quintet.ops.cross_entropy import CrossEntropy, head_loss
from quintet.ops.pointwise import REFERENCE, Kernels
from quintet.spec.model import Model
from quintet.spec.placement import Box, is_expert, whole
from quintet.spec.run import Recompute


@dataclass(frozen=True)
class Output:
    """What a forward yields: `hidden` [B, S, D] after the final norm, ready for the head; `mtp`, M such tensors, one per depth;
    `moe`, the statistics of every MoE layer by its number among these, those of MTP modules last."""

    hidden: Tensor
    mtp: tuple[Tensor, ...]
    moe: dict[int, MoEStatistics]


class HeadLoss(Protocol):
    """The seam that a head with a split vocabulary replaces."""

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int, kernel: CrossEntropy) -> Tensor:
        """hidden [B, S, D], weight [C, D], labels [B, S] (negative: ignored) -> sum of the losses, `chunk` tokens' logits at a time."""
        ...


def local_head_loss(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int, kernel: CrossEntropy) -> Tensor:
    """All rows of the head are here."""
    return head_loss(hidden.flatten(0, 1), weight, labels.flatten(), chunk=chunk, kernel=kernel)


class Embedding(nn.Module):
    """Token ids [B, S] -> [B, S, D]. `lookup`, from ids and weight, is the seam that a split vocabulary replaces."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.lookup: Callable[[Tensor, Tensor], Tensor] = F.embedding

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lookup(tokens, self.weight)


class Head(nn.Module):
    """Hidden states [..., D] -> logits [..., C]; the loss reads `weight` and multiplies by chunks."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight)


class Transformer(nn.Module):
    """A DeepSeek-V3 model on one device. Build it under `torch.device("meta")` to look at shapes alone."""

    def __init__(self, model: Model, *, kernels: Kernels = REFERENCE) -> None:
        super().__init__()
        self.model, self.kernels = model, kernels
        self.embed = Embedding(model.vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(Block(model, dense=i < model.num_dense_layers, kernels=kernels) for i in range(model.num_layers))
        self.norm = RMSNorm(model.hidden_size, eps=model.rms_norm_eps, kernels=kernels)
        if not model.tie_embeddings:
            self.head = Head(model.vocab_size, model.hidden_size)
        self.mtp = nn.ModuleList(MtpModule(model, kernels=kernels) for _ in range(model.num_mtp_modules))
        self.recompute_blocks = False
        self.in_steps = False
        """Whether `through` and `finish` can be set aside within blocks, which then are not called as modules."""
        self.head_loss: HeadLoss = local_head_loss
        # The seam that adds up counts [layers, B, E] over the ranks that share the sequences.
        self.whole_count: Callable[[Tensor], Tensor] = lambda count: count

    @property
    def head_weight(self) -> Tensor:
        """The output head's matrix [C, D], the embedding's own where they are tied."""
        return self.embed.weight if self.model.tie_embeddings else self.head.weight

    def forward(
        self, inputs: Tensor, *, targets: Tensor | None = None, positions: Tensor | None = None, document_ids: Tensor | None = None
    ) -> Output:
        """inputs [B, S] at `positions` [S] of their sequences (default: 0, 1, 2 ...) -> Output.

        With targets [M+1, B, S] the MTP modules run too: module k reads the tokens that depth k - 1 predicts.
        """
        turn = self.turn(inputs, positions)
        x, moe = straight(self.through(self.embed(inputs), range(self.model.num_layers), turn, document_ids))
        hidden, more = straight(self.finish(x, targets, turn, document_ids))
        return Output(hidden=hidden[0], mtp=hidden[1:], moe=moe | more)

    def rotate_like(self, model: Model) -> None:
        """Take the rotary embedding of `model`, and its scale of the attention logits, from now on; all else must be as it was."""
        shapes = [replace(each, yarn=None, max_context=1, rope_theta=1.0) for each in (self.model, model)]
        assert shapes[0] == shapes[1], shapes
        self.model = model
        for part in self.modules():
            if isinstance(part, LatentAttention):
                part.scale = softmax_scale(model)

    def turn(self, inputs: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """inputs [B, S] at `positions` [S] (None: 0, 1, 2 ...) -> the rotary embedding's cos and sin [S, R/2]."""
        return rotation(self.model, torch.arange(inputs.shape[1], device=inputs.device) if positions is None else positions)

    def through(
        self, x: Tensor, layers: Iterable[int], turn: tuple[Tensor, Tensor], document_ids: Tensor | None
    ) -> Steps[tuple[Tensor, dict[int, MoEStatistics]]]:
        """x [B, S, D] through some layers -> [B, S, D], and the statistics of each MoE layer by its number among these."""
        found: dict[int, MoEStatistics] = {}
        for layer in layers:
            x, statistics = yield from self._run(self.layers.get_submodule(str(layer)), x, turn, document_ids)
            if statistics is not None:
                found[layer - self.model.num_dense_layers] = statistics
        return x, found

    def finish(
        self, x: Tensor, targets: Tensor | None, turn: tuple[Tensor, Tensor], document_ids: Tensor | None
    ) -> Steps[tuple[tuple[Tensor, ...], dict[int, MoEStatistics]]]:
        """x [B, S, D] behind the last layer -> hidden states [B, S, D] ready for the head: the main model's and, with targets
        [M+1, B, S], those of each MTP module; and the modules' statistics."""
        hidden: tuple[Tensor, ...] = (self.norm(x),)
        found: dict[int, MoEStatistics] = {}
        # Each depth continues from the normalised states of the one before, as the inference of the published weights does.
        for depth, module in enumerate(self.mtp if targets is not None else ()):
            assert targets is not None and isinstance(module, MtpModule)
            embedded = self.embed(targets[depth].clamp(min=0))
            begun = begin(self._run(module, hidden[-1], embedded, turn, document_ids))
            (x, statistics), hidden = yield from carrying(begun, hidden)
            hidden += (module.norm(x),)
            assert statistics is not None
            found[self.model.num_moe_layers + depth] = statistics
        return hidden, found

    def _run(self, part: Tensor | nn.Module, *arguments: Any) -> Steps[tuple[Tensor, MoEStatistics | None]]:
        """Run a block or MTP module, keeping only its inputs for backward if whole blocks are recomputed: then it is not set aside."""
        assert isinstance(part, Block | MtpModule)
        found: tuple[Tensor, MoEStatistics | None]
        if self.recompute_blocks and torch.is_grad_enabled():
            found = checkpoint(part, *arguments, use_reentrant=False, preserve_rng_state=False)
        elif self.in_steps:
            found = yield from part.steps(*arguments)
        else:
            found = part(*arguments)
        return found

    def loss(self, hidden: Tensor, labels: Tensor, *, chunk: int) -> Tensor:
        """hidden [B, S, D] as in Output, labels [B, S] (negative: ignored) -> sum of the cross-entropies in nats."""
        return self.head_loss(hidden, self.head_weight, labels, chunk=chunk, kernel=self.kernels.cross_entropy)

    def logits(self, inputs: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
        """inputs [B, S] -> logits [B, S, C] of the main model, all at once: for inspection and tests, not for training."""
        return F.linear(self(inputs, document_ids=document_ids).hidden, self.head_weight)

    def empty_cache(self, batch: int) -> list[LatentCache]:
        """One latent cache per layer of the main model."""
        return [block.attention.empty_cache(batch) for block in self._blocks()]

    def decode(self, inputs: Tensor, cache: list[LatentCache]) -> Tensor:
        """New tokens [B, S] after those in the cache, which grows -> logits of the last one [B, C]."""
        known = cache[0].kv.shape[1]
        turn = rotation(self.model, torch.arange(known, known + inputs.shape[1], device=inputs.device))
        x = self.embed(inputs)
        for block, layer_cache in zip(self._blocks(), cache, strict=True):
            x = block.decode(x, turn, layer_cache)
        return F.linear(self.norm(x[:, -1]), self.head_weight)

    def _blocks(self) -> list[Block]:
        return [block for block in self.layers if isinstance(block, Block)]

    @property
    def num_moe_layers(self) -> int:
        """Mixtures of experts, those of MTP modules included."""
        return self.model.num_moe_layers + self.model.num_mtp_modules

    def moe_layers(self) -> dict[int, MixtureOfExperts]:
        """The mixtures of experts that are here, by their number in the model as in `Output.moe`."""
        first = self.model.num_dense_layers
        blocks: dict[int, object] = {int(name) - first: block for name, block in self.layers.named_children()}
        blocks |= {self.model.num_moe_layers + depth: module.block for depth, module in enumerate(self.mtp)}
        return {
            number: block.ffn
            for number, block in blocks.items()
            if isinstance(block, Block) and isinstance(block.ffn, MixtureOfExperts)
        }

    def keep(self, held: Callable[[str], bool]) -> None:
        """Take out the layers and other parts whose names are not held: those of other pipeline stages. The rest keep their names."""
        for name in ("embed", "norm", "head", "mtp"):
            if hasattr(self, name) and not held(name):
                setattr(self, name, nn.ModuleList())
        for layer in [name for name, _ in self.layers.named_children()]:
            if not held(f"layers.{layer}"):
                delattr(self.layers, layer)

    def set_recompute(self, policy: Recompute) -> None:
        """Choose what backward computes again: nothing; norms and MLA up-projections; whole blocks."""
        self.recompute_blocks = policy == "full"
        for part in self.modules():
            if isinstance(part, Block | LatentAttention | FeedForward):
                part.recompute = policy == "selective"

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Matrices from N(0, init_std), norm scales 1, router biases 0 (V3 4.2); see `initial_values`."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_values(self.model, name, whole(tuple(parameter.shape)), seed=seed))
        for layer in self.moe_layers().values():
            layer.router.expert_bias.zero_()


def initial_values(model: Model, name: str, box: Box, *, seed: int) -> Tensor:
    """The first values of a part of the parameter `name`, as it is called in the model: fp32, on the CPU.

    They depend on seed, name, expert and place alone, so every device, dtype and layout starts from the same numbers, and a rank
    draws its own experts only.
    """
    if len(box.shape) == 1:
        return torch.ones(box.sizes)
    if not is_expert(name):
        return _draw(model, box, f"{seed}/{name}")
    one = Box(box.offsets[1:], box.sizes[1:], box.shape[1:])
    begin, count = box.offsets[0], box.sizes[0]
    return torch.stack([_draw(model, one, f"{seed}/{name}/{expert}") for expert in range(begin, begin + count)])


def _draw(model: Model, box: Box, key: str) -> Tensor:
    """The part `box` of a matrix that `key` determines."""
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1
    drawn = torch.empty(box.shape).normal_(0.0, model.init_std, generator=torch.Generator().manual_seed(number))
    return drawn[tuple(slice(begin, begin + size) for begin, size in zip(box.offsets, box.sizes, strict=True))]
