"""Features that others computed: every layout is read row by row, what it does not say is unknown, and what a stranger may have planted is refused."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save

from kdstore.data.source import Caption
from kdstore.errors import JoinError, SourceError, UnknownName
from kdstore.evaluate.results import augmented_notice
from kdstore.extract.torchfile import read_tensors
from kdstore.store import open_store, verify_store
from kdstore.store.importing import IMPORTS, ImportConfig, import_store
from kdstore.store.importing.foreign import MAX_SAMPLE_BYTES

RNG = np.random.default_rng(0)
IMAGES = 37
Make = Callable[[Path], Any]


def as_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def as_npz(**arrays: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.savez(sink, **arrays)
    return sink.getvalue()


def clip_retrieval(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write what clip-retrieval 2.45 wrote of 12 images in two partitions, with more rows: the names, types and columns are those."""
    image, text = (RNG.normal(size=(IMAGES, 8)).astype("f2") for _ in range(2))
    for part, rows in enumerate((slice(0, 20), slice(20, IMAGES))):
        for name, values in (("img_emb", image), ("text_emb", text)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            np.save(folder / name / f"{name}_{part:04d}.npy", values[rows])
        (folder / "metadata").mkdir(exist_ok=True)
        keys = [f"{i:05d}" for i in range(IMAGES)][rows]
        pq.write_table(pa.table({"image_path": keys, "caption": [f"caption {key}" for key in keys]}), folder / f"metadata/metadata_{part:04d}.parquet")
    return image, text


def datacompdr(folder: Path, *, kind: str = "npz", original: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Write shards as DataCompDR has them: 3 augmentations, an original and two synthetic captions of each image, keys in the json."""
    image, text = RNG.normal(size=(IMAGES, 3, 8)).astype("f4"), RNG.normal(size=(IMAGES, 3, 8)).astype("f4")
    for shard in range(2):
        members = []
        for i in range(shard * 20, min(IMAGES, shard * 20 + 20)):
            features = {"image_emb": image[i], "text_emb": text[i]}
            content = as_npz(**features)
            if kind == "pth.gz":
                sink = io.BytesIO()
                torch.save({name: torch.from_numpy(value).bfloat16() for name, value in features.items()}, sink)
                content = gzip.compress(sink.getvalue())
            members += [(f"{i:08d}.url.txt", b"http://somewhere"), (f"{i:08d}.{kind}", content)]
            members += [(f"{i:08d}.syn.json", json.dumps({"syn_text": [f"syn {i} {j}" for j in range(2)]}).encode())]
            members += [(f"{i:08d}.paug.json", b'{"param_aug": "[]"}'), (f"{i:08d}.json", json.dumps({"uid": f"uid{i}", "sha256": f"{i:064x}"}).encode())]
            members += [(f"{i:08d}.txt", f"caption {i}".encode())] if original else []
        as_tar(folder / f"{shard:08d}.tar", members)
    return image, text


def theia(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write a model's shards as Theia's extraction does: bfloat16 tensors embedding [C, H, W] and cls_token [1, C]."""
    grid, cls = torch.randn(IMAGES, 8, 2, 3, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.arange(IMAGES * 8.0).view(IMAGES, 1, 8).bfloat16()
    samples = [(f"n{i:04d}.some_model.safetensors", save({"embedding": grid[i].contiguous(), "cls_token": cls[i].contiguous()})) for i in range(IMAGES)]
    for shard in range(2):
        as_tar(folder / f"imagenet_train-{shard:06d}-train.tar", samples[shard * 20 : shard * 20 + 20])
    return grid.float().numpy(), cls.float().numpy()


def plain(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir()
    image, text = RNG.normal(size=(IMAGES, 8)).astype("f4"), RNG.normal(size=(IMAGES // 2 * 2, 8)).astype("f8")
    (folder / "keys.txt").write_text("".join(f"k{i}\n" for i in range(IMAGES)))
    (folder / "captions.jsonl").write_text("".join(json.dumps([f"c{i}", "\ud800"] if i % 2 else []) + "\n" for i in range(IMAGES)))
    np.save(folder / "image.npy", image)
    np.save(folder / "text.npy", text)
    return image, text


MAKERS: dict[str, Make] = {"clip-retrieval": clip_retrieval, "datacompdr": datacompdr, "npy": plain, "theia": theia}


def imported(folder: Path, out: Path, format: str, source: Any = None, **options: Any) -> Any:
    config = ImportConfig(format=format, unit_rows=16, **{"dtype": "float32", **options})
    return import_store(folder, out, config, source=source, read_torch=read_tensors)


@pytest.mark.parametrize("format", IMPORTS)
def test_every_format_becomes_a_whole_store_that_says_what_it_does_not_know(format: str, tmp_path: Path) -> None:
    MAKERS[format](tmp_path / "theirs")
    made = imported(tmp_path / "theirs", tmp_path / "store", format)
    store = open_store(tmp_path / "store")
    assert verify_store(tmp_path / "store").ok
    assert (made.images, store.digest) == (IMAGES, made.digest)
    assert {"teacher.weights_sha256", "teacher.logit_scale", "teacher.logit_bias", "preprocessing"} <= set(made.unknown)
    assert not {"weights_sha256", "logit_scale", "logit_bias"} & store.identity["teacher"].keys()
    assert store.identity["teacher"]["imported"]["format"] == format
    assert str(tmp_path) not in (tmp_path / "store/manifest.json").read_text() + (tmp_path / "store/run.json").read_text()
    assert imported(tmp_path / "theirs", tmp_path / "store", format).digest == made.digest
    told = imported(tmp_path / "theirs", tmp_path / "told", format, teacher="T", logit_scale=100.0, logit_bias="none")
    assert open_store(tmp_path / "told").identity["teacher"]["logit_bias"] is None
    assert not {"teacher.logit_scale", "teacher.logit_bias"} & set(told.unknown)


def test_rows_of_clip_retrieval_keep_their_key_over_partitions(tmp_path: Path) -> None:
    image, text = clip_retrieval(tmp_path / "theirs")
    imported(tmp_path / "theirs", tmp_path / "store", "clip-retrieval")
    store = open_store(tmp_path / "store")
    assert store.keys().tolist() == [f"{i:05d}" for i in range(IMAGES)]
    assert store.captions() == [f"caption {i:05d}" for i in range(IMAGES)]
    assert np.array_equal(store.gather("image/embedding", np.arange(IMAGES)), image.astype("f4"))
    assert np.array_equal(store.gather("text/embedding", np.arange(IMAGES)), text.astype("f4"))


@pytest.mark.parametrize(("kind", "original"), [("npz", True), ("npz", False), ("pth.gz", True)])
def test_captions_of_datacompdr_have_the_embeddings_that_its_authors_read_for_them(kind: str, original: bool, tmp_path: Path) -> None:
    image, text = datacompdr(tmp_path / "theirs", kind=kind, original=original)
    imported(tmp_path / "theirs", tmp_path / "store", "datacompdr", sha256="sha256")
    store, per_image = open_store(tmp_path / "store"), 3 if original else 2
    kinds = ["human", "synthetic", "synthetic"][3 - per_image :]
    assert store.index("text", "kind").to_pylist() == kinds * IMAGES
    assert store.captions()[: 3 - 1] == (["caption 0", "syn 0 0"] if original else ["syn 0 0", "syn 0 1"])
    near = {"rtol": 1e-2, "atol": 1e-2} if kind == "pth.gz" else {"rtol": 1e-6, "atol": 0}
    np.testing.assert_allclose(store.gather("text/embedding", np.arange(store.num_texts)), text[:, 3 - per_image :].reshape(-1, 8), **near)
    np.testing.assert_allclose(store.gather("image/embedding", np.arange(IMAGES)), image.mean(1), rtol=0, atol=near["atol"] or 1e-6)
    assert store.keys()[5] == "uid5"
    assert store.image_sha256()[5] == f"{5:064x}"
    assert store.identity["arrays"]["image/embedding"]["views"] == ["augmented"]
    assert "is of augmented views (mean of" in augmented_notice(store, "image/embedding")
    assert not augmented_notice(store, "text/embedding")
    imported(tmp_path / "theirs", tmp_path / "second", "datacompdr", augmentation="1", key="name")
    second = open_store(tmp_path / "second")
    np.testing.assert_allclose(second.gather("image/embedding", np.arange(IMAGES)), image[:, 1], **near)
    assert second.keys()[5] == "00000005"


def test_theias_grids_become_tokens_row_by_row_and_captions_come_from_a_source(tmp_path: Path) -> None:
    class Captions:
        spec = "captions"

        def __len__(self) -> int:
            return 3

        def key(self, i: int) -> str:
            return f"n{i + 5:04d}"

        def captions(self, i: int) -> tuple[Caption, ...]:
            return (Caption(f"of {i + 5}"),)

    grid, cls = theia(tmp_path / "theirs")
    imported(tmp_path / "theirs", tmp_path / "store", "theia", source=Captions())
    store = open_store(tmp_path / "store")
    assert np.array_equal(store.gather("image/tokens", np.arange(IMAGES)), grid.reshape(IMAGES, 8, 6).transpose(0, 2, 1))
    assert np.array_equal(store.gather("image/embedding", np.arange(IMAGES)), cls[:, 0])
    assert store.captions() == ["of 5", "of 6", "of 7"]
    assert np.flatnonzero(np.diff(store.offsets)).tolist() == [5, 6, 7]
    assert store.identity["teacher"]["imported"]["model"] == "some_model"
    Captions.key = lambda self, i: f"x{i}"  # type: ignore[method-assign]
    with pytest.raises(JoinError, match="none of the keys"):
        imported(tmp_path / "theirs", tmp_path / "other", "theia", source=Captions())


def test_rows_without_finite_features_keep_their_row_and_too_many_are_refused(tmp_path: Path) -> None:
    image, _ = plain(tmp_path / "theirs")
    image[3, 2], image[20] = np.nan, 1e6
    np.save(tmp_path / "theirs/image.npy", image)
    made = imported(tmp_path / "theirs", tmp_path / "store", "npy", dtype="float16")
    assert (made.invalid_images, made.invalid_texts) == (2, 0)
    assert np.flatnonzero(~open_store(tmp_path / "store").image_valid).tolist() == [3, 20]
    with pytest.raises(SourceError, match="2 of 37 images have no finite features"):
        imported(tmp_path / "theirs", tmp_path / "strict", "npy", dtype="float16", max_invalid=0.01)
    assert not (tmp_path / "strict/manifest.json").exists()


@pytest.mark.parametrize("format", ["datacompdr", "npy"])
def test_an_import_that_was_stopped_goes_on_after_its_last_unit(format: str, tmp_path: Path) -> None:
    MAKERS[format](tmp_path / "theirs")
    whole = imported(tmp_path / "theirs", tmp_path / "whole", format)
    told: list[int] = []

    def stop_at(rows: int) -> Callable[..., None]:
        def on_progress(stage: str, done: int, total: int, note: str = "") -> None:
            if stage == "import: rows":
                told.append(done)
                if done >= rows:
                    raise KeyboardInterrupt

        return on_progress

    config = ImportConfig(format=format, unit_rows=16, dtype="float32")
    with pytest.raises(KeyboardInterrupt):
        import_store(tmp_path / "theirs", tmp_path / "store", config, on_progress=stop_at(33))
    assert not (tmp_path / "store/manifest.json").exists()
    told.clear()
    again = import_store(tmp_path / "theirs", tmp_path / "store", config, on_progress=stop_at(10**6))
    assert again.digest == whole.digest
    assert told[-1] == whole.images + whole.texts - 32  # two units were kept


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('unpickled')",)


def evil_npz() -> bytes:
    sink = io.BytesIO()
    np.savez(sink, image_emb=np.array([Evil()], object), text_emb=np.zeros((3, 8), "f4"))
    return sink.getvalue()


def bomb_npz() -> bytes:
    """1 KB for every MB: an array of zeros of the declared size, and one byte more than an image may have."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("image_emb", "text_emb"):
            archive.writestr(f"{name}.npy", bytes(MAX_SAMPLE_BYTES + 1))
    return sink.getvalue()


def lying_npz() -> bytes:
    inner = io.BytesIO()
    np.lib.format.write_array_header_1_0(inner, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 2**10)})
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("image_emb.npy", inner.getvalue())
    return sink.getvalue()


def torch_file(content: Any) -> bytes:
    sink = io.BytesIO()
    torch.save(content, sink)
    return gzip.compress(sink.getvalue())


HOSTILE = {
    "pickled objects": ("npz", evil_npz, "pickled objects"),
    "a zip bomb": ("npz", bomb_npz, "declares 67108865 bytes"),
    "a header that lies": ("npz", lying_npz, "its header says"),
    "no zip": ("npz", lambda: b"PK", "BadZipFile"),
    "a pickle in a torch file": ("pth.gz", lambda: torch_file({"image_emb": Evil()}), "UnpicklingError"),
    "a bare pickle": ("pth.gz", lambda: gzip.compress(pickle.dumps(Evil())), "BadZipFile"),
    "a gzip bomb": ("pth.gz", lambda: gzip.compress(bytes(MAX_SAMPLE_BYTES + 1)), "declares"),
    "a view larger than its storage": ("pth.gz", lambda: torch_file({"image_emb": torch.zeros(1).expand(2**20, 2**10)}), "declares"),
    "another thing than a dict": ("pth.gz", lambda: torch_file([1]), "holds a list"),
    "a stream that is cut": ("pth.gz", lambda: torch_file({})[:-9], "is cut"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_a_stranger_planted_is_one_line_and_nothing_is_run_or_allocated(case: str, tmp_path: Path) -> None:
    kind, content, message = HOSTILE[case]
    as_tar(tmp_path / "theirs/0.tar", [(f"a.{kind}", content()), ("a.json", b'{"uid": "u"}')])
    with pytest.raises(SourceError, match=message):
        imported(tmp_path / "theirs", tmp_path / "store", "datacompdr")
    assert not (tmp_path / "store").exists()


def test_folders_that_are_not_whole_are_named(tmp_path: Path) -> None:
    def refused(format: str, message: str, change: Callable[[Path], Any], error: type[Exception] = SourceError, **options: Any) -> None:
        folder = tmp_path / f"{format}-{len(list(tmp_path.iterdir()))}"
        MAKERS[format](folder)
        change(folder)
        with pytest.raises(error, match=message):
            imported(folder, tmp_path / "out", format, **options)
        assert not (tmp_path / "out").exists()

    refused("npy", "has 37 rows, and there are 38 keys", lambda folder: (folder / "keys.txt").write_text("".join(f"{i}\n" for i in range(38))))
    refused("npy", "more than once: k0", lambda folder: (folder / "keys.txt").write_text("k0\n" * IMAGES))
    refused("npy", "no JSON list of texts", lambda folder: (folder / "captions.jsonl").write_text("nonsense\n"))
    refused("npy", "has 1000 bytes", lambda folder: os.truncate(folder / "image.npy", 1000))
    refused("npy", "pickled objects", lambda folder: np.save(folder / "image.npy", np.array([Evil()], object)))
    refused("npy", "not float16, float32 or float64", lambda folder: np.save(folder / "image.npy", np.zeros((IMAGES, 8), "i4")))
    refused("npy", "no store can hold", lambda folder: np.save(folder / "image.npy", np.zeros((IMAGES, 0), "f4")))
    refused("npy", "one after the other", lambda folder: np.save(folder / "image.npy", np.zeros((IMAGES, 8), "f4", order="F")))
    refused("clip-retrieval", "have other partitions", lambda folder: (folder / "img_emb/img_emb_0001.npy").unlink())
    refused("clip-retrieval", "its metadata has 17 rows", lambda folder: np.save(folder / "text_emb/text_emb_0001.npy", np.zeros((16, 8), "f2")))
    refused("clip-retrieval", "column", lambda folder: None, UnknownName, key="url")
    refused("datacompdr", "has no text or number 'id'", lambda folder: None, key="id")
    refused("datacompdr", "'uid0' is no sha256", lambda folder: None, sha256="uid")
    refused("datacompdr", "not a whole tar", lambda folder: os.truncate(folder / "00000001.tar", 3000))
    refused("theia", "There is no .tar", lambda folder: [file.unlink() for file in folder.iterdir()])
    with pytest.raises(UnknownName, match="npy"):
        imported(tmp_path, tmp_path / "out", "numpy")
