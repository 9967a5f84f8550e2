"""DataCompDR's tars: of each sample .npz or .pth.gz with image_emb [A, D] and text_emb [1 + S, D], .syn.json, .json, and .txt where it was joined.

Row 0 of text_emb is of the original caption, which only .txt tells, and row 1 + i of syn_text[i] (apple/ml-mobileclip, hf_dataset_example.py). Rows of
image_emb are of augmented views, which cannot be drawn again here: their parameters are pixels of an image whose size the tar does not say. So the embedding
of one of them is taken, or the mean of all, and the identity says so.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kdstore.data.members import Sample
from kdstore.data.source import Caption
from kdstore.errors import ConfigError, SourceError
from kdstore.store.importing.config import ImportConfig
from kdstore.store.importing.foreign import Arrays, gunzipped, npz_arrays
from kdstore.store.importing.found import Found, Pair, Rows, unknown_sha256
from kdstore.store.importing.tars import Places, content_of, field_of, first_sample, json_of, samples_of, tars_in, text_of
from kdstore.store.plan import Side

ReadTorch = Callable[[bytes], Arrays]
_EMBEDDINGS = ("image_emb", "text_emb")
_KINDS = ("npz", "pth.gz")


def datacompdr(folder: Path, config: ImportConfig, read_torch: ReadTorch | None) -> Found:
    """Open a folder of DataCompDR's tars; raises SourceError, ConfigError for an augmentation that there is not."""
    places = Places(tars_in(folder))
    suffix, first, path = first_sample(places.tars, _KINDS)
    with open(path, "rb") as f:
        views, dim = _embeddings(content_of(f, path, first.members[suffix]), suffix, read_torch, f"{path}: {first.key}")["image_emb"].shape
    if config.augmentation != "mean" and int(config.augmentation) >= views:
        raise ConfigError(f"There are {views} augmentations, found --augmentation {config.augmentation}.", f"Give mean, or 0 to {views - 1}.")
    shards = _Shards(config, places, read_torch, views, dim)
    taken = f"mean of {views}" if config.augmentation == "mean" else f"number {config.augmentation} of {views}"
    encoding = {"norm": "unknown", "precision": "unknown", "layer": "output"}
    notices = [f"Image embeddings are of augmented views ({taken}), which cannot be drawn again: docs/sharing.md, Import."]
    if "txt" not in first.members:
        notices.append("Original captions are not in these tars (.txt): their embeddings are left out, those of synthetic ones taken.")
    return Found(
        {"image/embedding": (dim,), "text/embedding": (dim,)},
        {"image/embedding": {**encoding, "views": ["augmented"], "augmentation": taken}, "text/embedding": encoding},
        shards.pairs,
        shards.read,
        places.hashes if config.sha256 else unknown_sha256,
        {"augmentation": taken},
        tuple(notices),
    )


@dataclass(eq=False)
class _Shards:
    """The samples of some tars, of A augmented `views` and `dim` channels each; what is found in the pass over them is kept in a few bytes per image."""

    config: ImportConfig
    places: Places
    read_torch: ReadTorch | None
    views: int
    dim: int
    originals: array[int] = field(default_factory=lambda: array("b"))  # 1 where the original caption is there
    kinds: array[int] = field(default_factory=lambda: array("b"))

    def pairs(self) -> Iterator[Pair]:
        """Yield key and captions of all samples and find their places; raises SourceError."""
        self.places.clear()
        del self.originals[:], self.kinds[:]
        key, hashed = self.config.key or "uid", self.config.sha256
        for tar, file, sample, path in samples_of(self.places.tars):
            kind = _kind(sample, path)
            fields, synthetic = json_of(file, path, sample, "json"), json_of(file, path, sample, "syn.json").get("syn_text", [])
            if not isinstance(synthetic, list) or not all(isinstance(text, str) for text in synthetic):
                raise SourceError(f"{path}: syn_text of '{sample.key}' is no list of texts.", "Restore the file.")
            original = [text_of(file, path, sample.members["txt"])] if "txt" in sample.members else []
            self.originals.append(len(original))
            self.kinds.append(_KINDS.index(kind))
            sha256 = field_of(fields, hashed, sample, path) if hashed else ""
            self.places.add(tar, sample.members[kind], len(original) + len(synthetic), sha256)
            name = sample.key if key == "name" else field_of(fields, key, sample, path)
            yield name, (*(Caption(text) for text in original), *(Caption(text, "synthetic") for text in synthetic))

    def read(self, side: Side, start: int, stop: int) -> Rows:
        """Return the embeddings of rows `start:stop` of a side."""
        if side == "image":
            each = (found["image_emb"] for _, found in self._each(start, stop))
            which = self.config.augmentation
            return {"image/embedding": np.stack([x.mean(0, dtype=np.float64) if which == "mean" else x[int(which)].copy() for x in each])}
        first, last = (bisect.bisect_right(self.places.texts, row) - 1 for row in (start, stop - 1))
        rows = np.concatenate([found["text_emb"][1 - self.originals[i] :] for i, found in self._each(first, last + 1)])
        return {"text/embedding": rows[start - self.places.texts[first] :][: stop - start]}

    def _each(self, start: int, stop: int) -> Iterator[tuple[int, Arrays]]:
        for i, path, content in self.places.contents(start, stop):
            found = _embeddings(content, _KINDS[self.kinds[i]], self.read_torch, f"{path}, image {i}")
            captions = self.places.texts[i + 1] - self.places.texts[i] + 1 - self.originals[i]
            if found["image_emb"].shape != (self.views, self.dim) or found["text_emb"].shape != (captions, self.dim):
                shapes = " and ".join(str(list(found[name].shape)) for name in _EMBEDDINGS)
                expected = f"{[self.views, self.dim]} and {[captions, self.dim]}"
                raise SourceError(f"{path}, image {i}: expected embeddings {expected}, found {shapes}.", "Restore the file, or leave it out.")
            yield i, found


def _kind(sample: Sample, path: Path) -> str:
    for kind in _KINDS:
        if kind in sample.members:
            return kind
    raise SourceError(f"{path}: the sample '{sample.key}' has no .npz and no .pth.gz: found {', '.join(sample.members)}.", "Name a folder of DataCompDR.")


def _embeddings(content: bytes, kind: str, read_torch: ReadTorch | None, where: str) -> Arrays:
    """Read image_emb and text_emb, both of two axes; raises SourceError."""
    try:
        if kind == "npz":
            found = npz_arrays(content, _EMBEDDINGS)
        elif read_torch is None:
            raise ValueError("it is a file of torch, which is not at hand here")
        else:
            found = read_torch(gunzipped(content))
        if not all(name in found and found[name].ndim == 2 for name in _EMBEDDINGS):
            raise ValueError(f"it has no {' and '.join(_EMBEDDINGS)} of two axes")
    except ValueError as e:
        raise SourceError(f"{where}: its .{kind} cannot be imported: {e}.", "Restore it, or leave it out.") from e
    return found
