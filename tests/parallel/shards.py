"""The same step on one device and on the ranks of a layout: losses, gradients and statistics, put together again from the ranks' parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quintet.model.loss import Loss, Weights, count_targets, targets_by_depth, training_loss
from quintet.model.transformer import Transformer
from quintet.parallel.expert import apply_expert
from quintet.parallel.mesh import make_mesh
from quintet.parallel.tensor import apply_tensor
from quintet.spec.layout import Layout
from quintet.spec.model import Model
from quintet.spec.placement import local_box
from quintet.spec.run import Recompute
from tests.checkpoint.models import like_small
from tests.model.build import build, some_tokens
from tests.parallel.rows import rows_noted
from tests.ranks import on_ranks

LENGTH = 8
MODEL = like_small(num_layers=2, num_heads=4, expert_ffn_size=16)
"""One dense layer, one mixture of 8 experts, one MTP module; all divisible by 4."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step to compare."""

    model: Model = MODEL
    num_sequences: int = 4
    dtype: torch.dtype = torch.float32
    steady: bool = False
    """Few experts get all tokens."""
    recompute: Recompute = "none"
    documents: bool = False
    chunk: int = 5
    mtp: float = 0.3
    balance: float = 0.1


@dataclass(frozen=True)
class Result:
    """Parts of the loss, counts, and the gradient of every parameter, of one rank or of the whole."""

    losses: Tensor
    load: Tensor
    dropped: Tensor
    gradients: Mapping[str, Tensor]
    traffic: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Bytes and calls by axis."""
    rows: Sequence[Sequence[int]] = ()
    """Of each dispatch, rows for each rank of ep."""


def on_one_device(case: Case) -> Result:
    """The reference."""
    net = build(case.model, dtype=case.dtype, steady=case.steady)
    return _run(net, case, slice(None))


def on_layout(case: Case, layout: Layout) -> Result:
    """This rank's share, its model cut from the reference's."""
    mesh = make_mesh(layout)
    net = build(case.model, dtype=case.dtype, steady=case.steady)
    cut(net, layout, mesh.rank)
    apply_tensor(net, mesh)
    apply_expert(net, mesh)
    rows = torch.arange(case.num_sequences).tensor_split(layout.dp)[mesh.at.dp]
    with rows_noted() as noted:
        result = _run(net, case, rows)
    traffic = {axis: (group.traffic.num_bytes, group.traffic.num_calls) for axis, group in mesh.groups.items()}
    return replace(result, traffic=traffic, rows=noted)


def cut(net: torch.nn.Module, layout: Layout, rank: int, *, prefix: str = "") -> None:
    """Leave every parameter the part that `rank` holds."""
    for name, parameter in net.named_parameters(prefix):
        box = local_box(name, tuple(parameter.shape), layout, rank)
        parameter.data = parameter.detach()[_slices(box.offsets, box.sizes)].clone()


def together(shares: list[Result], layout: Layout, like: Mapping[str, Tensor]) -> Result:
    """The sum of the ranks' shares, gradients laid at their places in tensors of the shapes of `like`."""
    whole = {name: torch.zeros(tensor.shape) for name, tensor in like.items()}
    for rank, share in enumerate(shares):
        assert share.gradients.keys() == like.keys()
        for name, gradient in share.gradients.items():
            box = local_box(name, tuple(like[name].shape), layout, rank)
            whole[name][_slices(box.offsets, box.sizes)] += gradient.float()
    losses, load, dropped = (torch.stack([getattr(s, name) for s in shares]).sum(0) for name in ("losses", "load", "dropped"))
    return Result(losses, load, dropped, whole)


def disagreements(ours: Result, theirs: Result, *, tolerance: float) -> list[str]:
    """What differs by more than `tolerance`, relative to the norm of the reference; counts and zero gradients must be equal."""
    found = [name for name in ("load", "dropped") if not torch.equal(getattr(ours, name), getattr(theirs, name))]
    pairs = {"losses": (ours.losses, theirs.losses), **{n: (ours.gradients[n], theirs.gradients[n].float()) for n in theirs.gradients}}
    for name, (our, their) in pairs.items():
        error = float((our - their).norm() / their.norm().clamp(min=1e-30))
        if not error <= tolerance:
            found.append(f"{name} ({error:.1e})")
    return found


def beyond_rounding(ours: Result, theirs: Result, case: Case) -> list[str]:
    """What lies further from exact arithmetic (fp32 with the same weights) than the one device does, by a multiple of bf16's rounding:
    each rank rounds its terms of a sum, where one device rounds the sum."""
    net = build(case.model, dtype=case.dtype, steady=case.steady).float()
    exact = _run(net, case, slice(None))
    found = disagreements(ours, replace(theirs, gradients={}), tolerance=2**-7)
    for name, gradient in exact.gradients.items():
        our, their = (float((result.gradients[name].float() - gradient).norm()) for result in (ours, theirs))
        if not our <= 2 * their + 2**-6 * float(gradient.norm()):
            found.append(f"{name} ({our:.1e}, on one device {their:.1e}, of {float(gradient.norm()):.1e})")
    return found


def compare(layout: Layout, cases: Mapping[str, Case]) -> dict[str, list[str]]:
    """Case -> what a layout computes otherwise than one device; no entry where they agree."""
    references = [on_one_device(case) for case in cases.values()]  # first: what they import, the children inherit
    by_rank = on_ranks(layout.num_ranks, lambda rank: [on_layout(case, layout) for case in cases.values()])
    found = {}
    for index, ((name, case), reference) in enumerate(zip(cases.items(), references, strict=True)):
        ours = together([results[index] for results in by_rank], layout, reference.gradients)
        exact = case.dtype == torch.float32
        if wrong := disagreements(ours, reference, tolerance=3e-6) if exact else beyond_rounding(ours, reference, case):
            found[name] = wrong
    return found


def _run(net: Transformer, case: Case, rows: Tensor | slice) -> Result:
    net.set_recompute(case.recompute)
    tokens = some_tokens(case.model, case.num_sequences, LENGTH + 1)
    labels = tokens[:, 1:].clone()
    labels[0, 2] = -100
    targets = targets_by_depth(labels, case.model.num_mtp_modules)
    ids = torch.arange(LENGTH).expand(case.num_sequences, -1) // 3 if case.documents else None
    loss: Loss = training_loss(
        net,
        tokens[rows, :-1],
        targets[:, rows],
        document_ids=None if ids is None else ids[rows],
        weights=Weights(mtp=case.mtp, balance=case.balance),
        num_targets=count_targets(targets).tolist(),
        num_sequences=case.num_sequences,
        chunk=case.chunk,
    )
    loss.total.backward()
    for name, parameter in net.named_parameters():
        runs = case.mtp or not name.startswith("mtp.")
        assert (parameter.grad is not None) == bool(runs), f"{name}: whoever reduces its gradient would wait for ever"
    gradients = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
    return Result(torch.stack((loss.total.detach(), loss.main, loss.mtp, loss.balance)), loss.load, loss.dropped, gradients)


def _slices(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True))
