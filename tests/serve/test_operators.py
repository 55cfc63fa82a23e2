"""What operators alone may ask a server: interventions, and explanations; counted and logged by themselves."""

import json
import xml.etree.ElementTree as ET

import pytest
from builders.http_requests import QUESTION, chat, png, user

from psa_fast.cli import main
from psa_fast.safety import Intervention, Request
from psa_fast.safety.explanation import explain
from psa_fast.serve.audit_log import AuditLog
from psa_fast.serve.replay import difference, replay

KEY, OPERATOR = "a-key-of-some-length", "an-operators-own-key"
PATH = "/v1/chat/completions"
FORCED = {"kind": "set", "type": "privacy", "level": "high"}


def asked(client, key=None, **options):
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return client.post(PATH, json=chat(user(QUESTION, png(2)), **options), headers=headers)


def test_an_operator_intervenes_and_the_answer_is_the_guards(guard, open_client):
    client = open_client(guard, keys=[KEY], operators=[OPERATOR])
    request = Request(f"<image>\n{QUESTION}", (png(2),))
    plain = asked(client, KEY).json()
    forced = asked(client, OPERATOR, psa={"intervene": FORCED}).json()
    (expected,) = guard.answer(
        [Request(request.prompt, request.images, Intervention.from_json(FORCED))], max_new_tokens=6
    )
    assert forced["psa"] == json.loads(json.dumps(expected.verdict.to_json()))
    assert forced["choices"][0]["message"]["content"] == expected.text
    assert (forced["psa"]["type"], forced["psa"]["level"]) == ("privacy", "high")
    assert plain["psa"]["intervention"] is None
    assert asked(client, OPERATOR).json()["psa"] == plain["psa"]
    metrics = client.get("/metrics", headers={"authorization": f"Bearer {OPERATOR}"}).text
    assert 'psa_interventions_total{action="hint",kind="set"} 1.0' in metrics
    counted = [line for line in metrics.splitlines() if line.startswith("psa_verdicts_total{")]
    assert sum(float(line.rpartition(" ")[2]) for line in counted) == 2


@pytest.mark.parametrize("options", [{"intervene": FORCED}, {"explain": True}])
@pytest.mark.parametrize(
    ("keys", "operators", "key"), [([KEY], [OPERATOR], KEY), ([], [], None), ([], [OPERATOR], None)]
)
def test_nobody_else_may(guard, open_client, options, keys, operators, key):
    client = open_client(guard, keys=keys, operators=operators)
    refused = asked(client, key, psa=options)
    assert refused.status_code == 403
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("permission_error", "operators_only")
    assert asked(client, key).status_code == 200
    assert asked(client, key, psa={"explain": False}).status_code == 200


def test_an_explanation_comes_with_the_verdict_streamed_or_not(guard, open_client):
    client = open_client(guard, explains=True)
    psa = asked(client, psa={"explain": True}).json()["psa"]
    expected = explain(guard, Request(f"<image>\n{QUESTION}", (png(2),)))
    told = psa.pop("explanation")
    assert psa == json.loads(json.dumps(expected.verdict.to_json()))
    assert told["lines"] == expected.lines()
    assert told["flips"] == json.loads(json.dumps([flip.to_json() for flip in expected.flips]))
    assert ET.fromstring(told["svg"]).tag.endswith("svg")
    streamed = asked(client, psa={"explain": True}, stream=True).text
    first = json.loads(streamed.partition("\n")[0].removeprefix("data: "))
    assert first["psa"]["explanation"] == told
    assert asked(client, psa={"intervene": FORCED}).status_code == 403, "explaining is all that everybody may"


@pytest.mark.parametrize(
    "psa",
    [1, {"more": 1}, {"explain": 1}, {"intervene": 1}, {"intervene": {"kind": "set"}}, {"intervene": {"kind": 2}}],
)
def test_what_is_no_option_is_refused(guard, open_client, psa):
    reply = asked(open_client(guard, operators=[OPERATOR]), OPERATOR, psa=psa)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"].startswith("psa")


def test_the_log_tells_interventions_and_no_comparison_counts_them(guard, strict, open_client, tmp_path):
    log = tmp_path / "audit.jsonl"
    client = open_client(guard, operators=[OPERATOR], audit=AuditLog(log), shadow=strict)
    asked(client)
    asked(client, OPERATOR, psa={"intervene": FORCED})
    client.server.batcher.close()
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["intervention"] for row in rows if not row["shadow"]] == [None, FORCED | {"most": None}]
    assert len([row for row in rows if row["shadow"]]) == 1, "the shadow policy decides on nothing that was forced"
    assert [row["key"] is None for row in rows if not row["shadow"]] == [True, False]
    assert (replay(log, guard.policy).rows, replay(log, guard.policy).same) == (2, 2)
    assert difference(log, guard.policy, strict).rows == 1
    older = next(row for row in rows if not row["shadow"] and row["key"] is None)
    del older["intervention"]
    log.write_text(json.dumps(older) + "\n")
    assert replay(log, guard.policy).same == 1


def test_a_key_is_an_operators_or_everybodys(guard, open_client, tmp_path, capsys):
    with pytest.raises(ValueError, match="give operators their own"):
        open_client(guard, keys=[KEY], operators=[KEY])
    (tmp_path / "keys").write_text(KEY)
    files = ["--api_keys", str(tmp_path / "keys"), "--operator_keys", str(tmp_path / "keys")]
    assert main(["serve", "--model", str(tmp_path), *files]) == 2
    assert "is an API key of others too" in capsys.readouterr().err


def test_the_page_offers_an_explanation_where_one_may_be_had(guard, open_client):
    assert "data-explains" not in open_client(guard, page=True).get("/").text.partition(">")[0]
    for options in ({"explains": True}, {"operators": [OPERATOR]}):
        assert "data-explains>" in open_client(guard, page=True, **options).get("/").text
