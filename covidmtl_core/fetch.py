"""The data registry: what files exist, fetching them by checksum, and reading untrusted pickles.

A file is taken from the cache, else from the folder named by `COVIDMTL_DATA_MIRROR`, else from the
authors' repository at a pinned commit. It enters the cache only after its checksum was confirmed.
"""

import hashlib
import os
import pickle
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import pooch
import yaml

from covidmtl_core.errors import DataError, ParameterError

CACHE_VARIABLE = "COVIDMTL_CACHE"
MIRROR_VARIABLE = "COVIDMTL_DATA_MIRROR"

USED: dict[str, str] = {}
"""The files this process asked for, with their checksums: a result's provenance."""


@dataclass(frozen=True)
class RegistryEntry:
    """One file of `data_manifest/registry.yml`.

    Attributes:
        id: Short name used by `fetch` and the command line.
        file: File name in the cache and in a mirror folder.
        urls: Where it can be downloaded, best first; empty if it cannot.
        bytes: Size, or None where it is not known.
        sha256: Checksum of the content, or None.
        git_blob: The git object id of the content (used where no sha256 is known), or None.
        licence: What the owner allows.
        citation: What to cite.
        purpose: What the book uses it for.
        optional: True for a file that is fetched only when asked for by id.
        note: Why a file without `urls` cannot be fetched, and what a reader can do.
    """

    id: str
    file: str
    urls: tuple[str, ...]
    licence: str
    citation: str
    purpose: str
    bytes: int | None = None
    sha256: str | None = None
    git_blob: str | None = None
    optional: bool = False
    note: str = ""


def load_manifest(name: str) -> Any:
    """Parse a YAML file of the manifest folder, which travels inside the wheel."""
    text = (files("covidmtl_core.data_manifest") / name).read_text(encoding="utf-8")
    return yaml.safe_load(text)


@cache
def registry() -> dict[str, RegistryEntry]:
    """The registry by file id, in the order of `registry.yml`."""
    manifest = load_manifest("registry.yml")
    entries = {}
    for fields in manifest["files"]:
        urls = fields.pop("urls", [base + fields["file"] for base in manifest["base_urls"]])
        entries[fields["id"]] = RegistryEntry(urls=tuple(urls), **fields)
    return entries


def cache_folder() -> Path:
    """Where fetched files are kept: `$COVIDMTL_CACHE`, else the system's cache folder."""
    return Path(os.environ.get(CACHE_VARIABLE) or pooch.os_cache("covidmtl"))


def mirror_folder() -> Path | None:
    """The folder named by `$COVIDMTL_DATA_MIRROR`, or None if it is not set.

    Raises:
        DataError: The variable names something that is not a folder.
    """
    name = os.environ.get(MIRROR_VARIABLE)
    if not name:
        return None
    if not Path(name).is_dir():
        raise DataError(
            f"{MIRROR_VARIABLE} names {name!r}, which is not a folder: correct it or unset it."
        )
    return Path(name)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    return str(pooch.file_hash(str(path), alg="sha256"))


def matches(path: Path, entry: RegistryEntry) -> bool:
    """Whether a file's content is the registered one."""
    if entry.sha256:
        return file_sha256(path) == entry.sha256
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == entry.git_blob


def find_entry(file_id: str) -> RegistryEntry:
    """The registry entry of a file id.

    Raises:
        ParameterError: No file has that id.
    """
    if file_id not in registry():
        known = ", ".join(registry())
        raise ParameterError(f"No data file has the id {file_id!r}; known ids: {known}.")
    return registry()[file_id]


def state(entry: RegistryEntry) -> str:
    """`present` (in the cache), `damaged`, `in mirror`, `not fetched` or `unavailable`."""
    cached = cache_folder() / entry.file
    if cached.is_file():
        return "present" if matches(cached, entry) else "damaged"
    mirror = mirror_folder()
    if mirror and (mirror / entry.file).is_file():
        return "in mirror"
    return "not fetched" if entry.urls else "unavailable"


def fetch(file_id: str, progressbar: bool = False) -> Path:
    """Path of a registered file in the cache, brought there first if need be.

    Args:
        file_id: An id of `registry()`.
        progressbar: Show a progress bar while downloading.

    Returns:
        The cached file, its checksum confirmed.

    Raises:
        ParameterError: The id is not registered.
        DataError: The file cannot be had, or what came is not the registered content. The wrong
            file is kept beside the cached ones as `NAME.rejected`.
    """
    entry = find_entry(file_id)
    target = cache_folder() / entry.file
    USED[entry.file] = entry.sha256 or entry.git_blob or ""
    if target.is_file():
        if matches(target, entry):
            return target
        target.replace(_rejected(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".part-") as folder:
        part = Path(folder) / entry.file
        source = _obtain(entry, part, progressbar)
        if not matches(part, entry):
            received = part.stat().st_size
            part.replace(_rejected(target))
            expected = f"{entry.bytes:,} bytes" if entry.bytes else "the registered content"
            raise DataError(
                f"{entry.file} from {source} has the wrong checksum ({received:,} bytes came, "
                f"{expected} expected). It was set aside as {_rejected(target)}; "
                "fetch again, or get a fresh copy for the mirror folder."
            )
        part.replace(target)
    return target


def _rejected(target: Path) -> Path:
    return target.with_name(target.name + ".rejected")


def _obtain(entry: RegistryEntry, part: Path, progressbar: bool) -> str:
    """Copy or download a file to `part`; returns where it came from."""
    mirror = mirror_folder()
    if mirror and (mirror / entry.file).is_file():
        shutil.copyfile(mirror / entry.file, part)
        return f"the mirror folder {mirror}"
    if not entry.urls:
        raise DataError(f"{entry.file} cannot be fetched. {entry.note}")
    reasons = []
    for url in entry.urls:
        try:
            pooch.HTTPDownloader(progressbar=progressbar, timeout=30)(url, str(part), None)
            return url
        except OSError as error:  # every requests exception is one
            reasons.append(f"{url.split('/')[2]}: {type(error).__name__}")
    raise DataError(
        f"{entry.file} could not be downloaded ({'; '.join(reasons)}). Check the network, or put "
        f"the file into a folder and name that folder in {MIRROR_VARIABLE}."
    )


_PICKLE_GLOBALS = {
    ("builtins", "slice"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("pandas.core.frame", "DataFrame"),
    ("pandas.core.indexes.base", "Index"),
    ("pandas.core.indexes.base", "_new_Index"),
    ("pandas.core.indexes.range", "RangeIndex"),
    ("pandas.core.internals.managers", "BlockManager"),
}


class _TableUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")
        if (module, name) not in _PICKLE_GLOBALS:
            raise DataError(f"it asks for {module}.{name}, which no table needs")
        return super().find_class(module, name)


def read_pickled_table(path: Path) -> pd.DataFrame:
    """Read a pickled DataFrame without letting the pickle run anything else.

    Args:
        path: A pickle file whose checksum was confirmed.

    Raises:
        DataError: It holds anything but a plain DataFrame, or is damaged.
    """
    try:
        with path.open("rb") as stream:
            table = _TableUnpickler(stream).load()
    except Exception as error:
        raise DataError(f"{path.name} is not a safe pickled table: {error}.") from error
    if not isinstance(table, pd.DataFrame):
        raise DataError(f"{path.name} holds a {type(table).__name__}, not a table.")
    return table
