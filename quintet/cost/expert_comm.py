"""Bytes that a rank sends for expert parallelism, from the spec.

Per mixture of experts a row travels to its expert with its gate in fp32, and the result comes back; backward the result's gradient goes
out, and those of row and gate come back. Only rows whose expert lies on another rank are sent. Ranks also tell each other how many
come, 8 bytes per expert, forward only. Under full recompute all of forward is sent again.
"""

from __future__ import annotations

from quintet.cost.sent import Sent
from quintet.cost.tensor_comm import FP32, INDEX
from quintet.spec.layout import Layout
from quintet.spec.model import Model
from quintet.spec.run import Recompute


def expert_bytes(
    model: Model, layout: Layout, *, rows_out: float, rows_in: float, element_bytes: int, recompute: Recompute = "none"
) -> Sent:
    """On the axis ep, for one layer whose rank sends `rows_out` rows to experts on other ranks and receives `rows_in` from them."""
    row = model.hidden_size * element_bytes
    counts = INDEX * model.num_routed_experts * (layout.ep - 1) // layout.ep
    forward = rows_out * (row + FP32) + rows_in * row + counts
    backward = rows_in * (row + FP32) + rows_out * row
    return Sent(forward=forward, backward=backward + (forward if recompute == "full" else 0))


def mean_rows(model: Model, layout: Layout, *, tokens: int) -> float:
    """Rows that a rank with `tokens` tokens sends to other ranks, and receives, where all experts are chosen equally often."""
    sharing = layout.tp if layout.expert_tp > 1 else 1
    return tokens * sharing * model.num_experts_per_token * (layout.ep - 1) / layout.ep
