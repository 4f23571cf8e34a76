"""Curation on a Dask cluster: a worker is killed in the middle; nothing is lost and nothing done twice."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from LCTfoundLib.errors import OutputError
from training.curation.archive import find_studies
from training.curation.deidentify import Deidentifier, site_key
from training.curation.ledger import Ledger, State
from training.curation.quality import EdgeGate
from training.curation.shards import read_shard
from training.curation.stages import ReportLabels, Settings, classify_reports, site_folders
from training.curation.synthetic import write_study

distributed = pytest.importorskip("distributed", reason="Dask is not installed (the extra 'cluster')")
if os.name != "posix":
    pytest.skip("kills a process by a signal", allow_module_level=True)

STUDIES = 8


def slow_pack(studies, settings):
    """As the real one, and tells that it began and which process it is."""
    import os
    import time

    from training.curation.stages import pack

    (settings.shards.parent / f"{os.getpid()}.began").touch()
    time.sleep(0.3)
    return pack(studies, settings)


def full(studies, settings):
    from LCTfoundLib.errors import OutputError

    raise OutputError("The disk of /shards is full; free some space and run again.")


@pytest.fixture
def site(simple_chest, tmp_path):
    """An archive with its reports classified: ledger, settings, StudyInstanceUIDs."""
    chest = simple_chest.crop((22, 0, 0), (38, 64, 88))
    chest = chest.with_array(np.maximum(chest.array, -1024))
    uids = {write_study(tmp_path / f"archive/{n}", chest, "Emphysema.") for n in range(STUDIES)}
    path, key, shards = site_folders(tmp_path / "out")
    with Ledger(path) as ledger:
        ledger.add(find_studies(tmp_path / "archive"))
        classify_reports(ledger, lambda texts: [ReportLabels({"emphysema": 0.97}, 0.95) for _ in texts])
    return path, Settings(tmp_path / "archive", shards, site_key(key), edges=EdgeGate(slices=2)), uids


@pytest.fixture(scope="module")
def client():
    options = {"n_workers": 3, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        client.run(_with_repository, str(Path(__file__).resolve().parents[2]))
        client.register_plugin(_Repository(str(Path(__file__).resolve().parents[2])))
        yield client


def _with_repository(root: str) -> None:
    import sys

    if root not in sys.path:
        sys.path.insert(0, root)


class _Repository(distributed.WorkerPlugin):
    """Workers that take a dead one's place find the repository too."""

    def __init__(self, root: str) -> None:
        self.root = root

    def setup(self, worker) -> None:
        _with_repository(self.root)


def test_a_full_disk_on_a_worker_gives_all_studies_back(site, client):
    from training.curation.cluster import run_on_cluster

    path, settings, _ = site
    with pytest.raises(OutputError, match="full; free some space"):
        run_on_cluster(path, settings, client, studies_per_shard=2, packer=full)
    with Ledger(path) as ledger:
        assert ledger.states()[State.READY] == STUDIES


def test_a_killed_worker_loses_nothing_and_nothing_is_done_twice(site, client):
    from training.curation.cluster import run_on_cluster

    path, settings, uids = site
    killed: list[int] = []

    def kill_one() -> None:
        pids = set(client.run(os.getpid).values())
        end = time.monotonic() + 30
        while time.monotonic() < end and not killed:
            for mark in settings.shards.parent.glob("*.began"):
                if int(mark.stem) in pids:
                    os.kill(int(mark.stem), signal.SIGKILL)
                    killed.append(int(mark.stem))
                    return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_one)
    killer.start()
    run_on_cluster(path, settings, client, studies_per_shard=2, lease=30, packer=slow_pack)
    killer.join()
    assert killed
    with Ledger(path) as ledger:
        assert ledger.states()[State.PACKED] == STUDIES
        assert set(ledger.events("packed")) == uids and set(ledger.events("packed").values()) == {1}
        named = {row["name"] for row in ledger.shards()}
    shards = list(settings.shards.glob("shard-*.tar"))
    assert {shard.name for shard in shards} == named
    told = [facts["study"] for shard in shards for _, facts in read_shard(shard)]
    names = Deidentifier(settings.key)
    assert sorted(told) == sorted(names.name("study", uid) for uid in uids for _ in range(16))
