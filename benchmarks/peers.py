"""How others read random rows: each function writes the same rows [N, W] in its own format and returns its reader of a batch.

Every reader is the fastest public way that we know of to get float16 [B, W] from row numbers [B]. TensorStore and zarr-python read the very files of our store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Blocks = Callable[[], Iterator[npt.NDArray[np.float16]]]  # the rows, block after block
Read = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float16]]


def _arrow_batches(blocks: Blocks) -> Iterator[Any]:
    import pyarrow as pa

    for block in blocks():
        yield pa.record_batch([pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), block.shape[1])], ["x"])


def _of_arrow(table: Any, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
    return table["x"].combine_chunks().flatten().to_numpy().reshape(len(index), -1)


def hf_datasets(folder: Path, blocks: Blocks, store: Path) -> Read:
    import datasets
    import pyarrow as pa

    batches = _arrow_batches(blocks)
    first = next(batches)
    with pa.OSFile(str(folder / "x.arrow"), "wb") as sink, pa.ipc.new_stream(sink, first.schema) as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)
    dataset = datasets.Dataset.from_file(str(folder / "x.arrow")).with_format("arrow")  # its numpy format would make float32 of it
    return lambda index: _of_arrow(dataset[index.tolist()], index)


def lance(folder: Path, blocks: Blocks, store: Path) -> Read:
    import lance
    import pyarrow as pa

    width = next(blocks()).shape[1]
    dataset = lance.write_dataset(_arrow_batches(blocks), str(folder), schema=pa.schema([("x", pa.list_(pa.float16(), width))]), mode="overwrite")
    return lambda index: _of_arrow(dataset.take(index.tolist(), columns=["x"]), index)


def mosaic_mds(folder: Path, blocks: Blocks, store: Path) -> Read:
    from streaming import LocalDataset, MDSWriter

    width = next(blocks()).shape[1]
    with MDSWriter(out=str(folder), columns={"x": f"ndarray:float16:{width}"}) as writer:
        for block in blocks():
            for row in block:
                writer.write({"x": row})
    dataset = LocalDataset(str(folder))
    return lambda index: np.stack([sample["x"] for sample in dataset[index]])


def litdata(folder: Path, blocks: Blocks, store: Path) -> Read:
    from litdata import StreamingDataset
    from litdata.streaming import Cache

    cache = Cache(str(folder), chunk_bytes="64MB")
    count = 0
    for block in blocks():
        for row in block:
            cache[count] = row
            count += 1
    cache.done()
    cache.merge()
    dataset = StreamingDataset(str(folder), batch_decode=False)  # which decodes the neighbours of a row too
    return lambda index: np.stack([dataset[i] for i in index.tolist()])


def tensorstore(folder: Path, blocks: Blocks, store: Path) -> Read:
    import tensorstore as ts

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store / "image/embedding")}}
    array = ts.open(spec, read=True).result()
    return lambda index: array[:, 0][index].read().result()


def zarr_oindex(folder: Path, blocks: Blocks, store: Path) -> Read:
    import zarr

    array = zarr.open_array(store / "image/embedding", mode="r")
    return lambda index: array.oindex[index, 0]


PEERS: dict[str, Callable[[Path, Blocks, Path], Read]] = {
    "HF datasets": hf_datasets,
    "Lance": lance,
    "MDS": mosaic_mds,
    "LitData": litdata,
    "TensorStore": tensorstore,
    "zarr oindex": zarr_oindex,
}
