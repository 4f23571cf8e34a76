"""Reading and writing volumes: DICOM folders, NIfTI, NRRD, MHA; checked at the door, written whole or not at all."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from LCTfoundLib.errors import OutputError, UnsuitableImage
from LCTfoundLib.runtime.files import atomic_folder, atomic_path, output_errors
from LCTfoundLib.runtime.progress import Progress
from LCTfoundLib.volume import Volume
from LCTfoundLib.volume_checks import add_warning, check_ct, warnings_of
from LCTfoundLib.volume_dicom import MAX_VOXELS, is_dicom_file, read_dicom

__all__ = [
    "add_warning",
    "atomic_folder",
    "atomic_path",
    "check_ct",
    "from_sitk",
    "output_errors",
    "read_ct",
    "read_volume",
    "to_sitk",
    "warnings_of",
    "write_volume",
]

_READERS = {
    ".nii": "NiftiImageIO",
    ".nii.gz": "NiftiImageIO",
    ".nrrd": "NrrdImageIO",
    ".nhdr": "NrrdImageIO",
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
}
_WRITERS = {suffix: reader for suffix, reader in _READERS.items() if suffix not in (".nhdr", ".mhd")}
_KNOWN = "a DICOM folder, NIfTI (.nii, .nii.gz), NRRD or MetaImage (.mha)"
#: SimpleITK opens some formats by names that must be ASCII on Windows.
_ASCII_NAMES_ONLY = os.name == "nt"


def read_ct(path: Path | str, progress: Progress | None = None) -> Volume:
    """Read a CT and check it: int16 HU in the file's own orientation; see :func:`read_volume` and ``check_ct``.

    Raises:
        UnsuitableImage, Cancelled.
    """
    return check_ct(read_volume(path, progress))


def read_volume(path: Path | str, progress: Progress | None = None) -> Volume:
    """Read an image or a label map.

    Args:
        path: a folder with DICOM files, or a file (NIfTI, NRRD, MHA/MHD, ``.seg.nrrd``, multi-frame DICOM).
        progress: told about a DICOM folder's files.

    Returns:
        The volume on the file's own grid, with the file's dtype (float64 becomes float32; DICOM int16 HU). Its
        metadata tells nothing of the patient.

    Raises:
        UnsuitableImage: missing, damaged, of another format, or not one 3D image.
        Cancelled: the user stopped.
    """
    path = Path(path)
    if path.is_dir() or is_dicom_file(path):
        return read_dicom(path, progress)
    if not path.exists():
        raise UnsuitableImage(f"There is no file or folder {path}; check the path.")
    image_io = _format_of(path)
    if not image_io:
        if path.suffix.lower() == ".dcm":
            return read_dicom(path, progress)
        raise UnsuitableImage(f"{path.name} is of an unknown format; give {_KNOWN}.")
    volume = _read_file(path, image_io)
    Progress.of(progress).done()
    return volume


def write_volume(volume: Volume, path: Path | str, compress: bool = True) -> None:
    """Write NIfTI, NRRD or MHA, chosen by the suffix, on the volume's own grid; the file appears only when it is whole.

    Args:
        volume: boolean arrays are written as uint8, float16 as float32.
        path: ``.nii``, ``.nii.gz``, ``.nrrd`` or ``.mha``; its folder is made if missing.
        compress: where the format leaves the choice.

    Raises:
        OutputError: unknown suffix, or the place cannot be written or is full.
    """
    path = Path(path)
    suffix = _suffix_of(path, _WRITERS)
    if not suffix:
        raise OutputError(f"{path.name} has no known suffix; name it .nii.gz, .nii, .nrrd or .mha.")
    image = to_sitk(volume)
    with atomic_path(path) as staging, _ascii_output(staging, suffix) as target:
        staging.touch()  # the system's own reason when the folder cannot be written: SimpleITK does not tell it
        try:
            sitk.WriteImage(image, str(target), imageIO=_WRITERS[suffix], useCompression=compress)
        except RuntimeError as error:
            raise OutputError(f"{path} cannot be written; check that its disk is not full.") from error
        if _WRITERS[suffix] == "NiftiImageIO":
            _check_nifti(target, suffix, volume.array.size * image.GetSizeOfPixelComponent())


def from_sitk(image: sitk.Image) -> Volume:
    """A SimpleITK image with 3 dimensions and one component, without its metadata."""
    x, y, z = image.GetOrigin()
    a, b, c = image.GetSpacing()
    direction = np.array(image.GetDirection()).reshape(3, 3)
    return Volume(sitk.GetArrayFromImage(image), (a, b, c), (x, y, z), direction)


def to_sitk(volume: Volume) -> sitk.Image:
    """The same as a SimpleITK image (a copy of the values)."""
    narrow = {np.dtype(bool): np.uint8, np.dtype(np.float16): np.float32}
    array = volume.array.astype(narrow.get(volume.array.dtype, volume.array.dtype), copy=False)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(volume.spacing)
    image.SetOrigin(volume.origin)
    image.SetDirection(volume.direction.ravel().tolist())
    return image


def _suffix_of(path: Path, table: dict[str, str]) -> str:
    name = path.name.lower()
    return max((suffix for suffix in table if name.endswith(suffix)), key=len, default="")


def _format_of(path: Path) -> str:
    """SimpleITK's reader by suffix, else by the file's first bytes; empty when it is none that we read."""
    suffix = _suffix_of(path, _READERS)
    if suffix:
        return _READERS[suffix]
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise UnsuitableImage(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    if start.startswith(b"NRRD000"):
        return "NrrdImageIO"
    return "MetaImageIO" if start.startswith((b"ObjectType", b"NDims")) else ""


def _read_file(path: Path, image_io: str) -> Volume:
    with _ascii_input(path) as readable:
        reader = sitk.ImageFileReader()
        reader.SetImageIO(image_io)
        reader.SetFileName(str(readable))
        try:
            reader.ReadImageInformation()
            _check_header(reader, path)
            image = reader.Execute()
        except RuntimeError as error:
            raise UnsuitableImage(_why_unreadable(path, str(error))) from error
    if image.GetDimension() == 4:  # of one time point, as _check_header found
        image = image[:, :, :, 0]
    volume = from_sitk(image)
    volume.metadata["SourceFormat"] = image_io.removesuffix("ImageIO")
    if not _tells_orientation(reader, image_io):
        add_warning(volume, "The file does not tell how the patient lies in it; left and right may be exchanged.")
    return volume


def _check_header(reader: sitk.ImageFileReader, path: Path) -> None:
    """Refuse what cannot be one volume before memory is asked for."""
    size = reader.GetSize()
    if len(size) == 2 or (len(size) >= 3 and size[2] == 1):
        raise UnsuitableImage(f"{path.name} is a single slice; give the whole series of the chest CT.")
    if len(size) > 4 or (len(size) == 4 and size[3] > 1):
        raise UnsuitableImage(f"{path.name} has {len(size)} dimensions; export one volume of it.")
    if reader.GetNumberOfComponents() != 1:
        raise UnsuitableImage(f"{path.name} has several values per voxel; export it as one image in HU.")
    if np.prod([float(n) for n in size]) > MAX_VOXELS:
        raise UnsuitableImage(f"{path.name} has {'x'.join(str(n) for n in size)} voxels; crop it to the chest.")
    if reader.GetPixelID() == sitk.sitkFloat64:
        reader.SetOutputPixelType(sitk.sitkFloat32)


def _why_unreadable(path: Path, text: str) -> str:
    if "orthonormal" in text:
        return f"{path.name} has a sheared or scaled orientation; resample it to right angles and save it again."
    if "permission" in text.lower():
        return f"{path} cannot be read; check its permissions."
    return f"{path.name} is damaged or not of the format its name says; export it again as {_KNOWN}."


def _tells_orientation(reader: sitk.ImageFileReader, image_io: str) -> bool:
    def value(key: str) -> str:
        return reader.GetMetaData(key) if reader.HasMetaDataKey(key) else ""

    if image_io == "NiftiImageIO":
        return value("qform_code") not in ("", "0") or value("sform_code") not in ("", "0")
    return image_io != "NrrdImageIO" or bool(value("NRRD_space"))


@contextmanager
def _ascii_input(path: Path) -> Iterator[Path]:
    """The path itself, or where names must be ASCII a copy in a temporary folder."""
    if not _ASCII_NAMES_ONLY or str(path).isascii():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / f"image{_suffix_of(path, _READERS) or path.suffix}"
        shutil.copyfile(path, copy)
        yield copy


@contextmanager
def _ascii_output(path: Path, suffix: str) -> Iterator[Path]:
    """The path itself, or where names must be ASCII one in a temporary folder that is moved there."""
    if not _ASCII_NAMES_ONLY or str(path).isascii():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / f"image{suffix}"
        yield other
        shutil.copyfile(other, path)


def _check_nifti(path: Path, suffix: str, volume_bytes: int) -> None:
    """SimpleITK's NIfTI writer does not report a full disk (the others do), so the length is looked at."""
    length = 0
    try:
        with gzip.open(path) if suffix == ".nii.gz" else path.open("rb") as file:
            while chunk := file.read(2**22):
                length += len(chunk)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        length = 0
    if length < volume_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
