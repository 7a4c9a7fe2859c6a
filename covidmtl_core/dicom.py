"""DICOM series: which files make a volume, in which order, with which geometry.

Geometry comes from ImagePositionPatient and ImageOrientationPatient alone; file names, instance
numbers and UIDs are only used to tell series apart. What might be a lost slice is never left aside
in silence: a file that cannot be read, or that belongs to the chosen series and does not fit, is an
error.
"""

import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from covidmtl_core.dicom_files import (
    NoDicom,
    NoSlice,
    Slice,
    found_files,
    read_header,
)
from covidmtl_core.errors import DataError, DataWarning, ParameterError
from covidmtl_core.volume_files import MAX_VOXELS, shown

MAX_GAP_MM = 10.0
"""Widest gap between unevenly spaced slices that is filled by interpolation."""

_MAX_TILT = 35.0
_SAME_PLACE_MM = 0.1
_CUT_MM = 10.0


def read_series(path: Path, series: str | int | None = None) -> sitk.Image:
    """Assemble the CT volume of a folder (searched with its subfolders) or zip archive.

    Of several series of one patient the one with the most slices is taken; among equals the thinner
    slices, then the lower series number. Localizers, reformats in other planes and files that are
    not DICOM are left aside. Unevenly spaced slices are interpolated to a regular grid where no gap
    exceeds `MAX_GAP_MM`, and a tilted gantry's sheared volume is resampled upright; both give a
    `DataWarning`.

    Args:
        path: A folder, or a zip archive of one.
        series: The series to take: its SeriesInstanceUID, SeriesNumber or SeriesDescription.

    Returns:
        Rescaled intensities; slices in ascending order along their normal.

    Raises:
        DataError: No series can be read with certainty; the message names the file or series.
        ParameterError: `series` matches none or several.
    """
    if series is not None and (isinstance(series, bool) or not isinstance(series, str | int)):
        raise ParameterError(
            f"series {series!r} of {path} is no UID, number or description: give one of these."
        )
    with found_files(path) as files:
        slices = _choose(files, series, path)
        slices.sort(key=_height)
        voxels = len(slices) * slices[0].shape[0] * slices[0].shape[1]
        if voxels > MAX_VOXELS:
            raise DataError(f"{path} has a series of {voxels:,} voxels, too many for one CT scan.")
        pool = ThreadPoolExecutor(4)
        try:
            pixels = list(pool.map(lambda piece: _values(piece, path), slices))
        finally:
            pool.shutdown(cancel_futures=True)
    return _assemble(*_without_duplicates(slices, pixels, path), path)


def write_series(image: sitk.Image, folder: Path, patient_id: str = "phantom") -> None:
    """Write a volume as a DICOM CT series, one uncompressed file a slice.

    Args:
        image: Whole numbers from -32768 to 32767, HU.
        folder: Made if it is not there; files are named by their UIDs, so their order is not that
            of the slices.
        patient_id: Goes into PatientID and PatientName.

    Raises:
        ParameterError: The image is not 3D or its values cannot be kept.
    """
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ParameterError(f"the image has {image.GetDimension()} dimensions; 3 are needed.")
    voxels = sitk.GetArrayViewFromImage(image)
    with np.errstate(invalid="ignore"):
        stored = voxels.astype(np.int16)
    if not np.array_equal(stored, voxels):
        raise ParameterError(
            f"values from {voxels.min()} to {voxels.max()} cannot be kept: whole HU from -32768 to "
            "32767 are needed."
        )
    folder.mkdir(parents=True, exist_ok=True)
    spacing, direction = image.GetSpacing(), image.GetDirection()
    common = {
        "SOPClassUID": CTImageStorage,
        "Modality": "CT",
        "ImageType": ["DERIVED", "SECONDARY", "AXIAL"],
        "PatientID": patient_id,
        "PatientName": patient_id,
        "StudyInstanceUID": generate_uid(entropy_srcs=[patient_id, "study"]),
        "SeriesInstanceUID": generate_uid(entropy_srcs=[patient_id, "series"]),
        "FrameOfReferenceUID": generate_uid(entropy_srcs=[patient_id, "frame"]),
        "SeriesNumber": 1,
        "SeriesDescription": "Synthetic thorax",
        "ImageOrientationPatient": decimals([*direction[0::3], *direction[1::3]]),
        "PixelSpacing": decimals([spacing[1], spacing[0]]),
        "SliceThickness": decimals([spacing[2]])[0],
        "Rows": voxels.shape[1],
        "Columns": voxels.shape[2],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
        "RescaleIntercept": 0,
        "RescaleSlope": 1,
    }
    for index, plane in enumerate(stored):
        uid = generate_uid(entropy_srcs=[patient_id, str(index)])
        dataset = pydicom.Dataset()
        for keyword, value in common.items():
            setattr(dataset, keyword, value)
        dataset.SOPInstanceUID = uid
        dataset.InstanceNumber = index + 1
        position = image.TransformIndexToPhysicalPoint((0, 0, index))
        dataset.ImagePositionPatient = decimals(position)
        dataset.PixelData = np.ascontiguousarray(plane, "<i2").tobytes()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.save_as(folder / f"{uid}.dcm", enforce_file_format=True)


def decimals(values: Sequence[float]) -> list[str]:
    """Numbers as DICOM decimal strings, at most 16 characters."""
    return [pydicom.valuerep.format_number_as_ds(float(value)) for value in values]


# --- choosing the series ---------------------------------------------------------------------


def _choose(files: list[tuple[Path, str]], series: str | int | None, path: Path) -> list[Slice]:
    """The slices of the series to take, when it is certain that none is lost."""
    groups: dict[tuple[Any, ...], list[list[Slice]]] = {}
    refused: list[tuple[str, NoSlice]] = []
    foreign: list[tuple[str, NoDicom]] = []
    for file, name in files:
        try:
            piece = read_header(file, name)
        except NoSlice as reason:
            refused.append((name, reason))
        except NoDicom as reason:
            foreign.append((name, reason))
        else:
            _add(groups.setdefault(piece.series, []), piece, path)
    found = [group for same in groups.values() for group in same]
    if series is not None and found:
        found = _matching(found, str(series).strip(), path)
    if found:
        patients = {group[0].series[3] for group in found}
        if len(patients) > 1:
            raise DataError(f"{path} holds {len(patients)} patients: give the folder of one.")
        chosen = min(found, key=_rank)
        _refuse_lost_slices(chosen, refused, foreign, path)
        if series is None:
            _refuse_longer_rest(chosen, found, path)
        return [replace(piece, axes=chosen[0].axes) for piece in chosen]
    claims = [(name, reason) for name, reason in foreign if _is_named_dicom(name)]
    first = {str(reason): name for name, reason in reversed([*refused, *claims])}
    causes = [f"{name} {reason}" for reason, name in first.items()][:3]
    raise DataError(
        f"{path} holds no CT series that can be read ({'; '.join(causes) or 'no DICOM file'}): "
        "give the folder or zip archive with one patient's axial slices."
    )


def _add(groups: list[list[Slice]], piece: Slice, path: Path) -> None:
    """Put a slice to those of its orientation and pixel spacing, which rounding makes differ."""
    for group in groups:
        turned = np.abs(group[0].axes - piece.axes).max()
        wider = np.abs(np.subtract(group[0].spacing, piece.spacing)).max()
        if turned < 1e-3 and wider < 1e-3:
            group.append(piece)
            return
    if len(groups) > 50:
        raise DataError(f"{path} has a series whose orientation changes from slice to slice.")
    groups.append([piece])


def _matching(found: list[list[Slice]], wanted: str, path: Path) -> list[list[Slice]]:
    chosen = [group for group in found if wanted and wanted in group[0].series[:3]]
    different = {group[0].series[:6] for group in chosen}
    if len(different) == 1:
        return chosen
    names = "; ".join(
        shown(
            f"number {group[0].series[1] or '-'}, {group[0].series[2] or 'no description'}, "
            f"{len(group)} slices, UID {group[0].series[0] or '-'}"
        )
        for group in (chosen or found)[:10]
    )
    if chosen:
        raise ParameterError(
            f"series {wanted!r} is not unique in {path}: give the UID or description of one "
            f"({names})."
        )
    raise ParameterError(f"series {wanted!r} is not in {path}, which holds: {names}.")


def _rank(group: list[Slice]) -> tuple[Any, ...]:
    key = group[0].series
    number = int(key[1]) if re.fullmatch(r"-?[0-9]{1,15}", key[1]) else 10**16
    return -len(group), key[7], number, *map(str, key), group[0].name


def _refuse_lost_slices(
    chosen: list[Slice],
    refused: list[tuple[str, NoSlice]],
    foreign: list[tuple[str, NoDicom]],
    path: Path,
) -> None:
    """Raise if a file that was left aside may be a slice of the chosen series."""
    uid = chosen[0].series[0]
    lost: list[tuple[str, Exception]] = []
    lost += [(n, r) for n, r in refused if not r.aside and (r.uid is None or r.uid == uid)]
    alike = {re.sub("[0-9]+", "0", piece.name) for piece in chosen}
    lost += [(n, r) for n, r in foreign if _is_named_dicom(n) or re.sub("[0-9]+", "0", n) in alike]
    if lost:
        name, reason = lost[0]
        raise DataError(
            f"{path}: {name} {reason}; copy the series again, or take the file out of the folder "
            "if it is no slice of it."
        )


def _is_named_dicom(name: str) -> bool:
    return name.lower().endswith((".dcm", ".ima", ".dicom"))


def _refuse_longer_rest(chosen: list[Slice], found: list[list[Slice]], path: Path) -> None:
    """Raise if slices of the same series, told apart by their headers, reach further."""
    identity = chosen[0].series[0], chosen[0].series[3:6]
    heights = np.array([_height(piece) for piece in chosen])
    for group in found:
        if group is chosen or not identity[0]:
            continue
        if (group[0].series[0], group[0].series[3:6]) != identity:
            continue
        other = np.array([piece.position @ chosen[0].axes[2] for piece in group])
        beyond = max(heights.min() - other.min(), other.max() - heights.max())
        if beyond > _CUT_MM:
            raise DataError(
                f"{path} has one series whose headers fall into parts (as by {group[0].name}), of "
                f"which the largest leaves out {beyond:.0f} mm: choose one by `series` or separate "
                "them."
            )


# --- from slices to a volume -----------------------------------------------------------------


def _height(piece: Slice) -> float:
    return float(piece.position @ piece.axes[2])


def _values(piece: Slice, path: Path) -> NDArray[Any]:
    """Rescaled intensities of one file, (rows, columns)."""
    if piece.pixels.offset < 0:
        return _decoded(piece, path)
    how = piece.pixels
    raw = np.fromfile(piece.path, f"{how.order}u2", piece.shape[0] * piece.shape[1], "", how.offset)
    spare = 16 - how.bits
    values: NDArray[Any]
    if how.signed:
        values = (raw.astype(np.uint16) << spare).astype(np.int16) >> spare
    else:
        values = raw & np.uint16(2**how.bits - 1)
    kept = values.astype(np.uint16)
    if not (np.array_equal(kept, raw) or np.array_equal(kept & (2**how.bits - 1), raw)):
        raise DataError(
            f"{path}: {piece.name} has pixels that need more bits than its header says: export the "
            "series again."
        )
    return _short(values.reshape(piece.shape) * how.slope + how.intercept)


def _decoded(piece: Slice, path: Path) -> NDArray[Any]:
    """Compressed pixels."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    try:
        reader.SetFileName(str(piece.path))
        reader.ReadImageInformation()
        size = reader.GetSize()
        if tuple(size[:2]) == piece.shape[::-1] and int(np.prod(size[2:])) == 1:
            values = sitk.GetArrayFromImage(reader.Execute())
            if values.size == piece.shape[0] * piece.shape[1]:
                return _short(values.reshape(piece.shape))
        reason = f"{size[0]} x {size[1]} pixels decoded"
    except UnicodeError:
        reason = "its name is not plain text; rename it"
    except RuntimeError:
        reason = "damaged"
    raise DataError(
        f"{path}: {piece.name} has compressed pixels that cannot be read ({reason}): copy it again."
    )


def _short(values: NDArray[Any]) -> NDArray[Any]:
    """Whole numbers as int16 where they fit, all else as float32."""
    if np.abs(values).max() < 2**15:
        whole = values.astype(np.int16)
        if np.array_equal(whole, values):
            return whole
    return values.astype(np.float32)


def _without_duplicates(
    slices: list[Slice], pixels: list[NDArray[Any]], path: Path
) -> tuple[list[Slice], list[NDArray[Any]]]:
    """Drop copies of a slice; take the largest of several acquisitions of one place."""
    kept: list[int] = []
    clash = -1
    for index, piece in enumerate(slices):
        if kept and _height(piece) - _height(slices[kept[-1]]) < _SAME_PLACE_MM:
            apart = np.abs(piece.position - slices[kept[-1]].position).max()
            if apart > 2 * _SAME_PLACE_MM or not np.array_equal(pixels[index], pixels[kept[-1]]):
                clash = index
            continue
        kept.append(index)
    if clash < 0:
        return [slices[k] for k in kept], [pixels[k] for k in kept]
    parts: dict[str, list[int]] = {}
    for index, piece in enumerate(slices):
        parts.setdefault(piece.acquisition, []).append(index)
    if len(parts) == 1:
        raise DataError(
            f"{path} holds different slices at the same place (as {slices[clash].name}), which "
            "nothing in their headers tells apart: separate the volumes into folders of their own."
        )
    largest = max(parts.values(), key=len)
    heights = [_height(piece) for piece in slices]
    covered = heights[largest[-1]] - heights[largest[0]]
    if heights[-1] - heights[0] - covered > _CUT_MM:
        raise DataError(
            f"{path} holds several acquisitions that overlap, none of which covers the whole "
            f"height of {heights[-1] - heights[0]:.0f} mm: separate them into folders of their own."
        )
    warnings.warn(
        f"{path}: of {len(parts)} acquisitions of one place, number "
        f"{slices[largest[0]].acquisition or '(none)'} with {len(largest)} slices was taken and "
        f"{len(slices) - len(largest)} slices were dropped.",
        DataWarning,
        stacklevel=2,
    )
    return _without_duplicates([slices[k] for k in largest], [pixels[k] for k in largest], path)


def _check_scales(slices: list[Slice], path: Path) -> None:
    """All slices must count in the same units: the most common ones."""
    first = slices[0].pixels
    slope = float(np.median([piece.pixels.slope for piece in slices]))
    intercept = float(np.median([piece.pixels.intercept for piece in slices]))
    for piece in slices:
        how = piece.pixels
        if (how.bits, how.signed) != (first.bits, first.signed):
            what = "stores its pixels in another way than the first slice"
        elif abs(how.slope - slope) > 0.01 * slope or abs(how.intercept - intercept) > 100:
            what = (
                f"has a RescaleSlope or RescaleIntercept ({how.slope:.4g}, {how.intercept:.4g}) "
                f"unlike that of the other slices ({slope:.4g}, {intercept:.4g})"
            )
        else:
            continue
        raise DataError(f"{path}: {piece.name} {what}: export the series again.")


def _assemble(slices: list[Slice], pixels: list[NDArray[Any]], path: Path) -> sitk.Image:
    if len(slices) < 2:
        raise DataError(f"{path} has one CT slice; a volume needs the whole series.")
    _check_scales(slices, path)
    heights = np.array([_height(piece) for piece in slices])
    positions = np.array([piece.position for piece in slices])
    axes = slices[0].axes
    step = float(np.median(np.diff(heights)))
    if step < _SAME_PLACE_MM:
        raise DataError(f"{path} has slices {step:.2g} mm apart, closer than those of any CT scan.")
    sideways = (positions - positions.mean(0)) @ axes[:2].T
    centred = heights - heights.mean()
    slope = centred @ sideways / (centred @ centred)
    if np.abs(sideways - np.outer(centred, slope)).max() > max(0.5, 0.1 * step):
        raise DataError(
            f"{path} has slices that jump sideways from one to the next: they belong to different "
            "reconstructions; separate them into folders of their own."
        )
    _refuse_interleaved(slices, heights, step, path)
    volume, step = _regular(np.stack(pixels), heights, step, path)
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing((*slices[0].spacing, step))
    image.SetOrigin(tuple(positions[0]))
    image.SetDirection(tuple(axes.T.ravel()))
    sheared = np.hypot(*slope) * (heights[-1] - heights[0]) > 0.5
    return _upright(image, slope, path) if sheared else image


def _refuse_interleaved(
    slices: list[Slice], heights: NDArray[np.float64], step: float, path: Path
) -> None:
    """Raise if uneven slices come from acquisitions that overlap, as the patient moved between."""
    if np.abs(np.diff(heights) - step).max() <= max(0.02 * step, 0.02):
        return
    order = [piece.acquisition for piece in slices]
    changes = sum(one != other for one, other in pairwise(order))
    if changes >= len(set(order)):
        raise DataError(
            f"{path} holds acquisitions that overlap with slices at other heights: separate them "
            "into folders of their own."
        )


def _regular(
    volume: NDArray[Any], heights: NDArray[np.float64], step: float, path: Path
) -> tuple[NDArray[Any], float]:
    """The volume on evenly spaced slices, and their distance."""
    steps = np.diff(heights)
    if np.abs(steps - step).max() <= max(0.02 * step, 0.02):
        return volume, float((heights[-1] - heights[0]) / (len(heights) - 1))
    widest = int(steps.argmax())
    if steps[widest] > MAX_GAP_MM:
        raise DataError(
            f"{path} has a gap of {steps[widest]:.1f} mm between slices that mostly lie "
            f"{step:.1f} mm apart (after {heights[widest]:.1f} mm): slices are missing; export "
            "the series again."
        )
    warnings.warn(
        f"{path}: slices are {steps.min():.2f} to {steps.max():.2f} mm apart; they were "
        f"interpolated to every {step:.2f} mm.",
        DataWarning,
        stacklevel=2,
    )
    count = round((heights[-1] - heights[0]) / step) + 1
    if count * volume[0].size > MAX_VOXELS:
        raise DataError(f"{path} has slices too uneven for one volume ({count:,} would be needed).")
    places = np.linspace(heights[0], heights[-1], count)
    below = np.clip(np.searchsorted(heights, places, side="right") - 1, 0, len(heights) - 2)
    share = ((places - heights[below]) / steps[below])[:, None, None].astype(np.float32)
    mixed = volume[below] * (1 - share) + volume[below + 1] * share
    if np.issubdtype(volume.dtype, np.integer):
        mixed = mixed.round().astype(volume.dtype)
    return mixed, float(places[1] - places[0])


def _upright(image: sitk.Image, slope: NDArray[np.float64], path: Path) -> sitk.Image:
    """Undo the shear of a tilted gantry; `slope` is mm sideways (row, column) per mm of height."""
    angle = float(np.degrees(np.arctan(np.hypot(*slope))))
    if angle > _MAX_TILT:
        raise DataError(
            f"{path} has slices that move sideways as if the gantry were tilted by {angle:.0f} "
            f"degrees, over {_MAX_TILT:.0f}: their positions are wrong; export the series again."
        )
    axes = np.array(image.GetDirection()).reshape(3, 3).T
    height = (image.GetSize()[2] - 1) * image.GetSpacing()[2]
    reach = np.ceil(np.abs(slope) * height / image.GetSpacing()[:2]).astype(int)
    origin = np.array(image.GetOrigin())
    start = origin + sum(
        min(0.0, s) * height * axis for s, axis in zip(slope, axes[:2], strict=True)
    )
    size = [int(n + r) for n, r in zip(image.GetSize()[:2], reach, strict=True)]
    if size[0] * size[1] * image.GetSize()[2] > MAX_VOXELS:
        raise DataError(f"{path} would become too large when the gantry's tilt is undone.")
    warnings.warn(
        f"{path}: the gantry was tilted by {angle:.1f} degrees; the volume was resampled upright.",
        DataWarning,
        stacklevel=2,
    )
    # A point of the patient at height h lies h * slope further along in the stored, upright grid.
    shear = np.eye(3) - sum(
        s * np.outer(axis, axes[2]) for s, axis in zip(slope, axes[:2], strict=True)
    )
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(tuple(shear.ravel()))
    transform.SetCenter(tuple(origin))
    straight = sitk.Resample(
        sitk.Cast(image, sitk.sitkFloat32),
        [*size, image.GetSize()[2]],
        transform,
        sitk.sitkLinear,
        tuple(start),
        image.GetSpacing(),
        image.GetDirection(),
        -1024,
    )
    # Casting alone would cut off fractions and so darken the image by half a HU.
    whole = image.GetPixelID() == sitk.sitkInt16
    return sitk.Cast(sitk.Round(straight), sitk.sitkInt16) if whole else straight
