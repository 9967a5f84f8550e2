"""Sources: one contract for all, and every way a table can be wrong."""

import io
import json

import datasets
import pytest
from PIL import Image

from kdstore.data.source import UndecodableImage, decode_image
from kdstore.data.sources import SOURCES, open_source
from kdstore.errors import KdstoreError, SourceError, UnknownName


def png(color=(200, 30, 30), size=(12, 8), **options) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", size, color).save(sink, "PNG", **options)
    return sink.getvalue()


def noise() -> bytes:
    sink = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture
def folder(tmp_path):
    for k in range(4):
        (tmp_path / f"{k}.png").write_bytes(png((40 * k, 0, 0)))
    rows = "\n".join(f'{k}.png,"[""a {k}"", ""the {k}""]"' for k in range(4))
    (tmp_path / "metadata.csv").write_text(f"file_name,captions\n{rows}\n")
    return tmp_path


def parquet(path, images, **columns):
    table = datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())
    table.to_parquet(path)
    return path


@pytest.fixture(params=["scenes", "folder", "csv", "jsonl", "parquet"])
def source(request, folder, tmp_path):
    if request.param == "scenes":
        return open_source("scenes/val:4")
    if request.param == "folder":
        return open_source(str(folder))
    if request.param == "csv":
        (folder / "rows.csv").write_text("path,caption\n" + "".join(f"{k % 4}.png,words {k}\n" for k in range(8)))
        return open_source(str(folder / "rows.csv"))
    if request.param == "jsonl":
        (folder / "rows.jsonl").write_text("".join(json.dumps({"key": f"k{k}", "image": f"{k}.png", "text": f"t {k}"}) + "\n" for k in range(4)))
        return open_source(str(folder / "rows.jsonl"))
    return open_source(str(parquet(tmp_path / "rows.parquet", [{"bytes": png((k, 0, 0)), "path": None} for k in range(4)], caption=list("abcd"))))


def test_every_source_has_unique_keys_captions_and_images_and_opens_again_by_its_spec(source):
    assert len(source) == 4
    assert len({source.key(i) for i in range(4)}) == 4
    assert all(source.captions(i) for i in range(4))
    again = open_source(source.spec)
    for i in range(4):
        assert again.key(i) == source.key(i)
        assert again.captions(i) == source.captions(i)
        assert again.image(i).sha256 == source.image(i).sha256
        assert source.image(i).image.mode == "RGB"


def test_rows_of_one_path_are_one_image_with_several_captions(folder):
    (folder / "rows.csv").write_text("path,caption\n0.png,first\n1.png,other\n0.png,second\n")
    source = open_source(str(folder / "rows.csv"))
    assert [c.text for c in source.captions(0)] == ["first", "second"]
    assert len(source) == 2


def test_a_missing_caption_column_names_those_that_are_there(folder):
    (folder / "rows.csv").write_text("path,title\n0.png,first\n")
    with pytest.raises(SourceError, match=r"no caption column: found path, title.*caption=COLUMN"):
        open_source(str(folder / "rows.csv"))
    assert open_source(f"{folder}/rows.csv?caption=title").captions(0)[0].text == "first"


def test_a_key_that_stands_twice_is_named(folder):
    (folder / "rows.csv").write_text("key,path,caption\nx,0.png,first\nx,1.png,second\n")
    with pytest.raises(SourceError, match="'x' stands in rows 0 and 1"):
        open_source(str(folder / "rows.csv"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"not an image", "UnidentifiedImageError"), (noise()[:2000], "OSError")],
    ids=["empty", "text", "truncated"],
)
def test_an_image_that_cannot_be_decoded_says_why_and_keeps_its_hash(content, reason):
    with pytest.raises(UndecodableImage, match=reason) as e:
        decode_image(content)
    assert len(e.value.sha256) == 64


def test_cells_of_a_csv_are_read_as_they_are_written(folder):
    (folder / "rows.tsv").write_text("key\tpath\tcaption\n007\t0.png\tNone\n1e3\t1.png\t42\n10\t\tNA\n")
    source = open_source(str(folder / "rows.tsv"))
    assert [source.key(i) for i in range(3)] == ["007", "1e3", "10"]
    assert [source.captions(i)[0].text for i in range(3)] == ["None", "42", "NA"]
    with pytest.raises(UndecodableImage, match="no image"):
        source.image(2)


@pytest.mark.parametrize(("names", "keys"), [("ab", "ab"), ("aa", "01"), (["a", None], "01")])
def test_file_names_beside_encoded_images_are_keys_where_they_tell_images_apart(tmp_path, names, keys):
    images = [{"bytes": png((k, 0, 0)), "path": name} for k, name in enumerate(names)]
    source = open_source(str(parquet(tmp_path / "rows.parquet", images, caption=["x", "y"])))
    assert [source.key(i) for i in range(len(source))] == list(keys)
    assert source.image(1).sha256 != source.image(0).sha256


@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")  # datasets leaves the metadata file open
def test_a_hub_dataset_of_image_files_is_read_where_datasets_put_them(folder, monkeypatch):
    (folder / "metadata.csv").write_text("file_name,caption\n" + "".join(f"{k}.png,words {k}\n" for k in range(4)))
    monkeypatch.chdir(folder.parents[1])  # a folder of two names opens like a repository of the hub
    source = open_source(f"hf:{folder.parent.name}/{folder.name}")
    assert sorted(source.key(i) for i in range(len(source))) == [f"{k}.png" for k in range(4)]
    assert all(source.image(i).width == 12 for i in range(4))


def test_missing_and_escaping_paths_are_undecodable_rows_not_crashes(folder):
    (folder / "rows.csv").write_text("path,caption\nnone.png,first\n../../etc/passwd,second\n")
    source = open_source(str(folder / "rows.csv"))
    with pytest.raises(UndecodableImage, match=r"none\.png"):
        source.image(0)
    with pytest.raises(UndecodableImage, match="leaves"):
        source.image(1)


def test_images_are_upright_and_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    sink = io.BytesIO()
    Image.new("L", (10, 4)).save(sink, "JPEG", exif=exif)
    loaded = decode_image(sink.getvalue())
    assert (loaded.width, loaded.height, loaded.image.mode) == (4, 10, "RGB")


@pytest.mark.parametrize(
    "spec",
    [
        "scenes?caption=x",
        "{tmp}/bad.csv?caption",
        "nowhere",
        "scenes/nope",
        "scenes:many",
        "scenes:0",
        "{tmp}",
        "{tmp}/a.txt",
        "{tmp}/bad.parquet",
        "{tmp}/bad.csv?colour=x",
        "hf:no-such/data",
    ],
)
def test_a_wrong_spec_is_one_clear_error(spec, tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "bad.parquet").write_text("x")
    (tmp_path / "bad.csv").write_text("path,caption\nx,y\n")
    with pytest.raises(KdstoreError) as e:
        open_source(spec.format(tmp=tmp_path))
    assert "\n" not in str(e.value)
    assert e.value.hint


def test_an_unknown_column_option_is_named(folder):
    with pytest.raises(UnknownName, match="capton"):
        open_source(f"{folder}?capton=x")


def test_the_registry_names_are_prefixes_that_open(tmp_path):
    assert set(SOURCES) == {"scenes", "hf"}
