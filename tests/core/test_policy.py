"""One scorer for any number of actions; untrained it is the prior."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlcompress.core.errors import UserError
from rlcompress.core.policy import Policy, PolicyShape, load_policy, save_policy

SHAPE = PolicyShape(action_columns=5, state_columns=3, hidden=16, observation_version=2)


@pytest.fixture
def policy() -> Policy:
    torch.manual_seed(0)
    return Policy(SHAPE)


@pytest.fixture
def learned(policy) -> Policy:
    torch.nn.init.normal_(policy.score.weight)
    return policy


def observation(batch: int = 4, actions: int = 6) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(batch, actions)
    mask[:, 2:3] = 0
    return {
        "actions": torch.randn(batch, actions, SHAPE.action_columns),
        "state": torch.randn(batch, SHAPE.state_columns),
        "mask": mask,
    }


def test_an_untrained_policy_is_the_prior(policy):
    seen = observation()
    logits, values = policy(seen)
    legal = seen["mask"] > 0.5
    assert torch.equal(logits[legal], seen["actions"][..., -1][legal])
    assert values.shape == (4,)


def test_illegal_actions_have_no_chance_and_no_influence(learned):
    seen = observation()
    logits, values = learned(seen)
    assert (logits.softmax(1)[:, 2] == 0).all()
    other = {**seen, "actions": seen["actions"].clone()}
    other["actions"][:, 2] = 100.0
    assert torch.equal(learned(other)[0], logits)
    assert torch.allclose(learned(other)[1], values)


def test_actions_are_scored_alike_in_any_order(learned):
    seen = observation()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    logits, values = learned(seen)
    shuffled = {**seen, "actions": seen["actions"][:, order], "mask": seen["mask"][:, order]}
    assert torch.allclose(learned(shuffled)[0], logits[:, order], atol=1e-6)
    assert torch.allclose(learned(shuffled)[1], values, atol=1e-6)


@pytest.mark.parametrize("actions", [1, 3, 40])
def test_any_number_of_actions(learned, actions):
    seen = observation(2, actions)
    seen["mask"] = torch.ones_like(seen["mask"])
    logits, values = learned(seen)
    assert logits.shape == (2, actions)
    assert bool(torch.isfinite(logits).all())
    assert bool(torch.isfinite(values).all())


def test_the_best_action_of_numpy_arrays(learned):
    seen = observation(1)
    logits, _ = learned(seen)
    arrays = {name: tensor[0].numpy() for name, tensor in seen.items()}
    assert learned.best_action(arrays) == int(logits.argmax())
    arrays["mask"] = np.eye(6, dtype=np.float32)[4]
    assert learned.best_action(arrays) == 4


def test_saved_and_loaded(learned, tmp_path):
    save_policy(tmp_path / "policy", learned, {"experiment": "quickstart"})
    back, about = load_policy(tmp_path / "policy", 2)
    assert about == {"experiment": "quickstart"}
    assert back.shape == SHAPE
    assert torch.equal(back(observation())[0], learned(observation())[0])
    assert {p.name for p in (tmp_path / "policy").iterdir()} == {
        "policy.json",
        "policy.safetensors",
    }


def test_another_observation_version_is_refused(learned, tmp_path):
    save_policy(tmp_path, learned, {})
    with pytest.raises(UserError, match=r"version 2.*version 3"):
        load_policy(tmp_path, 3)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("policy.json", None),
        ("policy.safetensors", None),
        ("policy.json", b"{"),
        ("policy.json", b"{}"),
        ("policy.json", b"[]"),
        ("policy.json", b'{"shape": {"hidden": 3}}'),
        ("policy.safetensors", b"noise"),
        (
            "policy.json",
            b'{"shape": {"action_columns": 9, "state_columns": 3, "hidden": 16,'
            b' "observation_version": 2}}',
        ),
    ],
)
def test_a_damaged_policy_is_refused(learned, tmp_path, name, content):
    save_policy(tmp_path, learned, {})
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="no intact policy"):
        load_policy(tmp_path, 2)
