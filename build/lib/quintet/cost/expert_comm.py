"""Bytes that a rank sends for expert parallelism, from the spec.

Per mixture of experts a token sends a row to each other rank that holds some of its K experts, and the sum of their results comes back;
backward the result's gradient goes out, and the row's comes back. Beside a row's D values travel its K gates in fp32 (backward their
gradients) and, forward, the K experts' numbers of 2 bytes. Ranks also tell each other how many rows and copies of them come, 16
bytes, forward only. Under full recompute all of forward is sent again.

With `expert_tp` = t the rows that arrive at a rank go on to the t - 1 others that share its experts, and each of these sends its term of
their results back; backward the same.

**How many rows.** Let a token choose its K experts from those of g' of g groups, all choices equally likely. A rank with e = E/n experts
holds a = max(e g / E, 1) of the groups, or lies within one; it gets a row unless none of its experts in the chosen groups is chosen:

    p = sum over j, of which P(j) is the chance that j of its a groups are chosen, of  P(j) (1 - C(E' - e j/a, K) / C(E', K)),  E' = E g'/g

V3 (K = 8, 4 of 8 groups) at n = 8, 16, 32, 64: 3.63, 5.34, 6.60, 7.36 rows for a token's 8 experts, one n-th of which stay.
"""

from __future__ import annotations

import math

from quintet.cost.sent import Sent
from quintet.cost.tensor_comm import FP32, INDEX
from quintet.spec.layout import Layout
from quintet.spec.model import Model
from quintet.spec.run import Recompute

ID = 2
"""Bytes of an expert's number beside a row."""


def row_bytes(hidden_size: int, experts_per_token: int, element_bytes: int, *, with_ids: bool) -> int:
    """Bytes of a row as it travels: its values, at the next multiple of 4 its gates, then perhaps its experts' numbers; a multiple of 8."""
    tail = experts_per_token * (FP32 + (ID if with_ids else 0))
    return up(up(hidden_size * element_bytes, FP32) + tail, 8)


def expert_bytes(
    model: Model, layout: Layout, *, rows_out: float, rows_in: float, element_bytes: int, recompute: Recompute = "none"
) -> Sent:
    """On the axis ep, for one layer whose rank sends `rows_out` rows to other ranks and receives `rows_in` from them."""
    there, back = _rows_and_results(model, element_bytes)
    forward = rows_out * there + rows_in * model.hidden_size * element_bytes + 2 * INDEX * (layout.ep - 1)
    backward = rows_out * model.hidden_size * element_bytes + rows_in * back
    return Sent(forward=forward, backward=backward + (forward if recompute == "full" else 0))


def shared_bytes(
    model: Model, layout: Layout, *, rows_here: float, rows_there: float, element_bytes: int, recompute: Recompute = "none"
) -> Sent:
    """On the axis tp with `expert_tp`, of one layer: `rows_here` rows arrive at this rank, `rows_there` at the others that share experts.
    """
    if layout.expert_tp == 1:
        return Sent(forward=0, backward=0)
    others, result = layout.tp - 1, model.hidden_size * element_bytes
    there, back = _rows_and_results(model, element_bytes)
    forward = others * (rows_here * there + 2 * INDEX) + rows_there * result
    backward = others * rows_here * result + rows_there * back
    return Sent(forward=forward, backward=backward + (forward if recompute == "full" else 0))


def _rows_and_results(model: Model, element_bytes: int) -> tuple[int, int]:
    """Bytes of a row on its way to its experts, and of the gradient of one."""
    there, back = (row_bytes(model.hidden_size, model.num_experts_per_token, element_bytes, with_ids=ids) for ids in (True, False))
    return there, back


def ranks_per_token(model: Model, layout: Layout) -> float:
    """Ranks of ep to which a token goes, its own among them, on average, where all choices of experts are equally likely."""
    experts, chosen = model.num_routed_experts, model.num_experts_per_token
    groups, open_groups = model.num_groups, model.num_groups_per_token
    here, allowed = experts // layout.ep, experts * open_groups // groups
    own_groups = max(here * groups // experts, 1)

    def misses(num_open: int) -> float:
        """The chance that none is chosen of the experts here that lie in `num_open` open groups."""
        among = min(here * num_open // own_groups, allowed)  # groups need not lie whole on ranks
        return math.comb(allowed - among, chosen) / math.comb(allowed, chosen)

    ways = math.comb(groups, open_groups)
    chances = {
        num: math.comb(own_groups, num) * math.comb(groups - own_groups, open_groups - num) / ways
        for num in range(max(own_groups + open_groups - groups, 0), min(own_groups, open_groups) + 1)
    }
    return layout.ep * sum(chance * (1 - misses(num)) for num, chance in chances.items())


def mean_rows(model: Model, layout: Layout, *, tokens: int) -> float:
    """Rows that a rank with `tokens` tokens sends to other ranks, and receives, where all choices of experts are equally likely."""
    return tokens * ranks_per_token(model, layout) * (layout.ep - 1) / layout.ep


def up(count: int, step: int) -> int:
    """The next multiple."""
    return -(-count // step) * step
