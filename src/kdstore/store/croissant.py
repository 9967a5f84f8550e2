"""A store in Croissant 1.0, the JSON-LD by which catalogues find data sets: the index as records, and the arrays as sets of files.

The files of arrays are many, so they are described by pattern; the manifest, which has the hash of each of them, is the one file that is described by its own.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence
from typing import Any

from kdstore.store.layout import MANIFEST
from kdstore.store.plan import SIDES
from kdstore.store.reader import Store

_CR = {
    **{name: f"cr:{name}" for name in ("citeAs", "column", "equivalentProperty", "extract", "field", "fileProperty", "fileObject", "fileSet", "format")},
    **{name: f"cr:{name}" for name in ("includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex")},
    **{name: f"cr:{name}" for name in ("repeated", "replace", "samplingRate", "separator", "source", "subField", "transform")},
}
CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "sc": "https://schema.org/",
    **_CR,
}
_COLUMNS = {
    "image": {
        "row": "The row of the image in all image arrays.",
        "key": "",
        "sha256": "Of the encoded image.",
        "valid": "",
        "reason": "",
        "width": "",
        "height": "",
    },
    "text": {"row": "The row of the caption in all text arrays.", "image_row": "", "kind": "", "sha256": "Of the caption.", "caption": ""},
}
_NUMBERS = ("row", "image_row", "valid", "width", "height")


def croissant_of(store: Store, name: str, description: str, licence: str, citation: str, mirrors: Sequence[str], published: datetime.date) -> dict[str, Any]:
    """Return the content of croissant.json; paths in it are relative to the store's folder."""
    encoded = (store.path / MANIFEST).read_bytes()
    sides = [side for side, rows in zip(SIDES, (store.num_images, store.num_texts), strict=True) if rows]
    manifest = {"contentUrl": MANIFEST, "encodingFormat": "application/json", "sha256": hashlib.sha256(encoded).hexdigest()}
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": name,
        "description": f"{description} Digest of the store: {store.digest}.",
        "license": licence,
        "citeAs": citation,
        "version": f"1.{len(store.identity.get('withdrawn', {}).get('versions', []))}.0",
        "datePublished": published.isoformat(),
        **({"url": mirrors[0], "sameAs": list(mirrors)} if mirrors else {}),
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": "manifest",
                "name": MANIFEST,
                "contentSize": f"{len(encoded)} B",
                "description": "Every file's hash.",
                **manifest,
            },
            *(_files(f"{side}-index", "application/x-parquet", f"index/{side}/*.parquet", "The index.") for side in sides),
            *(_files(array, "application/vnd+zarr", f"{array}/**", f"Zarr v3, {list(spec.shape)} {spec.dtype}.") for array, spec in store.arrays.items()),
        ],
        "recordSet": [_records(side) for side in sides],
    }


def _files(name: str, kind: str, includes: str, description: str) -> dict[str, Any]:
    return {"@type": "cr:FileSet", "@id": name, "name": name, "description": description, "encodingFormat": kind, "includes": includes}


def _records(side: str) -> dict[str, Any]:
    fields = [
        {
            "@type": "cr:Field",
            "@id": f"{side}s/{column}",
            "name": column,
            **({"description": description} if description else {}),
            "dataType": "sc:Integer" if column in _NUMBERS else "sc:Text",
            "source": {"fileSet": {"@id": f"{side}-index"}, "extract": {"column": column}},
        }
        for column, description in _COLUMNS[side].items()
    ]
    return {"@type": "cr:RecordSet", "@id": f"{side}s", "name": f"{side}s", "key": {"@id": f"{side}s/row"}, "field": fields}
