"""What it costs to feed and to train COVID-MTL at the paper's size.

Run: python tests/benchmarks/bench_training.py [rounds]. A phantom of 340x390x390 voxels, in the
released format (a PNG a slice) and in the store; one process, rounds interleaved, medians. Peak
memory: of fresh processes that train two steps of one patient through `training.fit`. On CUDA also
a batch of 10 in the card's precision against plain PyTorch.
"""

import io
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pydicom
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from PIL import Image
from pydicom.encaps import generate_frames

from covidmtl_core import ct, shift3d, store
from covidmtl_core.benchmarks.recording import interleaved, record
from covidmtl_core.losses import MeanLoss, task_losses
from covidmtl_core.models import CovidMTL
from covidmtl_core.phantom import draw_patient, make_phantom
from covidmtl_core.recipe import TrainConfig
from covidmtl_core.shift3d import Shift3D
from covidmtl_core.store import Patients, read_crop
from covidmtl_core.training import _autocast, fit

START, SIZE = (70, 70, 70), (200, 250, 250)
TASKS = {"ct": 2, "nat": 2, "severity": 3}


def write_scans(folder: Path) -> None:
    """A phantom's lungs, in the released format and in the store."""
    made = make_phantom(draw_patient(1, 0.1))
    image = sitk.Clamp(made.image, sitk.sitkInt16, -1024, 3071)
    lungs = sitk.Cast(made.lungs > 0, sitk.sitkUInt8)
    masked = sitk.Mask(image, lungs, -1024)
    ct.write_volume(masked, folder / "released")
    for name, part in (("volume", masked), ("lungs", lungs)):
        store.write(part, folder / f"{name}.b2nd")


def read_slices(path: Path) -> NDArray[np.int16]:
    """The same crop, decoded slice by slice as the authors' code does."""
    dataset = pydicom.dcmread(path, force=True)
    frames = generate_frames(dataset.PixelData, number_of_frames=340)
    whole = np.stack([np.array(Image.open(io.BytesIO(f)), np.uint16) for f in frames])
    box = tuple(slice(s, s + n) for s, n in zip(START, SIZE, strict=True))
    return np.minimum(whole[box], store.CAP).astype(np.int16)


def crop_cases(folder: Path) -> dict[str, Callable[[], NDArray[np.int16]]]:
    """The same crop from both formats."""
    return {
        "slices": lambda: read_slices(folder / "released"),
        "store": lambda: read_crop(folder, START, SIZE),
    }


def peak_gib(folder: Path) -> tuple[float, float]:
    """Largest memory of a process that trains, GiB, and its time for a step, s."""
    code = (
        "import sys; from pathlib import Path\n"
        "from covidmtl_core.benchmarks import bench_training as b\n"
        "history = b.train_two(Path(sys.argv[1])).history.iloc[-1]\n"
        "print(history['gib'], history['seconds'] / 2)"
    )
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-c", code, str(folder), runs]
        here = Path(__file__).parent
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here)
    gib, seconds = map(float, done.stdout.split()[-2:])
    return gib, seconds


def train_two(folder: Path):  # type: ignore[no-untyped-def]
    """Two steps of COVID-MTL with Shift3D in each, one patient a step."""
    labels = pd.DataFrame({"ct": [0, 1], "nat": [0, 1], "severity": [0, 2]}, index=[1, 2])
    patients = Patients(labels, volumes=dict.fromkeys(labels.index, folder))
    config = TrainConfig(epochs=1, batch_size=1, shift_p=1.0)
    return fit(config, patients, sys.argv[2], progress=False, device="cpu")


def card_figures(folder: Path, rounds: int, device: str = "cuda", n: int = 10) -> dict[str, object]:
    """A batch on CUDA: ours against plain PyTorch's Shift3D and layout, and decoded slices."""
    labels = {task: torch.zeros(n, dtype=torch.int64, device=device) for task in TASKS}
    autocast = _autocast(TrainConfig(), torch.device(device))

    def step_of(ours: bool) -> Callable[[], None]:
        network = CovidMTL(TASKS, use_features=False, shift=Shift3D(p=1.0)).to(device).train()
        if ours:
            network = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(network.parameters(), 1e-3, 0.9, nesterov=True)
        fast_path = shift3d._fast_path if ours else lambda device: None

        def step() -> None:
            crops = [
                read_crop(folder, START, SIZE) if ours else read_slices(folder / "released")
                for _ in range(n)
            ]
            batch = torch.from_numpy(np.stack(crops)[:, None])
            with mock.patch.object(shift3d, "_fast_path", fast_path), autocast:
                outputs = network((batch.to(device).float() - 16.71) / 85.17)
                losses = task_losses({task: o.float() for task, o in outputs.items()}, labels)
                total = MeanLoss()(losses)
                optimizer.zero_grad(set_to_none=True)
                total.backward()
            optimizer.step()
            float(total.detach())  # waits for the card

        return step

    ours, plain = step_of(True), step_of(False)
    ours()
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    seconds = interleaved({"ours": ours, "plain": plain}, rounds)
    return {
        "peak memory, batch of 10, GiB": round(peak, 2),
        "samples a second": {name: round(n / value, 2) for name, value in seconds.items()},
        "samples a second against plain": round(seconds["plain"] / seconds["ours"], 2),
    }


def main(rounds: int) -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as named:
        folder = Path(named)
        write_scans(folder)
        same = np.array_equal(read_slices(folder / "released"), read_crop(folder, START, SIZE))
        seconds = interleaved(crop_cases(folder), rounds)
        sizes = {
            "slices": (folder / "released").stat().st_size / 1e6,
            "store": sum((folder / f"{n}.b2nd").stat().st_size for n in ("volume", "lungs")) / 1e6,
        }
        trained = [peak_gib(folder) for _ in range(3)]
        figures = {
            "volume": (340, 390, 390),
            "crop": SIZE,
            "crops are equal": same,
            "milliseconds a crop": {n: round(1000 * v, 1) for n, v in seconds.items()},
            "megabytes": {name: round(value, 2) for name, value in sizes.items()},
            "store against slices, times as fast": round(seconds["slices"] / seconds["store"], 1),
            "store against slices, size": round(sizes["store"] / sizes["slices"], 3),
            "peak memory of a step, GiB": round(statistics.median(g for g, _ in trained), 2),
            "seconds a step": round(statistics.median(s for _, s in trained), 2),
            "rounds": rounds,
        }
        if torch.cuda.is_available():
            on_card = card_figures(folder, max(rounds // 3, 3))
            card = torch.cuda.get_device_name()
            record("training_cost_gpu", on_card, ("torch", "blosc2"), card)
    record("training_cost", figures, ("torch", "blosc2", "numba"))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
