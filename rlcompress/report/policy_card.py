"""The card of a policy: what it learned on, how, and how well it did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def policy_card(about: Mapping[str, Any], where: str) -> str:
    """Markdown from a `policy.json`; `where`: the network that it was judged on."""
    lines = [
        "# A compression policy",
        "",
        "For `rlcompress transfer`, `rlcompress compress` and `search.policy`: it chooses how many",
        "channels of each group survive and how many bits each layer's weights get. Its prior goes",
        "by losses that it learned on other networks; see `rlcompress/core/learned.py`.",
        "",
        "| | |",
        "| --- | --- |",
        f"| networks | {', '.join(about['networks'])} |",
        f"| evaluations | {about['evaluations']} measured schedules |",
        f"| episodes of PPO | {about['episodes']} |",
        f"| recovery | {about['recovery']} |",
        f"| seed, spec | {about['seed']}, {about['spec_hash']} |",
        f"| commit | {about['commit']} |",
        f"| command | `{about['command']}` |",
        "",
        "Agreement of summed losses with measured KLs of schedules of one size (correlation), as",
        "estimated and as learned, on its own networks:",
        "",
        "| network | estimated | learned |",
        "| --- | ---: | ---: |",
        *(f"| {n} | {a:.2f} | {b:.2f} |" for n, (a, b) in about["agreement"].items()),
        "",
        f"On {where}, which it never saw, against the knapsack on estimates (held-out images):",
        "",
        "| times fewer bytes | KL, estimates | KL, policy | accuracy, estimates | … policy |",
        "| ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {row['target']:.1f} | {row['prior_kl']:.4f} | {row['policy_kl']:.4f} "
            f"| {row['prior_accuracy']:.2%} | {row['policy_accuracy']:.2%} |"
            for row in about["judged"]
        ),
        "",
        "Limits: it learned on image classifiers of 32 x 32 pixels with batch norms, with",
        "reconstruction as the recovery; elsewhere measure it against `knapsack` first.",
        "",
    ]
    return "\n".join(lines)
