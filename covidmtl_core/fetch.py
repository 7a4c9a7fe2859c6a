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
import requests
import yaml

from covidmtl_core.errors import DataError, DownloadError, ParameterError

CACHE_VARIABLE = "COVIDMTL_CACHE"
MIRROR_VARIABLE = "COVIDMTL_DATA_MIRROR"

TIMEOUT_S = 30
"""How long a server may be silent."""

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
    try:
        text = (files("covidmtl_core.data_manifest") / name).read_text(encoding="utf-8")
        return yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{name} cannot be read: {' '.join(str(error).split())}.") from error


@cache
def registry() -> dict[str, RegistryEntry]:
    """The registry by file id, in the order of `registry.yml`.

    Raises:
        DataError: The registry cannot be used.
    """
    try:
        manifest = load_manifest("registry.yml")
        entries = {}
        for fields in manifest["files"]:
            urls = fields.pop("urls", [base + fields["file"] for base in manifest["base_urls"]])
            if fields["file"] != Path(fields["file"]).name:
                raise ValueError(f"{fields['file']!r} is no file name")
            entries[fields["id"]] = RegistryEntry(urls=tuple(urls), **fields)
        return entries
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"registry.yml cannot be used ({type(error).__name__}: {error})."
        ) from error


def released_ids() -> list[str]:
    """Ids of the files that the released tier is made of."""
    return [entry.id for entry in registry().values() if entry.urls and not entry.optional]


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


def matches(path: Path, entry: RegistryEntry) -> bool:
    """Whether a file's content is the registered one."""
    if entry.sha256:
        return bool(pooch.file_hash(str(path), alg="sha256") == entry.sha256)
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
        DownloadError: The file is nowhere at hand and could not be downloaded.
        DataError: What came is not the registered content (it is kept beside the cached files as
            `NAME.rejected`), the cache folder cannot be written, or the file is offered nowhere.
    """
    entry = find_entry(file_id)
    target = cache_folder() / entry.file
    try:
        if not (target.is_file() and matches(target, entry)):
            _bring(entry, target, progressbar)
    except OSError as error:
        raise DataError(
            f"{target} cannot be written or read ({error}): free some space, or name a writable "
            f"folder in {CACHE_VARIABLE}."
        ) from error
    USED[entry.file] = entry.sha256 or entry.git_blob or ""
    return target


def _bring(entry: RegistryEntry, target: Path, progressbar: bool) -> None:
    """Put the first source with the registered content into the cache, in one step."""
    rejected = target.with_name(target.name + ".rejected")
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_file():
        shutil.copyfile(target, rejected)
    mirror = mirror_folder()
    mirrored = bool(mirror and (mirror / entry.file).is_file())
    if not mirrored and not entry.urls:
        raise DataError(f"{entry.file} cannot be fetched. {entry.note}")
    reasons, wrong = [], False
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".part-") as folder:
        part = Path(folder) / entry.file
        for source in [str(mirror)] if mirrored else entry.urls:
            try:
                if mirrored:
                    shutil.copyfile(Path(source) / entry.file, part)
                else:
                    pooch.HTTPDownloader(progressbar=progressbar, timeout=TIMEOUT_S)(
                        source, str(part), None
                    )
            except requests.RequestException as error:
                reasons.append(f"{source.split('/')[2]}: {type(error).__name__}")
                continue
            if matches(part, entry):
                part.replace(target)
                return
            wrong = True
            reasons.append(f"{source}: wrong checksum, {part.stat().st_size:,} bytes")
            part.replace(rejected)
    if wrong:
        expected = f" ({entry.bytes:,} bytes expected)" if entry.bytes else ""
        raise DataError(
            f"{entry.file} is not the registered file{expected}: {'; '.join(reasons)}. What "
            f"came was set aside as {rejected}; fetch again, or renew the mirror folder's copy."
        )
    raise DownloadError(
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
