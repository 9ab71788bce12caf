"""One matrix product per expert over rows sorted by expert: torch's grouped kernel, and a loop as its reference.

Letters: N rows (token-expert pairs), E experts, I inner width, O outer width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def grouped_matmul_reference(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [N, I], weight [E, O, I], ends [E] (row where each expert's part stops) -> [N, O], by a loop over experts."""
    begin, parts = 0, []
    for expert, end in enumerate(ends.tolist()):
        parts.append(rows[begin:end] @ weight[expert].t())
        begin = end
    return torch.cat(parts)


def grouped_matmul(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """As the reference; `ends` is int32 and its last entry is N. Widths must make rows of a multiple of 16 bytes."""
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
