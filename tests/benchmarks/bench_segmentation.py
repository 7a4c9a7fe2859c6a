"""Speed of the lung segmentations against the plain baseline, on one phantom at full size.

Run: python tests/benchmarks/bench_segmentation.py [rounds]. All methods in one process, rounds
interleaved, medians; worker processes are warm after the first round, which is not counted.
"""

import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import SimpleITK as sitk

sys.path.insert(0, str(Path(__file__).parent))

import plain_segmentation as plain

from covidmtl_core.phantom import draw_patient, make_phantom
from covidmtl_core.segmentation import segment_lungs


def plain_released(image: sitk.Image) -> np.ndarray:
    """Algorithm 1 as released, by the plain baseline."""
    volume = np.clip(sitk.GetArrayFromImage(image) + 1024, 0, 4095).astype(np.int16)
    return plain.refine(volume, plain.classical(volume))


def main(rounds: int) -> None:
    warnings.simplefilter("ignore")
    image = make_phantom(draw_patient(3, burden=0.2)).image
    methods = {
        "plain": plain_released,
        "released": lambda i: sitk.GetArrayFromImage(segment_lungs(i, "released")) > 0,
        "refined": lambda i: sitk.GetArrayFromImage(segment_lungs(i, "refined")) > 0,
    }
    times: dict[str, list[float]] = {name: [] for name in methods}
    masks = {}
    for number in range(rounds + 1):
        for name, method in methods.items():
            if name == "plain" and number == 0:
                continue
            start = time.perf_counter()
            masks[name] = method(image)
            if number:
                times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(found) for name, found in times.items()}
    print(
        json.dumps(
            {
                "voxels": image.GetSize(),
                "seconds": {name: round(value, 2) for name, value in median.items()},
                "released_speedup": round(median["plain"] / median["released"], 1),
                "refined_to_released": round(median["refined"] / median["released"], 2),
                "voxels_that_differ": int((masks["plain"] != masks["released"]).sum()),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
