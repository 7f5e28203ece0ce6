"""A run's folder: everything a run computes, written so that a kill at any instant loses nothing.

    config.json          what was run
    log.jsonl            one line a generation, every individual in it; equal runs write equal bytes
    timing.jsonl         one line a generation: what differs between equal runs
    best.pt              weights of the fittest individual, a state_dict for torch.load(..., weights_only=True)
    summary.json         the outcome, written at the end; so are schedule.json (replay.py), the figures and report.html
    individuals/ID.ckpt  an individual's weights and momentum: written once when it is trained, never changed; parents
                         and teachers are read from here
    checkpoint-G.ckpt    config, log and timing after G generations: with individuals/ all that a resumed run needs

A .ckpt file is the SHA-256 of its payload, then the payload: a NumPy .npz, which cannot carry code. The last two
checkpoints are kept. Of the last two generations, elites of the later one are kept twice (ID.mirror.ckpt), and any other
individual can be evaluated again from the checkpoint before it: so no single damaged file loses a run.
"""

import fcntl
import hashlib
import io
import json
import math
import os
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

DIGEST_BYTES = hashlib.sha256().digest_size
FOR_PEOPLE = ("config.json", "log.jsonl", "timing.jsonl", "best.pt", "summary.json", "schedule.json", "report.html",
              "tensorboard/*", *(f"{name}.{kind}" for name in ("curves", "losses", "schedule") for kind in ("png", "svg")))


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


def rank(m):
    """What orders individuals, or their log records: diverged ones below all others, then by fitness, then the older
    first. The test accuracy decides nothing."""
    m = m if isinstance(m, dict) else vars(m)
    return not m["diverged"], m["fitness"], -m["id"]


def fittest(population):
    return max(population, key=rank)


@contextmanager
def one_line(action):
    """What the operating system refuses within becomes a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot {action}: {error.strerror or error}") from error


def write_atomic(path, data):
    """The whole of data (bytes) or nothing: temporary file, fsync, rename, fsync of the folder."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with one_line(f"write {path}"):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):  # of the two errors the first says more; leftovers go when the run is resumed
                temporary.unlink()
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def delete(path):
    with one_line(f"delete {path}"):
        path.unlink(missing_ok=True)


def write_checked(path, **arrays):
    """A .ckpt file of named arrays."""
    buffer = io.BytesIO()
    buffer.write(bytes(DIGEST_BYTES))
    np.savez(buffer, **arrays)
    with buffer.getbuffer() as view:
        view[:DIGEST_BYTES] = hashlib.sha256(view[DIGEST_BYTES:]).digest()
        write_atomic(path, view)


def intact_bytes(path):
    """The bytes of a .ckpt file. Raises DamagedFile if they are not those that were written."""
    try:
        data = memoryview(Path(path).read_bytes())
    except OSError as error:
        raise DamagedFile(f"cannot read {path}: {error.strerror or error}") from error
    if hashlib.sha256(data[DIGEST_BYTES:]).digest() != bytes(data[:DIGEST_BYTES]):
        raise DamagedFile(f"{path} is damaged: its checksum does not match")
    return data


def read_checked(path, decode=dict):
    """decode(the named arrays of a .ckpt file). Raises DamagedFile if it is missing, damaged or carries objects, and
    if decode raises: anyone can compute a checksum."""
    data = intact_bytes(path)
    try:
        with np.load(io.BytesIO(data[DIGEST_BYTES:]), allow_pickle=False) as arrays:
            return decode(dict(arrays))
    except Exception as error:  # there is no list of what a hostile archive can make NumPy and zipfile raise
        raise DamagedFile(f"{path} is refused: it is not what this program writes ({error!r})") from error


def _text(array):
    return array.tobytes().decode()


def _array(text):
    return np.frombuffer(text.encode(), dtype=np.uint8)


def save_individual(path, individual, state):
    """Write an evaluated individual with its state: uint8 (bytes,), see training.Network."""
    record = _array(json.dumps(individual.record()))
    write_checked(path, record=record, correct=np.packbits(individual.correct),
                  validation=len(individual.correct), state=state)


def load_individual(path):
    """(individual, state) as save_individual wrote them. Raises DamagedFile."""
    def decode(arrays):
        individual = Individual(**json.loads(_text(arrays["record"])))
        individual.correct = np.unpackbits(arrays["correct"], count=int(arrays["validation"])).astype(bool)
        return individual, arrays["state"]
    return read_checked(path, decode)


def load_checkpoint(path):
    """(config, log, timing, log records of the population) as _write_checkpoint left them. Raises DamagedFile."""
    def decode(arrays):
        log = _text(arrays["log"])
        return dict(json.loads(_text(arrays["config"]))), log, _text(arrays["timing"]), _last_population(log)
    return read_checked(path, decode)


def _last_population(log):
    return [member for line in log.splitlines()[-1:] for member in json.loads(line)["population"]]


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
        self.config, self.log, self.timing = json.dumps(config, indent=2) + "\n", "", ""
        self.candidates = config.get("screen", 1) * config.get("population", 0)
        with one_line(f"write to {self.path}"):
            if not (overwrite or begun(self.path)) and (foreign := self._for_people()):
                raise RunError(f"{self.path} holds {foreign[0].name}, and no run: choose another --out, or have it "
                               "replaced with --overwrite")
            self._lock()
            if overwrite or not (resume or begun(self.path)):
                self._clear()
            elif not resume:
                raise RunError(f"{self.path} already holds a run: continue it with --resume, or start it over with "
                               "--overwrite")
            else:
                refuse_differences(read_config(self.path), json.loads(self.config), self.path)
                if not checkpoints(self.path) and not any(self.individuals.iterdir()):
                    raise RunError(f"{self.path} holds the log of a run without its weights: it cannot be resumed")
        if not checkpoints(self.path):  # this one is kept twice, as there is none before it
            self._write_checkpoint(self.path / "checkpoint-00000.mirror.ckpt")
            self._write_checkpoint(self._checkpoint_path(0))
        self._restore()
        for name, text in (("config.json", self.config), ("log.jsonl", self.log), ("timing.jsonl", self.timing)):
            self._put_back(name, text)
        self.clock = time.perf_counter()

    def _lock(self):
        self.individuals.mkdir(parents=True, exist_ok=True)
        with one_line(f"write {self.path / '.lock'}"):
            self.lock = open(self.path / ".lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{self.path} is in use by another process") from None
        for leftover in [*self.path.glob(".*.tmp"), *self.individuals.glob(".*.tmp")]:
            delete(leftover)

    def close(self):
        self.lock.close()  # for the next run of this process

    def _clear(self):
        """Forget a run, and nothing that is not of it. The config goes first: while it is there, individuals/ is of that
        config, even if damage leaves no checkpoint."""
        files = self._for_people() if begun(self.path) else []
        for old in [*files, *checkpoints(self.path)]:
            delete(old)
        for old in self.individuals.glob("*.ckpt"):
            delete(old)

    def _for_people(self):
        return [path for name in FOR_PEOPLE for path in self.path.glob(name)]

    def individual_path(self, id):
        return self.individuals / f"{id:06d}.ckpt"

    def _mirror_path(self, id):
        return self.individuals / f"{id:06d}.mirror.ckpt"

    def recall(self, individual):
        """The same individual as an interrupted run already evaluated it, or None."""
        path, mirror = self.individual_path(individual.id), self._mirror_path(individual.id)
        if not (path.exists() or mirror.exists()):
            return None
        try:
            found = self._intact(individual.id)
            if found.lineage() == individual.lineage():
                return found
        except DamagedFile as error:
            print(f"{error}; evaluating it again", file=sys.stderr)
        delete(mirror)  # it is not of the evaluation to come
        return None

    def record(self, generation, population, elites=()):
        """Close a generation: its line in the log, its times, its checkpoint; then forget who is needed no more."""
        elites = {individual.id for individual in elites}
        members = [{**individual.record(), "elite": individual.id in elites} for individual in population]
        line = json.dumps({"generation": generation, "population": members}) + "\n"
        now = time.perf_counter()
        times = json.dumps({"generation": generation, "seconds": now - self.clock}) + "\n"
        self.log, self.timing, self.clock = self.log + line, self.timing + times, now
        for id in elites:
            if not self._mirror_path(id).exists():
                write_atomic(self._mirror_path(id), intact_bytes(self.individual_path(id)))
        self._write_checkpoint(self._checkpoint_path(generation + 1))
        self._append("log.jsonl", line)
        self._append("timing.jsonl", times)
        self._prune()
        self.generations, self.population = generation + 1, population

    def evaluated(self):
        """How many individuals the completed generations have trained. Ids are given out in order from 0; of the initial
        ones the highest may not have passed --screen."""
        highest = max((individual.id for individual in self.population), default=-1)
        return max(1 + highest, self.candidates if self.population else 0)

    def read_log(self):
        """The completed generations: the lines of the log as dicts."""
        return [json.loads(line) for line in self.log.splitlines()]

    def _checkpoint_path(self, generations):
        return self.path / f"checkpoint-{generations:05d}.ckpt"

    def _write_checkpoint(self, path):
        write_checked(path, config=_array(self.config), log=_array(self.log), timing=_array(self.timing))

    def _append(self, name, line):
        with one_line(f"write {self.path / name}"), open(self.path / name, "a") as file:
            file.write(line)

    def _prune(self):
        """Keep the last two checkpoints and the individuals of their populations."""
        needed = {member["id"] for line in self.log.splitlines()[-2:] for member in _last_population(line)}
        for old in checkpoints(self.path)[2:]:
            delete(old)
        for path in self.individuals.glob("*.ckpt"):
            id = path.name.split(".")[0]
            if id.isdigit() and int(id) not in needed:
                delete(path)

    def _restore(self):
        """Take log, timing and population from the newest intact checkpoint. Says what is damaged."""
        def load(checkpoint):
            _, log, timing, members = load_checkpoint(checkpoint)
            return log, timing, [self._member(member) for member in members]
        (self.log, self.timing, self.population), damaged = newest_checkpoint(self.path, load)
        self.generations = len(self.log.splitlines())
        for line in damaged:
            print(f"{line}; going back to the end of generation {self.generations}", file=sys.stderr)

    def _put_back(self, name, text):
        """Write a file for people as it should be. Says so if it was something else, unless that something else is
        what an interruption leaves: the last line missing or cut short, or lines that came later."""
        path, expected = self.path / name, text.encode()
        if path.exists():
            with one_line(f"read {path}"):
                found = path.read_bytes()
            if found == expected:
                return
            last_line = expected.rfind(b"\n", 0, -1) + 1
            if not (found.startswith(expected) or (expected.startswith(found) and len(found) >= last_line)):
                print(f"{path} is damaged; put back as it was", file=sys.stderr)
        write_atomic(path, expected)

    def _member(self, member):
        """Load the individual of a log record."""
        individual = self._intact(member["id"])
        if {**individual.record(), "elite": member["elite"]} != member:
            raise DamagedFile(f"{self.individual_path(member['id'])} is not the individual that the log has")
        return individual

    def _intact(self, id):
        """Load an individual; where its file is damaged and it has a second copy, mend it. Raises DamagedFile."""
        path, mirror = self.individual_path(id), self._mirror_path(id)
        try:
            return load_individual(path)[0]
        except DamagedFile as error:
            if not mirror.exists():
                raise
            individual, _ = load_individual(mirror)
            print(f"{error}; mended from its second copy", file=sys.stderr)
            write_atomic(path, intact_bytes(mirror))
            return individual


def begun(path):
    """Whether a folder holds a run, if only its log, as published results do."""
    return bool(checkpoints(path)) or (Path(path) / "config.json").exists()


def checkpoints(path):
    """Paths of the checkpoints in a run's folder, the newest first."""
    return sorted(Path(path).glob("checkpoint-[0-9][0-9][0-9][0-9][0-9].*ckpt"), reverse=True)


def read_config(path):
    """The config of the run in a folder. Raises RunError."""
    newest, _ = newest_checkpoint(path)
    if newest is not None:
        return newest[0]
    file = Path(path) / "config.json"
    try:
        return dict(json.loads(file.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{path} holds no run") from None
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"cannot read {file}: {error}") from error


def newest_checkpoint(path, load=load_checkpoint):
    """load(the newest intact checkpoint of a run), None where there is no checkpoint, as in published results, which are
    config.json and log.jsonl alone; and what is wrong with newer ones, a line each. Raises RunError if all are damaged."""
    damaged = []
    for checkpoint in checkpoints(path):
        try:
            return load(checkpoint), damaged
        except DamagedFile as error:
            damaged.append(str(error))
    if damaged:
        raise RunError(f"{path} cannot be resumed: {'; '.join(damaged)}")
    return None, damaged


def refuse_differences(old, new, path):
    """Raise RunError naming every setting in which a config differs from that of the folder."""
    changed = [f"{name} is {old.get(name)!r} there and {new.get(name)!r} now"
               for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if changed:
        raise RunError(f"{path} holds a run with another config: {', '.join(changed)}")


def read_log(path):
    """The completed generations of a run, finished or not: the lines of its log as dicts. Raises RunError."""
    newest, _ = newest_checkpoint(path)
    file = Path(path) / "log.jsonl"
    try:
        text = file.read_text() if newest is None else newest[1]
        return [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {file}: {error}") from error
