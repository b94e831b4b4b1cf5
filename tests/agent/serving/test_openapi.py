"""The API does what its OpenAPI document says, whatever comes."""

from __future__ import annotations

import json
from importlib import resources

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.generation import GenerationMode

from agent.serving.api import Api
from agent.serving.asgi import AsgiApp
from agent.serving.settings import Settings
from edgeward.clock import ManualClock

load_all_checks()

DOCUMENT = json.loads(resources.files("agent.serving").joinpath("openapi.json").read_text())
#: (method, path, whether the requests keep to the document); only what has a body can fail to.
OPERATIONS = [
    (method.upper(), path, mode)
    for path, item in sorted(DOCUMENT["paths"].items())
    for method in item
    if method != "parameters"
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE or "requestBody" in item[method]
]
#: A request that keeps to the document can still be wrong (a model's own shapes), a 503 is a documented answer.
EXCLUDED = ("positive_data_acceptance", "unsupported_method", "not_a_server_error")


@pytest.fixture
def app(models):
    models.echo("m", "float32", [-1, 3])
    models.echo("text", "bytes", [-1])
    models.add("broken", None, [], [], reason="worker crashes in a loop")
    return AsgiApp(Api(models, Settings(), ManualClock()))


@pytest.mark.parametrize(("method", "path", "mode"), OPERATIONS)
def test_every_operation_keeps_to_the_document(app, method, path, mode):
    schema = schemathesis.openapi.from_dict(DOCUMENT)
    schema.app = app
    names = st.sampled_from(["m", "text", "broken", "nothing", "%2e%2e", "é"])
    excluded = [CHECKS.get_one(name) for name in EXCLUDED]

    @given(case=schema[path][method].as_strategy(generation_mode=mode), name=names)
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def run(case, name):
        if "model" in case.path_parameters:
            case.path_parameters["model"] = name
        if "version" in case.path_parameters:
            case.path_parameters["version"] = "3"
        response = case.call_and_validate(excluded_checks=excluded)
        assert response.status_code != 500

    run()
