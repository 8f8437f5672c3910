"""Damaged safetensors files."""

from __future__ import annotations

import json
import struct
from typing import Any


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a safetensors file with this header, which need not be right."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def headers() -> dict[str, bytes]:
    """Damaged safetensors files."""
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return {
        "empty": b"",
        "seven bytes": b"\0" * 7,
        "a header of no bytes": struct.pack("<Q", 0),
        "a header beyond the file": safetensors(b"{}", length=1000),
        "a header of 2^63": safetensors(b"{}", length=2**63),
        "a header of 2^64 - 1": safetensors(b"{}", length=2**64 - 1),
        "text": b"these are no weights at all, but a text\n" * 9,
        "a header that is not JSON": safetensors(b"weights!"),
        "a header that is a list": safetensors([]),
        "a header of brackets": safetensors(b"[" * 100_000),
        "a tensor that is a number": safetensors({"a": 1}),
        "no dtype": safetensors({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
        "an unknown dtype": safetensors({"a": {**one, "dtype": "F33"}}, b"\0" * 8),
        "offsets before the data": safetensors({"a": {**one, "data_offsets": [-8, 0]}}, b"\0" * 8),
        "offsets beyond the data": safetensors({"a": {**one, "data_offsets": [0, 80]}}, b"\0" * 8),
        "offsets that turn back": safetensors({"a": {**one, "data_offsets": [8, 0]}}, b"\0" * 8),
        "a shape that is larger": safetensors({"a": {**one, "shape": [3]}}, b"\0" * 8),
        "a shape that overflows": safetensors({"a": {**one, "shape": [2**40, 2**40]}}, b"\0" * 8),
        "a negative shape": safetensors({"a": {**one, "shape": [-2]}}, b"\0" * 8),
        "two tensors in one place": safetensors({"a": one, "b": one}, b"\0" * 8),
        "more data than tensors": safetensors({"a": one}, b"\0" * 80),
        "no tensors": safetensors({}),
        "metadata alone": safetensors({"__metadata__": {"format": "pt"}}),
        "a zip": b"PK\3\4" + b"\0" * 100,
        "a pickle": b"(dp0\nVa\np1\nI1\ns.",
    }
