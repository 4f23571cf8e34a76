"""What all tests share: the repository on the path, and small chests to work on."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from filelock import FileLock

REPOSITORY = Path(__file__).resolve().parent.parent
if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))

from LCTfoundLib.volume import Volume  # noqa: E402

if TYPE_CHECKING:
    from LCTfoundLib.tasks.lung_segmentation import LungResult
    from training.phantom.render import Rendered


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Fresh random input in each run; the seed is shown when a test fails."""
    seed = int(np.random.SeedSequence().entropy) % 2**32  # type: ignore[arg-type]
    request.node.user_properties.append(("seed", seed))
    print(f"random seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Maps of a few pixels are computed faster by one thread than shared out."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def simple_chest() -> Volume:
    """A CT of ellipsoids (HU, canonical, 4 mm): body, two lungs, trachea. For tests that need no anatomy."""
    shape, spacing = (60, 64, 88), 4.0
    k, j, i = np.indices(shape, dtype=np.float32)
    x, y, z = (i - 43.5) * spacing, (j - 31.5) * spacing, (k - 29.5) * spacing
    hu = np.full(shape, -1000, np.int16)
    hu[(x / 170) ** 2 + (y / 120) ** 2 < 1] = 40
    for side in (-1, 1):  # the patient's right is at negative x
        hu[((x - side * 75) / 55) ** 2 + (y / 80) ** 2 + (z / 105) ** 2 < 1] = -850
    hu[(x**2 + (y + 20) ** 2 < 9**2) & (z > 10)] = -990
    noise = np.random.default_rng(0).normal(0, 15, shape)
    return Volume((hu + noise).astype(np.int16), (spacing,) * 3, (-174.0, -126.0, -118.0), metadata={"Modality": "CT"})


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[], Any]], Any]:
    """Makes what is slow to make once for all processes of a test run: ``once(name, make)``.

    ``./run test`` gives the folder for its two parts; a single pytest has its own, which xdist's processes share.
    """
    given = os.environ.get("LCTFOUND_TEST_SHARED")
    own = tmp_path_factory.getbasetemp()
    folder = Path(given) if given else own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def made(name: str, make: Callable[[], Any]) -> Any:
        path = folder / f"{name}.pickle"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                path.write_bytes(pickle.dumps(make(), pickle.HIGHEST_PROTOCOL))
            return pickle.loads(path.read_bytes())  # written by this very run

    return made


@pytest.fixture(scope="session")
def phantom_case(once: Callable[[str, Callable[[], Any]], Any]) -> Rendered:
    """A synthetic patient with exact labels, scanned at 2.5 mm; made once for all tests."""
    from training.phantom.render import phantom

    def make() -> Rendered:
        case = phantom(seed=20, spacing=2.5)
        # Computed when first asked for: once here, and not in each process while some test looks at the clock.
        assert case.ct and case.segments and case.lobes
        return case

    return once("phantom_case", make)


@pytest.fixture(scope="session")
def fast_result(
    once: Callable[[str, Callable[[], Any]], Any], phantom_case: Rendered, shipped_weights: None
) -> LungResult:
    """The synthetic patient's lungs by the shipped weights, fast on the CPU; segmented once for all tests."""
    from LCTfoundLib.tasks.lung_segmentation import LungRequest, Quality, segment_lungs

    return once("fast_result", lambda: segment_lungs(phantom_case.ct, LungRequest(Quality.FAST, "cpu")))


@pytest.fixture(scope="session")
def shipped_weights() -> None:
    """Skips what needs the weights of lung segmentation while they are not there."""
    from LCTfoundLib.networks.lung import COARSE, FINE
    from LCTfoundLib.weights.registry import list_weights

    missing = {COARSE, FINE} - {entry.name for entry in list_weights()}
    if missing:
        pytest.skip(f"the weights {', '.join(sorted(missing))} are not there yet")
