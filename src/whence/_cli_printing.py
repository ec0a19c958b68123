"""Printing of the command line: tables and rankings, in columns or as JSON."""

import json as jsonlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whence.scores import Scores, TopScores


def print_rankings(scores: "Sequence[Scores | TopScores]", top: int, json: bool) -> None:
    rows = [
        [s.method, query_id, e.rank, e.train_id, e.score]
        for s in scores
        for row, query_id in enumerate(s.query_ids)
        for e in s.top(row, top)
    ]
    notes = list(dict.fromkeys(note for s in scores for note in s.notes))
    folders = {s.method: str(s.folder) for s in scores}
    print_table(["method", "query", "rank", "train id", "score"], rows, json, notes=notes, scores=folders)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], json: bool, **extra: Any) -> None:
    """Print rows in columns, or one JSON object with the rows as objects."""
    if json:
        table = [dict(zip(columns, row, strict=True)) for row in rows]
        print(jsonlib.dumps({"rows": table, **extra}, indent=1))
        return
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(c[i]) for c in [*cells, list(columns)]) for i in range(len(columns))]
    for line in [list(columns), ["-" * w for w in widths], *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for name, value in extra.items():
        _print_extra(name, value)


def print_tables(tables: Mapping[str, Mapping[str, Any]], json: bool) -> None:
    """Print tables one after the other, each with the file that it is in; as JSON, one list of them."""
    if json:
        found = [
            {"table": file, "rows": [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]}
            | {"notes": table["notes"]}
            for file, table in tables.items()
        ]
        print(jsonlib.dumps({**found[0], "more": found[1:]}, indent=1))
        return
    for number, (file, table) in enumerate(tables.items()):
        if number:
            print()
        print_table(table["columns"], table["rows"], json, table=file, notes=table["notes"])


def _print_extra(name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        print(*(f"{name} of {key}: {inner}" for key, inner in value.items()), sep="\n")
    elif isinstance(value, list):
        print(*(f"note: {note}" for note in value), sep="\n") if value else None
    else:
        print(f"{name}: {value}")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
