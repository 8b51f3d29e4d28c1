"""Which data a run has, as JSON values, so that a resumed run can refuse other data and name what has changed."""

import hashlib
import os
from dataclasses import asdict

from .prompts import read_prompts
from .sources import Source
from .tables import load_hub, open_source


def fingerprint(source: Source) -> dict:
    """Settings, number of records, and a digest of each file by its name.

    A digest covers all of a JSON file, the footer of a Parquet file, names, sizes, times and beginnings of the members
    of a tar, and the names in a folder of images; where the files are and when they were written does not count. The
    text of prompts counts, targets do not.
    Raises ValueError for a source that cannot be opened.
    """
    settings = asdict(source)
    if source.prompts is not None:
        settings["prompts"] = hashlib.blake2b(repr(read_prompts(source.prompts)).encode(), digest_size=16).hexdigest()
    if source.is_stream:
        info = load_hub(source).info
        described = repr((info.config_name, str(info.version), info.features, info.splits))
        digest = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()
        return {**settings, "num_records": None, "files": {source.path: digest}}
    rows = open_source(source)
    folder = os.path.commonpath([os.path.dirname(path) for path in rows.digest]) if len(rows.digest) > 1 else ""
    names = {os.path.relpath(path, folder) if folder else os.path.basename(path): path for path in rows.digest}
    return {**settings, "num_records": len(rows), "files": {name: rows.digest[path] for name, path in names.items()}}


def difference(saved: list[dict], current: list[dict]) -> str:
    """What has changed between two lists of sources, in words; "" if both give the same records. Paths may differ."""
    if len(saved) != len(current):
        return f"{len(current)} sources instead of {len(saved)}"
    for old, new in zip(saved, current):
        where = f"{new['task']}={new['path']}"
        for name in ("task", "weight", "split", "streaming", "condition_image_size", "prompts"):
            if name in old and old[name] != new[name]:  # records of an earlier version lack some
                return f"{where} has {name}={new[name]!r} instead of {old[name]!r}"
        if (missing := sorted(old["files"].keys() - new["files"].keys())) and len(old["files"]) > 1:
            return f"{where} lacks the file {missing[0]}"
        if (added := sorted(new["files"].keys() - old["files"].keys())) and len(new["files"]) > 1:
            return f"{where} has another file, {added[0]}"
        for (_, before), (name, now) in zip(sorted(old["files"].items()), sorted(new["files"].items())):
            if before != now:
                return f"{where}: {name} has other contents"
        if list(old["files"]) != list(new["files"]) and len(old["files"]) > 1:
            return f"{where} has its files in another order"
        if old["num_records"] != new["num_records"]:
            return f"{where} has {new['num_records']} records instead of {old['num_records']}"
    return ""
