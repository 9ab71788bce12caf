"""Ring attention: on any number of ranks it is the attention of one device, output and every gradient; and it sends what was foretold."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from quintet.cost.ring_comm import Payload, ring_bytes, ring_payload, ring_seconds, ring_width
from quintet.errors import SpecError
from quintet.model.attention import LatentAttention
from quintet.model.rope import rotation
from quintet.ops.pointwise import REFERENCE
from quintet.parallel.collectives import Group, Traffic, alone
from quintet.parallel.mesh import make_mesh
from quintet.parallel.sequence import RingAttention, shard_positions, shard_tokens
from quintet.spec.layout import Layout
from quintet.spec.model import Model, Yarn
from tests.checkpoint.models import like_small
from tests.ranks import on_ranks

PAYLOADS: tuple[Payload, ...] = ("latent", "kv")
ODD = like_small(
    hidden_size=18,
    num_heads=3,
    q_lora_rank=10,
    kv_lora_rank=7,
    qk_nope_head_dim=5,
    qk_rope_head_dim=6,
    v_head_dim=4,
    yarn=Yarn(factor=4.0, original_context=8, mscale=0.5),
)
MODELS = {"odd widths, YaRN": ODD, "no q-LoRA, one head": like_small(q_lora_rank=None, num_heads=1, v_head_dim=12)}

V3 = like_small(
    hidden_size=7168, num_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
)

Result = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """What is attended to."""

    model: Model
    batch: int
    length: int
    documents: bool = False
    dtype: torch.dtype = torch.float32
    recompute: bool = False
    checkpoint: bool = False

    def inputs(self) -> tuple[LatentAttention, Tensor, Tensor, Tensor | None]:
        """Layer, x and the output's gradient [B, S, D], and document ids [B, S], each row's borders elsewhere."""
        torch.manual_seed(0)
        layer = LatentAttention(self.model, kernels=REFERENCE)
        for parameter in layer.parameters():
            mean, std = (1.0, 0.2) if parameter.ndim == 1 else (0.0, parameter.shape[-1] ** -0.5)
            torch.nn.init.normal_(parameter, mean, std)
        layer.recompute = self.recompute
        x, grad = torch.randn(2, self.batch, self.length, self.model.hidden_size)
        ids = (torch.arange(self.length).view(1, -1) * 4 + torch.arange(self.batch)[:, None] * 5) // (self.length + 3)
        return layer.to(self.dtype), x.to(self.dtype), grad.to(self.dtype), ids if self.documents else None


def attended(case: Case, group: Group, attend: RingAttention | None) -> Result:
    """Output, and gradients of x and of every parameter, for this rank's tokens."""
    layer, x, grad, ids = case.inputs()
    if attend is not None:
        layer.attend = attend
    x, grad = (shard_tokens(t, group, dim=1) for t in (x, grad))
    x.requires_grad_()
    turn = rotation(case.model, shard_positions(case.length, group))
    out = cast(Tensor, checkpoint(layer, x, turn, ids, use_reentrant=False) if case.checkpoint else layer(x, turn, ids))
    names, parameters = zip(*layer.named_parameters(), strict=True)
    grads = torch.autograd.grad(out, (x, *parameters), grad)
    return {"output": out.detach(), **dict(zip(("x", *names), grads, strict=True))}


def joined(case: Case, parts: list[Result]) -> Result:
    """The ranks' tokens in the order of the sequence, and the sums of their gradients."""
    count = len(parts)
    order = torch.cat([shard_positions(case.length, Group("cp", tuple(range(count)), rank)) for rank in range(count)]).argsort()
    tokens = {name: torch.cat([part[name] for part in parts], 1)[:, order] for name in ("output", "x")}
    return {name: tokens[name] if name in tokens else torch.stack([part[name].float() for part in parts]).sum(0) for name in parts[0]}


def errors(ours: Result, theirs: Result) -> dict[str, float]:
    """Norm of the difference over the norm."""
    assert ours.keys() == theirs.keys()
    return {name: float((ours[name].float() - exact.float()).norm() / exact.float().norm()) for name, exact in theirs.items()}


def ring(case: Case, payload: Payload) -> tuple[Result, Traffic]:
    """This rank's results, and what it sent."""
    group = make_mesh(Layout(cp=torch.distributed.get_world_size()))["cp"]
    return attended(case, group, RingAttention(group, payload)), group.traffic


def assert_ranks_equal_one_device(cases: list[Case], count: int, *, tolerance: float = 2e-6) -> None:
    """Each case with both payloads; errors are relative to a gradient's own norm."""

    def work(rank: int) -> list[Result]:
        return [ring(case, payload)[0] for case in cases for payload in PAYLOADS]

    # First here: what the calls import is then imported in the ranks, which are forks of this process.
    ones = [attended(case, alone("cp"), None) for case in cases]
    found = on_ranks(count, work)
    for i, (case, payload) in enumerate((case, payload) for case in range(len(cases)) for payload in PAYLOADS):
        all_errors = errors(joined(cases[case], [parts[i] for parts in found]), ones[case])
        wrong = {name: error for name, error in all_errors.items() if not error < tolerance}
        assert not wrong, (cases[case], payload, wrong)


def test_each_rank_holds_an_early_and_a_late_chunk() -> None:
    groups = [Group("cp", (0, 1, 2), rank) for rank in range(3)]
    assert [shard_positions(12, group).tolist() for group in groups] == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    assert shard_positions(5, alone("cp")).tolist() == [0, 1, 2, 3, 4]


def test_tokens_are_taken_along_any_dim() -> None:
    group, x = Group("cp", (4, 6), 1), torch.arange(8)
    assert shard_tokens(x, group, dim=0).tolist() == [2, 3, 4, 5]
    assert shard_tokens(x.expand(3, 2, 8), group, dim=-1).tolist() == [[[2, 3, 4, 5]] * 2] * 3
    assert shard_tokens(x, alone("cp"), dim=0) is x


def test_a_sequence_that_cannot_be_cut_is_refused_with_the_nearest_length() -> None:
    with pytest.raises(SpecError, match=r"13 tokens must be divisible by 2 x cp \(4\); use 12 tokens"):
        shard_positions(13, Group("cp", (0, 1), 0))


@given(count=st.integers(1, 6), chunk=st.integers(1, 5))
def test_every_rank_scores_as_many_pairs_in_every_step(count: int, chunk: int) -> None:
    places = [shard_positions(2 * count * chunk, Group("cp", tuple(range(count)), rank)) for rank in range(count)]
    assert torch.cat(places).sort().values.tolist() == list(range(2 * count * chunk))
    pairs = {int((q[:, None] >= k[None, :]).sum()) for q in places for k in places if q is not k}
    assert pairs <= {2 * chunk * chunk}


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_ring_of_one_is_plain_attention(model: Model, payload: Payload, documents: bool) -> None:
    case = Case(model, batch=2, length=7, documents=documents)
    ours, theirs = (attended(case, alone("cp"), attend) for attend in (RingAttention(alone("cp"), payload), None))
    assert max(errors(ours, theirs).values()) < 2e-6


@pytest.mark.parametrize("count", [2, 3, 4])
def test_outputs_and_all_gradients_equal_one_devices(count: int) -> None:
    cases = [
        Case(model, batch=2, length=2 * count * chunk, documents=documents)
        for model, chunk in zip(MODELS.values(), (1, 3), strict=True)
        for documents in (False, True)
    ]
    assert_ranks_equal_one_device(cases, count)


def test_any_widths_do(seed: int) -> None:
    draw = random.Random(seed)

    def case() -> Case:
        widths = {name: draw.randint(1, 6) for name in ("num_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")}
        model = like_small(**widths, qk_rope_head_dim=2 * draw.randint(1, 3), q_lora_rank=draw.choice([None, 3, 8]))
        flags: dict[str, Any] = {name: draw.random() < 0.5 for name in ("documents", "recompute", "checkpoint")}
        return Case(model, batch=draw.randint(1, 3), length=6 * draw.randint(1, 4), **flags)

    # Random widths of 1 can make a gradient's norm tiny.
    assert_ranks_equal_one_device([case() for _ in range(8)], 3, tolerance=1e-4)


def test_recomputation_of_parts_and_of_all_changes_nothing() -> None:
    cases = [
        Case(ODD, batch=2, length=12, documents=True, recompute=recompute, checkpoint=whole)
        for recompute, whole in ((True, False), (False, True), (True, True))
    ]
    assert_ranks_equal_one_device(cases, 2)


def test_a_ring_longer_than_a_block_of_queries_equals_one_device() -> None:
    assert_ranks_equal_one_device([Case(ODD, batch=1, length=4 * 150, documents=documents) for documents in (False, True)], 2)


def test_in_bf16_the_ring_is_no_further_from_the_truth_than_one_device() -> None:
    case = Case(like_small(num_heads=4), batch=2, length=48, dtype=torch.bfloat16)
    found = on_ranks(4, lambda rank: [ring(case, payload)[0] for payload in PAYLOADS])
    truth = attended(_exact(case), alone("cp"), None)
    alone_errors = errors(attended(case, alone("cp"), None), truth)
    for i in range(len(PAYLOADS)):
        for name, error in errors(joined(case, [parts[i] for parts in found]), truth).items():
            assert error < 1.5 * alone_errors[name] + 2**-9, (PAYLOADS[i], name, error, alone_errors[name])


def _exact(case: Case) -> Case:
    """The same weights and inputs, rounded to bf16, computed with in fp32."""

    class Rounded(Case):
        def inputs(self) -> tuple[LatentAttention, Tensor, Tensor, Tensor | None]:
            layer, x, grad, ids = case.inputs()
            return layer.float(), x.float(), grad.float(), ids

    return Rounded(case.model, case.batch, case.length)


def test_a_micro_batch_without_sequences_passes() -> None:
    case = Case(ODD, batch=0, length=8, documents=True, recompute=True)
    for result, sent in (found for rank in on_ranks(2, lambda rank: [ring(case, payload) for payload in PAYLOADS]) for found in rank):
        assert sent == Traffic()
        assert result["output"].shape == (0, 4, 18)
        assert not any(tensor.any() for tensor in result.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bytes_that_a_rank_sends_are_those_foretold(dtype: torch.dtype) -> None:
    cases = [Case(ODD, batch=2, length=18, documents=documents, dtype=dtype) for documents in (False, True)]
    found = on_ranks(3, lambda rank: [ring(case, payload)[1].num_bytes for case in cases for payload in PAYLOADS])
    foretold = [
        ring_bytes(
            ODD,
            tokens_per_rank=6,
            sequences=2,
            cp=3,
            payload=payload,
            element_bytes=dtype.itemsize,
        ).total
        for case in cases
        for payload in PAYLOADS
    ]
    assert found == [foretold] * 3


def test_whole_block_recomputation_sends_the_forward_messages_once_more() -> None:
    case = Case(ODD, batch=1, length=8, checkpoint=True)
    sent = ring_bytes(ODD, tokens_per_rank=4, sequences=1, cp=2, payload="latent", element_bytes=4)
    assert on_ranks(2, lambda rank: ring(case, "latent")[1].num_bytes) == [2 * sent.forward + sent.backward] * 2


def kept_per_token(payload: Payload | None, *, recompute: bool) -> float:
    """Elements per token that are allocated in forward and still held behind it; None: without a ring."""
    case = Case(like_small(num_heads=8), batch=1, length=64, recompute=recompute)
    layer, x, _, _ = case.inputs()
    if payload is not None:
        layer.attend = RingAttention(alone("cp"), payload)
    turn = rotation(case.model, torch.arange(64))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profile:
        out = layer(x.requires_grad_(), turn, None)
    assert out.requires_grad and profile.profiler and profile.profiler.kineto_results
    held = sum(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    return held / 4 / 64


@pytest.mark.parametrize("payload", PAYLOADS)
def test_with_recomputation_a_layer_keeps_the_log_sum_exp_and_no_more_than_without_a_ring(payload: Payload) -> None:
    heads = 8
    assert kept_per_token(payload, recompute=True) == kept_per_token(None, recompute=True) + heads
    queries, normed_q, normed_kv = heads * 12, 12, 8
    sent = 8 + 4 if payload == "latent" else heads * 16 + 4 + normed_kv
    assert kept_per_token(payload, recompute=False) == kept_per_token(payload, recompute=True) + queries + normed_q + sent


def test_with_split_heads_each_rank_attends_with_its_own() -> None:
    case = Case(like_small(num_heads=4), batch=2, length=8)

    def part(rank: int, attend: RingAttention) -> Tensor:
        layer, x, _, _ = case.inputs()
        heads = slice(2 * rank, 2 * rank + 2)
        for name, width in (("wq_b", 12), ("wkv_b", 16)):
            weight = getattr(layer, name).weight
            weight.data = weight.detach().unflatten(0, (4, width))[heads].flatten(0, 1)
        layer.wo.weight.data = layer.wo.weight.detach().unflatten(1, (4, 8))[:, heads].flatten(1)
        layer.attend = attend
        return cast(Tensor, layer(x, rotation(case.model, torch.arange(8)), None)).detach()

    whole = attended(case, alone("cp"), None)["output"]
    torch.testing.assert_close(sum(part(rank, RingAttention(alone("cp"), PAYLOADS[rank])) for rank in range(2)), whole)


def test_auto_takes_what_the_cost_model_takes() -> None:
    layer, *_ = Case(like_small(num_heads=16), batch=1, length=8).inputs()
    group = Group("cp", (0, 1, 2, 3), 0)
    slow, fast = (RingAttention(group, "auto", link_bytes_per_second=link, flops_per_second=1e10) for link in (1e6, 1e12))
    assert slow.choose(layer, tokens_per_rank=64) == "latent"
    assert fast.choose(layer, tokens_per_rank=64) == "kv"
    assert RingAttention(group, "kv", link_bytes_per_second=1e6).choose(layer, tokens_per_rank=64) == "kv"


# What the cost model says of V3's shape.


def test_at_v3s_shape_latents_are_a_fifty_seventh_of_keys_and_values() -> None:
    assert ring_width(V3, payload="latent") == 576
    assert ring_width(V3, payload="kv") == 128 * 256 + 64 == 57 * 576
    assert ring_width(V3, tp=8, payload="latent") == 576
    sent = ring_bytes(V3, tokens_per_rank=4096, sequences=1, cp=2, payload="kv", element_bytes=2)
    assert sent.forward / 50e9 == pytest.approx(5.4e-3, rel=0.01)
    assert (sent.backward, sent.total) == (2 * sent.forward, 3 * sent.forward)
    few = ring_bytes(V3, tokens_per_rank=4096, sequences=1, cp=2, payload="latent", element_bytes=2)
    assert (few.forward, few.backward) == (4096 * 576 * 2, 4096 * 576 * (2 + 4))


def test_a_ring_of_one_sends_nothing_and_takes_the_time_of_its_scores() -> None:
    for payload in PAYLOADS:
        assert ring_bytes(V3, tokens_per_rank=4096, sequences=2, cp=1, payload=payload, element_bytes=2).total == 0
        taken = ring_seconds(V3, tokens_per_rank=4096, cp=1, payload=payload, element_bytes=2, flops_per_second=128 * 320 * 4096.0**2)
        assert (taken.forward, taken.backward) == (1.0, 2.5)


def test_the_crossover_lies_where_keys_and_values_hide_behind_the_scores() -> None:
    def choices(link: float) -> list[Payload]:
        lengths = (1024, 2048, 4096, 8192, 16384)
        return [ring_payload(V3, tokens_per_rank=s, cp=8, element_bytes=2, link_bytes_per_second=link) for s in lengths]

    assert choices(25e9) == ["latent"] * 5
    assert choices(50e9) == ["latent"] * 4 + ["kv"]
    assert choices(200e9) == ["latent"] + ["kv"] * 4
    assert choices(450e9) == ["kv"] * 5


@given(s=st.integers(1, 10**5), cp=st.integers(2, 64), tp=st.sampled_from([1, 4, 128]), link=st.floats(1e6, 1e13))
def test_the_payload_chosen_is_never_the_slower_one(s: int, cp: int, tp: int, link: float) -> None:
    def seconds(payload: Payload) -> float:
        return ring_seconds(V3, tokens_per_rank=s, cp=cp, tp=tp, payload=payload, element_bytes=2, link_bytes_per_second=link).total

    chosen = ring_payload(V3, tokens_per_rank=s, cp=cp, tp=tp, element_bytes=2, link_bytes_per_second=link)
    assert seconds(chosen) == min(map(seconds, PAYLOADS))
