"""What the guard adds to an answer, on a tiny model: the result's schema, and that unlike work is refused."""

import json

import guard_cost
import pytest

SHORT = ["--size", "tiny", "--requests", "1", "--rounds", "2", "--answer_tokens", "6", "--verdict_tokens", "3"]


def test_result_has_its_schema(tmp_path):
    path = tmp_path / "cost.json"
    guard_cost.main([*SHORT, "--json", str(path)])
    result = json.loads(path.read_text())
    assert set(result["prompts"]) == {"short", "long"}
    for found in result["prompts"].values():
        assert set(found["seconds"]) == {"plain", "one reading", "guarded", "verdict", "generative guard"}
        assert all(seconds > 0 for seconds in found["seconds"].values())
        for low, middle, high in found["ratios"].values():
            assert 0 < low <= middle <= high
        # a verdict that generates nothing is cheaper than an answer, on any machine
        assert found["seconds"]["verdict"] < found["seconds"]["guarded"]


def test_answers_of_another_length_are_not_compared(monkeypatch):
    build = guard_cost.build_base

    def ending(size):
        base = build(size)
        base.generation_config.eos_token_id = 3
        generate = base.generate
        base.generate = lambda **inputs: generate(**{**inputs, "max_new_tokens": 2})
        return base

    monkeypatch.setattr(guard_cost, "build_base", ending)
    with pytest.raises(SystemExit, match="2 tokens instead of 6: unlike work"):
        guard_cost.main(SHORT)
