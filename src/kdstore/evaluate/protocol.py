"""The settings of all evaluations, the same for every model that is compared; apart from the code that uses them, which imports torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from kdstore.config import check_at_least_one
from kdstore.errors import ConfigError, UnknownName
from kdstore.evaluate.datasets import check_vqa_name

HEADS_VERSION = 2
"""Of what heads compute by the same settings: another one for any change, so that no result or row of other heads is taken for one of these."""


@dataclass(frozen=True, kw_only=True)
class VqaConfig:
    """What is evaluated, on which questions, with which head; batch, rate and width were chosen on scenes, for few seconds on two cores."""

    model: str | None = None
    pretrained: str | None = None
    features: str | tuple[str, ...] | None = None  # stores of a model's image features, instead of the model
    mode: str = "frozen"  # or head+last-K, full
    image_size: int | None = None  # pixels; positions are interpolated; None: the model's own
    dataset: str = "scenes"
    folder: str | None = None  # of data sets that are files
    train_split: str = "train"  # 'train+val' where the evaluated split has no answers
    eval_split: str = "test"
    leaks: str = "report"  # images that are in both splits; or refuse
    train_images: int | None = None  # the first ones of the split; None: all
    eval_images: int | None = None
    metric_version: str | None = None  # None: the default of the data set's metric
    head: str = "coattention"
    heads_version: int = HEADS_VERSION  # of what heads compute; recorded, no other can be had
    question_encoder: str = "scratch"  # or own-text-tower
    controls: bool = True  # the rows question-only, untrained and vocabulary-oracle beside the model's
    min_answer_count: int = 1  # training questions an answer must lead to be in the vocabulary
    lookup: str = "normalised"  # of answers in the vocabulary; or raw, as in the published recipes
    grid: int | None = None  # average tokens to this many rows and columns
    width: int = 64
    layers: int = 2
    attention_heads: int = 4
    epochs: int = 6
    early_stopping: float = 0.0  # share of the training images held out to choose the epoch
    patience: int = 2  # epochs without a better score on these before training ends
    batch_images: int = 16
    learning_rate: float = 2e-3
    tower_rate: float = 0.1  # learning rate of the image tower's blocks as a share of the head's
    weight_decay: float = 0.01
    warmup: float = 0.1  # share of the steps
    gradient_clip: float = 1.0
    seeds: tuple[int, ...] = (0,)
    device: str = "auto"
    precision: str = "fp32"  # of the model's forward pass
    encode_batch: int = 256
    pixels_gib: float = 2.0  # memory for decoded images, where the tower is trained
    save_every: int = 500  # steps between checkpoints
    out: str | None = None  # result file; what is finished, and checkpoints, lie beside it

    def __post_init__(self) -> None:
        check_at_least_one(self, "min_answer_count", "layers", "attention_heads", "epochs", "patience", "batch_images", "encode_batch", "save_every")
        for name in ("train_images", "eval_images", "grid", "image_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"'{name}' must be at least 1, found {getattr(self, name)}.", f"Leave {name} out to take what is there.")
        if not self.seeds or not 0 <= min(self.seeds) <= max(self.seeds) < 2**63 or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"'seeds' must be different numbers of 0 or more, below 2^63, found {list(self.seeds)}.", "Write --seeds 0,1,2.")
        if self.eval_split in self.train_splits or len(set(self.train_splits)) < len(self.train_splits):
            raise ConfigError(f"'train_split' and 'eval_split' must differ, found '{self.train_split}' and '{self.eval_split}'.", "Evaluate on another split.")
        if self.width < 4 or self.width % self.attention_heads:
            raise ConfigError(f"'width' must be a multiple of attention_heads ({self.attention_heads}) and at least 4, found {self.width}.", "Correct width.")
        positive = (self.learning_rate, self.tower_rate, self.gradient_clip)
        if not (all(0 < value < math.inf for value in positive) and 0 <= self.weight_decay < math.inf and 0 <= self.warmup < 1):
            raise ConfigError(
                "'learning_rate', 'tower_rate' and 'gradient_clip' must be positive, 'weight_decay' not negative, 'warmup' in [0, 1).", "Correct the schedule."
            )
        if not 0 <= self.early_stopping < 1:
            raise ConfigError(f"'early_stopping' must be a share of the training images in [0, 1), found {self.early_stopping}.", "Correct early_stopping.")
        for name, known in (("question_encoder", QUESTION_ENCODERS), ("lookup", LOOKUPS), ("leaks", LEAKS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"'{name}' must be one of {', '.join(known)}, found '{getattr(self, name)}'.", f"Correct {name}.")
        check_vqa_name(self.dataset)
        if self.heads_version != HEADS_VERSION:
            raise ConfigError(f"'heads_version' must be that of the heads here, {HEADS_VERSION}, found {self.heads_version}.", "Leave it out.")
        if self.head not in READS:
            raise UnknownName.of("head", self.head, READS)
        self._check_mode()

    def _check_mode(self) -> None:
        if bool(self.model) == bool(self.stores):
            raise ConfigError("Either a model or stores of its features are evaluated.", "Give --model or --features.")
        if self.mode not in ("frozen", "full") and not re.fullmatch(r"head\+last-[1-9][0-9]*", self.mode):
            raise ConfigError(f"'mode' must be frozen, head+last-K (as head+last-2) or full, found '{self.mode}'.", "Correct --mode.")
        if self.stores:
            for found, said in (
                (self.tuned, f"--mode {self.mode} trains the image tower"),
                (self.image_size is not None, "--image-size changes what the tower sees"),
                (self.question_encoder == "own-text-tower", "the own text tower encodes questions"),
            ):
                if found:
                    raise ConfigError(f"A store holds features, but {said}.", "Give --model instead of --features.")
        if self.tuned and self.out is None:
            raise ConfigError(f"--mode {self.mode} keeps checkpoints beside its result, and there is no result file.", "Give --out FILE.")
        if self.tuned and self.precision == "fp16":
            raise ConfigError("The image tower is trained in fp32 or bf16, found fp16.", "Correct precision.")

    @property
    def stores(self) -> tuple[str, ...]:
        return (self.features,) if isinstance(self.features, str) else self.features or ()

    @property
    def train_splits(self) -> tuple[str, ...]:
        return tuple(self.train_split.split("+"))

    @property
    def tuned(self) -> bool:
        """Whether (part of) the image tower is trained."""
        return self.mode != "frozen"

    @property
    def blocks(self) -> int | None:
        """How many of the image tower's last blocks are trained; None: the whole tower."""
        return int(self.mode.removeprefix("head+last-")) if self.mode.startswith("head") else 0 if self.mode == "frozen" else None


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """What is evaluated on which pairs."""

    model: str | None = None
    pretrained: str | None = None
    cache: str | None = None  # a store whose embeddings are scored, without a model
    data: str | None = None  # None: the captions of the store; without a store, scenes
    index: str = "exact"  # or lists: approximate, for large sets
    probes: int = 32  # of about 4 sqrt(candidates) lists, how many a query looks at
    index_sample: int = 1000  # queries of either direction that are searched exactly too, to say what lists miss
    device: str = "auto"
    precision: str = "fp32"
    encode_batch: int = 256
    out: str | None = None  # result file

    def __post_init__(self) -> None:
        check_subject(self.model, self.cache)
        if self.index not in INDEXES:
            raise UnknownName.of("index", self.index, INDEXES)
        check_at_least_one(self, "encode_batch", "probes", "index_sample")


@dataclass(frozen=True, kw_only=True)
class ZeroshotConfig:
    """What is scored on which labelled images, and how the classes are put into words."""

    model: str | None = None
    pretrained: str | None = None
    cache: str | None = None  # a store whose images are scored; its teacher as `model` embeds the templates
    data: str | None = None  # a source with labels: captions of the kind `probe`; None: those of the store
    classnames: str | None = None  # a named set or a file; None: the labels themselves
    templates: str = "photo"  # a named set or a file
    device: str = "auto"
    precision: str = "fp32"
    encode_batch: int = 256
    out: str | None = None  # result file

    def __post_init__(self) -> None:
        check_subject(self.model, self.cache)
        check_at_least_one(self, "encode_batch")
        if self.cache is None and self.data is None:
            raise ConfigError("--data is needed: images with labels.", "Name a folder of class folders, or a source with ?probe=LABEL (docs/sources.md).")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Whose features, of which labelled images, are trained on and scored."""

    model: str | None = None
    pretrained: str | None = None
    train_data: str | None = None
    data: str | None = None  # the images that are scored
    train_cache: str | None = None  # stores in place of a model; without data beside them, their own labels
    cache: str | None = None
    classnames: str | None = None  # a named set or a file, where labels are numbers
    neighbours: int = 20
    temperature: float = 0.07
    val_share: float = 0.2  # of the training images, that C is chosen on
    max_iterations: int = 1000
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    encode_batch: int = 256
    out: str | None = None  # result file

    def __post_init__(self) -> None:
        check_subject(self.model, self.cache)
        if self.cache is None and (self.data is None or self.train_data is None):
            raise ConfigError("--train-data and --data are needed: labelled images to train on, and others to score.", "Name sources with ?probe=LABEL.")
        if (self.cache is None) != (self.train_cache is None):
            raise ConfigError("--train-cache and --cache go together.", "Name the store of the training images and that of the scored ones.")
        check_at_least_one(self, "neighbours", "max_iterations", "encode_batch")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"'seed' must be a number from 0 to 2^32 - 1, found {self.seed}.", "Correct --seed.")
        if not (0 < self.val_share < 1 and 0 < self.temperature < math.inf):
            raise ConfigError("'val_share' must lie between 0 and 1, and 'temperature' be positive.", "Correct the protocol.")


@dataclass(frozen=True, kw_only=True)
class AgreementConfig:
    """Which two are compared, the student first: models, then stores; on which images."""

    model: tuple[str, ...] = ()
    cache: tuple[str, ...] = ()
    data: str | None = None  # None: what the first store was extracted from
    samples: int = 2000
    neighbours: int = 10
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    encode_batch: int = 256
    out: str | None = None  # result file

    def __post_init__(self) -> None:
        if len(self.model) + len(self.cache) != 2:
            found = f"Agreement is of two models, found {len(self.model)} of --model and {len(self.cache)} of --cache."
            raise ConfigError(found, "Name the student and its teacher: --model RUN --cache STORE, or two models, or two stores.")
        if not self.cache and self.data is None:
            raise ConfigError("--data is needed: the images that both models see.", "Name a source (kdstore list sources).")
        if not self.model and self.data is not None:
            raise ConfigError("Two stores are compared on what both hold, but --data was given.", "Leave --data out.")
        if self.seed < 0:
            raise ConfigError(f"'seed' must be 0 or more, found {self.seed}.", "Correct --seed.")
        check_at_least_one(self, "encode_batch")
        if not 1 <= self.neighbours < self.samples or self.samples < 4:
            raise ConfigError(f"'samples' must be at least 4 and more than 'neighbours', found {self.samples} and {self.neighbours}.", "Correct them.")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Which predictions are scored, on which questions."""

    dataset: str
    predictions: str  # file in the format of the data set's evaluator
    split: str | None = None  # None: val, or what the data set has in its place
    folder: str | None = None  # of data sets that are files
    metric: str | None = None  # None: the data set's own
    metric_version: str | None = None  # None: the default of the metric
    name: str | None = None  # of the row in tables; None: the file's
    out: str | None = None  # result file


def check_subject(model: str | None, cache: str | None) -> None:
    """Raise ConfigError unless a model or a store is named."""
    if model is None and cache is None:
        raise ConfigError("--model or --cache is needed.", "Name a model, or the store of a teacher's features.")


def parse_seeds(text: str | None) -> tuple[int, ...] | None:
    """Read `0,1,2`; raises ConfigError."""
    try:
        return None if text is None else tuple(map(int, text.split(",")))
    except ValueError as e:
        raise ConfigError(f"'{text}' is no list of seeds.", "Write --seeds 0,1,2.") from e


READS = {"coattention": "tokens", "butd": "tokens", "pooled": "embedding"}
"""Head -> the image features that it reads: `tokens` [T, W], or the `embedding` as one token [1, D]."""

QUESTION_ENCODERS = ("scratch", "own-text-tower")
"""`scratch`: words learned from the training questions, the same for all models. `own-text-tower`: the frozen states of the model's own text
tower, a second protocol, since it mixes what image and text towers know."""

INDEXES = ("exact", "lists")
RETRIEVAL_DATA = "scenes/retrieval:1000"
LOOKUPS = ("normalised", "raw")
LEAKS = ("report", "refuse")

NOT_IN_DIGEST = (
    *("model", "pretrained", "features", "folder", "controls", "seeds"),
    *("device", "encode_batch", "pixels_gib", "save_every", "leaks", "out"),
)
"""Settings that are no part of the protocol: results of equal digests may stand in one table."""
