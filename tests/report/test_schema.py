"""The published schema of the JSON: what is written keeps to it, and it agrees with json.py's words."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import zoo
from jsonschema import Draft202012Validator
from sample_reports import EVERY

import freezekit
from freezekit.audit.findings import CAUSES, CODES, UNITS, DriftReport
from freezekit.report import json as as_json

SCHEMA: dict[str, Any] = json.loads(as_json.schema())
VALIDATOR = Draft202012Validator(SCHEMA)


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert SCHEMA["properties"]["schema_version"] == {"const": as_json.SCHEMA_VERSION}


def objects(schema: Any) -> list[dict[str, Any]]:
    """Every part of the schema that describes an object."""
    if isinstance(schema, list):
        return [found for item in schema for found in objects(item)]
    if not isinstance(schema, dict):
        return []
    own = [schema] if "properties" in schema else []
    return own + [found for item in schema.values() for found in objects(item)]


def test_every_object_is_closed() -> None:
    assert len(objects(SCHEMA)) == 9
    for found in objects(SCHEMA):
        assert found["additionalProperties"] is False
        assert found["required"] == list(found["properties"])


def test_it_lists_what_the_docstring_lists_in_its_order() -> None:
    assert as_json.__doc__ is not None
    tables = re.findall(r"^=+ +=+\n(.*?)^=+ +=+$", as_json.__doc__, re.MULTILINE | re.DOTALL)
    names = [re.findall(r"^``(\w+)``", table, re.MULTILINE) for table in tables]
    defs = SCHEMA["$defs"]
    described = [SCHEMA, *(defs[name] for name in ("cause_summary", "layer", "finding", "checkpoint"))]
    assert names == [list(one["properties"]) for one in described]


def test_its_words_are_the_code_s() -> None:
    assert SCHEMA["$defs"]["kind"]["enum"] == list(CAUSES)
    assert tuple(SCHEMA["properties"]["unit"]["enum"]) == UNITS
    assert all(re.search(SCHEMA["$defs"]["finding"]["properties"]["code"]["pattern"], code) for code in CODES)
    assert {level for _, level in CODES.values()} == set(
        SCHEMA["$defs"]["finding"]["properties"]["level"]["enum"]
    )


@pytest.mark.parametrize("kind", EVERY)
def test_reports_keep_to_it(kind: str) -> None:
    report = EVERY[kind]()
    content = json.loads(report.to_json())
    VALIDATOR.validate(content)
    assert list(content) == list(SCHEMA["properties"])
    for name, part in (("layers", "layer"), ("findings", "finding"), ("checkpoints", "checkpoint")):
        for item in content[name]:
            assert list(item) == list(SCHEMA["$defs"][part]["properties"])
    assert DriftReport.from_json(report.to_json()) == report


def test_real_reports_keep_to_it(tmp_path: Path) -> None:
    model = zoo.make("resnet18")
    torch.save(model.state_dict(), tmp_path / "base.pth")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("fc"))
    optimizer = torch.optim.SGD(freezekit.trainable_parameters(model), lr=0.1)
    with freezekit.DriftAuditor(model, optimizer, on_drift="record") as auditor:
        zoo.train(model, optimizer, zoo.images("resnet18"))
    torch.save(model.state_dict(), tmp_path / "drifted.pth")
    reports = {
        "alone": freezekit.audit_checkpoint(tmp_path / "base.pth"),
        "clean": freezekit.audit_checkpoint(tmp_path / "base.pth", tmp_path / "base.pth"),
        "drift": freezekit.audit_checkpoint(tmp_path / "drifted.pth", tmp_path / "base.pth"),
        "live": auditor.report(),
    }
    assert [report.clean for report in reports.values()] == [True, True, False, False]
    for report in reports.values():
        VALIDATOR.validate(json.loads(report.to_json()))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((), "more"),
        (("layers", 0), "more"),
        (("layers", 0, "timeline"), "more"),
        (("layers", 0, "scatter"), "more"),
        (("findings", 0), "more"),
        (("findings", 0, "cause"), "more"),
        (("causes", 0), "more"),
        (("causes", 0, "example"), "more"),
    ],
)
def test_what_is_not_known_is_refused(path: tuple[str | int, ...], value: str) -> None:
    content = json.loads(EVERY["live"]().to_json())
    VALIDATOR.validate(content)
    part = content
    for key in path:
        part = part[key]
    part[value] = 1
    with pytest.raises(jsonschema.ValidationError, match="Additional properties are not allowed"):
        VALIDATOR.validate(content)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("schema_version", 2, "1 was expected"),
        ("unit", "batch", "'batch' is not one of"),
        ("compared", -1, "less than the minimum"),
        ("against", 3, "is not of type"),
        ("clean", "yes", "is not of type 'boolean'"),
        ("changed", [1], "is not of type 'string'"),
    ],
)
def test_wrong_values_are_refused(key: str, value: object, says: str) -> None:
    content = json.loads(EVERY["trend"]().to_json())
    with pytest.raises(jsonschema.ValidationError, match=says):
        VALIDATOR.validate({**copy.deepcopy(content), key: value})
    del content[key]
    with pytest.raises(jsonschema.ValidationError, match=f"'{key}' is a required property"):
        VALIDATOR.validate(content)


def test_the_largest_numbers_stay_numbers(tmp_path: Path) -> None:
    largest = torch.finfo(torch.float64).max
    base = {"bn.running_mean": torch.zeros(2).double(), "bn.running_var": torch.zeros(2).double()}
    torch.save({**base, "bn.weight": torch.ones(2)}, tmp_path / "base.pth")
    moved = {name: torch.full((2,), largest, dtype=torch.float64) for name in base}
    torch.save({**moved, "bn.weight": torch.ones(2)}, tmp_path / "moved.pth")
    report = freezekit.audit_checkpoint(tmp_path / "moved.pth", tmp_path / "base.pth")
    assert report.layers[0].mean_shift_sigma == 1e308
    VALIDATOR.validate(json.loads(report.to_json()))
    assert DriftReport.from_json(report.to_json()) == report
