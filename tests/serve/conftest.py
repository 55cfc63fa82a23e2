"""A guard whose verdicts depend on the picture, behind HTTP."""

from types import SimpleNamespace

import pytest
from builders.http_requests import QUESTION, png
from builders.tiny_llava import build_addon, build_base

from psa_fast.safety import Guard, Policy, Request


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Base and add-on folders; the add-on reads text, as new ones do."""
    root = tmp_path_factory.mktemp("serve")
    base = build_base(root / "base")
    return SimpleNamespace(base=base, addon=build_addon(base, root / "addon", seed=11))


@pytest.fixture(scope="session")
def guard(trained):
    from psa_fast.safety.load import load_guard

    return load_guard(trained.addon, trained.base)


@pytest.fixture(scope="session")
def strict(guard):
    """A policy under which about half of the pictures 0 to 9 are refused, by the guard's own scores."""
    scores = sorted(v.unsafe_score for v in guard.verdicts([Request(QUESTION, (png(seed),)) for seed in range(10)]))
    assert scores[4] < scores[5]
    values = Policy.load().model_dump()
    values["unsafe_threshold"] = (scores[4] + scores[5]) / 2
    for level in values["levels"]:
        values["levels"][level] = {"action": "refuse"}
    return Policy.model_validate(values)


@pytest.fixture
def open_client():
    """Starts a server around a guard; gives its client, whose `server` it is."""
    pytest.importorskip("fastapi", reason="the extra psa-fast[serve] is not installed")
    pytest.importorskip("prometheus_client", reason="the extra psa-fast[serve] is not installed")
    from fastapi.testclient import TestClient

    from psa_fast.serve.api_keys import ApiKeys
    from psa_fast.serve.http_app import Server
    from psa_fast.serve.settings import ServerSettings

    clients = []

    def start(guard, keys=(), shadow=None, audit=None, page=False, operators=(), explains=False, **limits):
        settings = ServerSettings(**limits)
        server = Server(guard, settings, ApiKeys(keys), shadow, audit, page, ApiKeys(operators), explains)
        client = TestClient(server.app)
        client.server = server
        clients.append(client.__enter__())
        return client

    yield start
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def strict_guard(guard, strict):
    return Guard(guard.model, guard.processor, strict, model_hash=guard.model_hash)
