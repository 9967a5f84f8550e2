"""COCO captions: several per image, keys that are names or ids, and folders found or named."""

import io
import json

import pytest
from PIL import Image

from kdstore.data.source import UndecodableImage
from kdstore.data.sources import open_source
from kdstore.errors import SourceError, UnknownName


@pytest.fixture
def coco(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train2017").mkdir()
    images = [{"license": 1, "file_name": f"{k:012d}.jpg", "id": k, "width": 8, "height": 8} for k in (7, 3, 5)]
    for image in images[:2]:
        sink = io.BytesIO()
        Image.new("L", (8, 8), image["id"]).save(sink, "PNG")
        (tmp_path / "train2017" / image["file_name"]).write_bytes(sink.getvalue())
    notes = [{"image_id": image, "id": n, "caption": f"caption {n}\n"} for n, image in enumerate((3, 7, 7, 3, 3))]
    path = tmp_path / "annotations/captions_train2017.json"
    path.write_text(json.dumps({"info": {"year": 2017}, "licenses": [{"id": 1}], "images": images, "annotations": notes}))
    return path


def test_images_have_all_their_captions_in_order_and_file_names_as_keys(coco):
    source = open_source(str(coco))
    assert [source.key(i) for i in range(len(source))] == ["000000000007.jpg", "000000000003.jpg", "000000000005.jpg"]
    assert [[c.text for c in source.captions(i)] for i in range(3)] == [["caption 1", "caption 2"], ["caption 0", "caption 3", "caption 4"], []]
    assert source.captions(0)[0].kind == "human"
    assert source.image(1).image.getpixel((0, 0)) == (3, 3, 3)
    with pytest.raises(UndecodableImage, match=r"000000000005\.jpg"):
        source.image(2)


def test_keys_can_be_image_ids_or_content(coco):
    assert [open_source(f"{coco}?key=id").key(i) for i in range(3)] == ["7", "3", "5"]
    source = open_source(f"{coco}?key=sha256")
    assert source.key(1) == source.image(1).sha256
    with pytest.raises(UnknownName, match="key of a COCO file 'uid'"):
        open_source(f"{coco}?key=uid")


def test_the_folder_is_found_near_the_file_or_named(coco, tmp_path):
    (tmp_path / "train2017").rename(tmp_path / "pictures")
    with pytest.raises(SourceError, match=r"No folder with the images of .*000000000007\.jpg .*train2017.*images=FOLDER"):
        open_source(str(coco))
    source = open_source(f"{coco}?images={tmp_path}/pictures")
    assert source.image(0).width == 8
    assert open_source(source.spec).key(0) == source.key(0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"annotations": [{"image_id": 7, "bbox": [1]}]}, "no 'caption'"),
        ({"annotations": [{"image_id": 99, "caption": "x"}]}, "no 99"),
        ({"annotations": [{"image_id": 7, "caption": 4}]}, "not a file of COCO captions"),
        ({"images": [{"id": 7}]}, "no 'file_name'"),
        ({"images": []}, "names no images"),
    ],
)
def test_a_file_that_is_no_coco_captions_says_what_is_missing(coco, change, said):
    coco.write_text(json.dumps({**json.loads(coco.read_bytes()), "annotations": [], **change}))
    with pytest.raises(SourceError, match=said):
        open_source(str(coco))


def test_equal_file_names_are_named(coco):
    content = json.loads(coco.read_bytes())
    content["images"][1]["file_name"] = content["images"][0]["file_name"]
    coco.write_text(json.dumps(content))
    with pytest.raises(SourceError, match=r"the key '000000000007\.jpg' stands in image 0 and image 1"):
        open_source(str(coco))
