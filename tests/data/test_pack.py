"""Packing: every token once per epoch, nothing cut without need, fill-in-the-middle as published, all of it seeded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quintet.data import pack as module
from quintet.data.pack import PADDING, Permutation, Rows, best_fit, fim_cuts, pack, random_bits
from quintet.data.shards import Shard
from quintet.data.tokenizer import Fim
from tests.data.corpus import write_shard

EOS = 0
FIM = Fim(begin=1, hole=2, end=3)


def slow_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The reference: look at every row's room."""
    rooms: list[int] = []
    rows = [0] * len(lengths)
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [row for row, room in enumerate(rooms) if room >= lengths[piece]]
        row = min(fitting, key=rooms.__getitem__) if fitting else len(rooms)
        rooms += [] if fitting else [capacity]
        rooms[row] -= lengths[piece]
        rows[piece] = row
    return rows


@given(st.integers(1, 12).flatmap(lambda c: st.tuples(st.lists(st.integers(1, c), min_size=1, max_size=30), st.just(c))))
def test_best_fit_fills_rows_as_the_slow_reference_does(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    rows, reference = best_fit(np.array(lengths), capacity), slow_best_fit(lengths, capacity)
    filled = sorted(np.bincount(rows, lengths).tolist())
    assert filled == sorted(np.bincount(reference, lengths).tolist()) and max(filled) <= capacity
    assert set(rows.tolist()) == set(range(len(filled)))


def test_best_fit_by_hand() -> None:
    rows = best_fit(np.array([3, 5, 2, 4, 1, 5]), 5)
    assert [sorted(np.flatnonzero(rows == row).tolist()) for row in range(4)] == [[1], [5], [3, 4], [0, 2]]


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_the_permutation_is_one_and_any_part_of_it_can_be_computed(size: int, key: int) -> None:
    whole = Permutation(size, key=key)(np.arange(size))
    assert sorted(whole.tolist()) == list(range(size))
    assert Permutation(size, key=key)(np.arange(size // 2, size)).tolist() == whole[size // 2 :].tolist()


def test_the_permutation_is_that_of_the_runs_that_were_begun_before() -> None:
    assert Permutation(12, key=2**63 + 9)(np.arange(12)).tolist() == [6, 4, 3, 11, 10, 8, 5, 7, 9, 2, 0, 1]
    assert Permutation(3 * 10**9 + 7, key=5)(np.array([0, 1, 10**9])).tolist() == [2842576462, 1075468109, 890093383]


def test_the_permutation_mixes_well_and_differs_by_key() -> None:
    orders = np.stack([Permutation(5000, key=key)(np.arange(5000)) for key in range(40)])
    # Spread of a uniform variable over 5000 values: its mean has standard error 228 in 40 draws, neighbours are uncorrelated.
    assert np.abs(orders.mean(axis=0) - 2499.5).mean() < 250
    assert all(abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.06 for order in orders)
    assert abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 0.06


def test_random_bits_are_uniform_and_independent_of_the_call() -> None:
    bits = random_bits(7, np.arange(100_000))
    shares = [(bits >> np.uint64(i) & np.uint64(1)).mean() for i in range(64)]
    assert max(abs(share - 0.5) for share in shares) < 0.008 and len(set(bits.tolist())) == 100_000
    assert random_bits(7, np.array([99_999]))[0] == bits[-1]


def make_rows(folder: Path, lengths: list[int], *, row_length: int, fim_rate: float = 0.0, key: int = 11) -> Rows:
    """Document i holds the ids 10 + 1000 i, 11 + 1000 i ... and ends in EOS."""
    documents = [[*range(10 + 1000 * i, 9 + 1000 * i + length), EOS] for i, length in enumerate(lengths)]
    shard = Shard(write_shard(folder, documents, dtype="uint32"))
    return Rows(shard, row_length=row_length, key=key, eos_id=EOS, fim=FIM, fim_rate=fim_rate)


def read_epoch(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """All rows of the epoch: tokens [R, row_length] and document ids."""
    epoch, tokens, ids = rows.epoch, [], []
    while rows.epoch == epoch:
        row = rows.read()
        tokens.append(np.concatenate(row.ids).astype(np.int64))
        ids.append(np.repeat([*range(len(row.sizes)), PADDING], [*row.sizes, row.padding]))
    return np.stack(tokens), np.stack(ids)


@pytest.fixture(scope="module")
def lengths() -> list[int]:
    return [int(n) for n in np.random.default_rng(0).integers(1, 90, 300)]


@pytest.mark.parametrize("window", [40, 4096])
@pytest.mark.parametrize("row_length", [7, 33])
def test_an_epoch_holds_every_token_once_and_the_next_one_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lengths: list[int], row_length: int, window: int
) -> None:
    monkeypatch.setattr(module, "WINDOW", window)
    rows = make_rows(tmp_path / "s", lengths, row_length=row_length)
    first, second = read_epoch(rows), read_epoch(rows)
    for tokens, ids in (first, second):
        real = tokens[ids != PADDING]
        assert sorted(real.tolist()) == sorted(rows.shard.tokens.tolist())
        assert (tokens[ids == PADDING] == EOS).all()
        assert (ids == PADDING).mean() < (0.04 if window == 40 else 0.01)
    assert not np.array_equal(first[0], second[0])


def test_short_documents_are_never_cut_and_long_ones_only_at_whole_rows(tmp_path: Path, lengths: list[int]) -> None:
    tokens, ids = read_epoch(make_rows(tmp_path / "s", lengths, row_length=33))
    pieces: dict[int, list[int]] = {}
    for row, row_ids in zip(tokens, ids, strict=True):
        for i in range(row_ids.max() + 1):
            piece = row[row_ids == i]
            if len(piece) > 1:
                pieces.setdefault(int(piece[0]) // 1000, []).append(len(piece))
    for document, length in enumerate(lengths):
        expected = [33] * (length // 33) + ([length % 33] if length % 33 else [])
        assert sorted(pieces.get(document, [])) == sorted(size for size in expected if size > 1)


def test_document_ids_count_from_zero_along_the_row_and_padding_comes_last(tmp_path: Path, lengths: list[int]) -> None:
    _, ids = read_epoch(make_rows(tmp_path / "s", lengths, row_length=33))
    for row in ids:
        real = row[row != PADDING]
        assert real[0] == 0 and set(np.diff(real).tolist()) <= {0, 1} and (row[len(real) :] == PADDING).all()


def test_fim_rearranges_a_share_of_the_documents_as_prefix_suffix_middle(tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "s", [40] * 500, row_length=64, fim_rate=0.1)
    tokens, ids = read_epoch(rows)
    rearranged = 0
    for row, row_ids in zip(tokens, ids, strict=True):
        for i in range(row_ids.max() + 1):
            piece = row[row_ids == i].tolist()
            if FIM.begin not in piece:
                assert piece == [*range(piece[0], piece[0] + 39), EOS]
                continue
            rearranged += 1
            hole, end = piece.index(FIM.hole), piece.index(FIM.end)
            prefix, suffix, middle = piece[1:hole], piece[hole + 1 : end], piece[end + 1 : -1]
            whole = prefix + middle + suffix
            assert piece[0] == FIM.begin and piece[-1] == EOS and len(piece) == 43
            assert whole == list(range(whole[0], whole[0] + 39)) and whole[0] % 1000 == 10
    assert 30 <= rearranged <= 70


def test_a_rearranged_document_longer_than_a_row_is_cut_like_any_other(tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "s", [100], row_length=10, fim_rate=1.0)
    begin, end = rows.packed().cuts[0]
    tokens, ids = read_epoch(rows)
    text = np.arange(10, 109)
    expected = [1, *text[:begin], 2, *text[end:], 3, *text[begin:end], EOS]
    pieces = [row[row_ids != PADDING].tolist() for row, row_ids in zip(tokens, ids, strict=True)]
    assert sorted(pieces) == sorted(expected[i : i + 10] for i in range(0, 103, 10))


def test_fim_differs_between_epochs_and_keys_but_not_between_readings() -> None:
    documents, lengths = np.arange(2000), np.full(2000, 50)
    one, again, other = (fim_cuts(documents, lengths, rate=0.1, key=key) for key in (1, 1, 2))
    assert one == again and one != other and 150 < len(one) < 250
    part = fim_cuts(documents[1000:], lengths[1000:], rate=0.1, key=1)
    assert part == {document: cut for document, cut in one.items() if document >= 1000}
    assert all(0 <= begin <= end <= 49 for begin, end in one.values())
    assert fim_cuts(documents, np.full(2000, 2), rate=1.0, key=1) == {}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(2, 20), st.integers(0, 2**32))
def test_a_window_covers_each_document_without_overlap(lengths: list[int], row_length: int, key: int) -> None:
    window = pack(np.arange(len(lengths)), np.array(lengths), row_length=row_length, key=key, cuts={})
    covered = {(int(d), int(s) + i) for d, s, n in zip(window.document, window.start, window.length, strict=True) for i in range(int(n))}
    assert covered == {(d, i) for d, length in enumerate(lengths) for i in range(length)}
    assert int(window.length.sum()) == sum(lengths)
    filled = np.add.reduceat(window.length, window.first[:-1])
    assert filled.max() <= row_length and len(filled) == window.num_rows
