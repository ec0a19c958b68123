r"""Cut the images of `whence demo --text` from a table of emoji that are drawn in four styles.

Command, from the root of the checkout, in under ten seconds on one CPU core:

    .venv/bin/python recipes/make_text_demo_data.py --emoji emoji32_styles.parquet --out src/whence/demo_data

``--emoji`` holds 32 px emoji with the columns id, image, label (drawing style), text (caption) and name.

Result:

    styles.parquet            140 rows: 40 names in four styles, without the held-out pairs of name and style
    styles-queries.parquet     20 rows: every other name in one style, the styles in turn; five of each

NAMES are things of simple and different shapes and colours that all four styles have, so that a small model can learn
them in minutes. They were chosen by eye, before any model was traced. Image bytes are carried over unchanged.
"""

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from make_demo_data import SCHEMA, Row, read_rows

STYLES = ("fluent", "noto", "openmoji", "twemoji")
NAMES = (
    "red apple",
    "green apple",
    "banana",
    "grapes",
    "watermelon",
    "strawberry",
    "carrot",
    "hamburger",
    "pizza",
    "doughnut",
    "cat face",
    "dog face",
    "rabbit face",
    "bear",
    "panda",
    "lion",
    "pig face",
    "frog",
    "penguin",
    "octopus",
    "red heart",
    "blue heart",
    "yellow heart",
    "sun",
    "rainbow",
    "fire",
    "evergreen tree",
    "cactus",
    "tulip",
    "sunflower",
    "automobile",
    "rocket",
    "sailboat",
    "grinning face",
    "ghost",
    "alien",
    "soccer ball",
    "balloon",
    "umbrella",
    "crown",
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make styles.parquet and styles-queries.parquet of the text demo.")
    parser.add_argument("--emoji", type=Path, required=True, help="table of emoji in four styles")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    arguments = parser.parse_args()
    found = {(row["name"], row["label"]): row for row in read_rows(arguments.emoji)}
    held_out = {(name, STYLES[k // 2 % len(STYLES)]) for k, name in enumerate(NAMES) if k % 2 == 0}
    pairs = [(name, style) for name in NAMES for style in STYLES]
    arguments.out.mkdir(parents=True, exist_ok=True)
    for file, kept in (
        ("styles", [pair for pair in pairs if pair not in held_out]),
        ("styles-queries", [pair for pair in pairs if pair in held_out]),
    ):
        path = arguments.out / f"{file}.parquet"
        rows = [captioned_row(found[pair]) for pair in kept]
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path, compression="zstd")
        print(f"{path.name}: {len(rows)} rows, {path.stat().st_size:,} bytes")


def captioned_row(row: Row) -> Row:
    """Keep the columns of the demo's tables; the caption reads "name, STYLE style"."""
    image = {"bytes": row["image"]["bytes"], "path": None}
    return {"id": row["id"], "image": image, "label": row["label"], "text": f"{row['name']}, {row['label']} style"}


if __name__ == "__main__":
    main()
