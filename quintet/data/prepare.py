"""From a recipe's sources to token shards: train or load the tokenizer, make the parts, pick what is kept; nothing done twice.

<data.directory>/tokenizer.json
<data.directory>/trained.json                       what the tokenizer was trained from, if it was, and its fingerprint
<data.directory>/.complete                          that everything was made at least once, so that runs may depend on it
<data.directory>/<source>.parts/<key>/...           see `part`; the key is a hash of all that the part is made from
<data.directory>/<source>/{train,held_out}/...      which documents of the parts are read, see `shards`
<data.directory>/<source>/source.json               `_Done`: from what, with which result

Parts are made first, by an `engine`, and stay when others change. What is kept of them, and for what, is decided afterwards from a few
numbers per document, and is quickly decided anew.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import orjson
from blake3 import blake3
from numpy.typing import NDArray

from quintet.data import cut, dedup, minhash
from quintet.data.dedup import Duplicates, Fingerprints
from quintet.data.digest import hash_of
from quintet.data.engine import Engine, Local
from quintet.data.origin import Origin, origin_of, parts_of, provenance_of, shape_of, spec_of
from quintet.data.part import Job, Judge, NoProgress, PartStatistics, Progress, batches, first_bytes, is_held_out, keep, ranks_of
from quintet.data.shards import Selection, Shard, committed_folder, disk_errors, write_file, write_selection
from quintet.data.sources import File, Listing, Reader, list_files
from quintet.data.statistics import NO_DUPLICATES, Statistics, gather
from quintet.data.tokenizer import Tokenizer, check_trainable, train_bpe
from quintet.errors import DataError
from quintet.spec.run import Data, Source

TRAINING_BYTES = 256 << 20
"""Text that a tokenizer is trained on at most, in bytes; every source gives its share by weight."""
_TRAINING_PIECE_BYTES = 16 << 10
"""What the tokenizer's training is fed at a time, in characters; it takes hundreds of them ahead."""
_COMPLETE = ".complete"
_SHOWN_BYTES = 1 << 30
"""What is only read, for a fingerprint, is shown from this size on."""
_CHECKED_BYTES = 256 << 10
_PERCENTILES = (1, 10, 50, 90, 99, 100)
SPLITS = ("train", "held_out")

OnMessage = Callable[[str], None]
OnOther = Literal["refuse", "beside", "replace"]


@dataclass(frozen=True, kw_only=True)
class PreparedSource:
    """The shards of one source."""

    source: Source
    """As the recipe says."""
    train: Selection
    """At least one document."""
    held_out: Selection
    """Possibly empty."""
    statistics: Statistics
    """What became of it."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything that a loader needs."""

    directory: Path
    """data.directory."""
    tokenizer: Tokenizer
    """That made the ids."""
    sources: Mapping[str, PreparedSource]
    """By name, in the recipe's order."""

    @property
    def fingerprint(self) -> str:
        """blake3, hexadecimal, of every source's name and content and of the tokenizer."""
        contents = [(name, part.train.meta.content, part.held_out.meta.content) for name, part in self.sources.items()]
        return hash_of([self.tokenizer.fingerprint, *contents])


@dataclass(frozen=True, kw_only=True)
class _Done:
    """source.json."""

    origin: Origin
    """What the shards were made from."""
    tokenizer: str
    """Fingerprint of the tokenizer that made them."""
    fingerprints: tuple[int, ...]
    """Version and shape of the documents' fingerprints (see `minhash`); empty where there are none."""
    statistics: Statistics
    """Result."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """What the recipe said and which versions did it, for a person (see `origin.provenance_of`); nothing reads it."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is to be prepared, and whether the folder's tokenizer is already the one for it."""

    listings: Mapping[str, Listing]
    """Files of each source."""
    origins: Mapping[str, Origin]
    """Of each source, as it is now."""
    tokenizer_key: str
    """The given tokenizer's fingerprint, or a hash of all that one to be trained depends on."""
    fingerprint: str | None
    """Of the tokenizer, as far as it is known without training one."""
    given: Tokenizer | None
    """The recipe's tokenizer; None: one is trained."""

    @property
    def key(self) -> str:
        """Hash of everything that shapes the shards."""
        return hash_of([self.tokenizer_key, [(name, origin.spec, origin.text) for name, origin in self.origins.items()]])


def prepare(
    data: Data,
    *,
    vocab_size: int,
    seed: int,
    on_other: OnOther = "refuse",
    recipe: Path | str = "RECIPE",
    engine: Engine | None = None,
    progress: Progress | None = None,
    on_message: OnMessage = lambda message: None,
) -> Prepared:
    """Bring `data.directory` up to date with the recipe and open it; sources that did not change are left as they are.

    `vocab_size` is the model's: the most tokens that the tokenizer may have, and the size of one that is trained. `seed` picks the
    files that train it where there are more than `TRAINING_BYTES`. `engine` makes the parts (default: this machine's cores).
    `on_message` gets notices, one line each.

    Shards that are there already and were made from other text or settings, or by another tokenizer, may be those of earlier runs.
    `on_other` says what then becomes of them: they make this a DataError, whose remedy names `recipe` ("refuse"); they stay, and the
    data is prepared in a folder beside theirs, named by what it is made from ("beside"); or they are replaced ("replace").

    Raises DataError for missing or empty sources, bad documents under data.strict, a tokenizer that does not fit, a full disk.
    """
    progress = progress or NoProgress()
    directory = data.folder
    with _locked(directory):
        plan = _plan(data, directory, vocab_size=vocab_size, seed=seed, progress=progress, on_message=on_message)
        others = _others(directory, plan.origins, plan.fingerprint)
        if not others or on_other == "replace":
            tokenizer = _tokenizer(data, plan, directory, vocab_size=vocab_size, seed=seed, progress=progress, on_message=on_message)
            others = _others(directory, plan.origins, tokenizer.fingerprint)
            if not others or on_other == "replace":
                prepared = _make(data, plan, directory, tokenizer, engine or Local(), progress=progress, on_message=on_message)
                for name in set(others) - prepared.sources.keys():  # of another recipe, and without their tokenizer
                    shutil.rmtree(directory / name)
                    shutil.rmtree(_parts_folder(directory, name), ignore_errors=True)
                return prepared
    there = f"{directory} holds {', '.join(others)} made from other text or settings or by another tokenizer, on which runs may depend"
    if on_other == "refuse":
        raise DataError(
            f"{there}, and is left as it is; set data.directory to another folder, or replace what is there: "
            f"quintet prepare {recipe} --replace"
        )
    beside = directory.with_name(f"{directory.name}-{plan.key[:8]}")
    on_message(f"{there}, and stays as it is; this run's data is in {beside}")
    return prepare(
        replace(data, directory=str(beside)),
        vocab_size=vocab_size,
        seed=seed,
        recipe=recipe,
        engine=engine,
        progress=progress,
        on_message=on_message,
    )


def _make(
    data: Data, plan: _Plan, directory: Path, tokenizer: Tokenizer, engine: Engine, *, progress: Progress, on_message: OnMessage
) -> Prepared:
    if tokenizer.fim is None and data.fim_rate and any(source.domain == "code" for source in data.sources):
        on_message(f"{tokenizer.origin} has no fill-in-the-middle tokens: data.fim_rate ({data.fim_rate}) has no effect")
    # A given tokenizer may be the one that was trained here: what it was trained from stays known then.
    known = {key: fingerprint for key, fingerprint in _read_trained(directory).items() if fingerprint == tokenizer.fingerprint}
    trained = known if plan.given else {plan.tokenizer_key: tokenizer.fingerprint}
    if trained != _read_trained(directory):
        write_file(directory / "trained.json", orjson.dumps(trained))
    tokenizer.save(directory / "tokenizer.json")
    targets = _targets(data, plan, directory, tokenizer)
    done = {source.name: _still_good(data, source, plan, directory, tokenizer, targets[source.name], progress) for source in data.sources}
    jobs = _jobs(data, plan, directory, tokenizer, targets, [name for name, good in done.items() if not good], progress)
    keep(tokenizer)
    for _ in engine.run(jobs, progress, on_message):
        pass
    reused = {name: bool(good) for name, good in done.items()}
    if not all(reused.values()):
        _select(data, plan, directory, tokenizer, targets, reused)
    if not (directory / _COMPLETE).exists():
        write_file(directory / _COMPLETE, b"")
    prepared = _open(data, directory, tokenizer, recipe="RECIPE")
    parts = {name: replace(part, statistics=replace(part.statistics, reused=reused[name])) for name, part in prepared.sources.items()}
    return replace(prepared, sources=parts)


def _parts_folder(directory: Path, name: str) -> Path:
    return directory / f"{name}.parts"


def _targets(data: Data, plan: _Plan, directory: Path, tokenizer: Tokenizer) -> dict[str, list[Path]]:
    """The folders of each source's parts, in reading order."""
    found = {}
    for source in data.sources:
        shape = shape_of(data, source)
        keys = [hash_of([shape, tokenizer.fingerprint, part.text]) for part in plan.origins[source.name].parts]
        found[source.name] = [_parts_folder(directory, source.name) / key[:24] for key in keys]
    return found


def _still_good(
    data: Data, source: Source, plan: _Plan, directory: Path, tokenizer: Tokenizer, targets: list[Path], progress: Progress
) -> bool:
    """Whether what was made of a source before is there, whole and from the same origin."""
    folder, origin = directory / source.name, plan.origins[source.name]
    done = _read_done(folder)
    if done is None or not done.origin.is_same(origin) or done.tokenizer != tokenizer.fingerprint:
        return False
    if data.strict and _has_bad(done.statistics.skipped):
        return False
    size = sum(_folder_bytes(target) for target in targets)
    on_read = _noted(progress, f"check of {source.name}", size)
    try:
        for split in SPLITS:
            # Both name the same shards, so that their bytes are looked at once.
            Selection(folder / split, root=directory, tokenizer=tokenizer.fingerprint, verify=split == "train")
    except DataError:
        return False
    on_read(size)
    if done.origin != origin:  # the same text in files of other names or times
        write_file(folder / "source.json", _source_json(replace(done, origin=origin)))
    return True


def _jobs(
    data: Data,
    plan: _Plan,
    directory: Path,
    tokenizer: Tokenizer,
    targets: Mapping[str, list[Path]],
    names: list[str],
    progress: Progress,
) -> list[Job]:
    """A job for every part of the sources `names` that is not there, whole and without a bad document if that is asked."""
    jobs = []
    for source in data.sources:
        if source.name not in names:
            continue
        parts = parts_of(plan.listings[source.name])
        tokenizer.check(_first_texts(data, source, parts[0]))
        missing = {
            target: files
            for target, files in zip(targets[source.name], parts, strict=True)
            if not _is_whole_part(target, tokenizer, strict=data.strict)
        }
        progress.start(source.name, sum(file.num_bytes for files in missing.values() for file in files))
        for target, files in missing.items():
            target.parent.mkdir(exist_ok=True)
            jobs.append(
                Job(
                    data=data,
                    source=source,
                    files=files,
                    target=target,
                    tokenizer=directory / "tokenizer.json",
                    fingerprint=tokenizer.fingerprint,
                    reference=not tokenizer.is_fast,
                )
            )
    return jobs


def _first_texts(data: Data, source: Source, files: tuple[File, ...]) -> list[str]:
    """The documents that the two encoders are compared on."""
    reader = Reader(files, text_key=source.text_key, max_document_bytes=data.max_document_bytes, strict=False)
    texts: list[str] = []
    for document in reader:
        texts.append(document.text)
        if sum(map(len, texts)) >= _CHECKED_BYTES:
            break
    return first_bytes(texts, _CHECKED_BYTES) if texts else []


def _is_whole_part(target: Path, tokenizer: Tokenizer, *, strict: bool) -> bool:
    try:
        Shard(target, tokenizer=tokenizer.fingerprint, verify=True)
        return not (strict and _has_bad(_read_part(target).skipped))
    except DataError:
        return False


def _read_part(target: Path) -> PartStatistics:
    try:
        return msgspec.json.decode((target / "part.json").read_bytes(), type=PartStatistics)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{target / 'part.json'} is damaged ({error}); remove {target} and run prepare again") from None


def _select(
    data: Data, plan: _Plan, directory: Path, tokenizer: Tokenizer, targets: Mapping[str, list[Path]], reused: Mapping[str, bool]
) -> None:
    """Decide over the documents of all parts, and write for each source that is not `reused` which of them are read."""
    decision = None
    if data.dedup:
        parts = [(name, Fingerprints(target)) for name, found in targets.items() for target in found]
        known = [fingerprints for path in data.dedup.against for fingerprints in _known(path, data)]
        decision = dedup.decide(data.dedup, parts, known, scratch=directory)
    begin = 0
    for source in data.sources:
        found = targets[source.name]
        if not reused[source.name]:
            kept = decision.kept[begin : begin + len(found)] if decision else None
            duplicates = decision.duplicates[source.name] if decision else NO_DUPLICATES
            _commit(data, source, plan, directory, tokenizer, found, kept, duplicates)
            for left in set(_parts_folder(directory, source.name).iterdir()) - set(found):  # of other text or rules
                shutil.rmtree(left)
        begin += len(found)


def _known(path: str, data: Data) -> Iterator[Fingerprints]:
    """The fingerprints of the documents that another prepared directory keeps."""
    directory = Path(os.path.expanduser(path))
    folders = sorted(folder.parent for folder in directory.glob("[!.]*/source.json"))
    if not folders:
        raise DataError(f"data.dedup.against: {path} holds no prepared data; prepare it first, or correct the path")
    for folder in folders:
        done = _read_done(folder)
        if done is None or done.fingerprints != _fingerprints(data):
            raise DataError(
                f"data.dedup.against: {folder} has no fingerprints of this recipe's kind ({done.fingerprints if done else 'none'}, wanted "
                f"{_fingerprints(data)}: version, ngram, bands, rows); prepare it again with the same data.dedup"
            )
        selections = [Selection(folder / split, root=directory) for split in SPLITS]
        for name in selections[0].meta.shards:
            shard = Shard(directory / name)
            chosen = np.concatenate([selection.chosen(name) for selection in selections])
            assert len(chosen) <= shard.num_documents
            yield Fingerprints(directory / name, chosen=np.sort(chosen))


def _fingerprints(data: Data) -> tuple[int, ...]:
    return (minhash.VERSION, data.dedup.ngram, data.dedup.bands, data.dedup.rows) if data.dedup else ()


def _commit(
    data: Data,
    source: Source,
    plan: _Plan,
    directory: Path,
    tokenizer: Tokenizer,
    targets: list[Path],
    kept: Sequence[NDArray[np.bool_]] | None,
    duplicates: Duplicates,
) -> None:
    """Write the selections and the statistics of one source. Raises DataError if no document is left for training."""
    listing, origin = plan.listings[source.name], plan.origins[source.name]
    shards = [Shard(target) for target in targets]
    ranks = [_column(target, "ranks") for target in targets]
    alive = [np.ones(len(found), bool) for found in ranks] if kept is None else list(kept)
    held_out = _held_out(ranks, alive, data.held_out)
    chosen = {"train": [a & ~h for a, h in zip(alive, held_out, strict=True)], "held_out": held_out}
    gathered = gather([_read_part(target) for target in targets], num_not_text=listing.num_not_text, name=source.name)
    if not any(part.any() for part in chosen["train"]):
        left_out = {**gathered.skipped, **gathered.dropped, "exact duplicates": duplicates.exact, "near duplicates": duplicates.near}
        skipped = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count) or "nothing"
        raise DataError(
            f"source {source.name!r} has no document to train on ({len(listing.files)} files, {sum(int(h.sum()) for h in held_out)} "
            f"documents held out, skipped: {skipped}); add text, correct the source, loosen data.quality, or lower data.held_out "
            f"({data.held_out})"
        )
    with committed_folder(directory / source.name) as folder:
        totals = {}
        for split, masks in chosen.items():
            selected = [np.flatnonzero(mask) for mask in masks]
            size = sum(int(_column(target, "sizes")[mask].sum()) for target, mask in zip(targets, masks, strict=True))
            write_selection(folder / split, shards, selected, root=directory, num_bytes=size, tokenizer=tokenizer.fingerprint)
            lengths = np.concatenate([shard.lengths(documents) for shard, documents in zip(shards, selected, strict=True)])
            totals[split] = (len(lengths), int(lengths.sum()), size, lengths)
        percentiles = np.percentile(np.concatenate([total[3] for total in totals.values()]), _PERCENTILES, method="nearest").astype(int)
        seen = np.bitwise_or.reduce([_column(target, "seen") for target in targets])
        statistics = Statistics(
            documents=totals["train"][0],
            held_out_documents=totals["held_out"][0],
            tokens=totals["train"][1],
            held_out_tokens=totals["held_out"][1],
            num_bytes=totals["train"][2] + totals["held_out"][2],
            length_percentiles=dict(zip(_PERCENTILES, percentiles.tolist(), strict=True)),
            unique_tokens=int(np.unpackbits(seen).sum()),
            exact_duplicates=duplicates.exact,
            near_duplicates=duplicates.near,
            duplicate_pairs=duplicates.pairs,
            **vars(gathered),
        )
        done = _Done(
            origin=origin,
            tokenizer=tokenizer.fingerprint,
            fingerprints=_fingerprints(data),
            statistics=statistics,
            provenance=provenance_of(data, source),
        )
        with disk_errors(directory):
            (folder / "source.json").write_bytes(_source_json(done))


def _column(target: Path, name: str) -> NDArray[Any]:
    try:
        return np.load(target / f"{name}.npy")
    except (OSError, ValueError) as error:
        raise DataError(f"{target / name}.npy is damaged ({error}); remove {target} and run prepare again") from None


def _held_out(ranks: Sequence[NDArray[np.uint64]], alive: Sequence[NDArray[np.bool_]], share: float) -> list[NDArray[np.bool_]]:
    """Which of the kept documents are held out: those whose hash falls into the share.

    Where there is none (a small source) and `share` is not 0, it is the one with the smallest hash, if another is left for training.
    """
    found = [is_held_out(r, share) & a for r, a in zip(ranks, alive, strict=True)]
    if share > 0 and not any(part.any() for part in found) and sum(int(a.sum()) for a in alive) > 1:
        smallest = [r[a].min() if a.any() else np.iinfo(np.uint64).max for r, a in zip(ranks, alive, strict=True)]
        part = int(np.argmin(smallest))
        documents = np.flatnonzero(alive[part])
        found[part][documents[np.argmin(ranks[part][documents])]] = True
    return found


def foresee(data: Data, *, vocab_size: int) -> list[str]:
    """What `prepare` would refuse, one message each, as far as the names of files and the tokenizer tell: no text is read."""
    found = []
    for source in data.sources:
        try:
            list_files(source)
        except DataError as error:
            found.append(str(error))
    try:
        if data.tokenizer is not None:
            _check_vocab(_given_tokenizer(data.tokenizer), vocab_size)
        else:
            check_trainable(vocab_size)
    except DataError as error:
        found.append(str(error))
    directory = data.folder
    if obstacle := obstacle_to(directory):
        found.append(f"{directory} cannot be made or written: {obstacle} is no folder that may be written; set data.directory elsewhere")
    return found


def obstacle_to(directory: Path) -> Path | None:
    """What stands where `directory` or a parent of it should be a folder that may be written; None: nothing."""
    there = next(path for path in (directory, *directory.absolute().parents) if os.path.lexists(path))
    return None if there.is_dir() and os.access(there, os.W_OK) else there


def open_prepared(data: Data, vocab_size: int, *, recipe: Path | str = "RECIPE") -> Prepared:
    """Open what `prepare` made, without any work; `recipe` is what remedies name.

    Raises DataError if it is missing, damaged, made from another recipe or by another tokenizer, or does not fit `vocab_size`.
    """
    directory = data.folder
    if not (directory / "tokenizer.json").is_file():
        elsewhere = "" if directory.is_absolute() else f" (working folder {Path.cwd()}; a run's data is looked for from where it was begun)"
        raise DataError(f"{directory} holds no prepared data{elsewhere}; run: quintet prepare {recipe}")
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    if data.tokenizer is not None and (asked := _given_tokenizer(data.tokenizer)).fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"data.tokenizer {data.tokenizer} ({asked.fingerprint[:12]}) is not the one that {directory} was prepared with "
            f"({tokenizer.fingerprint[:12]}); run: quintet prepare {recipe}, or set data.directory to another folder"
        )
    _check_vocab(tokenizer, vocab_size)
    return _open(data, directory, tokenizer, recipe=recipe)


def _open(data: Data, directory: Path, tokenizer: Tokenizer, *, recipe: Path | str) -> Prepared:
    sources = {}
    for source in data.sources:
        done = _read_done(directory / source.name)
        if done is None or done.origin.spec != spec_of(data, source):
            state = "is not prepared" if done is None else "was prepared from other paths or settings than the recipe's"
            raise DataError(f"source {source.name!r} {state} in {directory}; run: quintet prepare {recipe}")
        train, held_out = (Selection(directory / source.name / split, root=directory, tokenizer=tokenizer.fingerprint) for split in SPLITS)
        sources[source.name] = PreparedSource(source=source, train=train, held_out=held_out, statistics=done.statistics)
    return Prepared(directory=directory, tokenizer=tokenizer, sources=sources)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Refuse a second prepare on the same folder, and clear away what a killed one left."""
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / ".lock", "ab")  # noqa: SIM115 -- closed below
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another quintet prepare works on {directory}; wait for it, or set data.directory elsewhere") from None
        for left in (*directory.glob(".*.tmp"), *directory.glob("*.parts/.*.tmp")):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield


def _plan(data: Data, directory: Path, *, vocab_size: int, seed: int, progress: Progress, on_message: OnMessage) -> _Plan:
    """Look at the sources and at what was made before; a source's text is read where its files are not those of before."""
    listings = {source.name: list_files(source) for source in data.sources}
    origins = {}
    for source in data.sources:
        done = _read_done(directory / source.name)
        on_read = _noted(progress, f"fingerprint of {source.name}", listings[source.name].num_bytes)
        origins[source.name] = origin_of(data, source, listings[source.name], before=done.origin if done else None, on_read=on_read)
    if data.dedup:
        others = hash_of([[(origin.spec, origin.text) for origin in origins.values()], [_known_hash(path) for path in data.dedup.against]])
        origins = {name: replace(origin, others=others) for name, origin in origins.items()}
    if data.tokenizer is not None:
        given = _given_tokenizer(data.tokenizer, on_message=on_message)
        _check_vocab(given, vocab_size)
        return _Plan(listings=listings, origins=origins, tokenizer_key=given.fingerprint, fingerprint=given.fingerprint, given=given)
    # Where only a part is read, which part depends on the files' names too.
    names = {source.name: [os.fsencode(file.path).hex() for file in listings[source.name].files] for source in data.sources}
    sample = None if _is_whole(listings) else [seed, [source.weight for source in data.sources], names]
    key = hash_of([vocab_size, [(origin.spec, origin.text) for origin in origins.values()], sample])
    return _Plan(listings=listings, origins=origins, tokenizer_key=key, fingerprint=_read_trained(directory).get(key), given=None)


def _known_hash(path: str) -> list[str]:
    """What decides over the documents that a prepared directory keeps."""
    folders = sorted(folder.parent for folder in Path(os.path.expanduser(path)).glob("[!.]*/source.json"))
    return [hash_of([folder.name, done.origin.spec, done.origin.text]) for folder in folders if (done := _read_done(folder))]


def _noted(progress: Progress, name: str, num_bytes: int) -> Callable[[int], None]:
    """Progress of reading alone, which is shown where there is much of it."""
    if num_bytes < _SHOWN_BYTES:
        return lambda size: None
    progress.start(name, num_bytes)
    return lambda size: progress.advance(name, 0, size)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0


def _others(directory: Path, origins: Mapping[str, Origin], fingerprint: str | None) -> list[str]:
    """The sources in `directory` that would no longer fit: made by another tokenizer than that of `fingerprint`, or from another origin.

    None as long as no preparation there came to its end, for no run can depend on it.
    """
    found: list[str] = []
    if not (directory / _COMPLETE).exists():
        return found
    for path in sorted(directory.glob("[!.]*/source.json")):
        done, wanted = _read_done(path.parent), origins.get(path.parent.name)
        if done and (done.tokenizer != fingerprint or (wanted and not done.origin.is_same(wanted))):
            found.append(path.parent.name)
    return found


def _is_whole(listings: Mapping[str, Listing]) -> bool:
    """Whether a tokenizer is trained on all of the text."""
    return sum(listing.num_bytes for listing in listings.values()) <= TRAINING_BYTES


def _read_trained(directory: Path) -> dict[str, str]:
    """trained.json: the key of what the tokenizer was trained from, with its fingerprint; empty where none was trained."""
    try:
        return msgspec.json.decode((directory / "trained.json").read_bytes(), type=dict[str, str])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return {}


def _tokenizer(
    data: Data, plan: _Plan, directory: Path, *, vocab_size: int, seed: int, progress: Progress, on_message: OnMessage
) -> Tokenizer:
    """The recipe's tokenizer, or one trained on its sources (again only if they changed)."""
    if plan.given:
        return plan.given
    with suppress(DataError):  # absent or damaged: trained again
        found = Tokenizer.from_file(directory / "tokenizer.json", on_message=on_message)
        if found.fingerprint == plan.fingerprint:
            return found
    texts = _training_texts(data, plan.listings, seed=seed, whole=_is_whole(plan.listings), progress=progress)
    return train_bpe(texts, vocab_size, on_message=on_message)


def _given_tokenizer(path: str, *, on_message: OnMessage = lambda message: None) -> Tokenizer:
    return Tokenizer.from_file(path, remedy="correct data.tokenizer", on_message=on_message)


def _check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"{tokenizer.origin} has {tokenizer.vocab_size} tokens, more than model.vocab_size ({vocab_size}); set model.vocab_size to at "
            f"least {tokenizer.vocab_size}, or use a smaller tokenizer"
        )


def _training_texts(data: Data, listings: Mapping[str, Listing], *, seed: int, whole: bool, progress: Progress) -> Iterator[str]:
    """Training documents of every source; where not all may be read, files in seeded order up to the source's share."""
    total = sum(listing.num_bytes for listing in listings.values())
    progress.start("tokenizer", total if whole else TRAINING_BYTES)
    weights = sum(source.weight for source in data.sources)
    for source in data.sources:
        files = listings[source.name].files
        budget = total if whole else int(TRAINING_BYTES * source.weight / weights)
        if not whole:
            files = tuple(sorted(files, key=lambda file: blake3(f"{seed}:".encode() + os.fsencode(file.path)).digest()))
        reader = Reader(files, text_key=source.text_key, max_document_bytes=data.max_document_bytes, strict=data.strict)
        judge = Judge(data, source.domain)
        read = 0
        for batch in batches(reader):
            judged, _ = judge.text(batch)
            ranks = ranks_of(judged)
            kept = (d.text for d, out in zip(judged, is_held_out(ranks, data.held_out).tolist(), strict=True) if not out)
            pieces = [piece for text in kept for piece in cut.pieces(text, _TRAINING_PIECE_BYTES)]
            stored = reader.bytes_read - read
            for i, piece in enumerate(pieces):
                yield piece
                progress.advance("tokenizer", 0, stored * (i + 1) // len(pieces) - stored * i // len(pieces))
            progress.advance("tokenizer", len(batch), 0 if pieces else stored)
            read = reader.bytes_read
            if read > budget:
                break


def _read_done(folder: Path) -> _Done | None:
    try:
        return msgspec.json.decode((folder / "source.json").read_bytes(), type=_Done)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _source_json(done: _Done) -> bytes:
    return msgspec.json.format(msgspec.json.encode(done))


def _has_bad(skipped: Mapping[str, int]) -> bool:
    return any(reason != "not_text" for reason in skipped)
