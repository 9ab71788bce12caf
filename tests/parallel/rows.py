"""How many rows experts' ranks must exchange, counted from what the router chose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from torch import Tensor

from quintet.cost.traffic import Rows
from quintet.parallel.expert import AllToAllDispatch, Route
from quintet.spec.layout import Layout


@contextmanager
def rows_noted() -> Iterator[list[list[int]]]:
    """A list that gets, for each dispatch here, how many tokens have experts on each rank of ep."""
    noted: list[list[int]] = []
    prepare = AllToAllDispatch.prepare

    def note(dispatch: AllToAllDispatch, experts: Tensor) -> Route:
        per_rank = dispatch.num_experts // dispatch.ep.size
        homes = [{expert // per_rank for expert in chosen} for chosen in experts.tolist()]
        noted.append([sum(rank in ranks for ranks in homes) for rank in range(dispatch.ep.size)])
        return prepare(dispatch, experts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AllToAllDispatch, "prepare", note)
        yield noted


def rows_between(layout: Layout, rank: int, sent: Sequence[Sequence[int]]) -> Rows:
    """`sent[r]`: rows that rank r has for each of its ep group -> those of one rank."""
    at = layout.coordinates(rank).ep

    def arriving(at_rank: int) -> int:
        return sum(sent[source][layout.coordinates(at_rank).ep] for source in layout.group_of(at_rank, "ep"))

    sharing = layout.group_of(rank, "tp") if layout.expert_tp > 1 else (rank,)
    here = arriving(rank)
    there = sum(map(arriving, sharing)) - here
    return Rows(out=sum(sent[rank]) - sent[rank][at], into=here - sent[rank][at], here=here, there=there)
