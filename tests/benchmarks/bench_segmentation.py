"""Speed of the lung segmentations against the plain baseline, on one phantom at full size.

Run: python tests/benchmarks/bench_segmentation.py [rounds]. All methods in one process, rounds
interleaved, medians; worker processes are warm after the first round, which is not counted. The
figures go to book/recorded, where the chapter on segmentation shows them.
"""

import sys
import warnings
from collections.abc import Callable

import numpy as np
import SimpleITK as sitk

from covidmtl_core._released_segmentation import refine
from covidmtl_core.benchmarks import plain_segmentation as plain
from covidmtl_core.benchmarks.recording import interleaved, record
from covidmtl_core.phantom import Phantom, draw_patient, make_phantom
from covidmtl_core.segmentation import segment_lungs


def plain_released(image: sitk.Image) -> np.ndarray:
    """Algorithm 1 as released, by the plain baseline."""
    volume = np.clip(sitk.GetArrayFromImage(image) + 1024, 0, 4095).astype(np.int16)
    return plain.refine(volume, plain.classical(volume))


def cases_of(image: sitk.Image, masks: dict[str, np.ndarray]) -> dict[str, Callable[[], None]]:
    """Each method on a scan at 1 mm; its mask is put into `masks`."""
    methods: dict[str, Callable[[sitk.Image], np.ndarray]] = {
        "plain": plain_released,
        "released": lambda i: sitk.GetArrayFromImage(segment_lungs(i, "released")) > 0,
        "refined": lambda i: sitk.GetArrayFromImage(segment_lungs(i, "refined")) > 0,
    }

    def keep(name: str) -> Callable[[], None]:
        return lambda: masks.update({name: methods[name](image)})

    return {name: keep(name) for name in methods}


def refining_cases(
    scan: Phantom, masks: dict[str, np.ndarray], n_jobs: int | None = None
) -> dict[str, Callable[[], None]]:
    """Algorithm 1 from where its snakes start, at the true lungs; at 1 mm."""
    volume = np.clip(sitk.GetArrayFromImage(scan.image) + 1024, 0, 4095).astype(np.int16)
    lungs = sitk.GetArrayFromImage(scan.lungs) > 0
    return {
        "plain": lambda: masks.update(plain=plain.refine(volume, lungs)),
        "released": lambda: masks.update(released=refine(volume, lungs, n_jobs)),
    }


def main(rounds: int) -> None:
    warnings.simplefilter("ignore")
    image = make_phantom(draw_patient(3, burden=0.2)).image
    masks: dict[str, np.ndarray] = {}
    cases = cases_of(image, masks)
    median = interleaved(cases, rounds, warm=["released", "refined"])
    figures = {
        "voxels": image.GetSize()[::-1],
        "seconds": {name: round(value, 2) for name, value in median.items()},
        "released against plain": round(median["plain"] / median["released"], 1),
        "refined against released": round(median["released"] / median["refined"], 1),
        "voxels that differ": int((masks["plain"] != masks["released"]).sum()),
        "rounds": rounds,
    }
    record("segmentation_speed", figures, ("numpy", "scikit-image", "SimpleITK", "edt"))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
