"""Whether a value fits an arrow type exactly: arrow itself cuts 1.5 to 1 and takes any null."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa

from ground.jsonl import kind_of


def misfits(value: object, field: pa.Field, name: str = "") -> Iterator[str]:
    """Yield what is wrong with `value` as a value of `field`, with its place: `messages[0].role`.

    Whole numbers pass as float; nothing else is converted. Types other than bool, int, float,
    string, list and struct are left to arrow.
    """
    name = name or field.name
    kind = field.type
    if value is None:
        if not field.nullable:
            yield f"{name} must not be null"
    elif pa.types.is_list(kind):
        yield from _list_misfits(value, kind.value_field, name)
    elif pa.types.is_struct(kind):
        yield from _struct_misfits(value, kind, name)
    elif not _is_scalar(value, kind):
        yield f"{name} must be {kind}, got {kind_of(value)}"


def row_misfits(row: Mapping[str, object], schema: pa.Schema) -> Iterator[str]:
    """Yield what is wrong with a row: columns missing or unknown, values of another type."""
    yield from _key_misfits(row, schema.names, "")
    for field in schema:
        if field.name in row:
            yield from misfits(row[field.name], field)


def _list_misfits(value: object, field: pa.Field, name: str) -> Iterator[str]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        yield f"{name} must be a list, got {kind_of(value)}"
        return
    for index, item in enumerate(value):
        yield from misfits(item, field, f"{name}[{index}]")


def _struct_misfits(value: object, kind: pa.StructType, name: str) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield f"{name} must be an object, got {kind_of(value)}"
        return
    fields = [kind.field(index) for index in range(kind.num_fields)]
    yield from _key_misfits(value, [field.name for field in fields], f"{name}.")
    for field in fields:
        if field.name in value:
            yield from misfits(value[field.name], field, f"{name}.{field.name}")


def _key_misfits(row: Mapping[str, object], names: Sequence[str], prefix: str) -> Iterator[str]:
    for name in names:
        if name not in row:
            yield f"{prefix}{name} is missing"
    for name in row:
        if name not in names:
            yield f"{prefix}{name} is not in the schema"


def _is_scalar(value: object, kind: pa.DataType) -> bool:
    if pa.types.is_boolean(kind):
        return isinstance(value, bool)
    if pa.types.is_integer(kind):
        return isinstance(value, int) and not isinstance(value, bool)
    if pa.types.is_floating(kind):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return isinstance(value, str)
    return True
