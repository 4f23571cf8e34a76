"""What all tests share: the repository on the path, and small chests to work on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))

from LCTfoundLib.volume import Volume  # noqa: E402

if TYPE_CHECKING:
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
def phantom_case() -> Rendered:
    """A synthetic patient with exact labels, scanned at 2.5 mm; made once for all tests."""
    from training.phantom.render import phantom

    return phantom(seed=20, spacing=2.5)


@pytest.fixture(scope="session")
def shipped_weights() -> None:
    """Skips what needs the weights of lung segmentation while they are not there."""
    from LCTfoundLib.networks.lung import COARSE, FINE
    from LCTfoundLib.weights.registry import list_weights

    missing = {COARSE, FINE} - {entry.name for entry in list_weights()}
    if missing:
        pytest.skip(f"the weights {', '.join(sorted(missing))} are not there yet")
