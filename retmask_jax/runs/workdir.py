"""The work directory: one folder per stage, results with provenance, stages skipped while what they read is the same.

Nothing in it is ever deleted, and no folder is renamed, which object stores cannot do: what no longer fits is moved,
file by file, to a new folder under `set-aside`.
"""

import contextlib
import dataclasses
import fnmatch
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from ml_collections import ConfigDict

from retmask_jax.data.needles import Needle
from retmask_jax.runs.lock import LOCK, locked
from retmask_jax.runs.recipes import as_json
from retmask_jax.utils.compiled import Spent, spent
from retmask_jax.utils.files import digest, read_json, wait_until_listed, wait_until_seen, write_json
from retmask_jax.utils.hosts import first_alone, primary, wait_for_all
from retmask_jax.utils.numbers import Number
from retmask_jax.utils.versions import installed_versions

log = logging.getLogger(__name__)

_RESULT = "result.json"
_STARTED = "started.json"
_ASIDE = "set-aside"
# Keys that say how to compute and not what: batch sizes, devices, servers, what is kept and shown along the way. They
# decide no result beyond rounding, so they may change between runs of a work directory.
_HOW = """batch_size cpu_devices kernel mesh.* distributed headlines timings programs.*
    pairs.batch_size pairs.concurrency pairs.timeout
    pairs.retries train.microbatch_size train.reference_batch_size train.remat train.widths train.checkpoint_every
    train.checkpoint_folder train.keep train.profile train.wandb""".split()
_FREE = ("template_kwargs", "endpoints", "models")  # sections that take any keys
_PACKAGES = ("retmask_jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


@dataclasses.dataclass(frozen=True)
class Basis:
    """What a stage's result rests on, as JSON values: a result is up to date while all of it is the same.

    settings: {key of the config: value} of those that decide the result. inputs: fingerprints of the files it reads.
    upstream: {stage: run id} of the results it reads.
    """

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    upstream: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def changes(self, wanted: "Basis") -> list[str]:
        """Each difference of what is wanted from this, such as "key: value there, value here".

        A setting that was not there yet when this was written is none: later versions add keys whose default changes
        nothing.
        """
        inputs, upstream = (
            differing(dict.fromkeys(new) | dict(old), new)
            for old, new in ((self.inputs, wanted.inputs), (self.upstream, wanted.upstream))
        )
        again = [f"{change.split(':')[0]} was made again" for change in upstream]
        return differing(self.settings, wanted.settings) + inputs + again


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a stage's result comes from.

    settings, inputs, upstream: what it rests on (`Basis`); settings is None in files of versions before 0.2. versions: of
    the packages. config: hash of all settings. created: UTC.
    """

    stage: str = ""
    model: str = ""
    revision: str | None = None
    seed: int | None = None
    settings: dict[str, Any] | None = None
    inputs: dict[str, Any] = dataclasses.field(default_factory=dict)
    upstream: dict[str, str] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    config: str = ""
    run_id: str = ""
    created: str = ""

    def changes(self, wanted: Basis) -> list[str]:
        """Each difference of what is wanted from what this result was made from, as of `Basis.changes`."""
        if self.settings is None:
            return ["it is of an older version"]
        return Basis(self.settings, self.inputs, self.upstream).changes(wanted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A question as it was answered, to be read: replies by who gave them, and the answer expected where one is known."""

    question: str
    replies: dict[str, str]
    expected: str | None = None

    @classmethod
    def of(cls, needle: Needle, replies: Mapping[str, str]) -> "Example":
        """The question of a needle with the replies to it."""
        return cls(question=needle.question, expected=needle.answer, replies=dict(replies))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What every stage's result has: its headline numbers by name, a few examples, and where they come from.

    seconds: that it took. spent: how many of them were spent on compiling and waiting, and the programs it needed.
    """

    numbers: dict[str, Number]
    examples: list[Example] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    spent: Spent = Spent()
    provenance: Provenance = dataclasses.field(default_factory=Provenance)


R = TypeVar("R", bound=Result)


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A folder of results. aside: what the config no longer fits is set aside instead of refused."""

    root: Path
    config: dict[str, Any]
    aside: bool = False

    @classmethod
    def open(cls, root: str | Path, config: ConfigDict, aside: bool = False) -> "Workdir":
        """Open; ValueError where a stage there was made with other settings, naming the first differences.

        Only what decides a stage's result counts; how it is computed (batch sizes, mesh, kernel, servers, versions) may
        change at any time, and settings of stages that have not begun may, too. Nothing is written before the first
        stage runs, so a mistake found until then leaves no folder.
        """
        work = cls(Path(root), as_json(config), aside)
        if (work.root / "config.json").exists():
            if not aside:
                work._check_settings()
        elif work.root.exists() and (not work.root.is_dir() or any(p.name != LOCK for p in work.root.iterdir())):
            raise ValueError(f"work directory {root} exists and is not one of ours: choose another --workdir")
        return work

    def folder(self, stage: str) -> Path:
        """Where a stage keeps its files."""
        return self.root / stage

    def result(self, stage: str, kind: type[R]) -> R:
        """A finished stage's result; ValueError if it has not run, or was written by a version whose results differ."""
        self._check_finished(stage)
        path = self.folder(stage) / _RESULT
        record = read_json(path)
        try:
            return msgspec.convert(record, kind)
        except msgspec.ValidationError as error:
            raise ValueError(
                f"{path} was written by another version and is not read by this one ({error}): run `retmask {stage}` again, "
                "which keeps that file"
            ) from error

    def provenance(self, stage: str) -> Provenance:
        """Where a finished stage's result comes from."""
        self._check_finished(stage)
        return msgspec.convert(read_json(self.folder(stage) / _RESULT).get("provenance", {}), Provenance)

    def is_finished(self, stage: str) -> bool:
        """Whether a stage has a result, up to date or not."""
        return (self.folder(stage) / _RESULT).exists()

    def run_id(self, stage: str) -> str:
        """The id of a finished stage's run; a rerun has another one."""
        return self.provenance(stage).run_id

    def run(
        self,
        stage: str,
        basis: Basis,
        work: Callable[[Path], Result],
        about: Mapping[str, Any] | None = None,
        kind: type[Result] = Result,
        stays: Callable[[Path], Iterable[str]] = lambda folder: (),
    ) -> bool:
        """Run a stage unless it has finished on the same basis; returns whether it ran.

        What an interrupted run on the same basis left is kept, so that the stage can resume; what another one left is
        set aside. Versions of packages are recorded, and a change is reported. A rerun has a new id, which makes the
        stages that depend on it run again. about: more for its provenance. kind: of the result; one that another version
        wrote in a form that is not read is kept, and the stage goes on from its other files. stays: of the stage's folder,
        the names of folders in it that are not set aside, since they are as they would be made again; only the first host
        asks. Raises ValueError while another process runs a stage here.
        """
        with locked(self.root) if primary() else contextlib.nullcontext():
            return self._run(stage, basis, work, dict(about or {}), kind, stays)

    def _run(
        self,
        stage: str,
        basis: Basis,
        work: Callable[[Path], Result],
        about: dict[str, Any],
        kind: type[Result],
        stays: Callable[[Path], Iterable[str]],
    ) -> bool:
        folder = self.folder(stage)
        write_json(self.root / "config.json", self.config)
        wait_for_all(f"{stage} begins")
        wait_until_seen(self.root / "config.json")
        if first_alone(lambda: self._prepare(stage, basis, kind, stays)) == "finished":
            return False
        begin, before = time.time(), spent()
        result = work(folder)
        took = {"seconds": round(time.time() - begin, 1), "spent": (spent() - before).rounded()}
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        record = about | _record(stage, basis) | {"config": digest(settings_of(self.config))}
        made = Provenance(**record, run_id=uuid.uuid4().hex, created=created)
        write_json(folder / _RESULT, dataclasses.replace(result, provenance=made, **took))
        wait_for_all(f"{stage} ends")
        return True

    def _prepare(self, stage: str, basis: Basis, kind: type[Result], stays: Callable[[Path], Iterable[str]]) -> str:
        """ "finished", "resumed" or "new": the first of what a stage's folder is, which now fits the basis."""
        folder, changes = self.folder(stage), []
        for name, state in ((_RESULT, "finished"), (_STARTED, "resumed")):
            if not (folder / name).exists():
                continue
            stored = read_json(folder / name)
            made = msgspec.convert(stored["provenance"] if name == _RESULT else stored, Provenance)
            if not (changes := made.changes(basis)):
                if name == _RESULT and not self._is_read(stage, kind):
                    continue
                _report_versions(stage, made.versions)
                return state
        staying = sorted(stays(folder))
        if target := set_aside(folder, self.root / _ASIDE, staying):
            more = f" and {len(changes) - 2} more changes" if len(changes) > 2 else ""
            why = "; ".join(changes[:2]) or "it has no record of what it was made from"
            but = f", but for {', '.join(staying)}, made from what has not changed" if staying else ""
            log.warning("%s is made again (%s%s); what was there is kept in %s%s", stage, why, more, target, but)
        write_json(folder / _STARTED, _record(stage, basis))
        return "new"

    def _is_read(self, stage: str, kind: type[Result]) -> bool:
        """Whether this version reads a stage's result; one that it does not read is moved out of the way."""
        try:
            self.result(stage, kind)
            return True
        except ValueError as error:
            shelf, number = self.root / _ASIDE, 1
            while (target := shelf / f"{stage}-result-{number}.json").exists():
                number += 1
            shelf.mkdir(exist_ok=True)
            os.replace(self.folder(stage) / _RESULT, target)
            log.warning("%s; it is kept in %s", error, target)
            return False

    def _check_finished(self, stage: str) -> None:
        if not self.is_finished(stage):
            raise ValueError(
                f"stage {stage} has no result in {self.root}: run `retmask {stage}` or `retmask run` first"
            )

    def _check_settings(self) -> None:
        """ValueError where stages there were made with other settings than the config has."""
        ours, changed = settings_of(self.config), []
        for path in sorted([*self.root.glob(f"*/{_RESULT}"), *self.root.glob(f"*/{_STARTED}")]):
            stored = read_json(path)
            stored = stored.get("provenance", stored)
            if "settings" not in stored:
                version = stored.get("versions", {}).get("retmask_jax", "an older version")
                raise ValueError(
                    f"work directory {self.root} was made by retmask_jax {version}, which did not tell models apart well "
                    "enough to go on there: choose another --workdir, or add --set-aside to keep what is there and begin anew"
                )
            changed += [one for one in differing(stored["settings"], ours) if one not in changed]
        if changed:
            more = f" and {len(changed) - 2} more" if len(changed) > 2 else ""
            raise ValueError(
                f"work directory {self.root} belongs to another config ({'; '.join(changed[:2])}{more}): choose another "
                "--workdir, or add --set-aside to make again what that changes (nothing is deleted)"
            )


def settings_of(config: Mapping[str, Any], patterns: Sequence[str] = ("*",)) -> dict[str, Any]:
    """{key: value} of a config (as JSON) for the keys that match a pattern, without those that only say how to compute.

    Of servers (pairs.endpoints) the names count, not the addresses, since servers move.
    """
    values = {}
    for key, value in _leaves(config):
        wanted = any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)
        if wanted and not any(fnmatch.fnmatchcase(key, pattern) for pattern in _HOW):
            values[key] = sorted(value) if key == "pairs.endpoints" else value
    return values


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys of the old values that have another value in the new ones, as "key: value there, value here"."""
    return [f"{key}: {old[key]!r} there, {new.get(key)!r} here" for key in sorted(old) if old[key] != new.get(key)]


def set_aside(folder: Path, shelf: Path, staying: Sequence[str] = ()) -> Path | None:
    """Move the files of a folder to a new one on the shelf, shelf/NAME-1, -2, ..., and return it; None if there are none.

    staying: Names of folders in it whose files are not moved.
    Files are moved one by one, the record that the stage began last: a move that is cut off goes on in the same place.
    """
    marker = folder / _STARTED
    wait_until_listed([marker, folder / _RESULT])
    there = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    stay = [folder / name for name in staying]
    files = sorted(path for path in there if not any(path.is_relative_to(other) for other in stay))
    if not files:
        return None
    number = 1
    while (target := shelf / f"{folder.name}-{number}").exists() and (
        (target / _STARTED).exists() or not marker.exists()
    ):
        number += 1
    for path in sorted(files, key=lambda path: path == marker):
        place = target / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()
    return target


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return installed_versions(_PACKAGES)


def changed_versions(stored: Mapping[str, str]) -> str:
    """The packages whose versions are others than those stored, as "name old, now new"; "" if there are none."""
    now = versions()
    return ", ".join(f"{name} {stored.get(name)}, now {now[name]}" for name in now if stored.get(name) != now[name])


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of a config; a section that takes any keys is one value."""
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and name not in _FREE:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _record(stage: str, basis: Basis) -> dict[str, Any]:
    return {"stage": stage, **dataclasses.asdict(basis), "versions": versions()}


def _report_versions(stage: str, stored: Mapping[str, str]) -> None:
    if changed := changed_versions(stored):
        log.warning("%s: what is kept was made with %s", stage, changed)
