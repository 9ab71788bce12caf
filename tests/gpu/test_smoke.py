"""On CUDA: the operations agree with the CPU's references, a tiny run trains, stops, resumes to the same bits and generates, its
checkpoints move between CPU and device, the host waits for no micro-batch, the commands work, and NCCL takes every kind of message.

Everything here is skipped where there is no CUDA device; run it alone with: pytest tests/gpu
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from quintet.checkpoint.agreement import Company
from quintet.cli import doctor
from quintet.cli import evaluate as evaluate_command
from quintet.cli import generate as generate_command
from quintet.cli import verify as verify_command
from quintet.data.prepare import prepare
from quintet.errors import DONE, INTERRUPTED
from quintet.evaluate.perplexity import evaluate
from quintet.model.generate import generate
from quintet.ops.attention import attention, attention_reference
from quintet.ops.cross_entropy import head_loss, head_loss_reference
from quintet.ops.grouped_matmul import grouped_matmul, grouped_matmul_reference
from quintet.ops.permute import collect, sort_by_expert, spread, sum_rows, sum_rows_reference
from quintet.ops.pointwise import REFERENCE, can_compile, fused
from quintet.parallel import collectives
from quintet.parallel.collectives import Group
from quintet.spec.run import Data, Run
from quintet.train import device as machine
from quintet.train.trained import open_trained
from tests.checkpoint.models import like_small
from tests.model.build import build, gradients, loss_of, some_tokens
from tests.train.runs import MODEL, At, assert_same, corpus, records, resume, send, tiny_run, train, where, write_recipe

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # Inductor's advice, which it gives whatever is compiled.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:\\s*Online softmax is disabled:UserWarning"),
]
ALIGNED = like_small(hidden_size=32, expert_ffn_size=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
"""Widths that bf16 products and fused attention want: multiples of 8."""


def assert_near(ours: Tensor, theirs: Tensor, *, limit: float = 0.02) -> None:
    """The difference is short beside the expected tensor: a bf16 has 8 bits. What should be 0 (a lone token's query has no gradient) is
    small."""
    error = (ours.detach().cpu().double() - theirs.detach().double()).norm()
    expected = max(float(theirs.detach().double().norm()), 1e-3 * theirs.numel() ** 0.5)
    assert error <= limit * expected, f"{error} beside {expected}"


def compare(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *tensors: Tensor) -> None:
    """Output and gradients of `ours` in bf16 on CUDA against those of `theirs` in fp32 on the CPU, for the same rounded inputs."""
    rounded = [t.bfloat16().to(CUDA).requires_grad_() for t in tensors]
    exact = [t.detach().float().cpu().requires_grad_() for t in rounded]
    out, expected = ours(*rounded), theirs(*exact)
    assert_near(out, expected)
    grad = torch.randn(expected.shape).bfloat16()
    our_grads = torch.autograd.grad(out, rounded, grad.to(CUDA, out.dtype))
    for our, their in zip(our_grads, torch.autograd.grad(expected, exact, grad.float()), strict=True):
        assert_near(our, their)


@pytest.mark.parametrize("widths", [(24, 16), (16, 16), (192, 128)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 17, 300])
def test_attention_equals_the_reference(length: int, masked: bool, widths: tuple[int, int]) -> None:
    width, value_width = widths
    q, k = torch.randn(2, 2, 3, length, width)
    v, ids = torch.randn(2, 3, length, value_width), (torch.arange(length) // 7).expand(2, -1) if masked else None
    compare(
        lambda *t: attention(*t, scale=width**-0.5, document_ids=None if ids is None else ids.to(CUDA)),
        lambda *t: attention_reference(*t, scale=width**-0.5, document_ids=ids),
        q,
        k,
        v,
    )


@pytest.mark.parametrize("loads", [[5, 3, 8], [16, 0, 32, 0], [0, 1], [64] * 8], ids=str)
def test_the_grouped_product_equals_the_loop_and_unused_experts_learn_nothing(loads: list[int]) -> None:
    ends = torch.tensor(loads).cumsum(0).to(torch.int32)
    rows, weight = torch.randn(sum(loads), 32), torch.randn(len(loads), 16, 32)
    compare(lambda r, w: grouped_matmul(r, w, ends.to(CUDA)), lambda r, w: grouped_matmul_reference(r, w, ends), rows, weight)

    on_device = weight.bfloat16().to(CUDA).requires_grad_()
    torch.empty(2**20, device=CUDA).fill_(torch.nan)  # freed at once: an output that nobody writes would show it
    out = grouped_matmul(rows.bfloat16().to(CUDA), on_device, ends.to(CUDA))
    (grad,) = torch.autograd.grad(out, on_device, torch.ones_like(out))
    assert [bool(expert.any()) for expert in grad] == [load > 0 for load in loads]


@pytest.mark.parametrize("num_tokens", [3, 400])
def test_rows_are_sorted_and_summed_as_on_the_cpu(num_tokens: int) -> None:
    experts, x = torch.rand(num_tokens, 8).topk(3).indices, torch.randn(num_tokens, 16)
    here, there = sort_by_expert(experts, 8), sort_by_expert(experts.to(CUDA), 8)
    for name in ("token_of_row", "row_of_slot", "load", "ends"):
        assert torch.equal(getattr(here, name), getattr(there, name).cpu()), name
    compare(lambda t: collect(spread(t, there), there), lambda t: collect(spread(t, here), here), x)
    rows = torch.randn(here.token_of_row.numel(), 16).bfloat16()
    assert_near(sum_rows(rows.to(CUDA), there.row_of_slot), sum_rows_reference(rows.float(), here.row_of_slot))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_heads_loss_equals_the_reference(compiled: bool) -> None:
    if compiled and not can_compile(CUDA):
        pytest.skip("torch.compile needs Triton")
    kernel, labels = (fused() if compiled else REFERENCE).cross_entropy, torch.randint(-1, 64, (50,))
    compare(
        lambda hidden, weight: head_loss(hidden, weight, labels.to(CUDA), chunk=25, kernel=kernel),
        lambda hidden, weight: head_loss_reference(hidden, weight, labels),
        torch.randn(50, 32),
        torch.randn(64, 32) * 0.3,
    )


def test_loss_and_gradients_of_a_model_equal_the_cpus() -> None:
    here, there = build(ALIGNED), build(ALIGNED, dtype=torch.bfloat16)
    for exact, rounded in zip(here.parameters(), there.parameters(), strict=True):
        exact.data = rounded.detach().float()
    there.to(CUDA)
    tokens = some_tokens(ALIGNED, 4, 49)
    expected = loss_of(here, tokens[:, :-1], tokens[:, 1:])
    loss = loss_of(there, tokens[:, :-1].to(CUDA), tokens[:, 1:].to(CUDA))
    assert loss.total.item() == pytest.approx(expected.total.item(), rel=0.01)
    assert torch.equal(loss.load.cpu(), expected.load)
    theirs = gradients(here, expected.total)
    for name, grad in gradients(there, loss.total).items():
        assert_near(grad, theirs[name], limit=0.1)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise RuntimeError where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_host_waits_for_nothing_in_a_micro_batch(recompute: Any) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("before Hopper torch's grouped product is a loop that the host must know the parts of")
    net, tokens = build(ALIGNED, dtype=torch.bfloat16).to(CUDA), some_tokens(ALIGNED, 4, 49).to(CUDA)
    net.set_recompute(recompute)
    targets = [192] * (ALIGNED.num_mtp_modules + 1)

    def both() -> None:
        gradients(net, loss_of(net, tokens[:, :-1], tokens[:, 1:], num_targets=targets).total)

    both()  # what is set up once may wait
    with no_waiting():
        both()


@pytest.fixture
def nccl() -> Iterator[Group]:
    """A process group of one rank, with the backends that the ranks of a run have."""
    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield Group("dp", (0,), 0, dist.group.WORLD)
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.float64, torch.float8_e4m3fn], ids=str)
def test_nccl_takes_every_kind_of_message(nccl: Group, dtype: torch.dtype) -> None:
    sent = torch.arange(6, device=CUDA).view(3, 2).to(dtype)

    def same(arrived: Tensor) -> bool:
        return arrived.is_cuda and arrived.dtype == dtype and torch.equal(arrived.float(), sent.float())

    assert same(collectives.all_gather(sent, nccl))
    assert same(collectives.all_to_all(sent, nccl, send=[3], receive=[3]))
    assert not collectives.all_to_all(sent[:0], nccl, send=[0], receive=[0]).numel()
    assert len(collectives.start_all_to_all(sent, nccl, send=[3], receive=[3], room=1).wait()) == 4
    if dtype != torch.float8_e4m3fn:  # nothing of eight bits is summed
        assert same(collectives.reduce_scatter(sent, nccl)) and same(collectives.all_reduce(sent.clone(), nccl))


def test_what_lies_on_the_host_goes_beside_nccl(nccl: Group) -> None:
    assert Company().share(lambda: "told") == ["told"]
    message = torch.ones(3)
    dist.all_reduce(message)
    dist.barrier()
    assert message.tolist() == [1, 1, 1]


def test_the_cache_changes_no_logits_beyond_rounding() -> None:
    net, tokens = build(ALIGNED, dtype=torch.bfloat16).to(CUDA), some_tokens(ALIGNED, 2, 12).to(CUDA)
    with torch.no_grad():
        whole, cache = net.logits(tokens), net.empty_cache(2)
        cached = torch.stack([net.decode(token, cache) for token in tokens.split(1, 1)], 1)
    assert cached.device.type == "cuda"
    assert_near(cached, whole.cpu(), limit=0.05)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Two prepared sources."""
    made = corpus(tmp_path_factory.mktemp("corpus"))
    prepare(made, vocab_size=MODEL.vocab_size, seed=0)
    return made


def cuda_run(data: Data, directory: Path, **settings: Any) -> Run:
    """Ten steps in bf16 on the CUDA device."""
    run = tiny_run(data, directory)
    model = replace(MODEL, hidden_size=32, expert_ffn_size=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    return replace(run, model=model, train=replace(run.train, **{"device": "cuda", "precision": "bf16", **settings}))


@contextmanager
def repeatable_attention() -> Iterator[None]:
    """Without the fused kernels, whose backward adds up in whatever order its blocks finish."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def test_ten_steps_equal_four_a_signal_a_resume_and_six(data: Data, tmp_path: Path) -> None:
    whole, stopped = cuda_run(data, tmp_path / "whole"), cuda_run(data, tmp_path / "stopped")
    with repeatable_attention():
        assert train(whole) == DONE
        assert train(stopped, At(4, lambda: send(signal.SIGTERM))) == INTERRUPTED
        assert [record.step for record in records(stopped)] == [1, 2, 3, 4]
        assert resume(stopped) == DONE
    assert_same(whole, stopped)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_run_with_fused_attention_and_functions_learns_evaluates_and_generates(data: Data, tmp_path: Path, recompute: str) -> None:
    run = cuda_run(data, tmp_path, recompute=recompute, compile=can_compile(CUDA), device="auto")
    assert machine.prepare(run.train).type == "cuda", "auto takes CUDA where it is present"
    assert train(run) == DONE
    losses = [record.main_loss for record in records(run)]
    assert losses[-1] < losses[0] - 0.1

    assert 0 < evaluate(where(run)).losses["code"] < losses[0]
    trained = open_trained(where(run))
    assert trained.device.type == trained.model.embed.weight.device.type == "cuda"
    prompt = torch.tensor([5, 6, 7], device=CUDA)
    drawn = [
        [*generate(trained.model, prompt, num_tokens=20, generator=torch.Generator(CUDA).manual_seed(0), temperature=temperature)]
        for temperature in (0.0, 1.0, 1.0)
    ]
    assert drawn[1] == drawn[2] and all(0 <= token < run.model.vocab_size for tokens in drawn for token in tokens)


def test_a_checkpoint_moves_from_cpu_to_device_and_back(data: Data, tmp_path: Path) -> None:
    run = cuda_run(data, tmp_path, precision="fp32", device="cpu")
    assert train(run, At(3, lambda: send(signal.SIGTERM))) == INTERRUPTED
    for device, step in (("cuda", 6), ("cpu", 10)):
        write_recipe(replace(run, train=replace(run.train, device=device)), where(run) / "recipe.toml")  # type: ignore[arg-type]
        assert resume(run, At(step, lambda: send(signal.SIGTERM))) == (INTERRUPTED if step < 10 else DONE)
    assert [record.step for record in records(run)] == [*range(1, 11)]


def test_saves_beside_training_hold_what_saves_that_are_waited_for_hold(data: Data, tmp_path: Path) -> None:
    beside, waited = (cuda_run(data, tmp_path / name) for name in ("beside", "waited"))
    with repeatable_attention():
        for run, background in ((beside, True), (waited, False)):
            assert train(replace(run, checkpoint=replace(run.checkpoint, every=2, background=background))) == DONE
    assert_same(beside, waited)


def test_the_commands_work_on_the_device(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = cuda_run(data, tmp_path)
    assert train(run) == DONE
    assert evaluate_command.main([str(where(run))]) == 0 and "code" in capsys.readouterr().out
    assert generate_command.main([str(where(run)), "--prompt", "def", "--tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("def")
    assert doctor.main(["--json"]) == 0 and "CUDA device 0" in capsys.readouterr().out


def test_doctor_measures_the_device_for_the_planner(tmp_path: Path) -> None:
    doctor.write_cluster(tmp_path / "cluster.toml", ranks=None)
    assert "peak" in (tmp_path / "cluster.toml").read_text()


def test_a_layout_is_verified_on_the_cpu_of_a_machine_with_a_device(data: Data, tmp_path: Path) -> None:
    recipe = write_recipe(tiny_run(data, tmp_path), tmp_path / "recipe.toml")
    assert verify_command.main([str(recipe), "--tiny", "--layout.dp", "2", "--train.device", "cpu"]) == 0
