"""Files and folders are there whole or not at all, whatever fails while they are written."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from whence import _files
from whence._files import publish_file, publish_folder, sha256_of_file, sha256_of_json, write_json


def fail(code=errno.ENOSPC):
    def raising(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return raising


def contents(folder: Path) -> dict[str, str]:
    return {f.relative_to(folder).as_posix(): f.read_text() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_hashes_are_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of_json({"b": 1, "a": [1, 2]}) == sha256_of_json({"a": (1, 2), "b": 1})
    assert sha256_of_json({"a": 1}) != sha256_of_json({"a": "1"})


def test_numpy_scalars_are_written_and_hashed_as_plain_ones(tmp_path):
    value = {"seed": np.int64(4), "rate": np.float32(1), "flip": np.bool_(True)}
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text()) == {"seed": 4, "rate": 1.0, "flip": True}
    assert sha256_of_json(value) == sha256_of_json({"seed": 4, "rate": 1.0, "flip": True})
    with pytest.raises(TypeError, match="type set is not JSON serializable"):
        sha256_of_json({"a": {1}})


def test_a_hash_survives_the_way_through_a_file(tmp_path):
    value = {"steps": {2: 0.1, 10: (1, 2)}}  # numbers sort otherwise than their text
    write_json(tmp_path / "x.json", value)
    assert sha256_of_json(json.loads((tmp_path / "x.json").read_text())) == sha256_of_json(value)


def test_a_file_appears_when_its_block_ends(tmp_path):
    target = tmp_path / "new" / "file.txt"
    with publish_file(target) as partial:
        partial.write_text("first")
        assert not target.exists()
    assert contents(tmp_path) == {"new/file.txt": "first"}
    with publish_file(target) as partial:
        partial.write_text("second")
        assert target.read_text() == "first"
    assert contents(tmp_path) == {"new/file.txt": "second"}


def test_a_folder_appears_when_its_block_ends(tmp_path):
    target = tmp_path / "new" / "folder"
    for text in ("first", "second"):
        with publish_folder(target) as partial:
            (partial / "sub").mkdir()
            (partial / "sub" / text).write_text(text)
        assert contents(tmp_path) == {f"new/folder/sub/{text}": text}


def test_two_may_write_a_shared_file_at_once(tmp_path):
    target = tmp_path / "file.txt"
    with publish_file(target, shared=True) as slow:
        slow.write_text("slow")
        with publish_file(target, shared=True) as fast:
            fast.write_text("fast")
        assert contents(tmp_path)["file.txt"] == "fast"
    assert contents(tmp_path) == {"file.txt": "slow"}


@pytest.mark.parametrize("links", [True, False])
def test_the_first_stays_where_nothing_is_replaced(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", fail(errno.EPERM))
    with pytest.raises(FileExistsError), publish_file(tmp_path / "file", shared=True, replace=False) as slow:
        slow.write_text("slow")
        with publish_file(tmp_path / "file", shared=True, replace=False) as fast:
            fast.write_text("fast")
    assert contents(tmp_path) == {"file": "fast"}


def test_a_disk_that_fails_to_link_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "hardlink_to", fail(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"), publish_file(tmp_path / "file", replace=False) as partial:
        partial.write_text("new")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_leaves_the_old_one_and_no_scraps(tmp_path, error):
    with publish_file(tmp_path / "file") as partial:
        partial.write_text("old")
    with publish_folder(tmp_path / "folder") as partial:
        (partial / "a").write_text("old")
    for publish, name in ((publish_file, "file"), (publish_folder, "folder")):
        with pytest.raises(error), publish(tmp_path / name) as partial:
            (partial / "a" if name == "folder" else partial).write_text("new")
            raise error
    assert contents(tmp_path) == {"file": "old", "folder/a": "old"}


def test_what_a_killed_process_left_is_swept_away(tmp_path):
    (tmp_path / ".folder.partial").mkdir()
    (tmp_path / ".folder.partial" / "scrap").write_text("half")
    (tmp_path / ".folder.replaced").mkdir()
    (tmp_path / ".file.partial").write_text("a longer half-written file")
    with publish_folder(tmp_path / "folder") as partial:
        (partial / "a").write_text("whole")
    with publish_file(tmp_path / "file") as partial:
        partial.write_text("whole")
    assert contents(tmp_path) == {"file": "whole", "folder/a": "whole"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("at", ["sync", "Path.replace", "Path.rename"])
def test_a_failing_disk_leaves_the_old_one(tmp_path, monkeypatch, code, at):
    with publish_file(tmp_path / "file") as partial:
        partial.write_text("old")
    with publish_folder(tmp_path / "folder") as partial:
        (partial / "a").write_text("old")
    with monkeypatch.context() as patch:
        if at == "sync":
            patch.setattr(_files.os, "fsync", fail(code))
        else:
            patch.setattr(Path, at.removeprefix("Path."), fail(code))
        if at != "Path.rename":
            with pytest.raises(OSError, match=os.strerror(code)), publish_file(tmp_path / "file") as partial:
                partial.write_text("new")
        if at != "Path.replace":
            with pytest.raises(OSError, match=os.strerror(code)), publish_folder(tmp_path / "folder") as partial:
                (partial / "a").write_text("new")
    assert contents(tmp_path) == {"file": "old", "folder/a": "old"}


def test_a_folder_that_cannot_be_replaced_is_put_back(tmp_path, monkeypatch):
    with publish_folder(tmp_path / "folder") as partial:
        (partial / "a").write_text("old")
    rename = Path.rename

    def rename_but_partial(self, target):
        return fail()() if self.name.endswith(".partial") else rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_but_partial)
    with pytest.raises(OSError, match="No space"), publish_folder(tmp_path / "folder") as partial:
        (partial / "a").write_text("new")
    assert contents(tmp_path) == {"folder/a": "old"}


def test_a_full_device_is_an_error_and_not_half_a_file(tmp_path):
    """/dev/full takes no byte: what is written through it fails as on a full disk."""
    write_json(tmp_path / "file.json", {"old": 1})
    (tmp_path / ".file.json.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "file.json", {"new": 2})
    assert json.loads((tmp_path / "file.json").read_text()) == {"old": 1}
    write_json(tmp_path / "file.json", {"new": 2})  # the link was removed
    assert contents(tmp_path) == {"file.json": '{\n "new": 2\n}\n'}


def test_json_holds_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file.json", {"a": float("nan")})
    assert contents(tmp_path) == {}


def test_files_are_readable_to_others_as_the_mask_allows(tmp_path):
    before = os.umask(0o022)
    try:
        with publish_folder(tmp_path / "folder") as partial:
            save_file({"x": np.zeros(2)}, partial / "x.safetensors")
        with publish_file(tmp_path / "y.safetensors") as partial:
            save_file({"x": np.zeros(2)}, partial)
    finally:
        os.umask(before)
    for path in (tmp_path / "folder" / "x.safetensors", tmp_path / "y.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o644
