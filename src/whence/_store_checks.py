"""Whether what lies in a store is whole: once for every shard before its rows are used, or all of it on request."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from whence._files import write_json
from whence.errors import StoreError
from whence.shards import Shard, block_name, read_sidecar

STEP_FOLDER = re.compile(r"\d{8,}")

_NOTHING = object()


def name_ids(ids: Sequence[str], limit: int = 5) -> str:
    """List ids in a message, the first few by name."""
    rest = f" and {len(ids) - limit} more" if len(ids) > limit else ""
    return ", ".join(ids[:limit]) + rest


def check_belongs(shard: Shard, sidecar: Path, spec_sha256: str) -> None:
    """Refuse a shard of another specification, or one whose sidecar lies where it does not belong.

    Raises StoreError.
    """
    if shard.spec_sha256 != spec_sha256:
        raise StoreError(
            f"{sidecar} belongs to a store of another specification: its hash is {shard.spec_sha256[:12]}…, here it is "
            f"{spec_sha256[:12]}…. Rows of the two cannot be compared; move the shard back to its own store."
        )
    block = block_name(shard.ids)
    if sidecar.parts[-2:] != (f"{shard.step:08d}", f"{block}.json") or shard.block != block:
        raise StoreError(f"{sidecar} is out of its place: it is of block {block} of step {shard.step}. Move it there.")


def check_block(step: int, ids: Sequence[str], content_hashes: Sequence[str]) -> None:
    """Refuse what is no list of samples at a checkpoint."""
    if step < 0:
        raise StoreError(f"step must be 0 or above, found {step}: it is the optimizer step of a checkpoint.")
    twice = [id_ for id_, count in Counter(ids).items() if count > 1]
    if not ids or twice or len(ids) != len(content_hashes):
        raise StoreError(
            f"Every sample must come once and with its content hash; found {len(ids)} ids and {len(content_hashes)} "
            f"hashes{f', and more than once {name_ids(twice)}' if twice else ''}."
        )


def list_changed(shard: Shard, contents: Mapping[str, str]) -> list[str]:
    """Give the samples of a shard whose content is not that in ``contents``."""
    return [id_ for id_, found in shard.contents.items() if contents.get(id_, found) != found]


def check_same_content(shards: Sequence[Shard], contents: Mapping[str, str]) -> None:
    """Refuse samples of which a shard was made when they had other content."""
    for shard in shards:
        changed = list_changed(shard, contents)
        if changed:
            raise StoreError(
                f"The content of samples has changed since {shard.sidecar_path} was made of them: {name_ids(changed)}. "
                "An id must stand for one image. Give changed images new ids, or write to a new store."
            )


def list_differences(found: Any, asked: Any, name: str = "") -> Iterator[str]:
    """List the settings that differ, by their dotted names without the leading ``spec.``."""
    if isinstance(found, dict) and isinstance(asked, dict):
        for key in sorted(found.keys() | asked.keys()):
            dotted = key if name in ("", "spec") else f"{name}.{key}"
            yield from list_differences(found.get(key, _NOTHING), asked.get(key, _NOTHING), dotted)
    elif found != asked:
        there, here = (_abbreviated("nothing" if value is _NOTHING else json.dumps(value)) for value in (found, asked))
        yield f"{name} is {there} there, {here} is asked for"


def _abbreviated(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def check_once(shards: Sequence[Shard], memory: Path) -> None:
    """Read the shards that were not read whole since they were written, and remember them in ``memory``.

    Raises StoreError, with all that are damaged. Where nothing can be written, nothing is remembered.
    """
    known = _read_memory(memory)
    faults, news = [], False
    for shard in shards:
        name = f"{shard.path.parent.name}/{shard.path.name}"
        try:
            shard.check_size()
            state = _state(shard)  # before the file is read: a later change is then seen the next time
            if known.get(name) != state:
                shard.check_sha256()
                known[name], news = state, True
        except StoreError as error:
            faults.append(str(error))
    if news:
        try:
            write_json(memory, known, shared=True)
        except OSError:  # a read-only or full disk is no reason not to read
            pass
    if faults:
        raise StoreError("\n".join(faults))


def _state(shard: Shard) -> list[int | str]:
    return [shard.num_bytes, shard.path.stat().st_mtime_ns, shard.sha256]


def _read_memory(path: Path) -> dict[str, list[int | str]]:
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def find_faults(folder: Path, spec_sha256: str) -> list[str]:
    """Read all of a store and say what is wrong, one sentence a fault."""
    faults: list[str] = []
    shards: list[Shard] = []
    for place in sorted(folder.iterdir()):
        if not place.is_dir() or not STEP_FOLDER.fullmatch(place.name):
            if place.name not in ("manifest.json", "verified.json"):
                faults.append(f"{place} is no part of a store; an interrupted run may have left it.")
            continue
        found, troubles = _read_step(place, spec_sha256)
        shards += found
        faults += troubles
    return faults + list(_compare_steps(shards))


def _read_step(folder: Path, spec_sha256: str) -> tuple[list[Shard], list[str]]:
    """Read all shards of a step; give those whose sidecars are good, and all faults."""
    shards, faults = [], []
    faulty: set[str] = set()
    holders: dict[str, Shard] = {}
    names = {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}
    sidecars = sorted(name for name in names if name.endswith(".json") and name[0] != ".")
    for path in (folder / name for name in sidecars):
        try:
            shard = read_sidecar(path)
            check_belongs(shard, path, spec_sha256)
            shards.append(shard)
            twice = [id_ for id_ in shard.ids if id_ in holders]
            if twice:
                others = sorted({holders[id_].block for id_ in twice})
                faults.append(f"{path} holds samples that {name_ids(others)} beside it holds too: {name_ids(twice)}.")
            holders |= dict.fromkeys(shard.ids, shard)
            shard.check_sha256()
        except StoreError as error:
            faults.append(str(error))
            faulty.add(path.stem)
        except OSError as error:
            faults.append(f"{path} or its shard cannot be read: {error}.")
            faulty.add(path.stem)
    named = {shard.path.name for shard in shards}
    for name in sorted(names - named - set(sidecars)):
        if name.split("-")[0] in faulty:
            continue  # it may be the one that the sidecar names
        what = "is named by no sidecar" if name.endswith(".safetensors") else "was left behind"
        faults.append(f"{folder / name} {what}. An interrupted run leaves such files; one at work has some too.")
    return shards, faults


def _compare_steps(shards: Sequence[Shard]) -> Iterator[str]:
    """Say which steps lack samples that others hold, and which samples differ between steps."""
    contents: dict[str, str] = {}
    held: dict[int, set[str]] = {}
    for shard in shards:
        held.setdefault(shard.step, set()).update(shard.ids)
        changed = list_changed(shard, contents)
        contents |= shard.contents
        if changed:
            yield f"{shard.sidecar_path} was made of other content than at other steps: {name_ids(changed)}."
    for step in sorted(held):
        lacking = [id_ for id_ in contents if id_ not in held[step]]
        if lacking:
            yield f"Step {step} lacks samples that other steps hold: {name_ids(lacking)}."
