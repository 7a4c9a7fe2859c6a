"""Speed and memory of the 375 features against pyradiomics run as the authors ran it.

Run: python tests/benchmarks/bench_features.py [rounds]. Both in one process, rounds interleaved,
medians, after one uncounted call of `fast` that compiles it. The phantom has about 4 million lung
voxels at 1 mm. The figures go to book/recorded, where the chapter on features shows them.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import util

import pandas as pd
import SimpleITK as sitk

from covidmtl_core.benchmarks.recording import interleaved, record
from covidmtl_core.phantom import Phantom, draw_patient, make_phantom
from covidmtl_core.radiomics.features import extract_features


def scan() -> Phantom:
    return make_phantom(draw_patient(10, burden=0.2))


def peak_gib(made: Phantom) -> float:
    """Largest memory of a fresh process that reads the scan and runs `fast`, GiB."""
    code = (
        "import resource, sys; import SimpleITK as sitk\n"
        "from covidmtl_core.radiomics.features import extract_features\n"
        "extract_features(*map(sitk.ReadImage, sys.argv[1:]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
    )
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/image.mha", f"{folder}/mask.mha"]
        for path, image in zip(paths, (made.image, made.lungs), strict=True):
            sitk.WriteImage(image, path)
        command = [sys.executable, "-c", code, *paths]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def cases_of(made: Phantom, found: dict[str, pd.Series]) -> dict[str, Callable[[], None]]:
    """Ways to the features of a scan, which are put into `found`; pyradiomics where it is there."""

    def keep(name: str, call: Callable[..., pd.Series], *options: str) -> Callable[[], None]:
        return lambda: found.update({name: call(made.image, made.lungs, *options)})

    cases = {"fast": keep("fast", extract_features)}
    if util.find_spec("radiomics"):
        from covidmtl_core.benchmarks.plain_features import as_released

        cases["released"] = keep("released", as_released)
        cases["cropped"] = keep("cropped", extract_features, "pyradiomics")
    return cases


def main(rounds: int) -> None:
    made = scan()
    peak = peak_gib(made)
    found: dict[str, pd.Series] = {}
    cases = cases_of(made, found)
    median = interleaved(cases, rounds, warm=["fast"])
    apart = ((found["fast"] - found["released"]) / found["released"]).abs().max()
    figures = {
        "voxels": made.image.GetSize()[::-1],
        "lung voxels": int((sitk.GetArrayViewFromImage(made.lungs) > 0).sum()),
        "seconds": {name: round(value, 2) for name, value in median.items()},
        "fast against released": round(median["released"] / median["fast"], 1),
        "peak memory of fast, GiB": round(peak, 2),
        "largest relative difference": float(f"{apart:.1e}"),
        "rounds": rounds,
    }
    record("features_speed", figures, ("numba", "numpy", "pyradiomics"))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
