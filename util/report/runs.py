"""What a report reads of a run: the results of test.py, and run.json, diagnosis.json and the events beside them.

Many runs fit one small file, a line of JSON each, from which the same tables are made.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pandas as pd
from pydantic import BaseModel, Field, FiniteFloat, ValidationError, field_validator, model_validator

from util.config import Count
from util.files import read_json, write_text


class Scored(BaseModel):
    per_seed: Annotated[list[FiniteFloat], Field(min_length=1)]


class Calibrated(BaseModel):
    threshold: FiniteFloat
    miou: Scored


class Machine(BaseModel):
    device: str | None = None
    torch: str | None = None
    git_revision: str | None = None
    git_clean: bool | None = None

    @property
    def revision(self) -> str:
        return (self.git_revision or "unknown")[:7] + " (dirty tree)" * (self.git_clean is False)


class Cost(BaseModel):
    steps: int
    seconds: float
    peak_memory_mib: float


class Start(BaseModel):
    time: str
    step: int


class Training(Machine):
    """What is kept of run.json; ``finished`` is there once the training has ended."""

    starts: list[Start] = []
    finished: Cost | None = None
    train_list_sha256: str | None = None


class Diagnosis(BaseModel):
    """What is kept of diagnosis.json, which scripts/diagnose.py writes: figures on novel and on base classes."""

    novel: dict[str, Any]
    base: dict[str, Any]


class RunConfig(BaseModel):
    data: dict[str, Any] = {}
    model: dict[str, Any]
    loss: dict[str, Any]
    train: dict[str, Any] = {}
    eval: dict[str, Any] = {}
    seed: int

    @field_validator("data")
    @classmethod
    def _drop_paths(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Leave out what is of one machine, and the names of the classes, which the fold's own YAML says."""
        return {k: value for k, value in data.items() if k not in ("root", "train_list", "val_list", "classes")}


class Run(BaseModel):
    """A results file and what its folder tells about the training; scores are in percent, one for each test seed."""

    run: str
    """the results file"""
    modified: str
    dataset: str
    fold: Annotated[int, Field(ge=0)]
    folds: Count
    shots: Count
    backbone: str
    episodes: Count
    seeds: list[int]
    train_seed: int | None = None
    unit: Literal["percent"]
    miou: Scored
    fb_iou: Scored
    precision: Scored
    calibrated: Calibrated | None = None
    list_sha256: str | None = None
    seconds: FiniteFloat | None = None
    peak_memory_mib: FiniteFloat | None = None
    dtype: str | None = None
    config: RunConfig
    environment: Machine = Machine()
    training: Training | None = None
    diagnosis: Diagnosis | None = None

    @model_validator(mode="after")
    def _check(self) -> "Run":
        if self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} of {self.folds}")
        if any(len(s.per_seed) != max(len(self.seeds), 1) for s in (self.miou, self.fb_iou, self.precision)):
            raise ValueError("per_seed does not fit seeds")
        return self

    @property
    def seed(self) -> int:
        return self.config.seed if self.train_seed is None else self.train_seed

    @property
    def calibrated_miou(self) -> list[float] | None:
        """At the threshold chosen on base classes; training ends with the choice, and 0.5 is not repeated."""
        if self.calibrated is not None:
            return self.calibrated.miou.per_seed
        return self.miou.per_seed if self.training and self.training.finished else None

    @property
    def best_miou(self) -> list[float] | None:
        """At the threshold that is best on the novel classes themselves, as scripts/diagnose.py finds it."""
        found = self.diagnosis.novel.get("miou", {}) if self.diagnosis else {}
        return [max(map(float, found.values()))] if found else None

    @property
    def revisions(self) -> str:
        """Of the evaluation, and of the training where it is another."""
        both = [self.environment, *([self.training] if self.training else [])]
        return ", trained at ".join(dict.fromkeys(machine.revision for machine in both))


class Found(NamedTuple):
    """What lies at the given places."""

    runs: list[Run]
    pending: list[str]
    """folders of runs without results, and how far they are"""
    skipped: list[str]
    """files that cannot be read, and why"""


def collect(places: Sequence[Path]) -> Found:
    """Read every results file below the folders, each once, and every line of the .jsonl files."""
    found = Found([], [], [])
    files = [file for place in places if place.is_dir() for file in sorted(place.rglob("results*.json"))]
    for file in {file.resolve(): file for file in files}.values():
        try:
            found.runs.append(read_run(file))
        except (OSError, ValueError, RecursionError, TypeError) as error:
            found.skipped.append(f"{file.as_posix()} (damaged or not ours: {reason(error)})")
    for place in places:
        for number, line in enumerate(place.read_text(encoding="utf-8").splitlines() if place.is_file() else [], 1):
            try:
                found.runs.append(Run.model_validate_json(line))
            except ValueError as error:
                found.skipped.append(f"{place.as_posix()} line {number} (damaged or not ours: {reason(error)})")
    evaluated = {file.parent for file in files}
    for file in (file for place in places if place.is_dir() for file in sorted(place.rglob("run.json"))):
        if file.parent not in evaluated:
            state = "trained, not evaluated" if read_json(file).get("finished") else "unfinished"
            found.pending.append(f"{file.parent.as_posix()}: {state}")
    return found


def read_run(path: Path) -> Run:
    """Join a results file with the run.json and the diagnosis.json beside it.

    Raises:
        ValueError: the results file is damaged, or is not one.
    """
    results = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(results, dict):
        raise ValueError("it holds no results")
    if "baselines" in results and "miou" not in results:
        raise ValueError("it holds only what needs no training; run test.py with --checkpoint as well")
    training, diagnosis = (read_json(path.with_name(name)) for name in ("run.json", "diagnosis.json"))
    if training:
        train_list = results.get("config", {}).get("data", {}).get("train_list")
        training["train_list_sha256"] = training.get("list_sha256", {}).get(train_list)
    modified = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
    about = {"run": path.as_posix(), "modified": modified}
    return Run.model_validate(results | about | {"training": training or None, "diagnosis": diagnosis or None})


def reason(error: Exception) -> str:
    """The first of what is wrong, in one line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".lstrip(": ")
    return str(error).splitlines()[0]


def write_runs(path: Path, runs: Sequence[Run]) -> None:
    """Write a line a run, sorted by name, so that a file under version control changes where runs did."""
    ordered = sorted(runs, key=lambda run: run.run)
    write_text(path, "".join(run.model_dump_json(exclude_none=True) + "\n" for run in ordered))


def read_curve(run: Run) -> pd.DataFrame | None:
    """The scalars that training wrote at each step as TensorBoard events: a column each, an index of steps."""
    folder = Path(run.run).with_name("tensorboard")
    if not folder.is_dir():
        return None
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # takes a second to import

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1, "tensors": 1})
    events.Reload()
    scalars = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    return pd.DataFrame(scalars).sort_index()
