"""A look at each preprocessed scan: measures, remarks, a picture, and a page of all."""

import html
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd
import SimpleITK as sitk

from covidmtl_core.segmentation import LEFT, RIGHT
from covidmtl_core.style import PALETTE

SIDES = {"right": RIGHT, "left": LEFT}

EXPECTED = {
    "lungs_ml": (1000, 9000),
    "median_hu": (-960, -550),
    "slice_mm": (0, 5),
}
"""Ranges beyond which a scan gets a remark, chosen to make one look twice, not to leave it out."""


def measure(image: sitk.Image, lungs: sitk.Image, raw: sitk.Image) -> dict[str, Any]:
    """Volumes, densities and sizes of a scan, and what is odd about them.

    Args:
        image: HU, as segmented, the whole field of view.
        lungs: Labels in its grid.
        raw: The scan as it was read.

    Returns:
        `right_ml`, `left_ml`, `lungs_ml`; `mean_hu`, `sd_hu`, `median_hu` inside the lungs;
        `slices`, `slice_mm`, `pixel_mm` of the scan as read; `remarks`, one text.
    """
    labels = sitk.GetArrayViewFromImage(lungs)
    values = sitk.GetArrayViewFromImage(image)[labels > 0]
    ml = float(np.prod(image.GetSpacing())) / 1000
    found: dict[str, Any] = {
        f"{side}_ml": round(float((labels == label).sum()) * ml, 1) for side, label in SIDES.items()
    }
    found["lungs_ml"] = round(found["right_ml"] + found["left_ml"], 1)
    found["mean_hu"] = round(float(values.mean()), 1)
    found["sd_hu"] = round(float(values.std()), 1)
    found["median_hu"] = round(float(np.median(values)), 1)
    # Normal axis of the scan as read: the one nearest to the patient's length.
    axis = int(np.abs(np.reshape(raw.GetDirection(), (3, 3))[2]).argmax())
    found["slices"] = raw.GetSize()[axis]
    found["slice_mm"] = round(raw.GetSpacing()[axis], 3)
    found["pixel_mm"] = round(raw.GetSpacing()[(axis + 1) % 3], 3)
    found["remarks"] = " ".join(_remarks(found, labels))
    return found


def _remarks(found: dict[str, Any], labels: "np.ndarray[Any, np.dtype[np.uint8]]") -> list[str]:
    remarks = []
    low, high = EXPECTED["lungs_ml"]
    if not low <= found["lungs_ml"] <= high:
        remarks.append(f"The lungs hold {found['lungs_ml']:.0f} ml.")
    sides = sorted((found["right_ml"], found["left_ml"]))
    if sides[0] < 0.4 * sides[1]:
        remarks.append(f"One lung holds {sides[0]:.0f} ml, the other {sides[1]:.0f} ml.")
    low, high = EXPECTED["median_hu"]
    if not low <= found["median_hu"] <= high:
        remarks.append(f"The median density is {found['median_hu']:.0f} HU.")
    if found["slice_mm"] > EXPECTED["slice_mm"][1]:
        remarks.append(f"The slices are {found['slice_mm']:g} mm apart.")
    inside = labels > 0
    for plane, name in ((inside[0], "lowest"), (inside[-1], "highest")):
        if plane.mean() > 0.01:
            remarks.append(f"The lungs reach the {name} slice.")
    if inside[:, :, [0, -1]].any() or inside[:, [0, -1]].any():
        remarks.append("The lungs reach the side of the field of view.")
    return remarks


def draw(volume: sitk.Image, lungs: sitk.Image, title: str, measures: dict[str, Any]) -> bytes:
    """A PNG: three planes through the lungs with their outlines, and the histogram of HU."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    values, labels = sitk.GetArrayViewFromImage(volume), sitk.GetArrayViewFromImage(lungs)
    step = volume.GetSpacing()[::-1]
    cuts = [int((np.ptp(p) / 2) + p.min()) for p in np.nonzero(labels)]
    figure = Figure(figsize=(11, 7.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2).ravel()
    colours = {RIGHT: PALETTE["orange"], LEFT: PALETTE["sky"]}
    for axis, name in enumerate(("axial", "coronal", "sagittal")):
        if name == "sagittal":
            cuts[2] = int(np.median(np.nonzero(labels == labels.max())[2]))
        plane, outline = (a.take(cuts[axis], axis=axis) for a in (values, labels))
        height, width = (s for k, s in enumerate(step) if k != axis)
        axes[axis].imshow(
            plane,
            cmap="gray",
            vmin=-1000,
            vmax=200,
            aspect=height / width,
            origin="upper" if name == "axial" else "lower",
        )
        for label, colour in colours.items():
            if (outline == label).any():
                axes[axis].contour(outline == label, [0.5], colors=[colour], linewidths=1.2)
        axes[axis].set_title(name)
        axes[axis].set_axis_off()
    for side, label in SIDES.items():
        inside = values[labels == label]
        if inside.size:
            text = f"{side} lung, {measures[f'{side}_ml']:.0f} ml"
            axes[3].hist(
                inside,
                120,
                range=(-1024, 200),
                density=True,
                histtype="step",
                color=colours[label],
                label=text,
                linewidth=1.6,
            )
    axes[3].set(xlabel="HU", ylabel="share of the lung per HU", title="histogram")
    axes[3].legend(frameon=False)
    facts = f"{measures['slices']} slices, {measures['slice_mm']:g} mm apart"
    median = f"{measures['median_hu']:.0f}".replace("-", "−")
    heading = f"{title}: lungs {measures['lungs_ml']:.0f} ml, median {median} HU"
    figure.suptitle("\n".join(filter(None, [f"{heading}; {facts}", measures["remarks"]])))
    picture = BytesIO()
    figure.savefig(picture, metadata={"Software": None})
    return picture.getvalue()


def overview(scans: pd.DataFrame) -> str:
    """An HTML page of all scans, those that need a look first."""
    failed = scans[scans["state"] == "failed"]
    ready = scans.drop(index=failed.index)
    if len(ready):
        ready = ready.iloc[np.argsort(ready["remarks"].fillna("") == "", kind="stable")]
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Quality</title>",
        "<meta name='viewport' content='width=device-width'>",
        "<style>body{font:16px system-ui;margin:2em auto;max-width:75em;padding:0 1em}",
        "img{width:100%}figure{margin:0 0 2em}.grid{display:grid;gap:1em;",
        "grid-template-columns:repeat(auto-fill,minmax(26em,1fr))}.remark{color:#a33b00}</style>",
        f"<h1>{len(ready)} scans ready, {len(failed)} failed</h1>",
    ]
    if len(failed):
        parts.append("<h2>Failed</h2><ul>")
        for patient_id, reason in failed["reason"].items():
            parts.append(f"<li><b>{html.escape(str(patient_id))}</b>: {html.escape(reason)}</li>")
        parts.append("</ul>")
    parts.append("<div class='grid'>")
    for patient_id, remarks in ready["remarks"].fillna("").items() if len(ready) else ():
        name = html.escape(str(patient_id))
        parts.append(
            f"<figure><a href='scans/{name}/quality.png'><img loading='lazy' "
            f"src='scans/{name}/quality.png' alt='Planes and histogram of {name}'></a>"
            f"<figcaption>{name} <span class='remark'>{html.escape(remarks)}</span></figcaption>"
            "</figure>"
        )
    return "\n".join([*parts, "</div></html>\n"])
