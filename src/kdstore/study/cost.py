"""What a plan costs before it is run: samples, multiply-accumulates, hours and bytes by stage, what is reused, and what must be fetched first.

GMACs are counted on models without weights, so they are the same everywhere. Hours are these divided by a rate, which is timed here in seconds, or given in the
recipe's table [cost] for a machine that is elsewhere; a share of a peak is an assumption and is shown as one. Training is three forward passes (one forward,
two backward), one more with `grad_checkpointing` and one more with `micro_batch`. Left out: losses, diagnostics and the disk; with rates from the recipe also
reading images and starting processes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch

from kdstore.config import make_config
from kdstore.data.source import Source
from kdstore.data.sources import open_source
from kdstore.errors import ConfigError, EvaluationError, KdstoreError, SourceError
from kdstore.evaluate.datasets import open_vqa
from kdstore.evaluate.fit import build_head
from kdstore.evaluate.heads import PackedQuestions
from kdstore.evaluate.packing import QUESTIONS_PER_ROW
from kdstore.evaluate.protocol import READS, RETRIEVAL_DATA, VqaConfig
from kdstore.extract.config import ExtractConfig
from kdstore.extract.fit import chains_of
from kdstore.models.cost import Cost, cost_of, gmacs
from kdstore.models.names import architecture_of
from kdstore.progress import OnProgress, silent
from kdstore.study.config import CostConfig, StudyConfig
from kdstore.study.downloads import OWNED, Asked, Download, files_of, weights_of
from kdstore.study.grid import Plan, Task
from kdstore.study.rates import WORDS, Rates, fixed_rates, measure_rates

STAGES = {"extract": "images", "distill": "pairs", "retrieval": "images", "vqa": "questions"}  # and what its samples are
BYTES_OF_RUN = 16  # per parameter: the student, and in its checkpoint weights and two moments, each four bytes
SAMPLED = 1_000  # rows of a source that tell how many captions an image has
DRAWN = 100  # scenes that tell how many questions are asked of one
ANSWERS = 3_000  # labels of a head whose data are not looked at


@dataclass(frozen=True)
class Amount:
    """What one task takes, or several: samples, GMACs, seconds (None: no rate is known) and bytes that stay on the disk."""

    tasks: int = 0
    samples: int = 0
    gmacs: float = 0.0
    seconds: float | None = 0.0
    bytes: int = 0

    def __add__(self, other: Amount) -> Amount:
        seconds = None if self.seconds is None or other.seconds is None else self.seconds + other.seconds
        return Amount(self.tasks + other.tasks, self.samples + other.samples, self.gmacs + other.gmacs, seconds, self.bytes + other.bytes)


@dataclass(frozen=True)
class Line:
    """The tasks of one stage and model, and what is left to do of them; `readers` are the runs that a store serves."""

    stage: str
    model: str
    all: Amount = Amount()
    left: Amount = Amount()
    readers: int = 0

    def with_task(self, amount: Amount, *, done: bool, readers: int) -> Line:
        return replace(self, all=self.all + amount, left=self.left + (Amount() if done else amount), readers=self.readers + readers)


@dataclass(frozen=True)
class StudyCost:
    """The lines of a plan, the rates behind their seconds, what [cost] gives, what must be fetched, and what a reader of the numbers has to know."""

    name: str
    arms: int
    cells: int
    lines: tuple[Line, ...]
    rates: Rates | None
    given: CostConfig
    downloads: tuple[Download, ...]
    notes: tuple[str, ...]

    def stage(self, name: str, *, left: bool = False) -> Amount:
        """Sum up one stage, or what is left to do of it."""
        return sum((line.left if left else line.all for line in self.lines if line.stage == name), Amount())

    def total(self, *, left: bool = False) -> Amount:
        return sum((self.stage(name, left=left) for name in STAGES), Amount())

    @property
    def record(self) -> dict[str, Any]:
        """All of it as JSON."""
        stages = {name: {"samples_are": of, "all": asdict(self.stage(name)), "left": asdict(self.stage(name, left=True))} for name, of in STAGES.items()}
        return {**asdict(self), "stages": stages, "total": asdict(self.total()), "left": asdict(self.total(left=True))}


def cost_of_plan(config: StudyConfig, plan: Plan, done: Collection[str] = (), *, on_progress: OnProgress = silent) -> StudyCost:
    """Work out what a plan costs and what of it is left, where tasks of the digests `done` are finished.

    Raises UnknownName and ModelError for models that there are not, ConfigError where neither the data nor [cost] say how many images there are.
    """
    tasks = [task for task in plan.tasks.values() if task.kind in STAGES]
    subjects = {task.digest: _subject(config, plan, task) for task in tasks}
    costs: dict[str, Cost] = {}
    by_architecture = cache(cost_of)  # which is most of the minute that a large plan takes
    for number, name in enumerate(names := list(dict.fromkeys(model for _, model in subjects.values())), start=1):
        costs[name] = by_architecture(architecture_of(name))
        on_progress("count", number, len(names), name)
    count = _Count(config, costs)
    students = {name: costs[name] for name in dict.fromkeys(subjects[task.digest][1] for task in tasks if task.kind == "distill")}
    rates = _rates(config, costs, students, count.data, on_progress)
    readers = Counter(need for task in tasks if task.kind == "distill" for need in task.needs)
    lines: dict[tuple[str, str], Line] = {}
    for task in tasks:
        label, model = subjects[task.digest]
        work = count.work(task, model)
        amount = Amount(1, work.samples, work.gmacs, work.seconds(rates, model), work.bytes)
        key = task.kind, task.label if task.kind == "extract" else label
        lines[key] = lines.get(key, Line(*key)).with_task(amount, done=task.digest in done, readers=readers[task.digest])
    weights = (weights_of(name, costs[name]) for name in map(config.place, config.teachers.values()))
    files = files_of(config.grid.vqa, config.folders)
    return StudyCost(
        name=config.grid.name,
        arms=len(plan.arms),
        cells=sum(len(arm.cells) for arm in plan.arms),
        lines=tuple(line for stage in STAGES for line in lines.values() if line.stage == stage),
        rates=rates,
        given=config.cost,
        downloads=(*filter(None, weights), *files),
        notes=(*count.notes, *(rates.notes if rates else ())),
    )


def _rates(config: StudyConfig, costs: dict[str, Cost], students: dict[str, Cost], data: Source | None, on_progress: OnProgress) -> Rates | None:
    """Return the rates of [cost], else those of this machine; None where the data are elsewhere, so that the study will be too."""
    given = config.cost
    if given.teacher_gmacs_per_second and given.student_gmacs_per_second:
        return fixed_rates(given.device, given.source, costs, given.teacher_gmacs_per_second, students, given.student_gmacs_per_second)
    if given.peak_gmacs_per_second or data is None:
        return None
    vqa = make_config(VqaConfig, {"model": "any"}, config.stages["vqa"])
    distill = config.stages["distill"] | config.machine.get("distill", {})
    options = {name: distill[name] for name in ("device", "precision", "batch_size") if name in distill}
    return measure_rates(costs, students, vqa, data, **options, on_progress=on_progress)


def _subject(config: StudyConfig, plan: Plan, task: Task) -> tuple[str, str]:
    """Return the label and the name here of what a task runs: the model that it names, or the student whose run it needs."""
    named = task.settings.get("teacher") or task.settings.get("model")
    name = named or task.settings.get("student") or plan.tasks[task.needs[0]].settings["student"]
    table = config.teachers if named else config.students
    return next((label for label, model in table.items() if model == name), name), config.place(name)


@dataclass(frozen=True)
class _Work:
    """What a task does: GMACs of encoding, of training and of heads, questions that heads learn from, images that are read, bytes that it leaves."""

    samples: int
    encode: float = 0.0
    train: float = 0.0
    head: float = 0.0
    questions: float = 0.0
    images_read: int = 0
    bytes: int = 0

    @property
    def gmacs(self) -> float:
        return self.encode + self.train + self.head

    def seconds(self, rates: Rates | None, model: str) -> float | None:
        """Return the seconds that it takes at these rates, None if none is known of its model."""
        if rates is None or model not in rates.encode:
            return None
        heads = self.questions / rates.questions if rates.questions else self.head / rates.train.get(model, rates.encode[model])
        working = self.encode / rates.encode[model] + (self.train / rates.train[model] if self.train else 0.0) + heads
        reading = self.images_read / rates.images_read if rates.images_read else 0.0
        return rates.start + (max(working, reading) if rates.beside else working + reading)


@dataclass(frozen=True)
class _Size:
    """Images of a source, its captions, and how many of these are distinct: a tower reads each once."""

    images: int
    texts: int
    distinct: int


class _Count:
    """Counts the work of tasks; sizes of sources and data sets are looked up once. `notes` say what was not counted."""

    def __init__(self, config: StudyConfig, costs: dict[str, Cost]) -> None:
        self.config, self.costs = config, costs
        self.notes: list[str] = []
        self.counted: dict[str, _Work] = {}
        self.size, self.asked = cache(self._size), cache(self._asked)

    @cached_property
    def data(self) -> Source | None:
        """The source that is trained on; None if it is not here."""
        return self._open(self.config.grid.data)[0]

    def work(self, task: Task, model: str) -> _Work:
        """Count one task of a stage; those that differ by their seeds alone are equal."""
        settings = {name: value for name, value in task.settings.items() if name not in ("seed", "seeds", "permute_targets")}
        key = f"{task.kind} {model} {settings}"
        if key not in self.counted:
            count = {"extract": self._extract, "distill": self._distill, "retrieval": self._retrieval, "vqa": self._vqa}[task.kind]
            self.counted[key] = count(settings, model)
        return self.counted[key]

    def _extract(self, settings: dict[str, Any], model: str) -> _Work:
        known = {field.name for field in fields(ExtractConfig)}
        config = make_config(ExtractConfig, {name: value for name, value in settings.items() if name in known} | {"teacher": model})
        cost, size = self.costs[model], self.size(settings["data"])
        images = size.images * (1 + config.views)
        stored = 0
        for name, chain in chains_of(config).items():
            side, _, kind = name.partition("/")
            if name == "text/tokens":
                self._note("The tokens of texts are not in the bytes.")
                continue
            rows = size.texts if side == "text" else size.images if kind == "tokens" else images
            stored += rows * math.prod(chain.shapes(cost.tokens if kind == "tokens" else (cost.embed_dim,))[-1]) * np.dtype(chain.dtype).itemsize
        return _Work(size.images, encode=images * cost.image_gmacs + size.distinct * cost.text_gmacs, images_read=size.images, bytes=stored)

    def _distill(self, settings: dict[str, Any], model: str) -> _Work:
        machine, cost = self.config.machine.get("distill", {}), self.costs[model]
        passes = 3 + bool(machine.get("grad_checkpointing")) + bool(machine.get("micro_batch"))
        pairs, images = settings["samples"], self.size(settings["data"]).images
        kept = 3 * cost.pixels**2 * images <= machine.get("memory_gib", 2.0) * 2**30  # decoded in the first epoch alone
        trained = passes * pairs * (cost.image_gmacs + cost.text_gmacs)
        return _Work(pairs, train=trained, images_read=min(pairs, images) if kept else pairs, bytes=BYTES_OF_RUN * cost.parameters)

    def _retrieval(self, settings: dict[str, Any], model: str) -> _Work:
        cost, size = self.costs[model], self.size(settings.get("data") or RETRIEVAL_DATA)
        return _Work(size.images, encode=size.images * cost.image_gmacs + size.distinct * cost.text_gmacs, images_read=size.images)

    def _vqa(self, settings: dict[str, Any], model: str) -> _Work:
        """Count the model's row and, with controls, those of the question alone and of the untrained twin, which has images of its own."""
        config = make_config(VqaConfig, {**settings, "model": model, "out": "any"})
        train = self.asked(config.dataset, config.train_split, config.train_images)
        evaluated = self.asked(config.dataset, config.eval_split, config.eval_images)
        towers, heads = (2, 3) if config.controls else (1, 1)
        seen = train.images * (3 * config.epochs if config.tuned else 1) + evaluated.images
        questions = heads * (config.epochs * train.questions + evaluated.questions / 3)
        per_row = max(1, min(QUESTIONS_PER_ROW, round(train.questions / max(1, train.images))))
        return _Work(
            evaluated.questions,
            encode=towers * seen * self.costs[model].image_gmacs,
            head=3 * questions * self._head(self.costs[model], config, per_row),
            questions=questions,
            images_read=train.images + evaluated.images,
        )

    def _open(self, spec: str) -> tuple[Source | None, str]:
        """Open a source that is here, and say why not; a table of the hub is not looked for."""
        place = self.config.place(spec)
        if place.startswith("hf:"):
            return None, f"{place} is on the Hub."
        try:
            return open_source(place), ""
        except SourceError as e:
            return None, e.message

    def _size(self, spec: str) -> _Size:
        data = spec == self.config.grid.data
        source, why = (self.data, "") if data and self.data is not None else self._open(spec)
        if source is not None:
            texts = [caption.text for i in range(min(SAMPLED, len(source))) for caption in source.captions(i)]
            scale = len(source) / min(SAMPLED, len(source))
            return _Size(len(source), round(scale * len(texts)), round(scale * len(set(texts))))
        given = self.config.cost
        images, captions = (given.images, given.captions) if data else (given.retrieval_images, given.retrieval_captions)
        if images is None:
            raise ConfigError(f"How many images {spec} has is not known: {why}", f"Write {'images' if data else 'retrieval_images'} = N in [cost].")
        self._note(f"{spec} is not here: {images:,} images with {captions:g} captions each, as [cost] says.")
        return _Size(images, round(images * captions), round(images * captions))

    def _asked(self, dataset: str, splits: str, limit: int | None) -> Asked:
        parts = list(self._splits(dataset, splits.split("+"), limit))
        return Asked(sum(part.images for part in parts), sum(part.questions for part in parts))

    def _splits(self, dataset: str, splits: list[str], limit: int | None) -> Iterator[Asked]:
        for split in splits:
            known = OWNED[dataset].splits.get(split.removesuffix("_balanced")) if dataset in OWNED else None
            if known is None and dataset == "scenes":
                few = open_vqa(dataset, split, num_images=DRAWN)
                images = limit or len(open_source(f"scenes/{split}"))
                yield Asked(images, round(images * len(few.questions) / few.num_images))
                continue
            if known is None:
                known = self._opened(dataset, split)
            share = 1.0 if limit is None else min(1.0, limit / max(1, known.images))
            yield Asked(round(share * known.images), round(share * known.questions))

    def _opened(self, dataset: str, split: str) -> Asked:
        try:
            found = open_vqa(self.config.place(dataset), split, folder=self.config.folders.get(dataset))
        except (EvaluationError, OSError) as e:
            self._note(f"{dataset}/{split} is not counted: {e.message if isinstance(e, KdstoreError) else e}")
            return Asked(0, 0)
        return Asked(found.num_images, len(found.questions))

    def _head(self, cost: Cost, config: VqaConfig, per_row: int) -> float:
        """Count the GMACs of a head's forward pass per question."""
        tokens, features = cost.tokens if READS[config.head] == "tokens" else (1, cost.embed_dim)
        plain = VqaConfig(model="any", head=config.head, width=config.width, layers=config.layers, attention_heads=config.attention_heads)
        return _head_gmacs(plain, config.grid**2 if config.grid else tokens, features, per_row)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


@cache
def _head_gmacs(config: VqaConfig, tokens: int, features: int, questions: int) -> float:
    """Count a head's forward pass on one image with so many questions, for each of these."""
    with torch.device("meta"):
        head = build_head(config, features, ANSWERS, num_words=1)
        word_RS, start_RP = torch.zeros(1, questions * WORDS, dtype=torch.long), torch.zeros(1, questions, dtype=torch.long)
        packed = PackedQuestions(word_RS, word_RS, word_RS, start_RP)
        return gmacs(lambda image_RTW: head(image_RTW, packed), torch.empty(1, tokens, features)) / questions
