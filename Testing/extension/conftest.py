"""The extension, built and installed once for all tests of this folder."""

from __future__ import annotations

import pytest

from Testing.extension.extension_build import Built, build_and_install


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build_and_install(tmp_path_factory.mktemp("extension"))
