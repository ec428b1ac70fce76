"""Image files to arrays and back. OpenCV does the work and is imported on first use, so that importing this is cheap.

What comes out is always (H, W, 3) uint8 RGB:

- EXIF orientation is applied (for WebP as far as the installed OpenCV reads it: 4.9 does not, 5.0 does).
- Grayscale is repeated over the three channels; palettes are resolved; CMYK is converted to RGB.
- Alpha is dropped: a transparent pixel shows the color stored beneath it, which is black in most TIFFs.
- 16 bits per channel are scaled to 8 (65535 becomes 255). Floating-point images have no known range and are refused.
- An animation gives its first picture.
- A JPEG or PNG that ends early is refused rather than filled up with gray.
"""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cl4wsis.errors import DataError
from cl4wsis.folders import replaced_file

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""File name endings (lower case) that are taken for images when a folder is searched."""

_JPEG_START, _JPEG_SCAN, _JPEG_END = b"\xff\xd8\xff", b"\xff\xda", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND"
_PNG_GRAY, _PNG_PALETTE = 0, 3  # color types


def read_image(path: str | Path) -> NDArray[np.uint8]:
    """Read an image file.

    Returns:
        (H, W, 3) uint8 RGB, upright.

    Raises:
        DataError: the file is missing, unreadable, truncated or no image; the message names it and the reason.
    """
    return decode_image(read_bytes(path), name=str(path))


def read_bytes(path: str | Path) -> bytes:
    """Read a whole file.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def decode_image(content: bytes, name: str = "image") -> NDArray[np.uint8]:
    """Decode the bytes of an image file.

    Args:
        content: the whole file.
        name: what error messages call the image.

    Returns:
        (H, W, 3) uint8 RGB, upright.

    Raises:
        DataError: the bytes are empty, truncated or no image.
    """
    if not content:
        raise DataError(f"{name}: is empty; expected an image file")
    if _is_truncated(content):
        raise DataError(f"{name}: ends before the image is complete; copy the file again")
    cv2 = _import_cv2()
    try:
        decoded = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    except cv2.error as error:
        if "CV_IO_MAX_IMAGE" in str(error):
            raise DataError(
                f"{name}: has more pixels than may be decoded; send a smaller image, or raise the limit "
                "(cl4wsis serve --max-pixels; elsewhere the environment variable OPENCV_IO_MAX_IMAGE_PIXELS)"
            ) from error
        raise DataError(f"{name}: cannot be decoded: {_first_line(error)}") from error
    if decoded is None:
        raise DataError(f"{name}: is not an image that can be read; expected JPEG, PNG, WebP, TIFF, BMP or PPM")
    rgb: NDArray[np.uint8] = cv2.cvtColor(_to_8_bits(decoded, name), cv2.COLOR_BGR2RGB)
    return rgb


def read_index_map(path: str | Path) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Read a PNG whose pixels are numbers: indices of a palette, or values of a grayscale image.

    Colors of the palette play no part. Pixels of 1, 2 or 4 bits count in steps of 1 as well.

    Returns:
        (H, W) uint8, or uint16 for 16 bits.

    Raises:
        DataError: the file is missing, truncated, no PNG, or shows colors instead of numbers.
    """
    content = read_bytes(path)
    if not content.startswith(_PNG_START) or content[12:16] != b"IHDR":
        raise DataError(f"{path}: is not a PNG; masks of numbers are stored as PNG")
    if _is_truncated(content):
        raise DataError(f"{path}: ends before the image is complete; copy the file again")
    depth, color_type = content[24], content[25]
    if color_type not in (_PNG_GRAY, _PNG_PALETTE):
        raise DataError(
            f"{path}: holds colors; expected are numbers, as in a palette or 8-bit grayscale PNG (class numbers "
            "0, 1, ..., 255 and not their colors)"
        )
    cv2 = _import_cv2()
    plain = _without_palette(content) if color_type == _PNG_PALETTE else content
    try:
        values = cv2.imdecode(np.frombuffer(plain, np.uint8), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH)
    except cv2.error as error:
        raise DataError(f"{path}: cannot be decoded: {_first_line(error)}") from error
    if values is None:
        raise DataError(f"{path}: is damaged and cannot be decoded; copy the file again")
    scale = 255 // (2**depth - 1) if depth < 8 else 1  # fewer bits are stretched to 0..255 in decoding
    numbers: NDArray[np.uint8] = values // scale if scale > 1 else values
    return numbers


def _without_palette(content: bytes) -> bytes:
    """Turn a palette PNG into a grayscale PNG of the same numbers: another color type, and no palette."""
    parts, position = [content[:8]], 8
    while position + 8 <= len(content):
        length, kind = int.from_bytes(content[position : position + 4], "big"), content[position + 4 : position + 8]
        chunk = content[position : position + length + 12]
        if kind == b"IHDR":
            body = b"IHDR" + chunk[8:17] + bytes([_PNG_GRAY]) + chunk[18:21]
            chunk = chunk[:4] + body + zlib.crc32(body).to_bytes(4, "big")
        if kind not in (b"PLTE", b"tRNS", b"bKGD", b"sBIT"):  # these speak of palette entries
            parts.append(chunk)
        position += length + 12
    return b"".join(parts)


def encode_png(array: NDArray[Any]) -> bytes:
    """Encode an image or an id map as PNG.

    Args:
        array: (H, W) uint8 or uint16, or (H, W, 3) uint8 RGB.

    Raises:
        ValueError: the array has another shape or type.
    """
    is_map = array.ndim == 2 and array.dtype in (np.uint8, np.uint16)
    is_rgb = array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8
    if not (is_map or is_rgb) or not array.size:
        raise ValueError(
            f"a PNG is made of (H, W) uint8 or uint16, or (H, W, 3) uint8, found {array.shape} {array.dtype}"
        )
    cv2 = _import_cv2()
    return bytes(cv2.imencode(".png", cv2.cvtColor(array, cv2.COLOR_RGB2BGR) if is_rgb else array)[1])


def encode_jpeg(image: NDArray[np.uint8], quality: int = 92) -> bytes:
    """Encode an (H, W, 3) uint8 RGB image as JPEG; quality is 1..100."""
    cv2 = _import_cv2()
    settings = [cv2.IMWRITE_JPEG_QUALITY, quality]
    return bytes(cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), settings)[1])


def write_png(path: str | Path, array: NDArray[Any]) -> None:
    """Write an image or an id map as PNG; a reader sees the old file or the new one, never half of it.

    Args:
        path: of the file; its folder must exist.
        array: (H, W) uint8 or uint16, or (H, W, 3) uint8 RGB.

    Raises:
        ValueError: the array has another shape or type.
        DataError: the file cannot be written.
    """
    write_bytes_atomically(Path(path), encode_png(array))


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old or the new one, never half of it.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        with replaced_file(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error


def _to_8_bits(decoded: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Scale 16 bits to 8, rounded; no copy of the image in wider numbers is made, and no value lies halfway."""
    if decoded.dtype == np.uint8:
        return decoded
    if decoded.dtype == np.uint16:
        return np.asarray(_import_cv2().convertScaleAbs(decoded, alpha=1 / 257), np.uint8)
    raise DataError(f"{name}: has {decoded.dtype} pixels; convert it to 8 or 16 bits per channel first")


def _is_truncated(content: bytes) -> bool:
    """Tell whether a JPEG or PNG lacks its end; OpenCV would fill the rest with gray without saying so."""
    if content.startswith(_JPEG_START):
        return content.rfind(_JPEG_END) < content.rfind(_JPEG_SCAN)
    return content.startswith(_PNG_START) and _PNG_END not in content


def _import_cv2() -> Any:
    import cv2

    # OpenCV writes warnings about odd files straight to stderr, past Python; what matters is raised instead.
    # The function moved between OpenCV 4 and 5; 0 is "silent" in both.
    (cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel)(0)
    return cv2


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["unknown reason"])[0]
