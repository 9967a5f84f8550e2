"""The recipe of a study: flat tables, read and normalised without torch.

What the grid decides (teacher, student, loss, samples, seed, paths, projector) is refused in the tables of the stages, and so is what would make a student's
beginning depend on its teacher. Settings of a machine (device, threads, folders) are kept apart: no digest sees them. Settings that have their default are
left out of the digests, so that a new setting of a later version changes none; what a default or a task means is numbered by PROTOCOL instead.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdstore.config import as_dict, make_config, parse_set, read_recipe
from kdstore.distill.config import MACHINE, DistillConfig
from kdstore.errors import ConfigError, UnknownName
from kdstore.evaluate.protocol import RETRIEVAL_DATA, RetrievalConfig, VqaConfig
from kdstore.extract.config import ExtractConfig
from kdstore.jsonfile import digest_of
from kdstore.study.controls import CONTROLS

PROTOCOL = 1  # of what tasks do; results of another are computed anew, and never merged


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The table [study]; `data` is what teachers are extracted over and students learn from."""

    name: str
    data: str
    losses: tuple[str, ...]
    samples: tuple[int, ...]  # pairs that a student sees: schedule lengths
    seeds: tuple[int, ...] = (0, 1, 2)
    vqa: tuple[str, ...] = ("scenes",)  # data sets
    own_samples: int | None = None  # that the teacher of the student's own size sees; default: four times the longest schedule
    own_seed: int = 1_000
    random_architecture: str | None = None  # of the random teacher; default: that of the first teacher
    random_seed: int = 2_000
    margin: float = 1.0  # points of VQA that count as nothing
    without_controls: tuple[str, ...] = ()
    probes: str | None = None  # what diagnostics are measured on, such as scenes/retrieval:1000?swapped=color,shape (docs/scenes.md); default: no diagnostics
    probe_samples: int = 1_000  # images of it, and of `data`
    sweep_seed: int = 3_000
    sweep_samples: int | None = None  # that every trial of [sweep] sees
    sweep_data: str | None = None  # pairs that choose among the trials: neither trained on nor reported

    def __post_init__(self) -> None:
        for name in ("losses", "samples", "seeds", "vqa"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name} must be different values, at least one; found {list(values)}.", f"Correct [study] {name}.")
        if min(*self.samples, self.own_samples or 1, self.sweep_samples or 1, self.probe_samples) < 1 or min(self.seeds) < 0 or not self.margin >= 0:
            raise ConfigError("samples must be positive, seeds and margin not negative.", "Correct [study].")
        for name in ("own_seed", "sweep_seed"):
            if getattr(self, name) in self.seeds:
                raise ConfigError(f"{name} {getattr(self, name)} is a student's seed, too: they would begin with equal weights.", f"Choose another {name}.")
        for control in self.without_controls:
            if control not in CONTROLS:
                raise UnknownName.of("control", control, CONTROLS)
        if "none" in self.losses:
            raise ConfigError("The loss 'none' is the control 'no teacher', which is in every study.", "Leave it out of losses.")


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """The table [cost], for a plan made where the data or the machine are not: how many pairs there are, and how fast the machine is (docs/study.md).

    Rates are GMACs per second, of models that encode and of students in training; without them `peak` gives hours at assumed shares of it.
    """

    images: int | None = None  # of the data
    captions: float = 1.0  # of each of these images
    retrieval_images: int | None = None
    retrieval_captions: float = 1.0
    device: str = ""
    source: str = ""  # of the rates
    teacher_gmacs_per_second: float | None = None
    student_gmacs_per_second: float | None = None
    peak_gmacs_per_second: float | None = None

    def __post_init__(self) -> None:
        rates = (self.teacher_gmacs_per_second, self.student_gmacs_per_second)
        if (rates[0] is None) != (rates[1] is None):
            raise ConfigError("[cost] gives one rate of two.", "Give teacher_gmacs_per_second and student_gmacs_per_second.")
        given = [rate for rate in (*rates, self.peak_gmacs_per_second) if rate is not None]
        counts = [count for count in (self.images, self.captions, self.retrieval_images, self.retrieval_captions) if count is not None]
        if any(not number > 0 for number in (*given, *counts)):
            raise ConfigError("Counts and rates of [cost] must be positive.", "Correct [cost].")
        if given and not (self.device and self.source):
            raise ConfigError("[cost] gives a rate and not of which device, or not from where.", "Write device and source, which are shown with the hours.")


@dataclass(frozen=True)
class StudyConfig:
    """A recipe: the grid, labels -> models, the settings of each stage that decide results (without defaults) and those of the machine."""

    grid: Grid
    teachers: dict[str, str]
    students: dict[str, str]
    stages: dict[str, dict[str, Any]]  # extract, distill, retrieval, vqa
    vqa_of: dict[str, dict[str, Any]] = field(default_factory=dict)  # [vqa.NAME]: of one data set alone
    machine: dict[str, dict[str, Any]] = field(default_factory=dict)  # by stage
    folders: dict[str, str] = field(default_factory=dict)  # name -> path here, of VQA data sets, sources and models
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    cost: CostConfig = CostConfig()  # no part of the recipe

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe as normalised, JSON-able, without what belongs to a machine."""
        vqa = self.stages["vqa"] | self.vqa_of
        return {"study": as_dict(self.grid), "teachers": self.teachers, "students": self.students, **self.stages, "vqa": vqa, "sweep": self.sweep}

    @property
    def digest(self) -> str:
        return digest_of({"protocol": PROTOCOL, **self.recipe})

    @property
    def random_architecture(self) -> str:
        """The random teacher's architecture: by default the first teacher's name without its tag."""
        first = next(iter(self.teachers.values()))
        return self.grid.random_architecture or (first if first.startswith(("hf-hub:", "local-dir:")) else first.partition(":")[0])

    def place(self, name: str) -> str:
        """Return where on this machine lies what the recipe names: its folder if it has one, else the name itself."""
        return self.folders.get(name, name)


def read_study(recipe: str | Path, settings: list[str] | None = None) -> StudyConfig:
    """Read a recipe, with `--set TABLE.KEY=VALUE`; raises ConfigError and UnknownName for what is no study."""
    tables = read_recipe(recipe, set(TABLES))
    for name, value in parse_set(settings).items():
        table, _, key = name.partition(".")
        if table not in TABLES or not key:
            raise ConfigError(f"--set {name} names no setting of a table.", "Write --set study.seeds=[0,1].")
        tables.setdefault(table, {})[key] = value
    return parse_study(tables)


def parse_study(tables: dict[str, dict[str, Any]]) -> StudyConfig:
    """Check and normalise the tables of a recipe; raises ConfigError and UnknownName."""
    grid = make_config(Grid, tables.get("study", {}), where="[study]", hint="All: kdstore list settings study.")
    vqa = dict(tables.get("vqa", {}))
    vqa_of = {name: vqa.pop(name) for name in [name for name, value in vqa.items() if isinstance(value, dict)]}
    for name in vqa_of:
        if name not in grid.vqa:
            raise UnknownName.of("VQA data set in the tables [vqa.NAME]", name, grid.vqa)
    given = {stage: tables.get(stage, {}) for stage in ("extract", "distill", "retrieval")} | {"vqa": vqa}
    config = StudyConfig(
        grid,
        _names(tables, "teachers"),
        _names(tables, "students"),
        {stage: _stage(stage, table) for stage, table in given.items()},
        {name: _stage("vqa", table) for name, table in vqa_of.items()},
        {stage: {name: value for name, value in table.items() if name in _STAGES[stage].machine} for stage, table in given.items()},
        {name: str(Path(path).absolute()) for name, path in _texts(tables, "folders").items()},
        {name: list(values) if isinstance(values, list) else [values] for name, values in tables.get("sweep", {}).items()},
        make_config(CostConfig, tables.get("cost", {}), where="[cost]", hint="All: docs/study.md."),
    )
    _check(config)
    return config


def _check(config: StudyConfig) -> None:
    distill = config.stages["distill"]
    if str(distill.get("init", "scratch")).startswith("inherit"):
        raise ConfigError("A student that inherits from its teacher does not begin as the others do.", "Leave init out of [distill], or name one model.")
    grid, sweep = config.grid, config.sweep
    if sweep and not (grid.sweep_samples and grid.sweep_data):
        raise ConfigError("[sweep] needs its budget and its judges.", "Give sweep_samples and sweep_data in [study].")
    if grid.probes and _set(grid.probes) == _set(grid.data):
        raise ConfigError(f"The probes {grid.probes} are trained on.", "Give probes another split.")
    if grid.sweep_data and _set(grid.sweep_data) in {_set(grid.data), _set(config.stages["retrieval"].get("data") or RETRIEVAL_DATA)}:
        raise ConfigError(f"The sweep would choose on {grid.sweep_data}, which is trained on or reported.", "Give sweep_data another split.")
    for name, values in sweep.items():
        if not values:
            raise ConfigError(f"[sweep] gives no value of {name} to try.", f"Give values, or leave {name} out.")
        for value in values:
            _stage("distill", {**distill, name: value})


def _set(spec: str) -> str:
    """Return a source without its size and what is asked of it: the first pairs of a split are not apart from the split."""
    name = re.sub(r"(:[0-9]+)?(\?.*)?$", "", spec)
    return "scenes/train" if name == "scenes" else name


def _names(tables: dict[str, dict[str, Any]], table: str) -> dict[str, str]:
    """Return {label: model}; raises ConfigError where there is none, or a model has two labels."""
    names = _texts(tables, table)
    if not names or len(set(names.values())) < len(names):
        raise ConfigError(f"[{table}] must name different models, at least one.", f"Write 'label = \"model\"' below [{table}].")
    for label in names:
        if "|" in label or not label.strip():
            raise ConfigError(f"The label '{label}' in [{table}] must have a letter and no '|'.", "Choose another.")
    return names


def _texts(tables: dict[str, dict[str, Any]], table: str) -> dict[str, str]:
    for name, value in tables.get(table, {}).items():
        if not isinstance(value, str):
            raise ConfigError(f"'{name}' in [{table}] must be str, found {value!r}.", f"Correct {name}.")
    return dict(tables.get(table, {}))


def _stage(stage: str, table: dict[str, Any]) -> dict[str, Any]:
    """Check a stage's table and return those of its settings that decide results and are not their defaults."""
    known = _STAGES[stage]
    for name in table:
        if name in known.decided:
            raise ConfigError(f"'{name}' in [{stage}] is for the study to decide, equally for all.", "Leave it out; see docs/study.md.")
    given = as_dict(make_config(known.cls, known.example, table, where=f"[{stage}]", hint=f"All: kdstore list settings {stage}."))
    default = as_dict(make_config(known.cls, known.example))
    return {name: given[name] for name in table if name not in known.machine and given[name] != default[name]}


@dataclass(frozen=True)
class _Stage:
    """The settings of a stage, an example of what the grid gives it, what the grid decides, and what belongs to a machine."""

    cls: Any
    example: dict[str, Any]
    decided: tuple[str, ...]
    machine: tuple[str, ...]


_STAGES = {
    "extract": _Stage(
        ExtractConfig,
        {"teacher": "any"},
        ("teacher", "pretrained", "untrained_seed", "data", "parent", "keys", "out", "workers", "scheduler", "part"),
        ("batch", "device", "threads", "compile", "channels_last"),
    ),
    "distill": _Stage(
        DistillConfig,
        {},
        (
            *("cache", "teacher", "pretrained", "teacher_untrained_seed", "teacher_weights", "data", "student", "loss", "out", "resume", "samples", "epochs"),
            *("seed", "projector", "text_tower", "cache_weights", "permute_targets", "validate_data", "validate_cache"),
        ),
        MACHINE,
    ),
    "retrieval": _Stage(RetrievalConfig, {"model": "any"}, ("model", "pretrained", "cache", "out"), ("device", "encode_batch")),
    "vqa": _Stage(
        VqaConfig,
        {"model": "any"},
        ("model", "pretrained", "features", "dataset", "folder", "controls", "seeds", "out"),
        ("device", "encode_batch", "pixels_gib", "save_every"),
    ),
}
TABLES = ("study", "teachers", "students", *_STAGES, "folders", "sweep", "cost")
