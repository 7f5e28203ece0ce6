"""A run's folder. A kill at any instant loses no generation that is closed.

    config.json    the settings of the run
    log.jsonl      a line for each generation, with every individual; it closes the generation
    individuals/   ID.safetensors: record, behaviour and state, of the last two generations
    timing.jsonl   a line for each generation: its seconds, and the commit of the code that ran it

The caller adds best.pt, schedule.json, summary.json, which makes the run finished, and then figures
and report.html. The files that a run reads again carry a checksum: the SHA-256 of the other bytes,
in the log of each line.
"""

import fcntl
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from errors import RunError

FOR_PEOPLE = ("log.jsonl", "timing.jsonl", "best.pt", "summary.json", "schedule.json",
              "report.html", "tensorboard/*",
              *(f"{name}.{kind}" for name in ("curves", "lineage", "losses", "schedule")
                for kind in ("png", "svg")))
MARK, DIGITS = b"sha256:", 64  # the checksum follows the first mark
BEHAVIOUR = "individual/correct"  # the name of this tensor among those of the state


class DamagedFile(RunError):
    """A file or a line is missing, or its bytes are not the ones that were written."""


@dataclass
class Individual:
    """M_gi of Sec. 3.1: what it is and, once evaluated, how good. Its weights stay on disk."""

    id: int
    generation: int  # in which it was trained
    hyperparameters: dict[str, float]
    parent: int | None = None  # gave it weights and hyperparameters; None: it starts anew
    mate: int | None = None  # gave it hyperparameters in crossover
    teacher: int | None = None  # taught it by distillation
    fitness: float = 0.0  # Config.fitness of the validation images
    test_accuracy: float = 0.0  # for comparison only: it never decides anything
    loss: float | None = None  # mean training loss of the last epoch; None: not finite
    diverged: bool = False
    applied: dict | None = None  # what training applied: learning_rate by epoch, theta, momentum...
    scores: dict = field(default_factory=dict)  # further metrics by name
    correct: np.ndarray | None = field(default=None, repr=False)  # (images,) bool: its behaviour

    def record(self):
        """All fields but the behaviour, as JSON; numbers that are not finite become None."""
        text = json.dumps({name: value for name, value in vars(self).items() if name != "correct"})
        return json.loads(text, parse_constant=lambda name: None)

    def lineage(self):
        """What was decided before training. It determines the result, given the run's config."""
        return self.id, self.generation, self.parent, self.mate, self.teacher, self.hyperparameters


def as_dict(m):
    """The fields of an individual or of its record."""
    return m if isinstance(m, dict) else vars(m)


def rank(m):
    """Sort key of an individual or its record: the diverged last, then by fitness, then by age."""
    m = as_dict(m)
    return not m["diverged"], m["fitness"], -m["id"]


def fittest(population):
    return max(population, key=rank)


def living_fitness(population):
    """The fitness of each individual or record that has not diverged; [0.0] if all have. A diverged
    one's is 0, which some metrics call good."""
    return [m["fitness"] for m in map(as_dict, population) if not m["diverged"]] or [0.0]


def ancestry(log):
    """The records from the first ancestor to the fittest of the last generation (Sec. 5.3)."""
    everyone = {member["id"]: member for line in log for member in line["population"]}
    line = [fittest(log[-1]["population"])]
    while line[-1]["parent"] is not None:
        line.append(everyone[line[-1]["parent"]])
    return line[::-1]


def finite_or_none(x):
    return x if math.isfinite(x) else None


@contextmanager
def one_line(action):
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot {action}: {error.strerror or error}") from error


def write_atomic(path, data):
    """Write all of the bytes, or leave the file as it was. Raises RunError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with one_line(f"write {path}"):
        _write(temporary, "wb", data)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)  # put the new name on the disk too
        os.fsync(folder)
        os.close(folder)


def _write(path, mode, data):
    with open(path, mode) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read(path):
    with one_line(f"read {path}"):
        return path.read_bytes()


def _stamped(data):
    """The same bytes, with the right checksum after the mark. Bytes without a mark change."""
    before, mark, after = data.partition(MARK)
    before, after = before + mark, after[DIGITS:]
    return before + hashlib.sha256(before + after).hexdigest().encode() + after


def sealed(content, indent=None):
    """A dict as JSON in bytes, which begins with its checksum and ends in a newline."""
    content = {"checksum": MARK.decode() + "0" * DIGITS, **content}
    return _stamped((json.dumps(content, indent=indent) + "\n").encode())


def unsealed(data, name):
    """The dict that `sealed` wrote; older files have no checksum. Raises DamagedFile."""
    try:
        if (b'"checksum"' in data or MARK in data) and _stamped(data) != data:
            raise ValueError("its checksum does not match")
        content = dict(json.loads(data))
        content.pop("checksum", None)
        return content
    except Exception as error:  # damaged JSON can raise RecursionError too
        raise DamagedFile(f"{name} is damaged: {error}") from error


def save_individual(path, individual, state):
    """Write an evaluated individual and its state: contiguous CPU tensors by name, which must not
    share memory. Raises RunError."""
    import torch  # here: the figures must not need PyTorch
    from safetensors.torch import save

    turned = [name for name, t in state.items() if t.is_complex()]
    tensors = state | {name: torch.view_as_real(state[name]) for name in turned}
    tensors[BEHAVIOUR] = torch.tensor(individual.correct)
    about = sealed({"record": individual.record(), "complex": turned}).decode()
    write_atomic(path, _stamped(save(tensors, {"individual": about})))


def load_individual(path):
    """Returns (individual, state) as saved; the order of the state's names may differ. Raises
    DamagedFile. Never runs code from the file."""
    import torch
    from safetensors.torch import load

    try:
        data = Path(path).read_bytes()
        if _stamped(data) != data:
            raise ValueError("its checksum does not match")
        header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
        about, state = json.loads(header["__metadata__"]["individual"]), load(data)
        individual = Individual(**about["record"], correct=state.pop(BEHAVIOUR).numpy())
        return individual, state | {n: torch.view_as_complex(state[n]) for n in about["complex"]}
    except Exception as error:  # hostile bytes with a right checksum can raise anything
        reason = getattr(error, "strerror", None) or error
        raise DamagedFile(f"{path} is damaged or missing: {reason}") from error


class RunFolder:
    """The folder of one run. Only one process at a time can hold it. To open it makes the folder
    and its lock, and changes nothing else before `begin`.

    log: the closed generations; population: that of the last one, or []."""

    def __init__(self, path, config, resume=False, overwrite=False):
        """config: a dict of all settings that determine the result. Raises RunError."""
        self.path, self.config = Path(path), json.loads(json.dumps(config))
        self.individuals, self.fresh = self.path / "individuals", overwrite or not resume
        self.log, self.population = [], []
        if not self.fresh:
            old, new = read_config(path), self.config
            if changed := [f"{name} is {old.get(name)!r} there and {new.get(name)!r} now"
                           for name in differing(old, new)]:
                raise RunError(f"{path} holds a run with another config: {', '.join(changed)}")
        elif not overwrite and (found := self._files("config.json", *FOR_PEOPLE)):
            raise RunError(f"{path} already holds a run, or at least {found[0].name}: continue it "
                           "with --resume, replace it with --overwrite, or choose another --out")
        with ExitStack() as stack:
            with one_line(f"write to {path}"):
                self.path.mkdir(parents=True, exist_ok=True)
                self.lock = stack.enter_context(open(self.path / ".lock", "w"))
            with one_line(f"lock {path}"):
                try:
                    fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise RunError(f"{path} is in use by another process") from None
            if not self.fresh:
                self._restore()
            stack.pop_all()

    def _restore(self):
        """Read the log and the population. If the last generation is damaged, drop it: the run
        evaluates it again from its parents."""
        errors = []
        for end in (None, -1):
            try:
                self.log = read_log(self.path, end)
                self.population = [self._load(m) for g in self.log[-1:] for m in g["population"]]
                break
            except DamagedFile as error:
                errors.append(str(error))
        if len(errors) == 2:
            raise RunError(f"{self.path} cannot be resumed: {'; '.join(dict.fromkeys(errors))}")
        for error in errors:
            print(f"{error}; going back to the end of generation {len(self.log)}", file=sys.stderr)

    def _load(self, member):
        path = self.individual_path(member["id"])
        individual, _ = load_individual(path)
        if {**individual.record(), "elite": member["elite"]} != member:
            raise DamagedFile(f"{path} is not the individual that the log has")
        return individual

    generations = property(lambda self: len(self.log))

    @property
    def finished(self):
        """Whether all generations are closed and summary.json is there."""
        closed = self.generations == self.config.get("generations")
        return closed and (self.path / "summary.json").exists()

    def begin(self):
        """Delete the run that this one replaces, or the remains of an interruption. Call it once,
        when nothing else can stop the run from starting, and never if it is `finished`."""
        with one_line(f"write to {self.path}"):
            self.individuals.mkdir(exist_ok=True)
            # A kill before config.json is replaced leaves the old run, which can then go on.
            old = (*self._files(*FOR_PEOPLE), *self._trained().values()) if self.fresh else ()
            for path in (*self._files(".*.tmp", "individuals/.*.tmp", "summary.json"), *old):
                path.unlink(missing_ok=True)
        if self.fresh:
            write_atomic(self.path / "config.json", sealed(self.config, indent=2))
        for name in ("log.jsonl", "timing.jsonl"):
            write_atomic(self.path / name, b"".join(_lines(self.path, name)[:self.generations]))
        self.clock, self.commit = time.perf_counter(), commit()

    def close(self):
        self.lock.close()

    def _files(self, *patterns):
        return [path for pattern in patterns for path in self.path.glob(pattern)]

    def individual_path(self, id):
        return self.individuals / f"{id:06d}.safetensors"

    def _trained(self):
        """{id: path} of the individuals' files, but not of copies such as "000001 (2)"."""
        return {int(path.stem): path for path in self.individuals.glob("*.safetensors")
                if path.stem.isdecimal()}

    def recall(self, individual):
        """The same individual if an interrupted run has evaluated it already, else None."""
        path = self.individual_path(individual.id)
        try:
            found = load_individual(path)[0] if path.exists() else None
        except DamagedFile as error:
            print(f"{error}; evaluating it again", file=sys.stderr)
            return None
        return found if found and found.lineage() == individual.lineage() else None

    def record(self, generation, population, elites=()):
        """Close a generation. Keep only the individuals of the last two."""
        elites = {individual.id for individual in elites}
        members = [{**m.record(), "elite": m.id in elites} for m in population]
        line, now = {"generation": generation, "population": members}, time.perf_counter()
        times = json.dumps(dict(generation=generation, seconds=now - self.clock,
                                commit=self.commit)) + "\n"
        with one_line(f"write to {self.path}"):
            _write(self.path / "timing.jsonl", "ab", times.encode())
            _write(self.path / "log.jsonl", "ab", sealed(line))
            self.log.append(line)
            self.population, self.clock = population, now
            needed = {member["id"] for line in self.log[-2:] for member in line["population"]}
            for id, path in self._trained().items():
                if id not in needed:
                    path.unlink()

    def evaluated(self):
        """The number of individuals that the closed generations have trained; ids start at 0."""
        return 1 + max((individual.id for individual in self.population), default=-1)


def begun(path):
    """Whether a folder holds a run."""
    return os.path.exists(Path(path) / "config.json")


def read_config(path):
    """The config of the run in a folder. Raises RunError."""
    if not begun(path):
        raise RunError(f"{path} holds no run")
    return unsealed(_read(file := Path(path) / "config.json"), file)


def read_log(path, end=None):
    """The lines of a run's log as dicts, one for each closed generation. Raises RunError."""
    return [unsealed(line, f"line {i} of {path}/log.jsonl")
            for i, line in enumerate(_lines(path, "log.jsonl")[:end], 1)]


def read_timing(path):
    """The lines of a run's timing.jsonl as dicts. Lines of older runs lack the commit."""
    return list(map(json.loads, _lines(path, "timing.jsonl")))


@cache  # what this process has imported stays the same
def commit():
    """The commit of this code, with "-dirty" if it was changed; "" outside of a git repository."""
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent,
                              capture_output=True, text=True).stdout.strip()
    except OSError:  # there is no git
        return ""


def _lines(path, name):
    """The whole lines of a file. An interruption can leave half a line, which is dropped."""
    file = Path(path) / name
    data = _read(file) if file.exists() else b""
    return [line + b"\n" for line in data.split(b"\n")[:-1]]


def differing(old, new):
    """The names of the settings in which two configs differ."""
    return [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
