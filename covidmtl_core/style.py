"""The visual language of the book: one colour-blind-safe palette, one word for one thing.

Colours are Okabe and Ito's (Color Universal Design, 2008).
"""

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from IPython.display import HTML
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

PALETTE = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "vermilion": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "grey": "#777777",
}

SHORT_TASKS = {"ct": "CT", "nat": "NAT", "severity": "severity"}
TASKS = {"ct": "CT (radiology)", "nat": "NAT (nucleic acid test)", "severity": "Severity"}
CLASSES = {
    "ct": ["CT negative", "CT positive"],
    "nat": ["NAT negative", "NAT positive"],
    "severity": ["Control or suspected", "Mild or regular", "Severe or critically ill"],
}
CLASS_COLOURS = [PALETTE["sky"], PALETTE["orange"], PALETTE["vermilion"]]
MODELS = {"RF": "Random forest", "LGBM": "LightGBM"}
METRICS = {
    "f1": "F1",
    "auc": "AUC as released",
    "exact_auc": "exact AUC",
    "auc_spread": "AUC spread",
}
QUANTILES = {0.025: "2.5%", 0.975: "97.5%"}
MODEL_COLOURS = {"RF": PALETTE["blue"], "LGBM": PALETTE["vermilion"]}
VERDICT_COLOURS = {
    "exact": PALETTE["green"],
    "agrees": PALETTE["sky"],
    "differs": PALETTE["vermilion"],
    "too few seeds": "#F0E442",
    "checked from print": PALETTE["blue"],
    "contradicted from print": PALETTE["purple"],
    "needs the CT volumes": PALETTE["grey"],
    "not measured": "#BBBBBB",
    "statement": "#DDDDDD",
}


def apply() -> None:
    """Set the style of every figure that follows, and crisp figures in notebooks."""
    import seaborn as sns
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    sns.set_theme(
        context="notebook",
        style="whitegrid",
        palette=list(PALETTE.values()),
        rc={
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "axes.titlesize": "medium",
            "legend.frameon": False,
            "grid.color": "#E6E6E6",
        },
    )
    set_matplotlib_formats("retina")


def outline(
    ax: "Axes",
    image: "NDArray[Any]",
    masks: "Sequence[tuple[str, NDArray[Any]]]",
    window: tuple[float, float] = (-1050, 250),
) -> None:
    """Draw a plane of a scan with outlines.

    Args:
        ax: Where to.
        image: (rows, columns), HU.
        masks: Colour of `PALETTE` and boolean mask of each outline.
        window: HU shown black and white.
    """
    ax.imshow(image, cmap="gray", vmin=window[0], vmax=window[1])
    for colour, mask in masks:
        if mask.any():
            ax.contour(mask, [0.5], colors=[PALETTE[colour]], linewidths=1)
    ax.axis("off")


def lung_surfaces(labels: "NDArray[Any]", spacing_mm: float, step_mm: float = 5.0) -> "go.Figure":
    """Both lungs as surfaces, in mm, for `turnable`.

    Args:
        labels: (D, H, W), feet first; 1 right and 2 left lung.
        spacing_mm: Of its voxels.
        step_mm: Roughly the length of a surface's edges.
    """
    import numpy as np
    import plotly.graph_objects as go
    from scipy.ndimage import gaussian_filter
    from skimage.measure import marching_cubes

    figure = go.Figure()
    step = max(1, round(step_mm / spacing_mm))
    for label, name, colour in ((1, "right lung", "blue"), (2, "left lung", "green")):
        mask = np.pad(labels == label, 3 * step).astype(np.float32)
        if not mask.any():
            continue
        mask = gaussian_filter(mask, 0.7 * step)
        corners, faces, *_ = marching_cubes(
            mask, 0.5, spacing=(spacing_mm,) * 3, step_size=step, allow_degenerate=False
        )
        z, y, x = corners.astype(np.float32).T
        i, j, k = faces.astype(np.int32).T
        mesh = {"x": x, "y": y, "z": z, "i": i, "j": j, "k": k}
        figure.add_mesh3d(**mesh, color=PALETTE[colour], name=name, showlegend=True)
    axes = {f"{axis}axis": {"title": {"text": f"{axis} (mm)"}} for axis in "xyz"}
    figure.update_layout(
        scene={**axes, "aspectmode": "data", "camera": {"eye": {"x": 0.5, "y": -2.2, "z": 0.5}}},
        margin={"l": 0, "r": 0, "t": 0, "b": 0},
        legend={"orientation": "h", "y": 1},
    )
    return figure


def turnable(figure: "go.Figure", height: int, title: str) -> "HTML":
    """A plotly figure in a frame of its own, drawn by the book's copy of plotly or else the web's.

    Args:
        figure: What to show.
        height: Of the frame, in pixels.
        title: Alternative text.
    """
    from IPython.display import HTML
    from plotly.offline import get_plotlyjs_version

    web = f"https://cdn.plot.ly/plotly-{get_plotlyjs_version()}.min.js"
    page = figure.to_html(
        include_plotlyjs=False, default_height=height - 20, config={"displayModeBar": False}
    )
    # The script from the web is written into the page before the figure's own is run.
    load = (
        '<script src="vendor/plotly.min.js"></script>'
        f"<script>window.Plotly || document.write('<script src=\"{web}\"><\\/script>')</script>"
    )
    page = page.replace("<body>", f"<body>{load}", 1)
    return HTML(
        f'<div><iframe srcdoc="{html.escape(page)}" title="{html.escape(title)}" width="100%" '
        f'height="{height}" style="border:0"></iframe></div>'
    )


def scrubber(figures: "Sequence[Figure]", labels: Sequence[str], alt: str) -> "HTML":
    """Pictures under a slider that needs neither kernel nor network.

    Args:
        figures: One for each place of the slider, of the same size; they are closed.
        labels: What is shown beside the slider at each place.
        alt: Alternative text of all pictures.

    Raises:
        ValueError: There is no figure, or not one label for each.
    """
    from IPython.display import HTML
    from matplotlib import pyplot as plt

    if not figures:
        raise ValueError("a slider needs at least one figure.")
    first, images = len(figures) // 2, []
    for place, (figure, label) in enumerate(zip(figures, labels, strict=True)):
        picture = io.BytesIO()
        figure.savefig(picture, format="webp", pil_kwargs={"quality": 85})
        plt.close(figure)
        shown = "block" if place == first else "none"
        images.append(
            f'<img alt="{html.escape(alt)}" title="{html.escape(label)}" '
            f'style="display:{shown};max-width:100%;height:auto;margin:0 auto" '
            f'src="data:image/webp;base64,{base64.b64encode(picture.getvalue()).decode()}">'
        )
    move = (
        "const box = this.closest('.scrubber'), all = box.querySelectorAll('img');"
        "all.forEach((image, k) => image.style.display = k == this.value ? 'block' : 'none');"
        "box.querySelector('output').textContent = all[this.value].title"
    )
    return HTML(
        f'<div class="scrubber">{"".join(images)}<label><input type="range" min="0" '
        f'max="{len(images) - 1}" value="{first}" aria-label="{html.escape(alt)}" '
        f'oninput="{move}"> <output>{html.escape(labels[first])}</output></label></div>'
    )
