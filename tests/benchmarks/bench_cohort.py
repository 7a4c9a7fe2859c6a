"""As many scans as the paper has through `covidmtl preprocess`, killed twice on the way.

Run: python tests/benchmarks/bench_cohort.py FOLDER [scans]. Small phantoms, 6 mm, as DICOM; 1 GB
in FOLDER, half an hour on 2 cores.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
from joblib import Parallel, delayed

from covidmtl_core.benchmarks.recording import record
from covidmtl_core.dicom import write_series
from covidmtl_core.phantom import SIZE, draw_patient, make_phantom

MM, JOBS = 6.0, 2


def scan(number: int, folder: Path) -> None:
    made = make_phantom(draw_patient(number, 0.1), [round(n / MM) for n in SIZE], MM)
    write_series(made.image, folder / f"s{number}", f"phantom-{number}")


def memory(process: psutil.Process) -> float:
    """GiB of a process and those it started; shared pages count once for each."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 2**30


def main(folder: Path, n: int) -> None:
    source, target = folder / "dicom", folder / "ready"
    source.mkdir(parents=True, exist_ok=True)
    Parallel(n_jobs=JOBS)(delayed(scan)(k, source) for k in range(n))
    lines = [f"p{k},s{k},{k % 2},{k % 2},{k % 2}\n" for k in range(n)]
    (source / "labels.csv").write_text("patient_id,path,ct,nat,severity\n" + "".join(lines))
    command = ["covidmtl", "preprocess", str(source), str(target)]
    command += ["--spacing", str(MM), "--jobs", str(JOBS)]
    kill_after, seen, start = [n // 3, 2 * n // 3], [], time.monotonic()
    while True:
        run = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        process = psutil.Process(run.pid)
        while run.poll() is None:
            done = len(list(target.glob("scans/*")))
            seen.append((done, memory(process)))
            if kill_after and done >= kill_after[0]:
                kill_after.pop(0)
                os.killpg(run.pid, signal.SIGKILL)
            time.sleep(0.5)
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL
    seconds = time.monotonic() - start
    scans = pd.read_csv(target / "scans.csv")
    assert len(scans) == n
    measured = pd.DataFrame(seen, columns=["done", "gib"])
    early = measured.query("20 <= done <= 100")["gib"].max()
    figures = {
        "scans": n,
        "ready": int((scans["state"] == "ready").sum()),
        "kills": 2,
        "processes": JOBS,
        "minutes": round(seconds / 60, 1),
        "seconds a scan": round(seconds / n, 2),
        "peak memory to 100 scans, GiB": round(early, 2),
        "peak memory to the end, GiB": round(measured["gib"].max(), 2),
    }
    record("cohort_run", figures, ("SimpleITK", "numpy"))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 1329)
