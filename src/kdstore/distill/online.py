"""The teacher itself in place of a store: for comparison, and for augmentation that no store can hold.

It runs on every batch, on the very pictures that the student is shown, through its own preprocessing, and costs what a store saves. Views are drawn by the
sampling that stores use, but from so many that an image does not show the same one twice. No statistics of its features are known, so losses of tokens need
a store.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from PIL import Image

from kdstore.data.source import Source
from kdstore.data.views import RESAMPLING, Augmentation
from kdstore.distill.config import DistillConfig
from kdstore.distill.targets import Rows
from kdstore.distill.tokens import Standard
from kdstore.distill.views import readable_image
from kdstore.errors import MissingFeature
from kdstore.models.encode import encode_image, encode_text
from kdstore.models.load import Model, load_model
from kdstore.progress import OnProgress

EMBEDDINGS = ("image/embedding", "text/embedding")


@dataclass(frozen=True, eq=False)
class RandomViews:
    """Views that are drawn as they are asked for, each by a hash of (seed, view, key)."""

    source: Source
    augmentation: Augmentation
    count: int = 2**31  # view 0 is the plain one

    def picture(self, image: Image.Image, row: int, view: int) -> Image.Image:
        """Draw a view of the image of a row of the source."""
        if view == 0:
            return image
        return self.augmentation.draw(image, self.augmentation.parameters(self.source.key(row), view, image.width, image.height))


class OnlineTargets:
    """A teacher's features, computed when they are asked for: float32, without a gradient, rows numbered as the source's."""

    def __init__(self, model: Model, source: Source, views: RandomViews | None) -> None:
        self.model, self.source, self.views = model, source, views
        self.name = model.name.name
        self.logit_scale: float | None = model.logit_scale
        self.logit_bias: float | None = model.logit_bias
        self._captions = pa.array([caption.text for i in range(len(source)) for caption in source.captions(i)], pa.large_string())
        self._one_at_a_time = threading.Lock()  # batches in memory, and users of a tokenizer that is not thread-safe

    @property
    def identity(self) -> dict[str, Any]:
        """What a store of these features would say of the teacher, and how its views are drawn."""
        drawn = {} if self.views is None else {"views": self.views.augmentation.identity}
        return {**self.model.identity, "precision": self.model.precision, **drawn}

    def shape(self, array: str) -> tuple[int, ...]:
        """Raises MissingFeature for other arrays than embeddings."""
        if array not in EMBEDDINGS:
            raise MissingFeature(f"A live teacher gives embeddings, and the loss needs its {array}.", "Extract a store with --tokens, and give it as --cache.")
        return (self.model.embed_dim,)

    def image(self, array: str, rows: Rows, views: Rows) -> npt.NDArray[Any]:
        pictures = []
        for row, view in zip(rows.tolist(), views.tolist(), strict=True):
            image = readable_image(self.source, row).image
            pictures.append(self.model.preprocess(image if self.views is None else self.views.picture(image, row, view)))
        with self._one_at_a_time:
            return encode_image(self.model, torch.stack(pictures)).cpu().numpy()

    def text(self, array: str, rows: Rows) -> npt.NDArray[Any]:
        """Each distinct caption is encoded once."""
        texts, place_B = np.unique([self._captions[row].as_py() for row in rows.tolist()], return_inverse=True)
        with self._one_at_a_time:
            return encode_text(self.model, texts.tolist()).cpu().numpy()[place_B]

    def standard(self, array: str, kind: str) -> Standard:
        """Raises MissingFeature: there are no statistics of features that are nowhere."""
        raise MissingFeature(f"The loss needs statistics of a teacher's {array}, which a live one has not.", "Extract a store and give it as --cache.")


def online_targets(config: DistillConfig, source: Source, on_progress: OnProgress) -> OnlineTargets:
    """Load the teacher that runs beside the student; raises ModelError, and ConfigError for views that cannot be drawn."""
    assert config.teacher is not None
    seed = config.teacher_untrained_seed
    with torch.random.fork_rng(devices=[]):
        model = load_model(
            config.teacher, config.pretrained, device=config.device, precision=config.teacher_precision, untrained=seed is not None, seed=seed or 0
        )
    if model.name.notice:
        on_progress("notice", 0, 0, model.name.notice)
    return OnlineTargets(model, source, RandomViews(source, _augmentation(config, model)) if config.augment == "random" else None)


def _augmentation(config: DistillConfig, model: Model) -> Augmentation:
    own = model.config["preprocess_cfg"].get("interpolation")
    return Augmentation(
        side=max(model.image_size),
        interpolation=own if own in RESAMPLING else "bicubic",
        scale=config.augment_scale,
        ratio=config.augment_ratio,
        flip=config.augment_flip,
        operations=config.augment_operations,
        strength=config.augment_strength,
        seed=config.seed,
    )
