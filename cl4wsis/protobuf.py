"""Walking protobuf messages where no library of theirs is at hand: metadata and places of weights in ONNX files."""

from collections.abc import Iterator
from typing import BinaryIO

_VARINT, _LENGTH_DELIMITED = 0, 2  # wire types


def length_delimited(file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """Walk the fields of a protobuf message, leaving the file at the start of each field with a length.

    Yields:
        Number and length of the field; whatever the caller has not read of it is skipped.

    Raises:
        ValueError: these bytes are no message of varints and length-delimited fields.
    """
    end = file.tell() + size
    while file.tell() < end:
        tag, value = _read_varint(file), _read_varint(file)
        field, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT and field:
            continue
        after = file.tell() + value
        if wire_type != _LENGTH_DELIMITED or not field or after > end:
            raise ValueError(f"unexpected field {field} of type {wire_type}")
        yield field, value
        file.seek(after)


def _read_varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError("unexpected end of file")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("a number is too long")
