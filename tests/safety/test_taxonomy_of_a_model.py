"""A model and a policy of a taxonomy of three classes: what it names, what it refuses, that PSA stays as it was."""

import pytest
import torch
import yaml
from builders.other_taxonomy import SMALL, write_policy
from builders.tiny_llava import build_base

from psa_fast.cli import main
from psa_fast.models import PsaConfig, PsaVLM, load_processor
from psa_fast.models.addon import check_files
from psa_fast.safety.guard import Guard, Request
from psa_fast.safety.load import checked_hash
from psa_fast.safety.policy import DEFAULT_POLICY, Policy
from psa_fast.safety.redecide import redecide
from psa_fast.serve.moderations import categories
from psa_fast.taxonomy import PSA
from psa_fast.taxonomy.crosswalk import read_taxonomy


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A policy of SMALL that switches fire off."""
    return Policy.load(write_policy(tmp_path_factory.mktemp("policy") / "small.yaml", fire=False))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of a tiny base and of an add-on whose heads were trained a few steps on rows of SMALL."""
    base, addon = (tmp_path_factory.mktemp(name) for name in ("base", "addon"))
    build_base(base)
    torch.manual_seed(0)
    psa = PsaVLM.from_pretrained(base)
    fields = {name: getattr(psa.config, name) for name in ("vision_hidden_size", "hidden_size", "image_tokens")}
    psa = PsaVLM.build(psa.vlm, PsaConfig(**fields, num_safety_tokens=2, num_head_tokens=2, taxonomy=SMALL.to_json()))
    ids = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    labels = {"words_type": torch.tensor([0, 1, 2]), "words_level": torch.tensor([1, 0, 1])}
    optimizer = torch.optim.AdamW([p for p in psa.bottleneck.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        out = psa(ids, **labels)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0]
    psa.save_addon(addon)
    return base, addon


def test_trained_saved_and_loaded_its_verdict_names_its_classes(trained, policy):
    base, addon = trained
    config = check_files(addon)
    assert (config.concepts, config.head_sizes, config.risk_types) == (SMALL, (3, 2), list(SMALL.types))
    psa = PsaVLM.from_pretrained(base, addon)
    guard = Guard(psa, load_processor(base, psa.config), policy)
    (verdict,) = guard.verdicts([Request("what colour is the circle ?")], on_error="raise")
    assert list(verdict.type_probs) == list(SMALL.types)
    assert list(verdict.level_probs) == ["none", "risky"]
    assert sum(verdict.type_probs.values()) == pytest.approx(1)
    assert redecide(policy, verdict) == verdict
    for other in (None, Policy.load()):
        with pytest.raises(ValueError, match="the model is of the taxonomy small, the policy of psa: a policy names"):
            Guard(psa, load_processor(base, psa.config), other)
    with pytest.raises(ValueError, match=f"the add-on {addon} is of the taxonomy small, the policy of psa"):
        checked_hash(addon, Policy.load())
    assert checked_hash(addon, policy)


def test_the_policy_decides_by_its_taxonomy(policy):
    refused = policy.decide([0.7, 0.2, 0.1], [0.4, 0.6])
    assert (refused.action, refused.type, refused.level, refused.code) == ("refuse", 0, 1, "unsafe")
    assert "knives" in refused.response
    assert policy.decide([0.1, 0.8, 0.1], [0.9, 0.1]).code == "clean"
    assert policy.decide([0.05, 0.05, 0.9], [0.1, 0.9]).rule == "type_off: fire is switched off"
    with pytest.raises(ValueError, match="type_probs must be 3 probabilities"):
        policy.decide([0.5, 0.5], [0.5, 0.5])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"taxonomy": "holisafe-20"}, "types: unknown or missing"),
        ({"taxonomy": "nowhere"}, "taxonomy: 'nowhere' is none of: psa, holisafe-20"),
        ({"taxonomy": {"version": 1}}, "taxonomy: the file lacks name, heads"),
    ],
)
def test_a_policy_of_no_taxonomy_is_refused(tmp_path, change, said):
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(DEFAULT_POLICY.read_text()) | change))
    with pytest.raises(ValueError, match=r"policy\.yaml") as error:
        Policy.load(path)
    assert said in str(error.value)


def test_psa_is_as_it_was(tmp_path):
    assert Policy.load().taxonomy == PSA
    named = yaml.safe_load(DEFAULT_POLICY.read_text()) | {"taxonomy": "psa"}
    assert Policy.model_validate(named).hash == Policy.load().hash
    assert "taxonomy" not in Policy.load().model_dump()
    config = PsaConfig(vision_hidden_size=16, hidden_size=32, image_tokens=4)
    assert (config.taxonomy, config.concepts, config.head_sizes) == (None, PSA, (7, 4))
    other = PsaConfig(vision_hidden_size=16, hidden_size=32, image_tokens=4, taxonomy=SMALL.to_json())
    assert other.digest() != config.digest()
    other.to_json_file(tmp_path / "psa_config.json")
    assert PsaConfig.from_json_file(tmp_path / "psa_config.json") == other
    with pytest.raises(ValueError, match=r"risk_types is .*; this psa-fast knows knives, fine, fire"):
        PsaConfig(16, 32, 4, risk_types=["a", "b", "c"], taxonomy=SMALL.to_json())
    with pytest.raises(ValueError, match="taxonomy"):
        PsaConfig(16, 32, 4, taxonomy={"name": "x"})


def test_moderations_name_the_risks_of_the_taxonomy():
    named = categories(read_taxonomy("mlcommons"))
    assert {name for name, kind in named.items() if kind} == {
        f"mlcommons/{kind.replace(' ', '-')}" for kind in read_taxonomy("mlcommons").risks
    }
    assert categories(PSA)["illicit"] == "illegal risk"
    assert categories(PSA)["psa/privacy"] == "privacy"


def test_what_counts_psas_classes_refuses_a_policy_of_others(trained, tmp_path, capsys):
    base, addon = trained
    file = write_policy(tmp_path / "policy.yaml")
    sources = ("--base", base, "--stage", f"one={addon}", "--data", tmp_path / "rows.jsonl", "--policy", file)
    (tmp_path / "rows.jsonl").write_text("")
    assert main(["robustness", *map(str, ("--out", tmp_path / "out", *sources))]) == 2
    assert "is of the taxonomy psa, the policy of small" in capsys.readouterr().err
