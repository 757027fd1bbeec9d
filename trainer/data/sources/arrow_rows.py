"""Turn Arrow tables into rows as their author wrote them: without the nulls that only the schema adds, JSON columns
parsed, class labels by their names.

A struct column has one set of keys for all rows, so a key that any row has stands in every other as null. Taught as it
comes, a model learns to write ``"kind": null``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

Convert = Callable[[Any], Any]


def row_converters(schema: pa.Schema) -> dict[str, Convert]:
    """Return what the values of a schema's columns must go through; columns that come right are left out.

    Args:
        schema: of Arrow; what ``datasets`` notes in its metadata is used.
    """
    features = _noted_features(schema)
    found = {field.name: _converter(field.type, features.get(field.name)) for field in schema}
    return {name: convert for name, convert in found.items() if convert is not None}


def convert_row(row: dict[str, Any], converters: Mapping[str, Convert]) -> dict[str, Any]:
    """Convert the values of a row, as :func:`row_converters` says, and return it."""
    for name, convert in converters.items():
        if row[name] is not None:
            row[name] = convert(row[name])
    return row


def _noted_features(schema: pa.Schema) -> dict[str, Any]:
    """Return the features that ``datasets`` notes in a schema's metadata; none where nobody did."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _converter(kind: pa.DataType, feature: Any) -> Convert | None:
    """Return the converter of a type; ``None`` where values come right."""
    if isinstance(kind, pa.JsonType):
        return _parse_json
    if isinstance(kind, pa.BaseExtensionType):
        return _converter(kind.storage_type, feature)
    if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and pa.types.is_integer(kind):
        return _class_names(feature.get("names"))
    if pa.types.is_dictionary(kind):
        return _converter(kind.value_type, feature)
    if pa.types.is_struct(kind):
        inner = feature if isinstance(feature, dict) and "_type" not in feature else {}
        return _struct({field.name: _converter(field.type, inner.get(field.name)) for field in kind.fields})
    if pa.types.is_map(kind):
        return _map(_converter(kind.item_type, None))
    if isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType | pa.ListViewType | pa.LargeListViewType):
        return _list(_converter(kind.value_type, _item_feature(feature)))
    return None


def _item_feature(feature: Any) -> Any:
    """Return the feature of a list's items: ``datasets`` has written lists in three ways."""
    if isinstance(feature, dict) and "feature" in feature:
        return feature["feature"]
    return feature[0] if isinstance(feature, list) and len(feature) == 1 else None


def _struct(fields: Mapping[str, Convert | None]) -> Convert:
    def convert(value: Any) -> Any:
        found = ((key, item, fields.get(key)) for key, item in value.items() if item is not None)
        return {key: item if inner is None else inner(item) for key, item, inner in found}

    return convert


def _list(inner: Convert | None) -> Convert | None:
    return None if inner is None else lambda value: [None if item is None else inner(item) for item in value]


def _map(inner: Convert | None) -> Convert:
    def convert(value: Any) -> Any:
        pairs = value.items() if isinstance(value, dict) else value
        return {key: item if inner is None or item is None else inner(item) for key, item in pairs}

    return convert


def _class_names(names: Any) -> Convert | None:
    if not isinstance(names, list):
        return None
    return lambda value: str(names[value]) if 0 <= value < len(names) else None


def _parse_json(value: Any) -> Any:
    try:
        return json.loads(value)
    except (TypeError, ValueError, RecursionError):
        return value
