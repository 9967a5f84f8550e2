"""Tars: an index instead of a copy, samples as webdataset groups them, and every way a tar can be wrong."""

import contextlib
import gzip
import io
import json
import os
import tarfile

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kdstore.data import tarindex
from kdstore.data.source import UndecodableImage
from kdstore.data.sources import open_source
from kdstore.data.tars import tars_of
from kdstore.errors import SourceError, UnknownName
from kdstore.store.plan import fingerprint_of


def png(value: int) -> bytes:
    sink = io.BytesIO()
    Image.new("L", (9, 7), value % 256).save(sink, "PNG")
    return sink.getvalue()


def write_tar(path, members, **options):
    """Write (name, content) in order, as webdataset's writer does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def as_img2dataset(path, rows):
    """Write what img2dataset writes: jpg (here a png, which decoding finds out), json, txt."""
    members = []
    for k in rows:
        meta = {"key": f"{k:09d}", "caption": f"words {k}", "url": f"https://x/{k}", "sha256": "0", "uid": f"u{k}", "blip": [f"said {k}"], "status": "success"}
        members += [(f"{k:09d}.jpg", png(k)), (f"{k:09d}.json", json.dumps(meta).encode()), (f"{k:09d}.txt", f"words {k}".encode())]
    return write_tar(path, members)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def shards(tmp_path):
    for shard in range(3):
        as_img2dataset(tmp_path / f"shards/{shard:05d}.tar", range(4 * shard, 4 * shard + 4))
    return tmp_path / "shards"


def rows_of(source):
    return [(source.key(i), source.captions(i)) for i in range(len(source))]


@pytest.mark.parametrize("pattern", ["{00000..00002}.tar", "*.tar", "0000[0-2].tar", "{00000,00001}.tar", ""])
def test_shards_open_by_braces_globs_and_their_folder_and_images_are_read_in_place(shards, pattern):
    source = open_source(f"{shards}/{pattern}")
    assert len(source) == (8 if "," in pattern else 12)
    for i in reversed(range(len(source))):
        assert source.key(i) == f"{i:09d}"
        assert [c.text for c in source.captions(i)] == [f"words {i}"]
        assert source.image(i).image.getpixel((0, 0)) == (i, i, i)
    assert rows_of(open_source(source.spec)) == rows_of(source)
    assert source.notices == ()


def test_captions_and_keys_come_from_json_fields_and_members_that_are_named(shards):
    source = open_source(f"{shards}/*.tar?caption=.txt,url&synthetic=blip&key=uid")
    assert source.key(5) == "u5"
    assert [(c.text, c.kind) for c in source.captions(5)] == [("words 5", "human"), ("https://x/5", "human"), ("said 5", "synthetic")]
    with pytest.raises(UnknownName, match=r"json field in .* 'captoin'. Did you mean caption"):
        open_source(f"{shards}/*.tar?caption=captoin")
    with pytest.raises(UnknownName, match=r"Unknown member of the samples in .* '\.cap'\. Known: \.jpg"):
        open_source(f"{shards}/*.tar?caption=.cap")


def test_the_index_is_built_once_and_anew_for_a_tar_that_changed(shards):
    open_source(str(shards))
    kept = sorted((shards / tarindex.FOLDER).iterdir())
    written = [path.stat().st_mtime_ns for path in kept]
    assert len(kept) == 3
    as_img2dataset(shards / "00001.tar", range(100, 103))
    source = open_source(str(shards))
    assert [source.key(i) for i in (4, 5, 6, 7)] == ["000000100", "000000101", "000000102", "000000008"]
    assert source.image(4).image.getpixel((0, 0)) == (100, 100, 100)
    assert [path.stat().st_mtime_ns == at for path, at in zip(kept, written, strict=True)] == [True, False, True]


def test_an_index_beside_tars_that_cannot_be_written_goes_to_the_users_cache(shards, tmp_path):
    (shards / tarindex.FOLDER).touch()  # a file where the folder should be
    first = rows_of(open_source(str(shards)))
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 3
    assert rows_of(open_source(str(shards))) == first
    (tmp_path / "cache/kdstore/tars").rename(tmp_path / "away")
    (tmp_path / "cache/kdstore/tars").touch()
    assert rows_of(open_source(str(shards))) == first


@given(data=st.data())
def test_a_damaged_or_hostile_index_is_built_anew(data, tmp_path_factory):
    tar = as_img2dataset(tmp_path_factory.mktemp("damaged") / "a.tar", range(3))
    expected = rows_of(open_source(str(tar)))
    (index,) = (tar.parent / tarindex.FOLDER).iterdir()
    content = bytearray(index.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
        index.write_bytes(content)
        assert rows_of(open_source(str(tar))) == expected
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        index.write_bytes(content)
        with contextlib.suppress(SourceError):  # a letter that makes two keys alike
            rows_of(open_source(str(tar)))  # another changed letter is not found, a changed structure is


def test_an_index_that_points_out_of_its_tar_is_not_believed(tmp_path):
    tar = as_img2dataset(tmp_path / "a.tar", range(3))
    expected = rows_of(open_source(str(tar)))
    (place,) = (tmp_path / tarindex.FOLDER).iterdir()
    table = pa.ipc.open_file(place).read_all()
    for column, value in (("offset", -1), ("offset", 10**9), ("size", 10**9), ("size", 2**63 - 1), ("offset", None)):
        wrong = table.set_column(table.schema.get_field_index(column), table.schema.field(column), [pa.array([value, 0, 0], pa.int64())])
        with pa.ipc.new_file(str(place), table.schema) as writer:
            writer.write_table(wrong)
        source = open_source(str(tar))
        assert rows_of(source) == expected
        assert source.image(0).width == 9


def test_samples_are_grouped_up_to_the_first_dot_as_webdataset_does(tmp_path):
    members = [
        ("./a/1.2/x.seg.png", png(1)),
        ("./a/1.2/x.PNG", png(2)),
        ("./a/1.2/x.txt", b" named "),
        ("y.jpeg", png(3)),
        ("y.json", b'{"caption": ["one", "two"]}'),
        (".hidden.png", png(4)),
        ("no-suffix", b""),
        ("z.png", png(5)),
        ("readme.txt", b"not a sample"),
    ]
    source = open_source(str(write_tar(tmp_path / "a.tar", members)))
    assert [source.key(i) for i in range(len(source))] == ["./a/1.2/x", "y", "z"]
    assert [[c.text for c in source.captions(i)] for i in range(3)] == [["named"], ["one", "two"], []]
    assert source.image(0).image.getpixel((0, 0)) == (2, 2, 2)
    assert source.notices == ("1 of 4 samples have no image and are left out.",)
    other = open_source(f"{tmp_path}/a.tar?image=seg.png")
    assert [other.key(i) for i in range(len(other))] == ["./a/1.2/x"]


def test_names_in_a_tar_are_keys_and_nothing_else(tmp_path):
    names = ["../../escape", "/etc/passwd", "a\nb", "long/" * 60 + "x", "\udcff\udcfe", "emoji \U0001f600"]
    tar = write_tar(tmp_path / "in/a.tar", [(f"{name}.png", png(k)) for k, name in enumerate(names)], errors="surrogateescape")
    with tarfile.open(tar, "a") as more:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = kind, "/etc/passwd"
            more.addfile(link)
    before = set(tmp_path.rglob("*"))
    source = open_source(str(tar))
    assert [source.key(i) for i in range(len(source))] == [*names[:4], "\\xff\\xfe", names[5]]
    assert all(source.image(i).image.getpixel((0, 0)) == (i, i, i) for i in range(6))
    assert {path.parent.name for path in {*tmp_path.rglob("*")} - before} == {"in", tarindex.FOLDER}


def test_equal_keys_are_named_and_equal_content_is_joined_and_counted(tmp_path):
    write_tar(tmp_path / "0.tar", [("x.png", png(1)), ("x.txt", b"one"), ("y.png", png(2)), ("y.txt", b"two")])
    write_tar(tmp_path / "1.tar", [("x.png", png(3)), ("x.txt", b"three"), ("z.png", png(1)), ("z.txt", b"four")])
    with pytest.raises(SourceError, match=r"the key 'x' stands in 0.tar and 1.tar. Take \?key=sha256"):
        open_source(str(tmp_path))
    source = open_source(f"{tmp_path}?key=sha256")
    assert [[c.text for c in source.captions(i)] for i in range(3)] == [["one", "four"], ["two"], ["three"]]
    assert [source.key(i) for i in range(3)] == [source.image(i).sha256 for i in range(3)]
    assert source.notices == ("1 of 4 images have the content of another; their captions are joined.",)
    with pytest.raises(SourceError, match=r"'x' has two members \.png"):
        open_source(str(write_tar(tmp_path / "twice.tar", [("x.png", png(1)), ("x.png", png(2))])))


def test_text_that_cannot_be_read_is_counted_and_its_sample_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(tarindex, "MAX_TEXT", 40)
    texts = {
        "a.txt": b"\xff\xfe",
        "b.json": b"{broken",
        "c.json": b"[" * 30,
        "d.txt": b"x" * 41,
        "e.json": b'["list"]',
        "f.json": b'{"caption": "\\ud800 half"}',
    }
    members = [m for name, content in texts.items() for m in ((f"{name[0]}.png", png(ord(name[0]))), (name, content))]
    source = open_source(str(write_tar(tmp_path / "a.tar", members)))
    assert [c.text for i in range(6) for c in source.captions(i)] == ["? half"]
    assert source.notices[0].startswith("5 members with text cannot be read")
    with pytest.raises(SourceError, match="'a' has no text or number in its json field 'caption'"):
        open_source(f"{tmp_path}/a.tar?key=caption")


def test_a_broken_image_in_a_tar_is_a_row_with_a_reason(tmp_path):
    source = open_source(str(write_tar(tmp_path / "a.tar", [("x.jpg", b""), ("x.txt", b"a"), ("y.jpg", b"text")])))
    for i, reason in enumerate(("the file is empty", "not an image")):
        with pytest.raises(UndecodableImage, match=reason):
            source.image(i)


def test_the_fingerprint_does_not_depend_on_where_the_tars_lie(shards, tmp_path):
    here = fingerprint_of(rows_of(open_source(str(shards))))
    shards.rename(tmp_path / "moved")
    assert fingerprint_of(rows_of(open_source(f"{tmp_path}/moved/{{00000..00002}}.tar"))) == here


@pytest.mark.parametrize("cut", [0, 100, 512, 700, 1024, 1536, 10_240 - 1024])
def test_a_tar_that_was_cut_is_refused_wherever_it_was_cut(tmp_path, cut):
    whole = write_tar(tmp_path / "whole.tar", [(f"{k}.png", png(k)) for k in range(9)]).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:cut])
    with pytest.raises(SourceError, match=r"a\.tar is not a whole tar.* Fetch it again") as e:
        open_source(f"{tmp_path}/a.tar")
    assert "\n" not in str(e.value)


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(tmp_path):
    content = bytearray(write_tar(tmp_path / "a.tar", [(f"{k}.png", png(k)) for k in range(9)]).read_bytes())
    content[4 * 1024 + 10] ^= 1
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(SourceError, match="no end mark and no further member at byte 4,096"):
        open_source(f"{tmp_path}/a.tar")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("packed.tar.gz", "is compressed by gzip; only plain tars.*Unpack it"),
        ("packed.tar", "is compressed by gzip; only plain tars.*Unpack it"),
        ("text.tar", "is not a whole tar"),
        ("empty.tar", r"No sample of .* has an image \(jpg.*found nothing"),
        ("texts.tar", r"has an image .*found .json, .txt\. Name its suffix"),
        ("x-{0..2}.tar", r"3 of 3 tars of .* are missing, the first: .*x-0\.tar"),
        ("{0..99999999}.tar", "names more than 1,000,000 tars"),
        ("none-*.tar", "1 of 1 tars .* are missing"),
        ("texts.tar?column=x", "Unknown option 'column'"),
        ("bare.tar?caption=alt", r"'alt' in .* is a json field, but no sample has any: found \.png"),
    ],
)
def test_a_wrong_tar_is_one_clear_error(tmp_path, name, said):
    for packed in ("packed.tar.gz", "packed.tar"):
        (tmp_path / packed).write_bytes(gzip.compress(b"x" * 10_240))
    (tmp_path / "text.tar").write_bytes(b"hello " * 500)
    write_tar(tmp_path / "empty.tar", [])
    write_tar(tmp_path / "texts.tar", [("a.txt", b"x"), ("a.json", b"{}")])
    write_tar(tmp_path / "bare.tar", [("a.png", png(0))])
    with pytest.raises((SourceError, UnknownName), match=said) as e:
        open_source(f"{tmp_path}/{name}")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("cut", [True, False])
def test_a_tar_that_changes_under_a_run_ends_it_with_one_clear_error(shards, cut):
    source = open_source(f"{shards}/00000.tar")
    if cut:
        source.image(0)  # the tar is open now
        os.truncate(shards / "00000.tar", 600)
        said = r"00000\.tar was cut"
    else:
        as_img2dataset(shards / "00000.tar", range(50, 57))
        said = r"00000\.tar changed since it was indexed"
    with pytest.raises(SourceError, match=said):
        source.image(3)


@given(st.integers(0, 30), st.integers(0, 30), st.booleans())
def test_braces_count_both_ways_and_keep_leading_zeros(tmp_path_factory, first, last, padded):
    folder = tmp_path_factory.mktemp("braces")
    step = 1 if last >= first else -1
    names = [f"{n:03d}" if padded else str(n) for n in range(first, last + step, step)]
    for name in names:
        (folder / f"{name}.tar").touch()
    span = f"{first:03d}..{last:03d}" if padded else f"{first}..{last}"
    assert [path.stem for path in tars_of(f"{folder}/{{{span}}}.tar")] == names
