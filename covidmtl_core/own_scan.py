"""A reader's own scan: a mask of their own, what feature models and a network of theirs say of it.

Reading, lungs and features are those of `preprocessing.preprocess_scan`, percentiles and flags
those of `radiomics.stability.place`. This is no medical device: nothing here has been tested on the
reader's scanner, population or disease.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import SimpleITK as sitk

from covidmtl_core import baselines, cohort, phantom_cohort, quality
from covidmtl_core.claims import write_atomically
from covidmtl_core.errors import DataError, ParameterError
from covidmtl_core.preprocessing import Preprocessed, preprocess_scan
from covidmtl_core.radiomics.stability import place
from covidmtl_core.segmentation import Segmenter
from covidmtl_core.volume_files import checked_path, read_file

WARNING = (
    "This is a study of a paper, not a medical device. Nothing here says whether a person is ill."
)

MADE = {"released": (1.0, "released"), "phantom": (phantom_cohort.SCAN_MM, "refined")}
"""Voxels in mm and method of segmentation with which each tier's table was made (section 4.1)."""


def given_lungs(path: str | Path) -> Segmenter:
    """A reader's mask as a method of segmentation, for `preprocess_scan` and `segment_lungs`.

    Args:
        path: NIfTI, NRRD or MetaImage; above 0 are the lungs, whichever labels they have. Its grid
            may be another than the scan's, if it lies in the same place.

    Returns:
        A function that takes the scan and returns the mask in its grid.

    Raises:
        DataError: The file cannot be read; or, when the function is called, it has no lung where
            the scan is.
    """
    path = checked_path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist: check the path of the mask.")
    mask = sitk.Cast(read_file(path) > 0, sitk.sitkUInt8)

    def given(image: sitk.Image) -> sitk.Image:
        found = sitk.Resample(mask, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
        here, whole = _ml(found), _ml(mask)
        if here <= 0.5 * whole:
            raise DataError(
                f"{path} has {here:.0f} of its {whole:.0f} ml where the scan is: it must be a mask "
                "of this scan, saved with its position in space."
            )
        return found

    return given


def _ml(mask: sitk.Image) -> float:
    voxels = np.count_nonzero(sitk.GetArrayViewFromImage(mask))
    return float(np.prod(mask.GetSpacing())) * int(voxels) / 1000


def feature_models(
    features: pd.Series, tier: str = "released", n_trees: int = 1000, seed: int = 11
) -> pd.DataFrame:
    """What models say of a scan's features that were trained on a cohort's training patients.

    Args:
        features: The 375 features of one scan.
        tier: Whose table: `released`, or `phantom`.
        n_trees: See `baselines.fit_predict`.
        seed: Of the forest.

    Returns:
        A line a model and task, a column a class: probabilities, and nothing where a task has fewer
        classes.

    Raises:
        DataError: A feature is missing or not a number.
    """
    table, patients = cohort.load_features(tier), cohort.load_cohort(tier)
    lost = [name for name in table if not np.isfinite(features.get(name, np.nan))]
    if lost:
        raise DataError(
            f"{len(lost)} features of the scan are not defined, the first is {lost[0]}: the lungs "
            "found may be too small for them."
        )
    train, _ = cohort.split(patients)
    yours = features[table.columns].to_frame("yours").T.astype(float)
    together = pd.concat([table.loc[train], yours])
    rows = {}
    for model in baselines.MODELS:
        for task in cohort.TASKS:
            said = baselines.fit_predict(
                model,
                together,
                patients[task],
                train,
                yours.index,
                n_trees=n_trees,
                seed=seed,
                scale_on="training",
            )
            rows[model, task] = said.probabilities[0]
    return _by_class(rows)


def network(scan: Preprocessed, checkpoint: str | Path, device: str | None = None) -> pd.DataFrame:
    """What a trained network says of a scan; none comes with this book.

    Args:
        scan: Made ready as the network's training scans were; a checkpoint does not know how, so
            neither voxels nor method are checked.
        checkpoint: See `training.load`.
        device: None takes CUDA where there is one.

    Returns:
        As `feature_models`, a line a task.
    """
    from covidmtl_core import training
    from covidmtl_core.store import OFFSET, Patients

    trained = training.load(checkpoint, device)
    config = trained.config
    voxels = sitk.GetArrayFromImage(scan.volume)
    voxels[sitk.GetArrayViewFromImage(scan.lungs) == 0] = -OFFSET
    patients = Patients(
        pd.DataFrame(-1, index=["yours"], columns=list(config.tasks)),
        scan.features.to_frame("yours").T if config.use_features else None,
        {"yours": voxels} if config.use_volume else None,
    )
    said = training.predict(trained, patients).loc["yours"]
    return _by_class(
        {
            ("network", task): said[[f"{task}_{k}" for k in range(classes)]].to_numpy()
            for task, classes in config.tasks.items()
        }
    )


def write_report(
    source: Path,
    target: Path,
    lungs: Path | None = None,
    checkpoint: Path | None = None,
    spacing_mm: float | None = None,
    method: str | None = None,
    tier: str = "released",
    device: str | None = None,
) -> Iterator[str]:
    """Put all of it about one scan into a folder: `covidmtl predict`.

    Args:
        source: As for `ct.read_ct`.
        target: Folder for `features.csv`, `predictions.csv` and `quality.png`; made if missing.
        lungs: See `given_lungs`; None finds the lungs by `method`.
        checkpoint: See `network`.
        spacing_mm: Of the voxels to measure on; None: those of the tier's table.
        method: As for `segmentation.segment_lungs`; None: as for the tier's table.
        tier: See `feature_models`.
        device: See `network`.

    Yields:
        What was found, line by line.

    Raises:
        CovidMTLError: The scan, the mask, the checkpoint or the target cannot be used.
    """
    if tier not in MADE:
        raise ParameterError(f"tier is {tier!r}; it must be one of {', '.join(MADE)}.")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{target} cannot be made a folder ({error.strerror}).") from error
    table_mm, table_method = MADE[tier]
    mm = table_mm if spacing_mm is None else spacing_mm
    scan = preprocess_scan(source, mm, given_lungs(lungs) if lungs else method or table_method)
    placed = place(scan.features, cohort.load_features(tier), mm, table_mm)
    said = feature_models(scan.features, tier)
    if checkpoint:
        said = pd.concat([said, network(scan, checkpoint, device)])
    picture = quality.draw(scan.volume, scan.lungs, "your scan", scan.measures)
    try:
        write_atomically(target / "features.csv", placed.to_csv(lineterminator="\n"))
        write_atomically(target / "predictions.csv", said.to_csv(lineterminator="\n"))
        write_atomically(target / "quality.png", picture)
    except OSError as error:
        raise DataError(f"{target} cannot be written ({error.strerror or error}).") from error
    yield f"Lungs: {scan.measures['lungs_ml']:.0f} ml. {scan.measures['remarks']}".rstrip()
    beyond = int(placed["flag"].str.contains("outside").sum())
    yield f"{beyond} of {len(placed)} features lie outside those of the {tier} patients."
    yield said.to_string(float_format="{:.2f}".format, na_rep="")
    yield f"Features, predictions and a picture: {target}"
    yield WARNING


def _by_class(rows: dict[tuple[str, str], Any]) -> pd.DataFrame:
    table = pd.DataFrame([pd.Series(row, dtype=float) for row in rows.values()])
    table.index = pd.MultiIndex.from_tuples(list(rows), names=["model", "task"])
    return table.rename_axis(columns="class")
