"""The loader: rows depend on the seed and their number alone, and any state continues exactly."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.data import pack
from quintet.data.loader import IGNORED, Batch, Loader, held_out_batches
from quintet.data.prepare import Prepared, prepare
from quintet.errors import DataError, SpecError
from quintet.spec.run import Data
from tests.data.corpus import some_texts, source, write_texts

Mixed = tuple[Prepared, Data]


def loader(mixed: Mixed, *, sequence_length: int = 32, seed: int = 5) -> Loader:
    return Loader(*mixed, sequence_length=sequence_length, seed=seed)


def stacked(batches: list[Batch]) -> torch.Tensor:
    """Everything in the batches: [rows, 3, L]."""
    return torch.cat([torch.stack([b.inputs, b.labels, b.document_ids.long()], 1) for b in batches])


def equal(a: list[Batch], b: list[Batch]) -> bool:
    return torch.equal(stacked(a), stacked(b))


@pytest.fixture(scope="module")
def rows(mixed: Mixed) -> torch.Tensor:
    """The first 300 rows, one at a time: more than an epoch of either source."""
    stream = loader(mixed)
    result = stacked([stream.next_batch(1) for _ in range(300)])
    assert stream.state()["code.epoch"] >= 1 and stream.state()["prose.epoch"] >= 1
    return result


def test_shapes_types_and_labels_shifted_by_one(mixed: Mixed) -> None:
    batch = loader(mixed).next_batch(6)
    assert batch.inputs.shape == batch.labels.shape == batch.document_ids.shape == (6, 32)
    assert (batch.inputs.dtype, batch.labels.dtype, batch.document_ids.dtype) == (torch.int64, torch.int64, torch.int32)
    assert all(sum(row) == 33 for row in batch.sizes)
    inside = batch.document_ids[:, 1:] >= 0
    assert torch.equal(batch.inputs[:, 1:][inside], batch.labels[:, :-1][inside])
    assert (batch.labels[:, :-1][~inside] == IGNORED).all()


def test_some_rows_of_a_batch_are_a_batch(mixed: Mixed) -> None:
    batch = loader(mixed).next_batch(7)
    some = batch.rows(slice(1, None, 3))
    for name in ("inputs", "labels", "document_ids"):
        assert torch.equal(getattr(some, name), getattr(batch, name)[1::3])


def test_padding_has_no_loss(mixed: Mixed) -> None:
    batches = [loader(mixed, sequence_length=500).next_batch(40)]
    padding = batches[0].document_ids < 0
    assert padding.any() and (batches[0].labels[padding] == IGNORED).all()
    assert (batches[0].inputs[padding] == mixed[0].tokenizer.eos_id).all()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12))
@settings(max_examples=25)
def test_any_division_into_batches_gives_the_same_rows(mixed: Mixed, rows: torch.Tensor, sizes: list[int]) -> None:
    stream = loader(mixed)
    sizes = [size for i, size in enumerate(sizes) if sum(sizes[: i + 1]) <= 300]
    if sizes:
        assert torch.equal(stacked([stream.next_batch(size) for size in sizes]), rows[: sum(sizes)])


def test_a_state_saved_at_any_point_continues_exactly(mixed: Mixed, rows: torch.Tensor) -> None:
    stream = loader(mixed)
    for k in range(297):
        state = json.loads(json.dumps(stream.state()))
        assert all(type(value) is int for value in state.values())
        if k % 7 == 0 or k > 270:
            resumed = loader(mixed)
            resumed.restore(state)
            assert torch.equal(stacked([resumed.next_batch(3)]), rows[k : k + 3])
            assert resumed.state()["code.rows"] + resumed.state()["prose.rows"] == k + 3
        stream.next_batch(1)


def test_resuming_is_exact_across_windows(mixed: Mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "WINDOW", 9)
    stream = loader(mixed)
    seen = set()
    for _ in range(60):
        resumed = loader(mixed)
        resumed.restore(stream.state())
        seen.add(stream.state()["code.window"])
        assert equal([resumed.next_batch(4)], [stream.next_batch(4)])
    assert len(seen) > 3


def test_the_order_depends_on_the_seed(mixed: Mixed) -> None:
    assert not equal([loader(mixed).next_batch(8)], [loader(mixed, seed=6).next_batch(8)])


def test_sources_come_by_weight(mixed: Mixed) -> None:
    stream = loader(mixed)
    stream.next_batch(100)
    assert (stream.state()["code.rows"], stream.state()["prose.rows"]) == (87, 13)


def test_only_code_is_rearranged(mixed: Mixed) -> None:
    prepared, data = mixed
    assert prepared.tokenizer.fim is not None
    for name, expected in (("code", True), ("prose", False)):
        one = replace(prepared, sources={name: prepared.sources[name]})
        inputs = Loader(one, data, sequence_length=32, seed=0).next_batch(100).inputs
        assert bool((inputs == prepared.tokenizer.fim.begin).any()) == expected


def test_another_sequence_length_goes_on_with_the_next_window(mixed: Mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "WINDOW", 9)
    short = loader(mixed)
    short.next_batch(10)
    long = loader(mixed, sequence_length=64)
    long.restore(short.state())
    before, after = short.state(), long.state()
    assert (after["code.window"], after["code.offset"]) == (before["code.window"] + 1, 0)
    assert after["code.rows"] == before["code.rows"]


@pytest.mark.parametrize("key, message", [("data", "another prepared data"), ("seed", "another seed")])
def test_a_state_of_other_data_or_seed_is_refused(mixed: Mixed, key: str, message: str) -> None:
    stream = loader(mixed)
    state = stream.state()
    with pytest.raises(DataError, match=message):
        stream.restore(dict(state, **{key: state[key] + 1}))
    del state["prose.rows"]
    with pytest.raises(DataError, match=r"other sources: prose\.rows"):
        stream.restore(state)


def test_held_out_rows_are_the_same_each_time_however_they_are_batched_and_never_rearranged(mixed: Mixed) -> None:
    def read(batch_size: int, num_sequences: int) -> list[Batch]:
        return list(held_out_batches(mixed[0], "code", sequence_length=16, num_sequences=num_sequences, batch_size=batch_size))

    shard, fim = mixed[0].sources["code"].held_out, mixed[0].tokenizer.fim
    everything = read(7, 10_000)
    assert equal(everything, read(3, 10_000)) and equal(read(2, 5), [b.rows(slice(5)) for b in everything[:1]])
    assert [len(batch.inputs) for batch in read(2, 5)] == [2, 2, 1]
    assert fim is not None and not any((batch.inputs == fim.begin).any() for batch in everything)
    real = torch.cat([batch.inputs[batch.document_ids >= 0] for batch in everything])
    assert shard.num_tokens - sum(len(b.inputs) for b in everything) <= len(real) <= shard.num_tokens


def test_a_source_without_held_out_documents_says_so(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts", some_texts(3))
    prepared = prepare(Data(sources=(source(folder),), directory=str(tmp_path / "p"), held_out=0.0), vocab_size=300, seed=0)
    with pytest.raises(DataError, match=r"no held-out document; raise data\.held_out"):
        next(held_out_batches(prepared, "code", sequence_length=8, num_sequences=1, batch_size=1))


def test_a_single_document_is_enough(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("hello")
    data = Data(sources=(source(tmp_path / "one.txt"),), directory=str(tmp_path / "p"))
    batches = list(
        islice(iter(lambda: Loader(prepare(data, vocab_size=300, seed=0), data, sequence_length=8, seed=0).next_batch(2), None), 2)
    )
    assert equal(batches[:1], batches[1:]) and (batches[0].labels == IGNORED).any()


@given(st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 3])), min_size=1, max_size=6))
@settings(max_examples=20)
def test_any_ranks_and_micro_batches_see_the_same_global_batches_after_any_stop(
    mixed: Mixed, rows: torch.Tensor, attempts: list[tuple[int, int]]
) -> None:
    """Each attempt runs two steps of 24 sequences on another number of ranks, in other micro-batches, and stops."""
    state: dict[str, int] | None = None
    at = 0
    for ranks, micro in attempts:
        ends = []
        for rank in range(ranks):
            stream = loader(mixed)
            if state is not None:
                stream.restore(state)
            for step in range(2):
                mine = stacked([stream.next_batch(24, part=rank, num_parts=ranks)])
                expected = rows[at + 24 * step : at + 24 * (step + 1)][rank::ranks]
                assert torch.equal(torch.cat(mine.split(micro)), expected)
            ends.append(stream.state())
        assert all(end == ends[0] for end in ends), "the state is the same on every rank"
        state, at = json.loads(json.dumps(ends[0])), at + 48


BUCKETS = (16, 32, 64, 128)


def in_buckets(mixed: Mixed, *, seed: int = 5) -> Loader:
    return Loader(mixed[0], replace(mixed[1], buckets=BUCKETS), sequence_length=BUCKETS[-1], seed=seed)


def test_in_buckets_every_batch_has_one_length_and_a_document_is_alone_and_whole_in_its_row(mixed: Mixed) -> None:
    stream, lengths = in_buckets(mixed), Counter[int]()
    for _ in range(200):
        batch = stream.next_batch(3)
        rows, length = batch.inputs.shape
        lengths[length] += 1
        assert rows == 3 * BUCKETS[-1] // length == 3 * batch.rows_per_sequence
        if length > BUCKETS[0]:
            assert (batch.document_ids.amax(1) == 0).all() and ((batch.document_ids >= 0).sum(1) >= length // 2 - 3).all()
        assert ((batch.labels == stream_end(mixed)).sum(1) >= 1).all(), "none is cut"
    assert {16, 32, 64} <= set(lengths) <= set(BUCKETS)


def stream_end(mixed: Mixed) -> int:
    return mixed[0].tokenizer.eos_id


@given(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=5))
@settings(max_examples=10)
def test_in_buckets_any_ranks_see_the_same_global_batches_after_any_stop(mixed: Mixed, attempts: list[int]) -> None:
    whole = in_buckets(mixed)
    state: dict[str, int] | None = None
    for ranks in attempts:
        expected = [whole.next_batch(8) for _ in range(3)]
        ends = []
        for rank in range(ranks):
            stream = in_buckets(mixed)
            if state is not None:
                stream.restore(state)
            assert all(torch.equal(stream.next_batch(8, part=rank, num_parts=ranks).labels, b.labels[rank::ranks]) for b in expected)
            ends.append(stream.state())
        assert all(end == ends[0] == whole.state() for end in ends)
        state = json.loads(json.dumps(ends[0]))
    stream = in_buckets(mixed)
    stream.restore(state or {})
    stream.skip(8)
    whole.next_batch(8)
    assert stream.state() == whole.state()


def test_in_buckets_every_document_is_seen_once_before_any_is_seen_twice_too_often(mixed: Mixed) -> None:
    stream = in_buckets(mixed)
    for _ in range(400):
        stream.skip(8)
    for name in mixed[0].sources:
        epochs = [value for key, value in stream.state().items() if key.endswith(f".{name}.epoch")]
        assert min(epochs) >= 3 and max(epochs) <= 1.25 * min(epochs), "buckets advance together"


def test_in_buckets_a_source_with_a_last_epoch_ends_in_each_and_the_others_go_on(mixed: Mixed) -> None:
    prepared, data = mixed
    capped = {name: replace(part, source=replace(part.source, epochs=1)) for name, part in prepared.sources.items()}
    stream = in_buckets((replace(prepared, sources=capped), data))
    seen = 0
    with pytest.raises(DataError, match="seen as often as its epochs allow"):
        for _ in range(10_000):
            batch = stream.next_batch(4)
            assert (batch.document_ids[0] >= 0).any(), "a batch begins with a document"
            seen += int((batch.labels == stream_end(mixed)).sum())
    assert {value for key, value in stream.state().items() if key.endswith(".epoch")} == {1}
    assert seen == sum(part.train.num_documents for part in prepared.sources.values())


def test_a_rank_that_needs_no_tokens_passes_over_them(mixed: Mixed, rows: torch.Tensor) -> None:
    stream = loader(mixed)
    stream.skip(37)
    assert torch.equal(stacked([stream.next_batch(4)]), rows[37:41])


def test_a_phase_may_mix_otherwise_and_no_document_comes_twice(mixed: Mixed) -> None:
    first = loader(mixed)
    first.next_batch(100)
    before = first.state()
    second = Loader(*mixed, sequence_length=32, seed=5, mixture={"code": 1.0, "prose": 3.0})
    second.restore(before)
    second.next_batch(40)
    after = second.state()
    assert (after["code.rows"] - before["code.rows"], after["prose.rows"] - before["prose.rows"]) == (10, 30)
    places = [tuple(state[f"code.{part}"] for part in ("epoch", "window", "offset")) for state in (before, after)]
    assert places[0] < places[1]
    resumed = Loader(*mixed, sequence_length=32, seed=5, mixture={"code": 1.0, "prose": 3.0})
    resumed.restore(after)
    assert equal([resumed.next_batch(9)], [second.next_batch(9)])
    without = Loader(*mixed, sequence_length=32, seed=5, mixture={"prose": 0.0})
    without.next_batch(20)
    assert without.state()["prose.rows"] == 0
    with pytest.raises(SpecError, match=r"no source 'prosa'.*did you mean 'prose'"):
        Loader(*mixed, sequence_length=32, seed=5, mixture={"prosa": 1.0})


def test_a_source_leaves_the_mixture_after_its_epochs_and_any_state_goes_on_exactly(mixed: Mixed) -> None:
    prepared, data = mixed

    def limited(code: int | None, prose: int | None) -> Loader:
        epochs = {"code": code, "prose": prose}
        parts = {name: replace(part, source=replace(part.source, epochs=epochs[name])) for name, part in prepared.sources.items()}
        return Loader(replace(prepared, sources=parts), data, sequence_length=32, seed=5)

    stream = limited(None, 1)
    states, batches = [], []
    for _ in range(40):
        states.append(stream.state())
        batches.append(stream.next_batch(5))
    assert stream.state()["prose.epoch"] == 1 and stream.state()["prose.offset"] == 0
    assert stream.state()["prose.rows"] == states[-1]["prose.rows"] < 26
    for i in (0, 7, 20, 33):
        resumed = limited(None, 1)
        resumed.restore(states[i])
        assert equal([resumed.next_batch(5) for _ in range(4)], batches[i : i + 4])
    ending = limited(1, 1)
    with pytest.raises(DataError, match=r"as often as its epochs allow; raise data\.sources\.epochs"):
        ending.next_batch(10_000)


def test_neighbours_in_the_stream_are_strangers_in_the_files(tmp_path: Path) -> None:
    """Of shuffled documents, two that follow each other lie a third of the source apart on average, and every tenth holds a tenth."""
    folder = write_texts(tmp_path / "texts", [f"document number {i:05}\n" for i in range(3000)])
    prepared = prepare(Data(sources=(source(folder),), directory=str(tmp_path / "p"), held_out=0.0), vocab_size=400, seed=0)
    stream = loader((prepared, Data(sources=(source(folder),), directory="", fim_rate=0.0)), sequence_length=16)
    seen: list[int] = []
    while stream.state()["code.epoch"] == 0:
        batch = stream.next_batch(1)
        text = prepared.tokenizer.decode(torch.cat([batch.inputs[0], batch.labels[0, -1:].clamp(min=0)]).tolist())
        seen += [int(found) for found in re.findall(r"document number (\d{5})", text)]
    places = torch.tensor(seen, dtype=torch.float64)
    distance = (places[1:] - places[:-1]).abs().mean() / 3000
    assert len(set(seen)) == 3000 and 0.31 < distance < 0.36
    tenths = torch.bincount((places[:1500] // 300).long(), minlength=10)
    assert tenths.min() > 110 and tenths.max() < 190


def test_a_weight_written_as_a_whole_number_is_the_same_mixture(mixed: Mixed) -> None:
    one, two = (Loader(*mixed, sequence_length=32, seed=5, mixture={"code": weight, "prose": 1.0}) for weight in (3, 3.0))
    one.next_batch(5)
    two.restore(one.state())
    assert two.state() == one.state()
