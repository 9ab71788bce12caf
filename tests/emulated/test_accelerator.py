"""The stand-in for CUDA is strict: mistakes that CUDA would refuse, or that would make the host wait, show."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quintet.model import rope
from quintet.model.generate import choose
from quintet.spec.model import Model
from tests.accelerator import DeviceMix, accelerated
from tests.checkpoint.models import like_small
from tests.model.build import build, loss_of, some_tokens

SMALL = like_small()


@pytest.mark.parametrize(
    "mistake",
    [
        lambda there, here: there + here,
        lambda there, here: here.add_(there),
        lambda there, here: there @ here,
        lambda there, here: torch.cat((there, here)),
        lambda there, here: F.linear(there, here),
        lambda there, here: F.embedding(torch.tensor([1]), there),
        lambda there, here: there.index_select(0, torch.tensor([1])),
        lambda there, here: there.scatter_add_(0, torch.zeros(2, 2, dtype=torch.int64), there),
        lambda there, here: torch.mm(there, there, out=here),
        lambda there, here: there.numpy(),
        lambda there, here: torch.multinomial(there.abs(), 1, generator=torch.Generator()),
        lambda there, here: torch.ones(2, device="cuda:1"),
        lambda there, here: torch.stack((there.sum(), here.sum())),
    ],
)
def test_what_mixes_devices_is_refused(mistake: Any) -> None:
    with accelerated(), pytest.raises(DeviceMix):
        mistake(torch.ones(2, 2, device="cuda"), torch.ones(2, 2))


def test_what_cuda_takes_is_computed_and_lies_on_the_device() -> None:
    with accelerated() as here:
        x = torch.arange(6.0, device="cuda").view(2, 3)
        scalar, indices = torch.tensor(2.0), torch.tensor([1, 0])
        taken: list[Tensor] = [x * scalar, x[indices], x.new_zeros(2), x.clone().copy_(torch.ones(2, 3)), F.pad(x, (0, 1)), x.t()[1:]]
        assert all(each.is_cuda and each.device == torch.device("cuda", 0) for each in taken)
        assert taken[0].tolist() == [[0, 2, 4], [6, 8, 10]] and taken[1].tolist() == [[3, 4, 5], [0, 1, 2]]
        x.view(-1)[0] = 7
        assert x.cpu().tolist()[0][0] == 7
        assert x.cpu().device.type == "cpu" and x.to("cuda") is x
        assert here.syncs.total() == 4


def test_what_nobody_wrote_is_no_number() -> None:
    with accelerated():
        assert torch.empty(3, device="cuda").isnan().all() and torch.ones(2, device="cuda").new_empty(2).isnan().all()


def test_waiting_is_counted_by_place_and_a_masks_size_is_waited_for() -> None:
    with accelerated() as here:
        x = torch.ones(3, device="cuda")
        x[x > 0], x.sum().item(), x.nonzero()
        torch.arange(3).to("cuda")
        assert here.syncs == {"outside index": 1, "outside _local_scalar_dense": 1, "outside nonzero": 1}
        assert here.uploads == {"outside": 1}
        choose(x[None], temperature=1.0, top_p=1.0, generator=torch.Generator("cuda").manual_seed(0))
        assert here.syncs.total() == 3


def test_backward_runs_in_a_thread_of_its_own() -> None:
    seen = []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            seen.append((threading.current_thread() is threading.main_thread(), grads[0].is_cuda))
            return 2 * grads[0]

    with accelerated():
        x = torch.ones(2, device="cuda", requires_grad=True)
        Twice.apply(x).sum().backward()
        assert seen == [(False, True)] and x.grad is not None and x.grad.tolist() == [2, 2]


def test_a_mistake_planted_in_the_model_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = some_tokens(SMALL, 2, 9)
    frequencies = rope.frequencies

    def forgetful(model: Model, device: torch.device) -> Tensor:
        return frequencies(model, torch.device("cpu"))

    with accelerated():
        net, inputs, labels = build(SMALL).to("cuda"), tokens[:, :-1].to("cuda"), tokens[:, 1:].to("cuda")
        assert loss_of(net, inputs, labels).total.is_cuda
        monkeypatch.setattr(rope, "frequencies", forgetful)
        with pytest.raises(DeviceMix, match="same device"):
            loss_of(net, inputs, labels)


def test_random_numbers_of_the_device_are_its_own() -> None:
    with accelerated():
        torch.manual_seed(3)
        before = torch.get_rng_state()
        one = torch.randn(4, device="cuda")
        assert torch.equal(torch.get_rng_state(), before), "the host's generator does not move"
        torch.manual_seed(3)
        assert one.tolist() == torch.randn(4, device="cuda").tolist()
