r"""Cut the images of `whence demo` from two larger tables: 960 emoji with 40 trousers among them, and 8 queries.

Command, from the root of the checkout, in under ten seconds on one CPU core:

    .venv/bin/python recipes/make_demo_data.py --emoji emoji32_styles.parquet --fashion fashion_mnist.parquet \
        --out src/whence/demo_data

``--emoji`` holds 32 px emoji with the columns id, image, label (drawing style), name and group; those drawn in
the style "noto" are used. ``--fashion`` holds Fashion-MNIST at 32 px with the columns id, image and label; trousers are
used.

Result, with SEED = 2024:

    train.parquet      1000 rows: 960 emoji, then 40 trousers
    queries.parquet       8 rows:   4 emoji, then  4 trousers; none of them in train.parquet, by id or by name

A query emoji must have no look-alike in the training set, or the demo would show a copy instead of an attribution. Many
emoji come in families (clock faces, hearts, one person in several jobs). So a query emoji is drawn from the groups of
things, and only from those whose nearest other emoji is at least MIN_DISTANCE away, in root mean square over pixels and
channels on the scale 0..255. Training emoji are drawn from all others; image bytes are carried over unchanged.
"""

import argparse
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SEED = 2024
NUM_TRAIN_EMOJI, NUM_TRAIN_TROUSERS = 960, 40
NUM_QUERY_EMOJI, NUM_QUERY_TROUSERS = 4, 4
THINGS = {"Activities", "Animals & Nature", "Food & Drink", "Objects", "Travel & Places"}
MIN_DISTANCE = 60.0
MAX_BYTES = 4_000_000

Row = dict[str, Any]

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("label", pa.string()),
        ("text", pa.string()),
    ],
    metadata={
        # What the `datasets` library reads to know that the column holds images.
        "huggingface": json.dumps(
            {
                "info": {
                    "features": {
                        "id": {"dtype": "string", "_type": "Value"},
                        "image": {"_type": "Image"},
                        "label": {"dtype": "string", "_type": "Value"},
                        "text": {"dtype": "string", "_type": "Value"},
                    }
                }
            }
        )
    },
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make train.parquet and queries.parquet of the demo.")
    parser.add_argument("--emoji", type=Path, required=True, help="table of emoji in several styles")
    parser.add_argument("--fashion", type=Path, required=True, help="table of Fashion-MNIST images")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    arguments = parser.parse_args()

    emoji = [row for row in read_rows(arguments.emoji) if row["label"] == "noto"]
    trousers = [row for row in read_rows(arguments.fashion) if row["label"] == "trouser"]
    generator = random.Random(SEED)

    distances = distances_to_nearest([row["image"]["bytes"] for row in emoji])
    distinct = [
        row
        for row, distance in zip(emoji, distances, strict=True)
        if row["group"] in THINGS and distance >= MIN_DISTANCE
    ]
    query_emoji = choose(distinct, NUM_QUERY_EMOJI, generator)
    train_emoji = choose(without(emoji, query_emoji), NUM_TRAIN_EMOJI, generator)
    query_trousers = choose(trousers, NUM_QUERY_TROUSERS, generator)
    train_trousers = choose(without(trousers, query_trousers), NUM_TRAIN_TROUSERS, generator)

    arguments.out.mkdir(parents=True, exist_ok=True)
    num_bytes = 0
    for name, some_emoji, some_trousers in [
        ("train", train_emoji, train_trousers),
        ("queries", query_emoji, query_trousers),
    ]:
        rows = [demo_row(row, "emoji", row["name"]) for row in some_emoji]
        rows += [demo_row(row, "trouser", "trouser") for row in some_trousers]
        path = arguments.out / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path, compression="zstd")
        num_bytes += path.stat().st_size
        print(f"{path.name}: {len(some_emoji)} emoji, {len(some_trousers)} trousers, {path.stat().st_size:,} bytes")
    if num_bytes > MAX_BYTES:
        raise SystemExit(f"The demo data take {num_bytes:,} bytes; a package should not carry more than {MAX_BYTES:,}.")
    print(f"{len(distinct)} emoji could have been queries; chosen:", "; ".join(row["name"] for row in query_emoji))


def read_rows(path: Path) -> list[Row]:
    return pq.read_table(path).to_pylist()


def choose(rows: list[Row], count: int, generator: random.Random) -> list[Row]:
    """Draw ``count`` rows without replacement and keep them in the order of their ids."""
    return sorted(generator.sample(sorted(rows, key=lambda row: row["id"]), count), key=lambda row: row["id"])


def without(rows: list[Row], others: list[Row]) -> list[Row]:
    """Leave out rows that share their id or their name with one of ``others``."""
    ids = {row["id"] for row in others}
    names = {row["name"] for row in others if "name" in row}
    return [row for row in rows if row["id"] not in ids and row.get("name") not in names]


def distances_to_nearest(images: list[bytes]) -> list[float]:
    """Give each image's root mean square distance, over pixels and channels, to the nearest other one."""
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image)).convert("RGB"), np.float64) for image in images])
    flat = pixels.reshape(len(images), -1)
    lengths = (flat**2).sum(1)
    squares = np.maximum(lengths[:, None] + lengths[None, :] - 2 * flat @ flat.T, 0.0)
    np.fill_diagonal(squares, np.inf)
    return np.sqrt(squares.min(1) / flat.shape[1]).tolist()


def demo_row(row: Row, label: str, text: str) -> Row:
    return {"id": row["id"], "image": {"bytes": row["image"]["bytes"], "path": None}, "label": label, "text": text}


if __name__ == "__main__":
    main()
