"""The settings of the VQA protocol: the same for every model that is compared."""

from __future__ import annotations

from dataclasses import dataclass

from kdstore.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class VqaConfig:
    """What is evaluated, on which questions, with which head; batch, rate and width were chosen on scenes, for few seconds on two cores."""

    model: str
    pretrained: str | None = None
    dataset: str = "scenes"
    folder: str | None = None  # of data sets that are files
    train_split: str = "train"
    eval_split: str = "test"
    train_images: int | None = None  # the first ones of the split; None: all
    eval_images: int | None = None
    metric_version: str = "2021"
    head: str = "coattention"
    question_encoder: str = "scratch"  # or own-text-tower
    controls: bool = True  # the rows question-only, untrained and vocabulary-oracle beside the model's
    min_answer_count: int = 1  # training questions an answer must lead to be in the vocabulary
    width: int = 64
    layers: int = 2
    attention_heads: int = 4
    epochs: int = 4
    batch_images: int = 16
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup: float = 0.1  # share of the steps
    gradient_clip: float = 1.0
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"  # of the model's forward pass
    encode_batch: int = 256
    out: str | None = None  # result file

    def __post_init__(self) -> None:
        for name in ("min_answer_count", "layers", "attention_heads", "epochs", "batch_images", "encode_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"'{name}' must be at least 1, found {getattr(self, name)}.", f"Correct {name}.")
        for name in ("train_images", "eval_images"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"'{name}' must be at least 1, found {getattr(self, name)}.", f"Leave {name} out to use the whole split.")
        if self.seed < 0:
            raise ConfigError(f"'seed' must be at least 0, found {self.seed}.", "Correct seed.")
        if self.train_split == self.eval_split:
            raise ConfigError(f"'train_split' and 'eval_split' must differ, found '{self.eval_split}' for both.", "Evaluate on another split.")
        if self.width < 4 or self.width % self.attention_heads:
            raise ConfigError(f"'width' must be a multiple of attention_heads ({self.attention_heads}) and at least 4, found {self.width}.", "Correct width.")
        if not (self.learning_rate > 0 and self.gradient_clip > 0 and self.weight_decay >= 0 and 0 <= self.warmup < 1):
            raise ConfigError("'learning_rate' and 'gradient_clip' must be positive, 'weight_decay' not negative, 'warmup' in [0, 1).", "Correct the schedule.")
        if self.question_encoder not in QUESTION_ENCODERS:
            raise ConfigError(
                f"'question_encoder' must be one of {', '.join(QUESTION_ENCODERS)}, found '{self.question_encoder}'.", "Correct question_encoder."
            )


QUESTION_ENCODERS = ("scratch", "own-text-tower")
"""`scratch`: words learned from the training questions, the same for all models. `own-text-tower`: the frozen states of the model's own text
tower, a second protocol, since it mixes what image and text towers know."""

NOT_IN_DIGEST = ("model", "pretrained", "folder", "controls", "device", "encode_batch", "out")
"""Settings that are no part of the protocol: results of equal digests may stand in one table."""
