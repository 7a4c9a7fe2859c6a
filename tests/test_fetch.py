import hashlib
import os
import pickle
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest

from covidmtl_core import fetch
from covidmtl_core.errors import DataError, DownloadError, ParameterError

CONTENT = b"a table of patients" * 1000
ENTRY = fetch.RegistryEntry(
    id="table",
    file="table.bin",
    urls=(),
    licence="none",
    citation="none",
    purpose="a test",
    bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/silent":
            time.sleep(5)
        body = {"/good": CONTENT, "/wrong": CONTENT[::-1], "/short": CONTENT}.get(self.path)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:500] if self.path == "/short" else body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def put(**changes: object) -> None:
        entry = replace(ENTRY, **changes)  # type: ignore[arg-type]
        monkeypatch.setattr(fetch, "registry", lambda: {entry.id: entry})

    return put


def left_over(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.is_dir() else []


def test_registry_entries_can_be_checked_or_say_why_not() -> None:
    for entry in fetch.registry().values():
        assert entry.licence and entry.citation and entry.purpose
        if entry.urls:
            assert bool(entry.sha256) != bool(entry.git_blob), entry.id
            assert all("3610c0e35a06b95646b906140d5b6ab42a301524" in url for url in entry.urls)
        else:
            assert entry.note, entry.id


def test_download_is_checked_and_kept(server, register, empty_cache) -> None:  # type: ignore[no-untyped-def]
    register(urls=(f"{server}/missing", f"{server}/wrong", f"{server}/good"))
    path = fetch.fetch("table")
    assert path.read_bytes() == CONTENT
    assert left_over(empty_cache) == ["table.bin", "table.bin.rejected"]
    register(urls=(f"{server}/missing",))
    assert fetch.fetch("table") == path, "a file in the cache needs no download"


@pytest.mark.parametrize(("page", "kept"), [("wrong", ["table.bin.rejected"]), ("short", [])])
def test_bad_download_never_enters_the_cache(server, register, empty_cache, page, kept) -> None:  # type: ignore[no-untyped-def]
    register(urls=(f"{server}/{page}",))
    with pytest.raises(DataError, match=r"table\.bin"):
        fetch.fetch("table")
    assert left_over(empty_cache) == kept


def test_a_cache_that_cannot_be_written_is_named(register, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "file").touch()
    monkeypatch.setenv(fetch.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    register(urls=("http://127.0.0.1:9/none",))
    with pytest.raises(DataError, match="COVIDMTL_CACHE"):
        fetch.fetch("table")


def test_many_at_once_repair_a_damaged_file(server, register, empty_cache) -> None:  # type: ignore[no-untyped-def]
    register(urls=(f"{server}/good",))
    fetch.fetch("table").write_bytes(b"damaged")
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch.fetch("table").read_bytes()))
        for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 12


def test_no_network_says_what_to_do(register, empty_cache) -> None:  # type: ignore[no-untyped-def]
    register(urls=("http://127.0.0.1:9/none",))
    with pytest.raises(DataError, match="COVIDMTL_DATA_MIRROR"):
        fetch.fetch("table")
    assert left_over(empty_cache) == []


def test_truncated_cache_file_is_set_aside_and_fetched_again(server, register, empty_cache) -> None:  # type: ignore[no-untyped-def]
    register(urls=(f"{server}/good",))
    fetch.fetch("table").write_bytes(CONTENT[:100])
    assert fetch.state(fetch.registry()["table"]) == "damaged"
    assert fetch.fetch("table").read_bytes() == CONTENT
    assert (empty_cache / "table.bin.rejected").read_bytes() == CONTENT[:100]


def test_mirror_comes_before_download(register, empty_cache, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / "table.bin").write_bytes(CONTENT)
    monkeypatch.setenv(fetch.MIRROR_VARIABLE, str(mirror))
    register(urls=("http://127.0.0.1:9/none",))
    assert fetch.state(fetch.registry()["table"]) == "in mirror"
    assert fetch.fetch("table").read_bytes() == CONTENT
    (mirror / "table.bin").write_bytes(b"something else")
    fetch.cache_folder().joinpath("table.bin").unlink()
    with pytest.raises(DataError, match="wrong checksum"):
        fetch.fetch("table")
    assert (mirror / "table.bin").exists(), "a mirror is never written to"


def test_mirror_must_be_a_folder(register, empty_cache, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    register(urls=())
    monkeypatch.setenv(fetch.MIRROR_VARIABLE, "/no/such/folder")
    with pytest.raises(DataError, match="not a folder"):
        fetch.fetch("table")


def test_a_silent_server_is_given_up(server, register, empty_cache, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    assert fetch.TIMEOUT_S <= 60
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.5)
    register(urls=(f"{server}/silent",))
    begun = time.monotonic()
    with pytest.raises(DownloadError, match="Timeout"):
        fetch.fetch("table")
    assert time.monotonic() - begun < 4


def test_git_blob_id_is_what_git_computes(register, empty_cache, tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "empty"
    path.write_bytes(b"")
    blob = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # git's well-known empty blob
    assert fetch.matches(path, replace(ENTRY, sha256=None, git_blob=blob))
    path.write_bytes(b"x")
    assert not fetch.matches(path, replace(ENTRY, sha256=None, git_blob=blob))


def test_unknown_and_unavailable_ids_are_named(empty_cache) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ParameterError, match=r"'lungs'.*features"):
        fetch.fetch("lungs")
    with pytest.raises(DataError, match=r"closed"):
        fetch.fetch("segmented-volumes")


@pytest.mark.usefixtures("released")
@pytest.mark.parametrize("file_id", ["patients", "features"])
def test_released_pickles_read_as_pandas_reads_them(file_id: str) -> None:
    path = fetch.fetch(file_id)
    pd.testing.assert_frame_equal(fetch.read_pickled_table(path), pd.read_pickle(path))


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["COVIDMTL_TEST_TRAP"],)


@pytest.mark.parametrize("content", [Evil(), [1, 2], {"a": Evil()}, "text", b"no pickle"])
def test_unpickler_runs_nothing_and_admits_only_tables(tmp_path, monkeypatch, content) -> None:  # type: ignore[no-untyped-def]
    trap = tmp_path / "trap"
    monkeypatch.setenv("COVIDMTL_TEST_TRAP", str(trap))
    path = tmp_path / "evil.ppl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    with pytest.raises(DataError, match=r"evil\.ppl"):
        fetch.read_pickled_table(path)
    assert not trap.exists()


def test_truncated_pickle_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "cut.ppl"
    path.write_bytes(pickle.dumps(pd.DataFrame({"a": range(1000)}))[:500])
    with pytest.raises(DataError, match=r"cut\.ppl"):
        fetch.read_pickled_table(path)
