"""What lies on disk of a record: parts that count, and the refusal of those that do not."""

import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest

from whence import record as record_module
from whence.errors import RecordError
from whence.record import SCHEMA, PartWriter, Record, Visits

MANIFEST = {
    "format_version": 1,
    "seed": 0,
    "loss": "mse",
    "mixed_precision": "no",
    "prediction_type": "epsilon",
    "data_fingerprint": None,
    "config": {},
}


def columns(step, num_visits, **changed):
    """One part of one step, with values that can be told apart."""
    values = {name: [0] * num_visits for name in SCHEMA.names if name not in ("sample", "rank")}
    values |= {
        "step": [step] * num_visits,
        "slot": list(range(num_visits)),
        "model_time": [float(10 * step + k) for k in range(num_visits)],
        "sigma": [0.5] * num_visits,
        "noise_key": [2**64 - 1 - k for k in range(num_visits)],
        "flip": [k % 2 == 1 for k in range(num_visits)],
        "condition_dropped": [False] * num_visits,
        "learning_rate": [0.1] * num_visits,
        "clip_coefficient": [0.5] * num_visits,
        "samples_in_step": [num_visits] * num_visits,
        "loss_weight": [1.0] * num_visits,
        "loss": [0.25] * num_visits,
    }
    return values | changed


@pytest.fixture
def folder(tmp_path):
    """Two parts of one rank and a probe."""
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    writer = PartWriter(tmp_path)
    writer.append(columns(1, 3), ["c", "a", "b"])
    writer.append(columns(2, 3), ["a", "d", "a"])
    writer.append(columns(3, 2), ["e", "a"], kind="probe")
    return tmp_path


def ids_of(record, visits):
    return [record.sample_ids[row] for row in visits.sample]


def test_a_record_reads_back_as_it_was_written(folder):
    record = Record.open(folder)
    assert record.sample_ids == ("c", "a", "b", "d", "e")
    assert ids_of(record, record.visits) == ["c", "a", "b", "a", "d", "a"]
    assert ids_of(record, record.probes) == ["e", "a"]
    assert record.visits.step.tolist() == [1, 1, 1, 2, 2, 2]
    assert record.visits.timestep.tolist() == [10, 11, 12, 20, 21, 22]
    assert record.visits.noise_key.tolist() == [2**64 - 1, 2**64 - 2, 2**64 - 3] * 2
    assert record.visits.flip.tolist() == [False, True, False] * 2
    assert record.manifest == MANIFEST
    np.testing.assert_allclose(record.visits.weight, 0.1 * 0.5 / 3, rtol=1e-15)


def test_a_visit_takes_few_bytes(tmp_path):
    """DESIGN.md 2 promises about 40 bytes a visit."""
    rng = np.random.default_rng(0)
    n = 10_000
    random = {"noise_key": rng.integers(0, 2**64, n, dtype=np.uint64), "loss": rng.random(n).astype(np.float32)}
    random |= {"model_time": rng.integers(0, 1000, n).astype(np.float32), "sigma": rng.random(n).astype(np.float32)}
    PartWriter(tmp_path).append(columns(1, n, **random), [str(i) for i in rng.permutation(n)])
    (part,) = tmp_path.glob("visits-*.parquet")
    assert part.stat().st_size / n < 40


def test_visits_of_a_step_are_those_of_the_probe_where_training_ended(folder):
    record = Record.open(folder)
    assert len(record.visits_of_step(2)) == 3
    assert ids_of(record, record.visits_of_step(3)) == ["e", "a"]
    assert len(record.visits_of_step(4)) == 0


def test_where_keeps_some_visits(folder):
    visits = Record.open(folder).visits
    assert visits.where(visits.flip).slot.tolist() == [1, 1]
    assert len(visits.where(np.zeros(6, dtype=bool))) == 0


def test_a_record_without_visits_is_empty(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    record = Record.open(tmp_path)
    assert (len(record.visits), len(record.probes), record.sample_ids) == (0, 0, ())


def test_ranks_number_their_samples_apart_and_are_read_as_one(folder):
    other = PartWriter(folder, rank=1)
    other.append(columns(1, 2), ["f", "a"])
    other.append(columns(2, 1), ["f"])
    record = Record.open(folder)
    assert record.sample_ids == ("c", "a", "b", "d", "e", "f")  # each once, though both ranks saw "a"
    assert record.visits.rank.tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 1]
    assert ids_of(record, record.visits) == ["c", "a", "b", "f", "a", "a", "d", "a", "f"]


def test_rows_are_in_the_order_of_training(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    writer = PartWriter(tmp_path)
    writer.append(columns(1, 4, micro_batch=[1, 0, 1, 0], slot=[1, 1, 0, 0]), ["d", "b", "c", "a"])
    record = Record.open(tmp_path)
    assert ids_of(record, record.visits) == ["a", "b", "c", "d"]


def test_a_writer_goes_on_where_another_stopped(folder):
    writer = PartWriter(folder)
    assert (writer.last_step, writer.has_probe(3), writer.has_probe(4)) == (2, True, False)
    writer.append(columns(3, 2), ["b", "g"])
    record = Record.open(folder)
    assert ids_of(record, record.visits)[-2:] == ["b", "g"]


def test_parts_beyond_a_step_are_moved_aside(folder):
    writer = PartWriter(folder)
    writer.rewind(1)
    record = Record.open(folder)
    assert (writer.last_step, record.sample_ids) == (1, ("c", "a", "b"))
    assert ids_of(record, record.visits) == ["c", "a", "b"]
    moved = sorted(f.name.split("-", maxsplit=1)[1] for f in (folder / "aside").iterdir())
    assert moved == [
        "probe-0-00000003.parquet",
        "samples-0-probe-00000003.parquet",
        "samples-0-visits-00000002.parquet",
        "visits-0-00000002-00000002.parquet",
    ]
    writer.append(columns(2, 2), ["z", "c"])
    writer.rewind(1)
    assert len(list((folder / "aside").iterdir())) == 6  # nothing moved aside before is overwritten


def test_the_probe_of_the_last_step_stays(folder):
    before = (folder / "parts-0.json").read_bytes()
    writer = PartWriter(folder)
    writer.rewind(2)
    assert writer.has_probe(3)
    assert (folder / "parts-0.json").read_bytes() == before
    assert not (folder / "aside").exists()


@pytest.mark.parametrize("failing", ["rows", "samples", "list"])
def test_a_part_that_could_not_be_written_can_be_appended_again(folder, monkeypatch, failing):
    writer = PartWriter(folder)
    want = Record.open(folder)
    with monkeypatch.context() as patch:

        def full(*args, **kwargs):
            raise OSError(28, os.strerror(28))

        def full_rows(table, *args, **kwargs):
            return full() if (len(table.column_names) > 1) == (failing == "rows") else pq_write(table, *args, **kwargs)

        pq_write = pq.write_table
        patch.setattr(*((record_module, "write_json", full) if failing == "list" else (pq, "write_table", full_rows)))
        with pytest.raises(OSError, match="No space left"):
            writer.append(columns(3, 2), ["new", "a"])
    assert Record.open(folder).sample_ids == want.sample_ids
    writer.append(columns(3, 2), ["new", "a"])
    found = Record.open(folder)
    assert ids_of(found, found.visits) == [*ids_of(want, want.visits), "new", "a"]


def test_the_content_hash_tells_records_apart(folder):
    before = Record.open(folder).content_hash
    assert before == Record.open(folder).content_hash
    PartWriter(folder).append(columns(3, 1), ["a"])
    assert Record.open(folder).content_hash != before


@pytest.mark.parametrize(
    "name",
    ["visits-0-00000001-00000001.parquet", "probe-0-00000003.parquet", "samples-0-visits-00000001.parquet"],
)
def test_a_flipped_byte_is_found_and_named(folder, name):
    damaged = bytearray((folder / name).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / name).write_bytes(damaged)
    with pytest.raises(RecordError, match=f"{name} is damaged or was altered"):
        Record.open(folder)


@pytest.mark.parametrize("name", ["visits-0-00000002-00000002.parquet", "samples-0-visits-00000002.parquet"])
def test_a_missing_part_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(RecordError, match=f"{name} is missing"):
        Record.open(folder)


@pytest.mark.parametrize("name", ["manifest.json", "parts-0.json"])
@pytest.mark.parametrize("kept", [0, 20])
def test_truncated_json_is_named(folder, name, kept):
    (folder / name).write_bytes((folder / name).read_bytes()[:kept])
    with pytest.raises(RecordError, match=f"{name} cannot be read"):
        Record.open(folder)


@pytest.mark.parametrize("name", ["manifest.json", "parts-0.json"])
def test_json_of_another_form_is_named(folder, name):
    (folder / name).write_text('"text"')
    with pytest.raises(RecordError, match=f"{name} .*form"):
        Record.open(folder)


@pytest.mark.parametrize("part", ["{}", "3", '{"kind": "visits", "first_step": 1, "last_step": 1, "rows": {}}'])
def test_a_part_without_its_keys_is_named(folder, part):
    (folder / "parts-0.json").write_text(f"[{part}]")
    for open_it in (Record.open, PartWriter):
        with pytest.raises(RecordError, match="parts-0.json: entry 0 does not describe a part of a record"):
            open_it(folder)


def test_parts_without_checksums_are_named(folder):
    parts = json.loads((folder / "parts-0.json").read_text())
    del parts[1]["rows"]["sha256"]
    (folder / "parts-0.json").write_text(json.dumps(parts))
    with pytest.raises(RecordError, match="parts-0.json: entry 1 does not describe"):
        Record.open(folder)


def test_a_manifest_without_its_keys_is_named(folder):
    (folder / "manifest.json").write_text(json.dumps({k: v for k, v in MANIFEST.items() if k not in ("seed", "loss")}))
    with pytest.raises(RecordError, match="manifest.json lacks seed, loss. The record is damaged"):
        Record.open(folder)


def test_a_record_opens_by_a_text_too(folder):
    record = Record.open(str(folder))
    assert len(record.visits) == 6 and record.content_hash == Record.open(folder).content_hash


def test_no_record_is_told_with_what_to_do(tmp_path):
    with pytest.raises(RecordError, match="holds no record of training .* on a grid of timesteps"):
        Record.open(tmp_path)


def test_a_newer_format_is_refused(folder):
    (folder / "manifest.json").write_text(json.dumps(MANIFEST | {"format_version": 2}))
    with pytest.raises(RecordError, match="format version 2; this version of whence reads 1"):
        Record.open(folder)


def test_an_old_file_beside_the_parts_does_not_count(folder):
    (folder / "visits-0-00000009-00000009.parquet").write_bytes(b"left by a killed process")
    assert len(Record.open(folder).visits) == 6


def test_columns_have_the_types_of_the_schema(folder):
    table = pq.read_table(folder / "visits-0-00000001-00000001.parquet")
    assert table.schema.equals(SCHEMA)
    visits = Visits.from_table(table)
    assert (visits.step.dtype, visits.noise_key.dtype, visits.loss.dtype) == (np.int64, np.uint64, np.float32)
