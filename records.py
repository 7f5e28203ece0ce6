"""A run's folder: everything a run computes, written so that a kill at any instant loses nothing.

    config.json          what was run
    log.jsonl            one line a generation, every individual in it; equal runs write equal bytes
    timing.jsonl         one line a generation: what differs between equal runs
    best.pt              weights of the fittest individual, a state_dict for torch.load(..., weights_only=True)
    summary.json         the outcome, written at the end
    individuals/ID.ckpt  an individual's weights and momentum: written once by the worker that trained it, never
                         changed; workers read parents and teachers from here
    checkpoint-G.ckpt    config and log after G generations: with individuals/ all that a resumed run needs

A .ckpt file is the SHA-256 of its payload, then the payload: a NumPy .npz, which cannot carry code. The last two
checkpoints are kept, and individuals that survive as elites are kept twice, so no single damaged file loses a run.
"""

import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

DIGEST_BYTES = hashlib.sha256().digest_size
FOR_PEOPLE = ("config.json", "log.jsonl", "timing.jsonl", "best.pt", "summary.json")  # no resumed run reads these


class RunError(Exception):
    """A run folder that cannot be used or written; the message is one clear line."""


class DamagedFile(RunError):
    """A file whose bytes are not those that were written."""


@dataclass
class Individual:
    """M_gi of Sec. 3.1, its weights left on disk: what it is, and once evaluated, how well it does."""

    id: int
    generation: int  # in which it was trained
    hyperparameters: dict[str, float]
    parent: int | None = None  # whose weights and hyperparameters it started from; None: fresh
    mate: int | None = None  # who gave hyperparameters in crossover
    teacher: int | None = None  # whose predictions it was distilled from
    fitness: float = 0.0  # validation accuracy
    test_accuracy: float = 0.0  # for comparison only: nothing is ever chosen by it
    loss: float | None = None  # mean training loss of the last epoch; None: not finite
    diverged: bool = False
    correct: np.ndarray | None = field(default=None, repr=False)  # (validation images,) booleans: its behaviour

    def record(self):
        """Everything but the behaviour vector, as it stands in the log."""
        return {name: value for name, value in vars(self).items() if name != "correct"}

    def lineage(self):
        """What was decided before it was trained: with the run's config, this determines the result."""
        return self.id, self.generation, self.parent, self.mate, self.teacher, self.hyperparameters


def write_atomic(path, data):
    """The whole of data (bytes) or nothing: temporary file, fsync, rename, fsync of the folder."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def write_checked(path, **arrays):
    """A .ckpt file of named arrays."""
    buffer = io.BytesIO()
    buffer.write(bytes(DIGEST_BYTES))
    np.savez(buffer, **arrays)
    with buffer.getbuffer() as view:
        view[:DIGEST_BYTES] = hashlib.sha256(view[DIGEST_BYTES:]).digest()
        write_atomic(path, view)


def read_checked(path):
    """The named arrays of a .ckpt file. Raises DamagedFile for any that is missing, damaged or carries objects."""
    try:
        data = memoryview(Path(path).read_bytes())
    except OSError as error:
        raise DamagedFile(f"cannot read {path}: {error.strerror or error}") from error
    if hashlib.sha256(data[DIGEST_BYTES:]).digest() != bytes(data[:DIGEST_BYTES]):
        raise DamagedFile(f"{path} is damaged: its checksum does not match")
    try:
        with np.load(io.BytesIO(data[DIGEST_BYTES:]), allow_pickle=False) as arrays:
            return dict(arrays)
    except ValueError as error:
        raise DamagedFile(f"{path} is refused: it holds something other than plain arrays") from error


def _text(array):
    return array.tobytes().decode()


def _array(text):
    return np.frombuffer(text.encode(), dtype=np.uint8)


def save_individual(path, individual, state):
    """Write an evaluated individual with its state: float32 (D,), see training.Network."""
    record = _array(json.dumps(individual.record()))
    write_checked(path, record=record, correct=np.packbits(individual.correct),
                  validation=len(individual.correct), state=state)


def load_individual(path):
    """(individual, state) as save_individual wrote them."""
    arrays = read_checked(path)
    individual = Individual(**json.loads(_text(arrays["record"])))
    individual.correct = np.unpackbits(arrays["correct"], count=int(arrays["validation"])).astype(bool)
    return individual, arrays["state"]


def finite_or_none(x):
    """JSON has no NaN and no infinity."""
    return x if math.isfinite(x) else None


class RunFolder:
    """The folder of one run, held by one process at a time.

    generations: how many are completed; population: as the last of them left it, [] before the first.
    """

    def __init__(self, path, config, resume=False, overwrite=False):
        """config: a dict that JSON can hold, with all that determines the result. Raises RunError."""
        self.path = Path(path)
        self.individuals = self.path / "individuals"
        self.config, self.log = json.dumps(config, indent=2) + "\n", ""
        self.clock = time.perf_counter()
        try:
            self._open(overwrite)
        except OSError as error:
            raise RunError(f"cannot write to {self.path}: {error.strerror or error}") from error
        if not checkpoints(self.path):
            self._write_checkpoint(0)
        elif resume:
            refuse_differences(read_config(self.path), json.loads(self.config), self.path)
        else:
            raise RunError(f"{self.path} already holds a run: continue it with --resume, or start it over with "
                           "--overwrite")
        write_atomic(self.path / "config.json", self.config.encode())
        self.generations, self.population = self._restore()

    def _open(self, overwrite):
        self.individuals.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.path / ".lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{self.path} is in use by another process") from None
        for leftover in [*self.path.glob(".*.tmp"), *self.individuals.glob(".*.tmp")]:
            leftover.unlink()
        if overwrite:
            shutil.rmtree(self.individuals)
            self.individuals.mkdir()
            for old in [*checkpoints(self.path), *(self.path / name for name in FOR_PEOPLE)]:
                old.unlink(missing_ok=True)

    def individual_path(self, id):
        return self.individuals / f"{id:06d}.ckpt"

    def _mirror_path(self, id):
        return self.individuals / f"{id:06d}.mirror.ckpt"

    def recall(self, individual):
        """The same individual as an interrupted run already evaluated it, or None."""
        path = self.individual_path(individual.id)
        if not path.exists():
            return None
        try:
            found, _ = load_individual(path)
        except DamagedFile as error:
            print(f"{error}; evaluating it again", file=sys.stderr)
            return None
        return found if found.lineage() == individual.lineage() else None

    def record(self, generation, population, elites=(), **facts):
        """Close a generation: its line in the log, its checkpoint, its times; then forget who is needed no more."""
        elites = {individual.id for individual in elites}
        members = [{**individual.record(), "elite": individual.id in elites} for individual in population]
        line = json.dumps({"generation": generation, **facts, "population": members}) + "\n"
        self.log += line
        for id in elites:
            if not self._mirror_path(id).exists():
                write_atomic(self._mirror_path(id), self.individual_path(id).read_bytes())
        self._write_checkpoint(generation + 1)
        self._append("log.jsonl", line)
        now = time.perf_counter()
        self._append("timing.jsonl", json.dumps({"generation": generation, "seconds": now - self.clock}) + "\n")
        self.clock = now
        self._prune()
        self.generations, self.population = generation + 1, population

    def evaluated(self):
        """How many individuals the completed generations have trained. Ids are given out in order from 0."""
        return 1 + max((individual.id for individual in self.population), default=-1)

    def _write_checkpoint(self, generations):
        write_checked(self.path / f"checkpoint-{generations:05d}.ckpt", log=_array(self.log),
                      config=_array(self.config))

    def _append(self, name, line):
        try:
            with open(self.path / name, "a") as file:
                file.write(line)
        except OSError as error:
            raise RunError(f"cannot write {self.path / name}: {error.strerror or error}") from error

    def _prune(self):
        for old in checkpoints(self.path)[2:]:
            old.unlink()
        lines = [json.loads(line) for line in self.log.splitlines()[-2:]]
        needed = {member["id"] for line in lines for member in line["population"]}
        for path in self.individuals.glob("*.ckpt"):
            if int(path.name.split(".")[0]) not in needed:
                path.unlink()

    def _restore(self):
        """(generations completed, population) as of the newest intact checkpoint.

        The log is put back as the checkpoint has it. Says what is damaged; raises RunError if nothing intact is left.
        """
        damaged = []
        for checkpoint in checkpoints(self.path):
            try:
                log = _text(read_checked(checkpoint)["log"])
                lines = log.splitlines()
                members = json.loads(lines[-1])["population"] if lines else []
                population = [self._intact(member["id"]) for member in members]
            except DamagedFile as error:
                damaged.append(str(error))
                continue
            for line in damaged:
                print(f"{line}; going back to the end of generation {len(lines) - 1}", file=sys.stderr)
            self.log = log
            write_atomic(self.path / "log.jsonl", log.encode())
            return len(lines), population
        raise RunError(f"{self.path} cannot be resumed: " + "; ".join(damaged))

    def _intact(self, id):
        """Load an individual of the population; where its file is damaged and it has a second copy, mend it."""
        path, mirror = self.individual_path(id), self._mirror_path(id)
        try:
            return load_individual(path)[0]
        except DamagedFile as error:
            if not mirror.exists():
                raise
            individual, _ = load_individual(mirror)
            print(f"{error}; mended from its second copy", file=sys.stderr)
            write_atomic(path, mirror.read_bytes())
            return individual


def checkpoints(path):
    """Paths of the checkpoints in a run's folder, the newest first."""
    return sorted(Path(path).glob("checkpoint-*.ckpt"), reverse=True)


def read_config(path):
    """The config of the run in a folder, as its checkpoints keep it. Raises RunError."""
    damaged = [f"{path} holds no run"]
    for checkpoint in checkpoints(path):
        try:
            return json.loads(_text(read_checked(checkpoint)["config"]))
        except DamagedFile as error:
            damaged.append(str(error))
    raise RunError("; ".join(damaged[1:] or damaged))


def refuse_differences(old, new, path):
    """Raise RunError naming every setting in which a config differs from that of the folder."""
    changed = [f"{name} is {old.get(name)!r} there and {new.get(name)!r} now"
               for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if changed:
        raise RunError(f"{path} holds a run with another config: {', '.join(changed)}")


def read_log(path):
    """The generations of a run, finished or not: the lines of its log as dicts. Raises RunError."""
    path = Path(path) / "log.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}") from error
