"""Preprocessed volumes on disk, of which a part can be read alone, and the patients to train on.

A volume is one file of Blosc2's n-dimensional format, lossless, in compressed blocks, as nnU-Net
keeps its own: a crop costs what it holds and not what the scan holds. Blosc2 reads most changed
bits as other voxels without a word, so each chunk has a checksum and is compared with it when read.
"""

import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from covidmtl_core.claims import write_atomically
from covidmtl_core.errors import DataError, ParameterError

CHUNKS, BLOCKS = (32, 128, 128), (16, 64, 64)
"""Voxels (z, y, x) that lie together in the file, and that are unpacked together."""

OFFSET, CAP = 1024, 2000
"""What is added to HU, and where the sum is cut off (the authors' code)."""

_AGAIN = "delete its folder and preprocess the scan again."

Volume = Path | NDArray[np.int16]
"""A folder with `volume.b2nd` and `lungs.b2nd`, or (D, H, W) HU that is -1024 outside the lungs."""


def write(image: sitk.Image, path: Path) -> None:
    """Write a volume, with its grid; the file appears whole or not at all.

    Args:
        image: 3D, of integers.
        path: File named .b2nd.
    """
    import blosc2

    values = sitk.GetArrayFromImage(image)
    parts = [np.minimum(sizes, values.shape).tolist() for sizes in (CHUNKS, BLOCKS)]
    settings = {"codec": blosc2.Codec.ZSTD, "clevel": 5, "filters_meta": [0]}
    settings["filters"] = [blosc2.Filter.SHUFFLE if values.itemsize > 1 else blosc2.Filter.NOFILTER]
    settings["nthreads"] = 1  # more would write the blocks in any order
    array = blosc2.asarray(values, chunks=parts[0], blocks=parts[1], cparams=settings)
    written = blosc2.ndarray_from_cframe(array.to_cframe())  # a chunk of zeros is another in memory
    chunks = [written.schunk.get_chunk(k) for k in range(written.schunk.nchunks)]
    array.schunk.vlmeta["crc32"] = [crc32(chunk) for chunk in chunks]
    array.schunk.vlmeta["layout"] = _layout(array)
    array.schunk.vlmeta["sha256"] = hashlib.sha256(values.tobytes()).hexdigest()
    for name in ("Spacing", "Origin", "Direction"):
        array.schunk.vlmeta[name] = list(getattr(image, f"Get{name}")())
    write_atomically(path, array.to_cframe())


def read(path: Path) -> sitk.Image:
    """A whole volume, as it was written.

    Raises:
        DataError: The file is missing or damaged.
    """
    array = _open(path)
    values = _part(array, path, tuple(slice(0, n) for n in array.shape))
    meta = array.schunk.vlmeta
    if hashlib.sha256(values.tobytes()).hexdigest() != meta["sha256"]:
        raise DataError(f"{path} is damaged inside: {_AGAIN}")
    image = sitk.GetImageFromArray(values)
    for name in ("Spacing", "Origin", "Direction"):
        getattr(image, f"Set{name}")(meta[name])
    return image


def read_crop(volume: Volume, start: Sequence[int], size: Sequence[int]) -> NDArray[np.int16]:
    """A box of the lungs' volume, as the networks take it but for standardisation.

    Args:
        volume: See `Volume`.
        start: First voxel (z, y, x); may be negative.
        size: Voxels; the box may stick out.

    Returns:
        HU + 1024, cut off at 0 and 2000; 0 outside the lungs and outside the volume.

    Raises:
        DataError: A file is missing, damaged, or does not fit the other.
    """
    whole = _open(volume / "volume.b2nd") if isinstance(volume, Path) else volume
    ends = [min(s + n, most) for s, n, most in zip(start, size, whole.shape, strict=True)]
    firsts = [max(s, 0) for s in start]
    if any(first >= end for first, end in zip(firsts, ends, strict=True)):
        return np.zeros(tuple(size), np.int16)
    box = tuple(slice(first, end) for first, end in zip(firsts, ends, strict=True))
    lungs = None
    if isinstance(volume, Path):
        mask = volume / "lungs.b2nd"
        masks = _open(mask)
        if masks.shape != whole.shape:
            raise DataError(f"{mask} has another size than its volume: {_AGAIN}")
        values, lungs = _part(whole, volume / "volume.b2nd", box), _part(masks, mask, box)
    else:
        values = whole[box]
    values = np.clip(values, -OFFSET, CAP - OFFSET).astype(np.int16, copy=False)
    values += OFFSET
    if lungs is not None:
        np.copyto(values, 0, where=lungs == 0)
    if values.shape == tuple(size):
        return values
    crop = np.zeros(tuple(size), np.int16)
    crop[tuple(slice(b.start - s, b.stop - s) for b, s in zip(box, start, strict=True))] = values
    return crop


def shape_of(volume: Volume) -> tuple[int, ...]:
    """Voxels (z, y, x)."""
    return _open(volume / "volume.b2nd").shape if isinstance(volume, Path) else volume.shape


def _open(path: Path) -> Any:
    import blosc2

    try:
        # One thread: the workers that load batches are many, and are forked.
        array = blosc2.open(str(path), mode="r", dparams=blosc2.DParams(nthreads=1))
        if array.ndim != 3 or array.schunk.vlmeta["layout"] != _layout(array):
            raise ValueError(f"{path} has another layout than was written")
        return array
    except FileNotFoundError:
        raise DataError(f"{path} is missing: run `covidmtl preprocess` again.") from None
    except Exception as error:  # blosc2 raises anything on a damaged file
        raise DataError(f"{path} is damaged or of another kind: {_AGAIN}") from error


def _layout(array: Any) -> str:
    """What the header says of how to read the chunks; it has no checksum."""
    return f"{array.shape} {array.chunks} {array.blocks} {array.dtype.str}"


def _part(array: Any, path: Path, box: tuple[slice, ...]) -> NDArray[Any]:
    import blosc2

    try:
        sums = array.schunk.vlmeta["crc32"]
        for k in blosc2.get_slice_nchunks(array, box):
            if crc32(array.schunk.get_chunk(int(k))) != sums[k]:
                raise ValueError(f"chunk {k} is not what was written")
        return array[box]
    except Exception as error:
        raise DataError(f"{path} is damaged inside: {_AGAIN}") from error


def load_preprocessed(
    folder: str | os.PathLike[str],
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Path]]:
    """What `covidmtl preprocess` made ready.

    Returns:
        Indexed by patient (text), those whose scans are ready: the table `scans.csv` (`ct`, `nat`,
        `severity`, `split` and more) and the 375 features; and the folder of each volume.

    Raises:
        DataError: The folder is not one of preprocessed scans, or none is ready.
    """
    folder = Path(folder)
    tables = []
    for name in ("scans.csv", "features.csv"):
        try:
            table = pd.read_csv(folder / name, dtype={"patient_id": str})
            tables.append(table.set_index("patient_id"))
        except (OSError, ValueError, KeyError):
            raise DataError(
                f"{folder / name} is missing or damaged: run `covidmtl preprocess` into {folder}."
            ) from None
    scans = tables[0][tables[0]["state"] == "ready"]
    if scans.empty:
        raise DataError(f"no scan of {folder} is ready: see the reasons in scans.csv.")
    return scans, tables[1], {p: folder / "scans" / p for p in scans.index}


def load_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """How `covidmtl preprocess` made a folder: `spacing_mm`, `method`, version.

    Raises:
        DataError: The folder does not say.
    """
    path = Path(folder) / "settings.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise DataError(
            f"{path} is missing or damaged: run `covidmtl preprocess` into {path.parent}."
        ) from None


class Patients(Dataset[dict[str, Any]]):
    """Patients with labels and volumes, features, or both, to train on or to predict.

    Args:
        labels: Indexed by patient, a column for each task: classes from 0; missing or negative
            where unknown.
        features: Indexed by patient, any scale; None for none.
        volumes: Patient to volume; None for none.

    Raises:
        ParameterError: There is no patient, or neither volumes nor features.
        DataError: Volumes, features or a label of a patient are missing or cannot be used.
    """

    def __init__(
        self,
        labels: pd.DataFrame,
        features: pd.DataFrame | None = None,
        volumes: Mapping[Any, Volume] | None = None,
    ) -> None:
        if labels.empty or (features is None and volumes is None):
            raise ParameterError("there must be patients, with volumes, features or both.")
        for name, there in (("features", features), ("volumes", volumes)):
            known = there.index if isinstance(there, pd.DataFrame) else there
            lost = [] if known is None else [p for p in labels.index if p not in known]
            if lost:
                raise DataError(f"{len(lost)} patients have no {name}, the first is {lost[0]}.")
        for name, table in (("labels", labels), ("features", features)):
            if table is not None and not table.index.is_unique:
                twice = table.index[table.index.duplicated()][0]
                raise DataError(f"patient {twice} is in the {name} more than once.")
        self.ids = list(labels.index)
        self.crop: Sequence[int] = (200, 250, 250)
        self.jitter: Sequence[int] = (0, 0, 0)
        self.labels = {}
        for task in labels:
            classes = pd.to_numeric(labels[task], errors="coerce").astype("Float64")
            odd = labels[task].notna() & ~(classes % 1 == 0).fillna(False).astype(bool)
            if odd.any():
                patient, label = next(iter(labels[task][odd].items()))
                raise DataError(f"{task} of patient {patient} is {label}: classes are numbers.")
            self.labels[str(task)] = torch.tensor(classes.fillna(-1).astype("int64").to_numpy())
        self.volumes = None if volumes is None else [volumes[p] for p in self.ids]
        self.features = None
        if features is not None:
            values = features.loc[self.ids].to_numpy(np.float64)
            if not np.isfinite(values).all():
                row, column = np.argwhere(~np.isfinite(values))[0]
                name = features.columns[column]
                raise DataError(f"feature {name} of patient {self.ids[row]} is not a number.")
            self.features = torch.tensor(values)

    def cropped(self, crop: Sequence[int], jitter: Sequence[int] = (0, 0, 0)) -> "Patients":
        """The same patients, with crops of other sizes.

        Args:
            crop: Voxels (D, H, W) of what a network is given.
            jitter: Voxels by which a crop with a seed lies off the volume's centre, at most.
        """
        other = copy.copy(self)
        other.crop, other.jitter = crop, jitter
        return other

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([(index, None)])

    def __getitems__(self, wanted: Sequence[tuple[int, int | None]]) -> dict[str, Any]:
        """A batch.

        Args:
            wanted: Places of patients, each with the seed of its crop; None takes the centre.

        Returns:
            `index` (N,), `seed` (N,) int64; `labels`, task to (N,) int64; `features` (N, F)
            float64 and `volume` (N, 1, D, H, W) int16 (see `read_crop`), or None.
        """
        places = torch.tensor([index for index, _ in wanted])
        crops = None
        if self.volumes is not None:
            crops = np.stack([self._crop(self.volumes[i], seed) for i, seed in wanted])[:, None]
        return {
            "index": places,
            "seed": torch.tensor([seed or 0 for _, seed in wanted]),
            "labels": {task: values[places] for task, values in self.labels.items()},
            "features": None if self.features is None else self.features[places],
            "volume": None if crops is None else torch.from_numpy(crops),
        }

    def _crop(self, volume: Volume, seed: int | None) -> NDArray[np.int16]:
        start = [(n - size) // 2 for n, size in zip(shape_of(volume), self.crop, strict=True)]
        if seed is not None:
            low, high = [-j for j in self.jitter], self.jitter
            off = np.random.default_rng(seed).integers(low, high, endpoint=True)
            start = [s + int(o) for s, o in zip(start, off, strict=True)]
        return read_crop(volume, start, self.crop)

    def standardisation(self) -> tuple[float, float]:
        """Mean and standard deviation of a centre crop, each averaged over the patients."""
        from tqdm import tqdm

        if self.volumes is None:
            return 0.0, 1.0
        moments = []
        for volume in tqdm(self.volumes, "standardising", leave=False, disable=None):
            crop = self._crop(volume, None)
            moments.append((crop.mean(dtype=np.float64), crop.std(dtype=np.float64)))
        mean, sd = np.mean(moments, axis=0)
        return float(mean), float(sd) or 1.0

    def fingerprint(self) -> str:
        """A hash of all that is in here; of volumes in files, of the hashes that they hold."""
        found = hashlib.sha256(repr(self.ids).encode())
        for task, values in self.labels.items():
            found.update(task.encode() + values.numpy().tobytes())
        if self.features is not None:
            found.update(self.features.numpy().tobytes())
        for volume in self.volumes or []:
            if isinstance(volume, Path):
                for name in ("volume", "lungs"):
                    array = _open(volume / f"{name}.b2nd")
                    found.update(array.schunk.vlmeta["sha256"].encode())
            else:
                found.update(repr(volume.shape).encode() + np.ascontiguousarray(volume).tobytes())
        return found.hexdigest()
