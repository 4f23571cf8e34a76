"""`slicer.packaging`: what is installed is really looked up; nothing is ever installed by the host.

Slicer skips installation while it runs tests, and the host always does; outside of tests it says what to install.
"""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import slicer
from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

__all__ = [
    "load_pyproject_dependencies",
    "load_requirements",
    "pip_check",
    "pip_ensure",
    "pip_install",
    "pip_uninstall",
]

Requirements = str | Requirement | Iterable["str | Requirement"]


class InstallationRefused(RuntimeError):
    """The host installs nothing; the message names what is missing."""


def load_requirements(path: str | Path) -> list[Requirement]:
    """Requirements of a requirements.txt. Comments, empty lines and pip options (`-r`, `--index-url`) are left out."""
    requirements = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        text = line.split(" #")[0].strip()
        if not text or text.startswith(("#", "-")):
            continue
        try:
            requirements.append(Requirement(text))
        except InvalidRequirement as problem:
            raise ValueError(f"{path}, line {number}: {problem}") from problem
    return requirements


def load_pyproject_dependencies(path: str | Path) -> list[Requirement]:
    """Requirements under `[project] dependencies` of a pyproject.toml."""
    project = tomllib.loads(Path(path).read_text(encoding="utf-8")).get("project", {})
    return [Requirement(text) for text in project.get("dependencies", [])]


def pip_check(req: Requirements) -> bool:
    """True where every requirement, and what it needs in its turn, is installed in a version that fits."""
    return not _missing(_as_list(req))


def pip_ensure(
    requirements: Requirements,
    constraints: str | Path | None = None,
    skip_packages: list[str] | None = None,
    prompt_install: bool = True,
    prompt_restart: bool = True,
    requester: str | None = None,
    skip_in_testing: bool = True,
    show_progress: bool = True,
) -> list[str] | None:
    """Check `requirements`; with something missing, return under testing (as Slicer does), and else refuse."""
    if constraints is not None and not Path(constraints).is_file():
        raise FileNotFoundError(f"The constraints file {constraints} does not exist.")
    missing = _missing(_as_list(requirements), skipped={canonicalize_name(name) for name in skip_packages or ()})
    if not missing:
        return None
    names = ", ".join(str(requirement) for requirement in missing)
    if skip_in_testing and slicer.app.testingEnabled():
        logging.info("Testing: %s not installed for %s.", names, requester or "the module")
        return None
    raise InstallationRefused(f"{requester or 'The module'} needs {names}. Install it by pip and start the host again.")


def pip_install(requirements: str | list[str], **options: object) -> list[str] | None:
    raise InstallationRefused(f"The host installs nothing. Install {requirements} by pip and start the host again.")


def pip_uninstall(requirements: str | list[str], **options: object) -> None:
    raise InstallationRefused(f"The host removes nothing. Remove {requirements} by pip.")


def _as_list(requirements: Requirements) -> list[Requirement]:
    if isinstance(requirements, str | Requirement):
        requirements = [requirements]
    return [item if isinstance(item, Requirement) else Requirement(item) for item in requirements]


def _missing(requirements: list[Requirement], skipped: frozenset[str] | set[str] = frozenset()) -> list[Requirement]:
    seen: set[tuple[str, frozenset[str]]] = set()
    return [item for item in requirements if not _is_satisfied(item, frozenset(), skipped, seen)]


def _is_satisfied(
    requirement: Requirement,
    extras: frozenset[str],
    skipped: frozenset[str] | set[str],
    seen: set[tuple[str, frozenset[str]]],
) -> bool:
    """`extras` are those of the package that asks for `requirement`; they switch its markers on."""
    name, wanted = canonicalize_name(requirement.name), frozenset(requirement.extras)
    if name in skipped or not _applies(requirement, extras):
        return True
    try:
        distribution = metadata.distribution(requirement.name)
    except metadata.PackageNotFoundError:
        return False
    if not requirement.specifier.contains(distribution.version, prereleases=True):
        return False
    if (name, wanted) in seen:
        return True
    seen.add((name, wanted))
    return all(_is_satisfied(Requirement(need), wanted, skipped, seen) for need in distribution.requires or ())


def _applies(requirement: Requirement, extras: frozenset[str]) -> bool:
    if requirement.marker is None:
        return True
    environment = dict(default_environment())
    return any(requirement.marker.evaluate({**environment, "extra": extra}) for extra in extras or {""})
