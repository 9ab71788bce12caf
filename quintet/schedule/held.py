"""What a rank keeps of its micro-batches: from forward to the gradient of the input, and from there, if put off, to that of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from quintet.schedule.op import Work


def peak(row: Sequence[Work], *, kept: Mapping[int, float], put_off: Mapping[int, float]) -> float:
    """The most that a row keeps at once, in any unit, by stage: `kept` of a micro-batch from its F on, in its place `put_off` from its I
    on, nothing after its B or W. In a pair the forward comes first."""
    now = most = 0.0
    for work in row:
        for kind, stage, _ in work.ops:
            if kind == "F":
                now += kept[stage]
            elif kind == "B":
                now -= kept[stage]
            else:
                now += put_off[stage] - kept[stage] if kind == "I" else -put_off[stage]
            if now > most:
                most = now
    return most


def fullest(row: Sequence[Work]) -> tuple[tuple[int, int], ...]:
    """The moments at which a row keeps most, whatever a put-off micro-batch is worth beside one that is not: (stages' micro-batches between
    F and I or B, those between I and W), none of which another one exceeds in both."""
    found: list[tuple[int, int]] = []
    for moment in sorted(set(_moments(row)), reverse=True):
        if not found or moment[1] > found[-1][1]:
            found.append(moment)
    return tuple(found)


def _moments(row: Sequence[Work]) -> Iterator[tuple[int, int]]:
    kept = put_off = 0
    yield kept, put_off
    for work in row:
        for kind, _, _ in work.ops:
            kept += {"F": 1, "W": 0}.get(kind, -1)
            put_off += {"I": 1, "W": -1}.get(kind, 0)
            yield kept, put_off
