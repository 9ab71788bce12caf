"""Where every figure of an estimate comes from: its formula, with the values that went in."""

from __future__ import annotations

from quintet.errors import UsageError, did_you_mean
from quintet.plan.block_time import rate
from quintet.plan.estimate import Estimate, goodput, terms
from quintet.plan.formulas import BUBBLES
from quintet.plan.memory import FRAGMENTATION, IMBALANCE, block_bytes, peaks_in_flight
from quintet.plan.stages import policy_of
from quintet.plan.step_time import OPTIMIZER_BYTES, weights_of

FORMULAS = {
    "time.forward": "M x seconds of the busiest rank's forward = {m} x sum over its layers of block.{{products, grouped, attention, moved, "
    "launch, tensor, ring}}; `block.*` holds those of one layer (plan/block_time.py)",
    "time.input_gradient": "the same of the gradients of inputs: M = {m} x sum of "
    "block.{{products_input, grouped_input, attention_backward, "
    "moved_backward, launch_backward, again, tensor_backward, ring_backward}}",
    "time.weight_gradient": "M = {m} x sum over layers of block.{{products_weight, grouped_weight}}",
    "time.all_to_all": "M = {m} x layers with experts x 2 (dispatch + combine), and once more where recompute ({recompute}) repeats them; "
    "before any pair hides it (see time.overlap)",
    "time.overlap": "minus pairs of the schedule {schedule} x (their ops one after the other - two streams in V3's order, plan/costs.py "
    "overlapped); a pair takes {pair:.4g} s",
    "time.bubble": "the formula of {schedule} with P = {p}: {bubble_formula}, of the mean rank's F, B = I + W, W and pair F&B "
    "(plan/formulas.py)",
    "time.p2p": "2 (P-1) = {hops} hops of the first and last micro-batch, and in an interleaved pipeline "
    "{p2p_shown:.0%} of 2 M v = {looped} "
    "messages of T/tp x D x 2 bytes = {message:.4g}",
    "time.gradients": "ZeRO {zero}: {gradient_bytes} bytes x weights of the rank ({common:.4g} shared by {replicas} "
    "replicas, {experts:.4g} of "
    "experts by {expert_replicas}), reduced over links that hold {near} of the group; minus {zero_hidden:.0%} of a backward",
    "time.weights": "ZeRO {zero}: 2 bytes x the same weights, gathered; minus {zero_hidden:.0%} of a forward",
    "time.optimizer": "(weights of the rank's shard) x ({optimizer_bytes} + 2 x 2 x {moments} bytes) / {memory_rate:.4g} B/s",
    "time.straggling": "{straggle:.1%} of all above for each doubling of {ranks} devices beyond one domain of {domain}",
    "time.total": "the sum of time.*",
    "block.products": "2 m n k operations in tiles on {cores} cores, at {rate:.4g} op/s = peak x reachable x sustained x share of cores, "
    "plus filling each tile ({ramp:.0f} bytes); not below bytes / memory bandwidth (plan/rates.py)",
    "block.grouped": "the same for {local} local experts with {rows:.4g} rows each",
    "block.attention": "2 x S/2 x H x (q + v) operations per token / (bf16 peak x {attention:.3g} x S / (S + {attention_half:.0f}))",
    "block.moved": "bytes of norms, residuals, rotary embedding, activations and routing of {tokens} tokens, x {moved} for what is not "
    "fused, / {memory_rate:.4g} B/s",
    "block.launch": "what kernels x {launch:.2g} s of the host exceed the work; in mixtures of experts {launch_moe:.2g} s, and forward a "
    "wait of {wait:.2g} s",
    "block.again": "recompute {recompute}: what backward computes again",
    "block.tensor": "gathers and scatters of {tokens} tokens over tp = {tp}, {tp_shown:.0%} of them shown",
    "block.ring": "what a ring step's message takes longer than its attention, x (cp - 1), cp = {cp}",
    "block.dispatch": "{tokens}/tp tokens to other domains {once}, D = {hidden}, at {network:.4g} B/s x "
    "{all_to_all}; inside one at {link:.4g} B/s",
    "block.combine": "the same way back, in bf16",
    "memory.weights": "2 bytes x {weights:.6g} weights of the fullest rank{shard3}",
    "memory.gradients": "{gradient_bytes} bytes x {weights:.6g}, a share of it from ZeRO 2 on",
    "memory.master_weights": "4 bytes x weights, of which ZeRO keeps one in {replicas} (experts: one in {expert_replicas})",
    "memory.moments": "2 x {moments} bytes x the same share",
    "memory.gathered": "ZeRO 3: whole weights and gradients of two layers",
    "memory.activations": "{in_flight:.3g} micro-batches of the rank's share in flight, counted in the schedule "
    "{schedule}, x {layers} layers x "
    "{layer_bytes:.4g} bytes that a layer keeps under recompute {recompute} (plan/memory.py, cost/activations.py), or "
    "keeps for weight gradients that are put off, and what losses keep",
    "memory.recomputation": "what one layer holds besides while backward computes it again",
    "memory.logits": "logits in bf16 and fp32 and their gradient, of the tokens of a loss chunk, vocabulary / tp",
    "memory.messages": "the largest message and its copy, and two of the pipeline",
    "memory.imbalance": "{imbalance:.0%} more rows than the mean at the experts of this rank",
    "memory.fragmentation": "{fragmentation:.0%} of activations, logits and messages",
    "memory.framework": "CUDA's context, communication buffers and workspaces, assumed",
    "memory.total": "the sum of memory.*",
}
"""Name or its beginning -> formula."""


def explain(found: Estimate, name: str) -> str:
    """One figure, or all that begin like it (`memory`). Raises UsageError for a name that there is not."""
    values = terms(found)
    chosen = [key for key in values if key == name or key.startswith(f"{name}.")]
    if not chosen:
        raise UsageError(f"--explain {name}: no such figure{did_you_mean(name, values)}; figures: {', '.join(values)}")
    context = _context(found)
    return "\n".join(_line(key, values[key], context) for key in chosen)


def _line(key: str, value: float, context: dict[str, object]) -> str:
    formula = FORMULAS.get(key) or next((FORMULAS[known] for known in sorted(FORMULAS, reverse=True) if key.startswith(known)), "")
    unit = "bytes" if key.startswith("memory") else "s"
    return f"{key} = {value:.6g} {unit}\n    {formula.format(**context)}"


def _context(found: Estimate) -> dict[str, object]:
    setup, cluster, software = found.setup, found.cluster, found.setup.software
    a, layout, m = setup.architecture, setup.layout, setup.num_microbatches
    per_rank = len(found.timed.parts) // layout.pp
    fullest = found.memory.index(found.fullest)
    common, experts = weights_of(setup, found.timed.parts[fullest])
    peaks = peaks_in_flight(setup.schedule, layout.pp, m, setup.chunks)
    curve = cluster.gpu.attention
    local = max(1, a.num_experts // layout.ep)
    return {
        "m": m,
        "p": layout.pp,
        "recompute": setup.recompute,
        "schedule": setup.schedule,
        "pair_waits": software.pair_waits,
        "pair": found.timed.pipeline.pair,
        "bubble_formula": BUBBLES[setup.schedule].format(v=per_rank),
        "hops": 2 * (layout.pp - 1),
        "p2p_shown": 1 - software.p2p_hidden,
        "looped": 2 * m * per_rank,
        "message": setup.tokens / layout.tp * a.hidden_size * 2,
        "zero": layout.zero,
        "gradient_bytes": setup.gradient_bytes,
        "common": common,
        "experts": experts,
        "replicas": setup.replicas,
        "expert_replicas": setup.expert_replicas,
        "near": min(layout.num_replicas, max(1, cluster.domain // layout.tp)),
        "zero_hidden": software.zero_hidden,
        "optimizer_bytes": OPTIMIZER_BYTES,
        "moments": setup.moments_bytes,
        "memory_rate": cluster.gpu.memory_bandwidth * software.memory,
        "straggle": software.straggle,
        "ranks": layout.num_ranks,
        "domain": cluster.domain,
        "cores": cluster.gpu.num_cores,
        "rate": rate(cluster, setup.precision, software),
        "ramp": software.ramp,
        "local": local,
        "rows": setup.tokens * layout.expert_tp / layout.tp * a.experts_per_token / local,
        "attention": curve.forward,
        "attention_half": curve.forward_half,
        "tokens": setup.tokens,
        "moved": software.moved,
        "launch": software.launch,
        "launch_moe": software.launch_moe,
        "wait": software.wait,
        "tp": layout.tp,
        "tp_shown": 1 - software.tp_hidden,
        "cp": layout.cp,
        "once": "once per node" if software.once_per_node else "once per expert",
        "hidden": a.hidden_size,
        "network": cluster.network.effective,
        "link": cluster.link.effective,
        "all_to_all": software.all_to_all,
        "weights": common + experts,
        "shard3": ", divided by its replicas" if layout.zero == 3 else "",
        "in_flight": max(kept + put_off for kept, put_off in peaks[fullest]) / per_rank,
        "layers": found.timed.parts[fullest].num_blocks * per_rank,
        "layer_bytes": block_bytes(setup, policy_of(setup), moe=bool(a.num_moe_layers)),
        "imbalance": IMBALANCE,
        "fragmentation": FRAGMENTATION,
        "goodput": goodput(found).share,
    }


def compare(one: Estimate, other: Estimate) -> list[tuple[str, float, float]]:
    """Term by term, what two setups take: name, and the value of either; the largest difference first."""
    first, second = terms(one), terms(other)
    names = [name for name in first if name.startswith(("time.", "memory.")) and (first[name] or second[name])]

    def weight(name: str) -> float:
        scale = max(first[f"{name.partition('.')[0]}.total"], 1e-12)
        return abs(first[name] - second[name]) / scale

    return [(name, first[name], second[name]) for name in sorted(names, key=weight, reverse=True)]
