"""The settings of the demo: a small grid of teachers and seeds over the built-in scenes."""

from __future__ import annotations

from dataclasses import dataclass

from kdstore.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The same student, data, batches and protocol for every teacher; seeds are paired over teachers."""

    out: str = "demo"
    teachers: tuple[str, ...] = ("scenes-S", "scenes-L")
    student: str = "scenes-T"
    loss: str = "clip-kd-free"
    images: int = 6_000  # training scenes, seen by extraction, distillation and the VQA heads
    samples: int = 16_000  # pairs that each student sees
    batch_size: int = 64
    learning_rate: float = 2e-3
    seeds: tuple[int, ...] = (0,)
    retrieval_images: int = 1_000
    vqa_train_images: int = 2_500
    vqa_test_images: int = 1_000
    vqa_epochs: int = 3
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.teachers or not self.seeds:
            raise ConfigError("A demo needs at least one teacher and one seed.", "Correct teachers and seeds.")
        for name in ("images", "samples", "batch_size", "retrieval_images", "vqa_train_images", "vqa_test_images", "vqa_epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}.", f"Correct {name}.")
        for name in ("images", "samples"):
            if getattr(self, name) < self.batch_size:
                raise ConfigError(f"{getattr(self, name)} {name} are less than one batch of {self.batch_size}.", f"Raise {name} or lower batch_size.")
