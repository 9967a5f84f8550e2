"""The settings of a distillation; apart from the code that uses them, so that reading a recipe imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kdstore.address import store_name
from kdstore.errors import ConfigError, UnknownName


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Settings of a run; those named in `MACHINE` do not decide its result and may differ when it is resumed."""

    cache: str | tuple[str, ...] | None = None  # the store, or one for each teacher; without one the loss must be the task alone
    teacher: str | None = None  # a model that runs beside the student instead of a store (docs/training.md)
    pretrained: str | None = None  # its tag or checkpoint file
    teacher_untrained_seed: int | None = None  # random weights of its architecture instead: a control
    teacher_precision: str = "fp32"
    augment: str = "none"  # random: each image in another view every epoch, seen by both; no store holds targets of these
    augment_scale: tuple[float, ...] = (0.08, 1.0)  # share of the image that a crop takes
    augment_ratio: tuple[float, ...] = (3 / 4, 4 / 3)  # its width to its height
    augment_flip: float = 0.0  # probability; captions tell left from right
    augment_operations: int = 2  # of RandAugment
    augment_strength: float = 0.3  # of these, 1 the strongest
    cache_folder: str | None = None  # of stores that are used where they are; default: KDSTORE_CACHE, or kdstore in the user's cache folder (docs/sharing.md)
    cache_gib: float | None = None  # that it may hold; default: KDSTORE_CACHE_GIB, or 32
    shuffle: str = "auto"  # full; windows:ROWS of whole shards; auto: windows for stores that are elsewhere and larger than the cache
    data: str | None = None  # the source of images; default: the one that the store records
    student: str = "ViT-T-16"
    init: str = "scratch"  # or a model folder, a file or tag of the student's architecture, or inherit[:MODEL], by default the teacher (docs/students.md)
    inherit_layers: str = "even"  # or first: which layers of a deeper model are inherited
    text_tower: str = "own"  # copied: starts as the (first) teacher's; frozen: is the teacher's, and the store's embeddings stand for it
    teacher_weights: str | None = None  # the teacher as a model's name, where the store's name for it does not lead to its weights
    loss: str = "clip-kd"
    out: str | None = None  # default: runs/<student>_<loss>_<store>_seed<seed>
    resume: bool = False
    samples: int | None = None  # pairs seen in all; give this or epochs
    epochs: int | None = None  # default: 32, as CLIP-KD
    batch_size: int = 256  # pairs that are contrasted with each other, of all processes together
    micro_batch: int | None = None  # pairs that a process encodes at once; default: its whole part of the batch (docs/training.md)
    lr: float = 1e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    warmup: float = 0.05  # share of all steps
    grad_clip: float = 1.0  # largest norm of the gradient; 0 does not clip
    max_skipped: int = 10  # steps in a row whose loss or gradient is not finite, each left out, after which the run ends
    ema: float = 0.0  # decay per step of an average of the weights, exported to ema/ in the run folder; 0: none
    seed: int = 0
    cache_weights: tuple[float, ...] = ()  # of each store's teacher in every term; default: 1 each
    teacher_temperature: str | float | tuple[float, ...] = "own"  # scale of their softmax logits: own, a number, one each, or "entropy:NATS" to match
    sigmoid_teacher: str = "refuse"  # softmax terms of teachers trained with a sigmoid; allow, or split: each term its own kind of teachers
    permute_targets: int | None = None  # seed by which image and text targets are permuted, apart from each other: a control (docs/training.md)
    token_standard: str = "channel"  # how teachers' tokens are brought to one scale: channel (mean and variance), phi-s (docs/losses.md)
    projector: str = "auto"  # auto: where the widths differ; always: for comparisons across teachers
    views: str = "auto"  # stored: the augmented ones too, drawn again (docs/views.md); plain; auto: what the store has; unmatched: docs/sharing.md
    join: str = "key"  # how stores find their images in the source; content: those of other keys by the bytes of the images, which reads them all
    changed_images: str = "refuse"  # allow: train on images whose bytes are not those that the teacher saw
    precision: str = "auto"  # fp32 on the CPU, mixed bf16 or fp16 on a GPU
    device: str = "auto"
    grad_checkpointing: bool = False  # keep fewer activations and compute them again
    compile: bool = False  # with torch.compile
    threads: int = 2  # that read and decode ahead
    memory_gib: float = 2.0  # for views and tokens kept for later epochs, of each process
    validate_data: str | None = None  # a source of pairs that are not trained on (docs/training.md)
    validate_cache: str | None = None  # a store of the teacher over such pairs: its agreement with the student is measured too
    validate_every: int = 1000  # steps
    log_every: int = 10  # steps
    save_every: int = 1000  # steps

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise UnknownName.of(f"value of {name}", getattr(self, name), known)
        if self.cache and self.teacher:
            raise ConfigError(f"Both a store and a live teacher ({self.teacher}) are given.", "Give --cache or --teacher.")
        if self.augment != "none" and not self.teacher:
            found = "Unstorable augmentation: a random view is drawn anew in every epoch, and a store holds no target of it."
            raise ConfigError(found, "Extract a store with --views K and leave augment out, or run the teacher live with --teacher.")
        if self.text_tower != "own" and not self.cache:
            raise ConfigError(f"A student with a {self.text_tower} text tower takes it from the teacher of a store, and there is none.", "Give --cache STORE.")
        if self.text_tower == "frozen" and self.projector == "always":
            found = "A student with the teacher's frozen text tower is in the teacher's space, where projector=always has nothing to project to."
            raise ConfigError(found, "Leave projector at auto.")
        if self.permute_targets is not None and (self.text_tower == "frozen" or not (self.cache or self.teacher)):
            raise ConfigError("permute_targets permutes what a teacher says, and here it says nothing, or is the student's text tower.", "Leave it out.")
        if not re.fullmatch(r"auto|full|windows:[1-9]\d{0,14}", self.shuffle):
            raise UnknownName.of("value of shuffle", self.shuffle, ("auto", "full", "windows:ROWS"))
        if self.samples is not None and self.epochs is not None:
            raise ConfigError(f"Both samples ({self.samples}) and epochs ({self.epochs}) are given.", "Give one of them.")
        if self.samples is not None and self.samples < self.batch_size:
            raise ConfigError(f"{self.samples} samples are less than one batch of {self.batch_size}.", "Raise samples or lower batch_size.")
        for name, (low, high) in RANGES.items():
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values,):
                if not isinstance(value, str | None) and not low <= value < high:
                    raise ConfigError(f"{name} must be at least {low:g} and below {high:g}, found {value}.", f"Correct {name}.")

    @property
    def caches(self) -> tuple[str, ...]:
        """The paths of the stores."""
        return (self.cache,) if isinstance(self.cache, str) else self.cache or ()

    @property
    def run_path(self) -> Path:
        """The run folder: `out` or its default."""
        teacher = "+".join(map(store_name, self.caches)) or (f"online-{self.teacher}" if self.teacher else "no-teacher")
        name = f"{self.student}_{self.loss}_{teacher}_seed{self.seed}"
        return Path(self.out) if self.out else Path("runs") / "".join(c if c.isalnum() or c in "._-+" else "-" for c in name.replace(" ", ""))


CHOICES = {
    "inherit_layers": ("even", "first"),
    "text_tower": ("own", "copied", "frozen"),
    "sigmoid_teacher": ("refuse", "allow", "split"),
    "token_standard": ("channel", "phi-s"),
    "projector": ("auto", "always"),
    "views": ("auto", "stored", "plain", "unmatched"),
    "join": ("key", "content"),
    "changed_images": ("refuse", "allow"),
    "teacher_precision": ("fp32", "bf16", "fp16"),
    "augment": ("none", "random"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
}

RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("epochs", "batch_size", "micro_batch", "max_skipped", "validate_every", "threads", "log_every", "save_every"), (1, 2**40)),
    **dict.fromkeys(("lr", "weight_decay", "grad_clip", "memory_gib"), (0, 1e9)),
    **dict.fromkeys(("beta1", "beta2", "warmup", "ema"), (0, 1)),
    **dict.fromkeys(("eps", "cache_weights", "teacher_temperature"), (1e-30, 1e9)),
    **dict.fromkeys(("seed", "permute_targets"), (0, 2**63)),
    "cache_gib": (1e-9, 2**30),
}

MACHINE = (
    *("cache", "cache_folder", "cache_gib", "teacher", "pretrained", "data", "teacher_weights", "out", "resume", "device", "threads", "memory_gib"),
    *("log_every", "save_every", "micro_batch", "grad_checkpointing", "compile", "max_skipped", "validate_data", "validate_cache", "validate_every"),
)
"""Left out of what decides a result (to rounding); the store enters by its digest and the source by its fingerprint, not by their paths."""
