"""Small models with weights of unit gain, at which logits and gradients are large enough to be compared."""

from __future__ import annotations

import torch
from torch import Tensor

from quintet.model.loss import Loss, Weights, count_targets, targets_by_depth, training_loss
from quintet.model.transformer import Transformer
from quintet.spec.model import Model
from tests.checkpoint.models import weights


def build(model: Model, *, dtype: torch.dtype = torch.float32, steady: bool = True) -> Transformer:
    """A model with random weights.

    With `steady` the router biases lie so far apart that they alone choose the experts: then no rounding error, say between
    cached and uncached logits, sends a token of nearly equal scores to another expert.
    """
    generator = torch.Generator().manual_seed(0)
    net = Transformer(model)
    net.load_state_dict(weights(model, generator))
    for layer in net.moe_layers().values() if steady else ():
        # Sums of two differ too, by more than two scores can.
        layer.router.expert_bias.copy_(4.0 * 2.0 ** torch.randperm(model.num_routed_experts, generator=generator))
    for parameter in net.parameters():
        parameter.data = parameter.detach().to(dtype)
    return net


def some_tokens(model: Model, *shape: int, seed: int = 0) -> Tensor:
    """Random token ids."""
    return torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def loss_of(
    net: Transformer,
    inputs: Tensor,
    labels: Tensor,
    *,
    document_ids: Tensor | None = None,
    mtp: float = 0.3,
    balance: float = 0.1,
    num_targets: list[int] | None = None,
    num_sequences: int | None = None,
    chunk: int = 16,
) -> Loss:
    """The training loss, by default of a step whose only micro-batch this is."""
    targets = targets_by_depth(labels, net.model.num_mtp_modules)
    return training_loss(
        net,
        inputs,
        targets,
        document_ids=document_ids,
        weights=Weights(mtp=mtp, balance=balance),
        num_targets=num_targets or count_targets(targets).tolist(),
        num_sequences=num_sequences or len(inputs),
        chunk=chunk,
    )


def gradients(net: Transformer, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter by name; zeros where the loss does not depend on it."""
    names, parameters = zip(*net.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, grads, strict=True))
