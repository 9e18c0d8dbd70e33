"""openapi.json, checked by openapi-spec-validator; tests/test_restapi.py checks that the service is as it says."""
from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_the_description_is_valid_openapi() -> None:
    validator = pytest.importorskip("openapi_spec_validator")
    document = json.loads((Path(__file__).resolve().parent.parent / "openapi.json").read_text("utf-8"))
    validator.OpenAPIV31SpecValidator(document).validate()
