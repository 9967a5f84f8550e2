"""Sources: one contract for all, and every way a table can be wrong."""

import gc
import io
import json
import os

import datasets
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kdstore.data.columns import group
from kdstore.data.source import UndecodableImage
from kdstore.data.sources import SOURCES, open_source
from kdstore.errors import KdstoreError, SourceError, UnknownName
from kdstore.store.plan import fingerprint_of


def png(color=(200, 30, 30), size=(12, 8), **options) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", size, color).save(sink, "PNG", **options)
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
    with pytest.raises(SourceError, match="'x' stands in row 0 and row 1"):
        open_source(str(folder / "rows.csv"))


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
    gc.collect()  # the file that is left open is this test's affair


def test_missing_and_escaping_paths_are_undecodable_rows_not_crashes(folder):
    (folder / "rows.csv").write_text("path,caption\nnone.png,first\n../../etc/passwd,second\n")
    source = open_source(str(folder / "rows.csv"))
    with pytest.raises(UndecodableImage, match=r"none\.png"):
        source.image(0)
    with pytest.raises(UndecodableImage, match="leaves"):
        source.image(1)


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


@pytest.mark.parametrize("name", ["https://host/{00000..00099}.tar", "s3://bucket/x.parquet", "pipe:aws s3 cp s3://x -", "-", "/dev/stdin", "{tmp}/fifo"])
def test_a_stream_is_refused_with_what_to_do_instead(name, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SourceError, match=r"is a stream: its length is unknown.*Fetch it first"):
        open_source(name.replace("{tmp}", str(tmp_path)))


def test_captions_of_three_kinds_are_kept_apart(folder):
    rows = [
        {"path": "0.png", "alt": "a", "long": ["b", " c "], "blip": '["d", "e"]', "ask": "f"},
        {"path": "1.png", "alt": None, "long": [], "blip": "[2]", "ask": ""},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(f"{folder}/rows.jsonl?caption=alt,long&synthetic=blip&probe=ask")
    kinds = [("a", "human"), ("b", "human"), ("c", "human"), ("d", "synthetic"), ("e", "synthetic"), ("f", "probe")]
    assert [(c.text, c.kind) for c in source.captions(0)] == kinds
    assert [(c.text, c.kind) for c in source.captions(1)] == [("[2]", "synthetic")]  # a caption, not a list
    assert [c.kind for c in open_source(f"{folder}/rows.jsonl?synthetic=alt").captions(0)] == ["synthetic"]
    assert open_source(source.spec).captions(0) == source.captions(0)


def test_keys_by_content_join_equal_images_and_say_so(folder):
    (folder / "twin.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "rows.csv").write_text("path,caption\n0.png,first\n1.png,other\ntwin.png,second\nnone.png,lost\n")
    source = open_source(f"{folder}/rows.csv?key=sha256")
    assert [source.key(i) for i in range(3)] == [source.image(0).sha256, source.image(1).sha256, "no-image-3"]
    assert [c.text for c in source.captions(0)] == ["first", "second"]
    assert source.notices == ("1 of 4 images have the content of another; their captions are joined.",)


def test_rows_without_any_name_are_numbered_and_said(tmp_path):
    source = open_source(str(parquet(tmp_path / "rows.parquet", [{"bytes": png(), "path": None}], caption=["x"])))
    assert source.key(0) == "0"
    assert "row numbers" in source.notices[0]


@pytest.mark.parametrize("absolute", [False, True])
def test_the_same_data_has_the_same_fingerprint_wherever_it_lies(folder, tmp_path_factory, absolute):
    def listed(at):
        (at / "rows.csv").write_text("path,caption\n" + "".join(f"{at / f'{k}.png' if absolute else f'{k}.png'},words {k}\n" for k in range(4)))
        source = open_source(str(at / "rows.csv"))
        assert source.image(3).width == 12
        return fingerprint_of((source.key(i), source.captions(i)) for i in range(len(source)))

    elsewhere = tmp_path_factory.mktemp("else where (1)+")
    for image in folder.glob("*.png"):
        (elsewhere / image.name).write_bytes(image.read_bytes())
    assert listed(folder) == listed(elsewhere)


@pytest.mark.parametrize(("keys", "said"), [([None, "k"], "row 0 has no key"), ([["x"], []], "not texts or numbers")])
def test_rows_whose_key_is_none_are_one_clear_error(folder, keys, said):
    (folder / "rows.jsonl").write_text("".join(json.dumps({"key": key, "image": "0.png", "text": "a"}) + "\n" for key in keys))
    with pytest.raises(SourceError, match=said):
        open_source(str(folder / "rows.jsonl"))


@given(st.lists(st.sampled_from("abcdef"), min_size=1), st.integers(1, 4))
def test_grouping_keeps_every_row_once_in_order(names, chunk):
    chunks = [pa.array(names[i : i + chunk], pa.large_string()) for i in range(0, len(names), chunk)]
    groups = group(pa.chunked_array(chunks))
    expected = [[i for i, n in enumerate(names) if n == name] for name in dict.fromkeys(names)]
    assert [groups.rows(i) for i in range(len(groups))] == expected if groups else len(set(names)) == len(names)


def test_the_registry_names_are_prefixes_that_open():
    assert set(SOURCES) == {"scenes", "hf", "images"}


def test_labels_are_captions_of_the_kind_probe_by_their_names(tmp_path):
    columns = {"label": [1, 0, -1], "number": [7, 0, 3], "image": [{"bytes": png((k, 0, 0)), "path": None} for k in range(3)]}
    features = datasets.Features({"label": datasets.ClassLabel(names=["cat", "dog"]), "number": datasets.Value("int64"), "image": datasets.Image()})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "rows.parquet")
    assert [[(c.text, c.kind) for c in open_source(f"{tmp_path}/rows.parquet?probe=label,number").captions(i)] for i in range(3)] == [
        [("dog", "probe"), ("7", "probe")],
        [("cat", "probe"), ("0", "probe")],
        [("3", "probe")],
    ]


def test_a_folder_of_class_folders_is_a_labelled_source(tmp_path):
    for name in ("n02/b.JPEG", "n01/deep/a.png", "n01/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png())
    (tmp_path / "n02" / "notes.txt").touch()
    source = open_source(str(tmp_path))
    assert [(source.key(i), [(c.text, c.kind) for c in source.captions(i)]) for i in range(len(source))] == [
        ("n01/c.png", [("n01", "probe")]),
        ("n01/deep/a.png", [("n01", "probe")]),
        ("n02/b.JPEG", [("n02", "probe")]),
    ]
    assert source.image(2).width == 12
    with pytest.raises(UnknownName, match="probe"):
        open_source(f"{tmp_path}?probe=label")


def test_scenes_have_labels_when_asked_for_them():
    plain, labelled = open_source("scenes/test:20"), open_source("scenes/test:20?probe=leftmost-color")
    assert labelled.spec == "scenes/test:20?probe=leftmost-color"
    for i in range(20):
        leftmost = min(plain.scene(i).things, key=lambda t: t.x)
        assert labelled.captions(i)[:-1] == plain.captions(i)
        assert (labelled.captions(i)[-1].text, labelled.captions(i)[-1].kind) == (leftmost.color, "probe")
        assert {c.text for c in open_source("scenes/test:20?probe=shape").captions(i) if c.kind == "probe"} == {t.shape for t in plain.scene(i).things}
    with pytest.raises(UnknownName, match="leftmost-color"):
        open_source("scenes/test:20?probe=leftmost-colour")
