import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from covidmtl_core import cohort, data_folder
from covidmtl_core.dicom import write_series
from covidmtl_core.errors import DataError
from covidmtl_core.phantom import draw_patient, make_phantom

HEADER = "patient_id,path,ct,nat,severity\n"


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("series") / "scan"
    write_series(make_phantom(draw_patient(1, 0.1), (34, 39, 39), 10.0).image, folder)
    return folder


def listed(folder: Path, lines: str, header: str = HEADER) -> pd.DataFrame:
    (folder / "labels.csv").write_text(header + lines, encoding="utf-8-sig")
    return data_folder.check(folder, read=False)


def test_blank_labels_are_masked_and_paths_start_at_the_folder(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(
        "Patient_ID, path ,ct,nat,severity,age\n7,a b/x,1,,0.0,33\n"
    )
    index = data_folder.load_index(tmp_path)
    assert index.loc["7", "path"] == str(tmp_path / "a b" / "x")
    assert index.loc["7", "ct"] == 1 and index.loc["7", "severity"] == 0
    assert index.loc["7", ["nat", "split"]].isna().all()


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (",a,1,1,1\n", ["line 2", "patient_id is ''"]),
        ("../x,a,1,1,1\n", ["'../x'"]),
        ("a,x,1,1,1\nA,y,1,1,1\n", ["line 3", "'A' occurs before"]),
        ("a,,1,1,1\n", ["'a' has no path"]),
        ("a,x,1,1,1\nb,./x,1,1,1\n", ["scan './x' occurs before"]),
        ("a,x,2,1,1\n", ["ct is '2'", "0, 1, or blank"]),
        ("a,x,1,yes,1\n", ["nat is 'yes'"]),
        ("a,x,1,1,0.5\n", ["severity is '0.5'", "0, 1, 2, or blank"]),
        ("a,x,1,0,2\n", ["severity 0 is for NAT negatives"]),
        ("a,x,1,1,0\n", ["severity 0 is for NAT negatives"]),
        ("", ["lists no patient"]),
        ('a,"x,1,1,1\n', ["cannot be read as a table"]),
        ("\n\na,x,5,1,1\n", ["line 4", "ct is '5'"]),
        ("a,x,1,1,1,1\n", ["line 2", "more cells than the first line"]),
        ("a,x\n", ["line 2", "fewer cells than the first line"]),
        (f"a,{'x' * 400},1,1,1\na,y,1,1,1\n", ["x does not exist", "y does not exist"]),
    ],
)
def test_each_wrong_cell_is_named(tmp_path: Path, lines: str, named: list[str]) -> None:
    problems = listed(tmp_path, lines)
    text = " ".join((problems["where"] + ": " + problems["problem"]).tolist())
    assert all(part in text for part in named), text
    with pytest.raises(DataError, match=r"labels\.csv"):
        data_folder.load_index(tmp_path)


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    problems = listed(tmp_path, "a,x,7,1,1\n,y,1,9,1\nb,x,1,1,8\n")
    assert (problems["level"] == "error").sum() >= 5
    assert {"labels.csv, line 2", "labels.csv, line 3", "labels.csv, line 4"} <= set(
        problems["where"]
    )


@pytest.mark.parametrize(
    ("header", "named"),
    [
        ("patient_id;path;ct;nat;severity\n", "separated by commas"),
        ("patient_id,path,ct,nat\n", "no column severity"),
        ("patient_id,path,ct,nat,severity,ct\n", "a column occurs twice"),
    ],
)
def test_wrong_headers_are_named(tmp_path: Path, header: str, named: str) -> None:
    problems = listed(tmp_path, "a,x,1,1,1\n" if ";" not in header else "a;x;1;1;1\n", header)
    assert named in problems["problem"].iloc[0]


def test_empty_cells_and_lines_beyond_the_table_do_no_harm(tmp_path: Path) -> None:
    lines = b"\xef\xbb\xbf" + HEADER.encode() + b"a,x,1,1,1,,\r\n\r\n,,,,\r\n"
    (tmp_path / "labels.csv").write_bytes(lines)
    assert data_folder.load_index(tmp_path).index.tolist() == ["a"]
    (tmp_path / "labels.csv").write_bytes(HEADER.encode("utf-16"))
    assert "cannot be read as a table" in data_folder.check(tmp_path)["problem"][0]


def test_a_split_is_given_for_all_or_none(tmp_path: Path) -> None:
    header = HEADER.replace("\n", ",split\n")
    assert (
        "in every line" in listed(tmp_path, "a,x,1,1,1,train\nb,y,1,1,1,\n", header)["problem"][0]
    )
    (tmp_path / "labels.csv").write_text(header + "a,x,1,1,1,Train\nb,y,1,1,1,test\n")
    assert data_folder.load_index(tmp_path)["split"].tolist() == ["train", "test"]


def test_scans_are_read_and_compared(tmp_path: Path, series: Path) -> None:
    shutil.copytree(series, tmp_path / "one")
    big = sitk.GetImageFromArray(np.tile(np.arange(-1000, 200, 4, np.int16), (60, 300, 1)))
    for name in ("big.nii", "again.nii"):
        sitk.WriteImage(big, tmp_path / name)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.dcm").write_bytes(b"no scan")
    lines = "one,one,1,1,1\na,big.nii,1,1,1\nb,again.nii,1,1,1\nc,broken,0,0,0\nd,missing,0,0,0\n"
    quick = listed(tmp_path, lines)
    assert quick["where"].tolist() == ["patient d"]
    problems = data_folder.check(tmp_path).set_index("where")
    assert problems.loc["patient b", "level"] == "warning"
    assert "equals that of patient a" in problems.loc["patient b", "problem"]
    assert "broken" in problems.loc["patient c", "problem"]
    assert "does not exist" in problems.loc["patient d", "problem"]


def test_no_data_folder_is_named(tmp_path: Path) -> None:
    assert "not a folder" in data_folder.check(tmp_path / "no")["problem"][0]
    assert "neither labels.csv" in data_folder.check(tmp_path)["problem"][0]


@pytest.mark.usefixtures("released")
def test_the_sites_archives_are_joined_to_the_released_labels(tmp_path: Path) -> None:
    patients = cohort.load_cohort("released")
    known = patients.index[3]
    for number in (known, 99_999):
        (tmp_path / f"Patient {number}.zip").write_bytes(b"")
    index = data_folder.load_index(tmp_path)
    assert index.index.tolist() == [str(known)]
    row = index.loc[str(known)]
    assert (
        row[["ct", "nat", "severity"]].tolist()
        == patients.loc[known, ["ct", "nat", "severity"]].tolist()
    )
    assert row["split"] == ("train" if known in cohort.split(patients)[0] else "test")
    problems = data_folder.check(tmp_path, read=False)
    assert set(problems["level"]) == {"warning"}
    assert problems["problem"].str.contains("99999").any()
    assert problems["problem"].str.contains("1328 of the 1329 patients").any()
    (tmp_path / f"Patient {known}.zip").unlink()
    with pytest.raises(DataError, match="no archive is of a patient of the study"):
        data_folder.load_index(tmp_path)
