"""The teacher at work on one unit: images decoded in threads ahead of the model, features encoded and written in one behind it.

Batches never cross units, so what is computed depends neither on who works on which unit nor on where a run was stopped. Time is counted where it is
spent (decoding, model, encoding and writing), so that a run can say which of them holds it back.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdstore.data.images import reason_of
from kdstore.data.source import Source, UndecodableImage
from kdstore.errors import SourceError
from kdstore.extract.config import ExtractConfig
from kdstore.extract.fit import encoded, image_features, text_features
from kdstore.extract.parent import RowsOfStore
from kdstore.extract.views import augmentation_of, numbers_of, pictures_of
from kdstore.models.encode import text_token_form
from kdstore.models.load import Model
from kdstore.models.memory import Fitting
from kdstore.store import ArraySpec, Attempt, Codec, Plan, Unit
from kdstore.threads import AHEAD, batches_ahead, decoding_threads

DISTINCT_BYTES = 1 << 30  # of features of captions that are kept in case they come again
ENOUGH = 100  # images from which a share of undecodable ones is believed
BAD_VALUES = "its features are no finite numbers of the stored type"
_NUMBERS = {"image/view", "text/length"}  # beside features, never bad
_TEXT = {"valid": 1}


@dataclass(frozen=True)
class Tally:
    """What was done, and the seconds that it took: of decoding those of one thread over their number, of the rest as they passed.

    `encoded` are pictures or texts that went through the model: views count each, equal captions once.
    """

    images: int = 0
    texts: int = 0
    encoded: int = 0
    invalid: int = 0
    decoding: float = 0.0
    model: float = 0.0
    writing: float = 0.0
    last_reason: str = ""

    def __add__(self, other: Tally) -> Tally:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self) if f.name != "last_reason"}
        return Tally(**sums, last_reason=other.last_reason or self.last_reason)


@dataclass
class Guard:
    """Ends a run whose images, or texts, are not valid, in too large a part of them or all: of ENOUGH or more so far, or of all at the end."""

    side: str
    max_invalid: float
    total: int
    seen: int = 0
    invalid: int = 0

    def add(self, done: Tally) -> None:
        """Count rows; raises SourceError when too many of them are not valid."""
        self.seen, self.invalid = self.seen + done.images + done.texts, self.invalid + done.invalid
        ended = self.seen == self.total
        if self.invalid > self.max_invalid * (self.seen if ended else max(self.seen, ENOUGH)) or (ended and self.invalid == self.seen > 0):
            found = f"{self.invalid} of the first {self.seen} {self.side}s are not valid (the last: {done.last_reason or 'in an earlier unit'})"
            raise SourceError(f"{found}; {100 * self.max_invalid:.3g} % may be.", "Check the data, or allow more with --set max_invalid=SHARE.")


class Extractor:
    """A loaded teacher with all that units of one store need; `write` fills an attempt and may be called for any unit, in any order."""

    def __init__(
        self, config: ExtractConfig, source: Source, plan: Plan, model: Model, arrays: tuple[ArraySpec, ...], codecs: Mapping[str, Codec], fitting: Fitting
    ) -> None:
        self.model = model
        self.fitting = fitting
        self._config = config
        self._source = source
        self._plan = plan
        self._specs = {spec.name: spec for spec in arrays if not spec.name.endswith("/valid")}
        self._codecs = codecs
        self._augmentation = augmentation_of(config, model)
        self._views = range(1 + config.views)
        self.images_at_once = max(1, config.batch // len(self._views))  # a batch is of pictures, and all of an image are in one
        text_shape = text_token_form(model, config.token_layer).shape if "text/tokens" in self._specs else (1, model.embed_dim)
        self._distinct_texts = max(1, DISTINCT_BYTES // (4 * math.prod(text_shape)))
        self._decoders = decoding_threads(model.device.type, config.decoders)
        self._writer = ThreadPoolExecutor(1, "write")

    def close(self) -> None:
        """End the threads."""
        for pool in (self._decoders, self._writer):
            pool.shutdown(cancel_futures=True)

    def write(self, attempt: Attempt, unit: Unit, on_batch: Callable[[Tally], None]) -> Tally:
        """Compute and append all rows of a unit; `on_batch` is told what was done, batch by batch.

        Raises ModelError for values that cannot be stored, what the source raises, DiskFull, CannotWrite, and what `on_batch` raises.
        """
        total, writing = Tally(), deque[Future[Tally]]()
        try:
            for done, write in (self._images if unit.side == "image" else self._texts)(attempt, unit):
                writing.append(self._writer.submit(_written, write))
                if len(writing) > AHEAD:
                    done += writing.popleft().result()
                total += done
                on_batch(done)
            rest = sum((future.result() for future in writing), Tally())
            on_batch(rest)
            return total + rest
        finally:
            for future in writing:
                future.cancel()
            self._writer.submit(int).result()  # nobody writes any more when the attempt is given up

    def decode(self, row: int, views: Sequence[int] | None = None) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Decode and preprocess one image; returns its pixels, None if it cannot be decoded, and what the index says of it.

        The pixels are [C, H, W], or [V, C, H, W] if it is asked for in some `views`.
        """
        try:
            loaded = self._source.image(row)
        except UndecodableImage as e:
            return None, {"sha256": e.sha256, "valid": 0, "reason": e.reason, "width": 0, "height": 0}
        info = {"sha256": loaded.sha256, "valid": 1, "reason": "", "width": loaded.width, "height": loaded.height}
        try:
            if views is None or self._augmentation is None:
                return self.model.preprocess(loaded.image), info
            return pictures_of(self.model, self._augmentation, self._source.key(row), loaded.image, views), info
        except Exception as e:  # what torchvision and Pillow raise for an image that they cannot resize
            return None, {**info, "valid": 0, "reason": reason_of(e)}

    def decode_all(self, rows: range) -> tuple[list[tuple[torch.Tensor | None, dict[str, Any]]], float]:
        """Decode images in all threads; returns them with the seconds that it took: of one thread, over their number."""
        return self._split(list(self._decoders.map(self._timed_decode, rows)))

    def _timed_decode(self, row: int) -> tuple[Any, float]:
        started = time.perf_counter()
        return self.decode(row, views=self._views), time.perf_counter() - started

    def _split(self, timed: list[tuple[Any, float]]) -> tuple[list[Any], float]:
        return [decoded for decoded, _ in timed], sum(seconds for _, seconds in timed) / self._config.decoders

    def _images(self, attempt: Attempt, unit: Unit) -> Iterator[tuple[Tally, Callable[[], int]]]:
        if isinstance(self._source, RowsOfStore) and not self._config.reads_images:
            attempt.index(self._source.index_rows(unit.start, unit.stop))  # no image need be read
            return
        first = unit.start
        for timed in batches_ahead(self._decoders, self._timed_decode, range(unit.start, unit.stop), self.images_at_once):
            decoded, seconds = self._split(timed)
            started = time.perf_counter()
            pixels, rows = [d for d, _ in decoded if d is not None], [info for _, info in decoded]
            features = image_features(self._config, self.model, self.fitting, torch.stack(pixels)) if pixels else {}
            valid = np.array([info["valid"] for info in rows], bool)
            if self._augmentation is not None:
                images = [(self._source.key(row), info) for row, info in enumerate(rows, first) if info["valid"]]
                features["image/view"] = numbers_of(self._augmentation, images, self._views)
            first += len(rows)
            reasons = [info["reason"] for info in rows if not info["valid"]] or [""]
            yield (
                Tally(
                    images=len(rows),
                    encoded=len(pixels) * len(self._views),
                    invalid=int((~valid).sum()),
                    decoding=seconds,
                    model=time.perf_counter() - started,
                    last_reason=reasons[-1],
                ),
                lambda features=features, valid=valid, rows=rows: self._append(attempt, "image/", features, valid, rows),  # type: ignore[misc]
            )

    def _texts(self, attempt: Attempt, unit: Unit) -> Iterator[tuple[Tally, Callable[[], int]]]:
        if not any(name.startswith("text/") for name in self._specs):
            yield Tally(), lambda: self._append(attempt, "text/", {}, np.ones(len(unit), bool))  # the index alone
            return
        batch, started = 4 * self._config.batch, time.perf_counter()
        for distinct, place_N in _spans(self._plan.texts(unit.start, unit.stop), self._distinct_texts):
            kept: dict[str, npt.NDArray[Any]] = {}
            newest_N, row = np.maximum.accumulate(place_N), 0
            for start in range(0, len(distinct), batch):
                part = distinct[start : start + batch]
                for name, values in text_features(self._config, self.model, self.fitting, part).items():
                    kept.setdefault(name, np.empty((len(distinct), *values.shape[1:]), values.dtype))[start : start + len(part)] = values
                ready, encoded_now = int(np.searchsorted(newest_N, start + batch)), len(part)
                for first in range(row, ready, batch):
                    rows = place_N[first : min(first + batch, ready)]
                    features, valid = {name: values[rows] for name, values in kept.items()}, np.ones(len(rows), bool)
                    yield (
                        Tally(texts=len(rows), encoded=encoded_now, model=time.perf_counter() - started),
                        lambda features=features, valid=valid: self._append(attempt, "text/", features, valid),  # type: ignore[misc]
                    )
                    started, encoded_now = time.perf_counter(), 0
                row = ready

    def _append(
        self, attempt: Attempt, side: str, features: Mapping[str, npt.NDArray[Any]], valid: npt.NDArray[np.bool_], rows: Sequence[dict[str, Any]] = ()
    ) -> int:
        """Append the features of valid rows as they are stored, among rows of NaN or code 0; returns how many rows turned out to hold values that cannot be.

        Raises ModelError for such a row, unless the settings have it marked as not valid.
        """
        refuse, codes, good = self._config.bad_values == "refuse", dict(features), np.ones(int(valid.sum()), bool)
        for name in (features.keys() & self._specs.keys()) - _NUMBERS:
            codes[name], good_B = encoded(name, features[name], self._codecs.get(name), self._specs[name].dtype, refuse=refuse)
            good &= good_B.reshape(len(good), -1).all(axis=1)  # of all views
        valid = valid.copy()
        valid[valid] = good
        if not refuse:
            told = zip(rows or [_TEXT] * len(valid), valid, strict=True)
            rows = [row if ok or not row["valid"] else {**row, "valid": 0, "reason": BAD_VALUES} for row, ok in told]
        for name, spec in self._specs.items():
            if not name.startswith(side):
                continue
            block = np.full((len(valid), *spec.shape[1:]), spec.fill, spec.dtype)
            if name == "text/length":
                block[:] = features[name]
            elif name in codes:
                block[valid] = codes[name].reshape(-1, *spec.shape[1:])[good]
            if name == "text/tokens":
                block[np.arange(block.shape[1]) >= features["text/length"][:, None]] = 0  # code 0, whatever it decodes to
            attempt.append(name, block)
        attempt.index(rows)
        return int((~good).sum())


def _spans(texts: list[str], most: int) -> Iterator[tuple[list[str], npt.NDArray[np.int64]]]:
    """Cut texts into spans of at most `most` distinct ones; yields these in order of appearance, and the place among them of each text of the span [N]."""
    distinct: dict[str, int] = {}
    places: list[int] = []
    for text in texts:
        if text not in distinct and len(distinct) == most:
            yield list(distinct), np.array(places)
            distinct, places = {}, []
        places.append(distinct.setdefault(text, len(distinct)))
    yield list(distinct), np.array(places)


def _written(write: Callable[[], int]) -> Tally:
    started = time.perf_counter()
    invalid = write()
    return Tally(invalid=invalid, writing=time.perf_counter() - started, last_reason=BAD_VALUES if invalid else "")
