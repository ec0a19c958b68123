"""How fast a store answers: its top 100 against reading the same bytes and multiplying them in torch.

    python benchmarks/query.py                        200,000 rows of 4,096 in float16, 1.6 GB in a temporary folder
    python benchmarks/query.py --quick                20,000 rows
    python benchmarks/query.py --queries 16 --json query.json

Three ways, interleaved, one process, files in the system's cache; the median of the runs counts:

    store      ``top_of_store``: shards to the 100 images with the largest scores of each query
    plain      the same files read with ``safetensors``, converted with ``.float()``, multiplied, ``topk``
    one file   the same rows in one file, read into memory by one call, converted, multiplied, ``topk``

The store's time is without opening it: sidecars and checksums are read once.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from whence.row_products import Reading, top_of_store
from whence.store import Store

STEP = 1
TOP = 100


def make_store(folder: Path, num_rows: int, width: int, block_size: int) -> Store:
    """Fill a store with random rows of length about 1."""
    store = Store.create(folder, {"what": "random rows"}, width=width, dtype="float16")
    rng = np.random.default_rng(0)
    for start in range(0, num_rows, block_size):
        count = min(block_size, num_rows - start)
        rows = rng.standard_normal((count, width), dtype=np.float32) / np.sqrt(width, dtype=np.float32)
        arrays = {
            "rows": rows,
            "norms": rng.uniform(1, 2, count),
            "sample": np.arange(count),
            "weight.equal": np.ones(count),
        }
        ids = [str(row) for row in range(start, start + count)]
        store.write_shard(STEP, ids, ids, arrays)
    return store


def plain(store: Store, vectors: torch.Tensor) -> torch.Tensor:
    """Read every file whole, convert, multiply, scale."""
    scores = []
    for shard in store.shards(STEP):
        arrays = load_file(shard.path)
        scores.append((arrays["rows"].float() @ vectors.T) * arrays["norms"][:, None])
    return torch.cat(scores).topk(TOP, dim=0).indices


def one_file(path: Path, width: int, norms: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Read one file at once, convert, multiply, scale."""
    rows = torch.from_numpy(np.fromfile(path, np.float16)).view(-1, width)
    return ((rows.float() @ vectors.T) * norms[:, None]).topk(TOP, dim=0).indices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--block-size", type=int, default=256, help="rows in a shard")
    parser.add_argument("--queries", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where the temporary store is made")
    parser.add_argument("--quick", action="store_true", help="20,000 rows")
    parser.add_argument("--json", type=Path, help="write the figures here")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    num_rows = 20_000 if asked.quick else asked.rows
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        figures = measure(Path(name), num_rows, asked.width, asked.block_size, asked.queries, asked.runs)
    figures |= {"threads": asked.threads, "torch": torch.__version__}
    for key, value in figures.items():
        print(f"{key:<16}{value:.4g}" if isinstance(value, float) else f"{key:<16}{value}")
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1))


def measure(
    folder: Path, num_rows: int, width: int, block_size: int, num_queries: int, runs: int
) -> dict[str, float | int]:
    """Time the three ways in turn and check that they agree."""
    store = make_store(folder / "store", num_rows, width, block_size)
    path = folder / "rows"
    with path.open("wb") as file:
        for shard in store.shards(STEP):
            shard.read("rows").tofile(file)
    norms = torch.cat([torch.from_numpy(shard.read("norms").copy()) for shard in store.shards(STEP)])
    vectors = torch.randn(num_queries, width, generator=torch.Generator().manual_seed(0))
    ways = {
        "store": lambda: top_of_store(store, {STEP: vectors}, Reading(weights="weight.equal"), TOP),
        "plain": lambda: plain(store, vectors),
        "one_file": lambda: one_file(path, width, norms, vectors),
    }
    ids = [id_ for shard in store.shards(STEP) for id_ in shard.ids]
    found, want = ways["store"](), ways["plain"]()
    assert all(found.ids[q] == [ids[row] for row in want[:, q]] for q in range(num_queries))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {
        "rows": num_rows,
        "width": width,
        "block_size": block_size,
        "queries": num_queries,
        **{f"{name}_s": seconds for name, seconds in medians.items()},
        "ratio_to_plain": medians["store"] / medians["plain"],
        "ratio_to_one_file": medians["store"] / medians["one_file"],
    }


if __name__ == "__main__":
    main()
