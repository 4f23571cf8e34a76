"""`import SampleData` as in Slicer: data sets that modules register, downloaded with their checksums and loaded."""

from __future__ import annotations

import hashlib
import logging
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import slicer

_MANY = 1 << 20


class ChecksumError(RuntimeError):
    """What was downloaded is not what was registered."""


@dataclass
class SampleDataSource:
    """One entry of the sample data module; all sequences have one item per file."""

    sampleName: str = ""
    uris: Sequence[str] = ()
    fileNames: Sequence[str] = ()
    nodeNames: Sequence[str | None] = ()
    checksums: Sequence[str | None] = ()
    loadFiles: Sequence[bool] = ()
    loadFileTypes: Sequence[str | None] = ()
    loadFileProperties: Mapping[str, Any] = field(default_factory=dict)
    customDownloader: Callable[[SampleDataSource], Any] | None = None
    thumbnailFileName: str | None = None


class SampleDataLogic:
    @staticmethod
    def registerCustomSampleDataCategory(category: str, title: str | None = None) -> None:
        """Make a section; `category` identifies it in all languages, `title` is shown."""
        _titles()[category] = title or category
        _sources().setdefault(category, [])

    @staticmethod
    def registerCustomSampleDataSource(
        category: str = "Custom",
        sampleName: str | None = None,
        uris: str | Sequence[str] | None = None,
        fileNames: str | Sequence[str] | None = None,
        nodeNames: str | Sequence[str | None] | None = None,
        customDownloader: Callable[[SampleDataSource], Any] | None = None,
        thumbnailFileName: str | None = None,
        loadFileTypes: str | Sequence[str | None] | None = None,
        loadFiles: bool | Sequence[bool] | None = None,
        loadFileProperties: Mapping[str, Any] | None = None,
        checksums: str | Sequence[str | None] | None = None,
        loadFileType: str | Sequence[str | None] | None = None,
    ) -> None:
        """Add a data set to a section. A name that the section has already is not added again.

        Args:
            checksums: "SHA256:digest", one for each file.
        """
        addresses = _list(uris)
        names = _list(fileNames)
        if addresses and len(addresses) != len(names):
            raise ValueError(f"{sampleName}: {len(addresses)} uris, but {len(names)} file names")
        source = SampleDataSource(
            sampleName=sampleName or "",
            uris=addresses,
            fileNames=names,
            nodeNames=_list(nodeNames, len(names)),
            checksums=_list(checksums, len(names)),
            loadFiles=_list(loadFiles, len(names), True),
            loadFileTypes=_list(loadFileTypes or loadFileType, len(names)),
            loadFileProperties=dict(loadFileProperties or {}),
            customDownloader=customDownloader,
            thumbnailFileName=thumbnailFileName,
        )
        known = _sources().setdefault(category, [])
        if all(other.sampleName != source.sampleName for other in known):
            known.append(source)

    @staticmethod
    def sourceForSampleName(sampleName: str) -> SampleDataSource | None:
        return next((item for items in _sources().values() for item in items if item.sampleName == sampleName), None)

    def downloadFromSource(self, source: SampleDataSource) -> list[Any]:
        """Nodes for the files that are loaded, paths for those that are not.

        Raises:
            ChecksumError: a file is damaged or another one.
            OSError: it cannot be had.
        """
        if source.customDownloader is not None:
            return source.customDownloader(source)
        results = []
        items = zip(
            source.uris,
            source.fileNames,
            source.nodeNames,
            source.checksums,
            source.loadFiles,
            source.loadFileTypes,
            strict=True,
        )
        for uri, fileName, nodeName, checksum, isLoaded, fileType in items:
            path = self.downloadFile(uri, str(self._cache()), fileName, checksum)
            if not isLoaded:
                results.append(path)
                continue
            properties = {**source.loadFileProperties, **({"name": nodeName} if nodeName else {})}
            results.append(slicer.util.loadNodeFromFile(path, fileType, properties))
        return results

    def downloadSample(self, sampleName: str) -> Any:
        """The node of a data set with one file; the list of a data set with several."""
        source = self.sourceForSampleName(sampleName)
        if source is None:
            raise ValueError(f"There is no sample data set {sampleName!r}.")
        results = self.downloadFromSource(source)
        return results[0] if len(results) == 1 else results

    def downloadFile(self, uri: str, destFolderPath: str, name: str, checksum: str | None = None) -> str:
        """Path of the file; one that is there already, with the right checksum, is not downloaded again."""
        path = Path(destFolderPath) / name
        if path.is_file() and (checksum is None or _matches(path, checksum)):
            return str(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.part")
        logging.info("Downloading %s", uri)
        with urllib.request.urlopen(uri, timeout=60) as source, partial.open("wb") as target:
            while piece := source.read(_MANY):
                target.write(piece)
        if checksum is not None and not _matches(partial, checksum):
            partial.unlink()
            raise ChecksumError(f"{uri} does not have the checksum {checksum}. Download it again, or tell its owner.")
        partial.replace(path)
        return str(path)

    def _cache(self) -> Path:
        return Path(slicer.app.temporaryPath) / "RemoteIO"


def downloadSample(sampleName: str) -> Any:
    return SampleDataLogic().downloadSample(sampleName)


def downloadSamples(sampleName: str) -> list[Any]:
    results = downloadSample(sampleName)
    return results if isinstance(results, list) else [results]


def _sources() -> dict[str, list[SampleDataSource]]:
    """`slicer.modules.sampleDataSources`: section -> data sets."""
    if not hasattr(slicer.modules, "sampleDataSources"):
        slicer.modules.sampleDataSources = {}
    return slicer.modules.sampleDataSources


def _titles() -> dict[str, str]:
    if not hasattr(slicer.modules, "sampleDataCategoryTitles"):
        slicer.modules.sampleDataCategoryTitles = {}
    return slicer.modules.sampleDataCategoryTitles


def _list(value: Any, count: int = 0, default: Any = None) -> list[Any]:
    """One value or several, as a list; nothing given: `count` times the default."""
    if value is None:
        return [default] * count
    return list(value) if isinstance(value, list | tuple) else [value] * max(count, 1)


def _matches(path: Path, checksum: str) -> bool:
    algorithm, digest = checksum.split(":")
    computed = hashlib.new(algorithm.lower())
    with path.open("rb") as source:
        while piece := source.read(_MANY):
            computed.update(piece)
    return computed.hexdigest() == digest.lower()
