"""The model card that lies beside a ticket's files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlcompress.core.pareto import ticket_rank
from rlcompress.core.schedule import Measurement
from rlcompress.report.figures import TIMES, arm_measurements, size

#: What brings a ticket to the accuracy floor, by the searcher; else that of `search`.
_REMEDIES = {"dynamic": "lower dynamic.target, raise dynamic.final_steps or ticket.floor"}
REMEDY = (
    "lower search.target (--target of compress), raise search.episodes (--evaluations) or "
    "ticket.floor"
)

_NO_LABELS = """
They have no labels: what is measured is how often the answer is the dense network's."""


def measure_of(labelled: bool) -> str:
    """What the share of right answers is called: without labels, right is what the dense network
    answers."""
    return "accuracy" if labelled else "agreement with dense"


def points(value: float) -> str:
    """Of accuracy: `1 point`, `0.5 points`."""
    text = f"{value:.3g}"
    return f"{text} point" + "s" * (text != "1")


def below_floor(ticket: Mapping[str, Any]) -> str:
    """A line where a ticket misses the accuracy floor on the validation split, with what to do;
    empty where it is at it. `ticket`: the content of ticket.json."""
    if ticket_rank(ticket)[0]:
        return ""
    validation = ticket["validation"]
    best = 100 * (validation[ticket["arm"]] - validation["dense"])
    remedy = _REMEDIES.get(ticket["searcher"], REMEDY)
    return (
        f"no ticket within {points(ticket['floor'])} of dense, ticket.floor "
        f"(best {best:+.2f} on validation): {remedy}"
    )


def model_card(
    ticket: Mapping[str, Any],
    experiment: str,
    spec: Mapping[str, Any],
    delivered: Mapping[str, Any],
    command: str,
    *,
    labelled: bool = True,
) -> str:
    """Markdown with Hugging Face's YAML front matter, for `tickets/<id>/card.md`.

    ticket  the content of ticket.json; spec  the resolved experiment, with model and data
    delivered  `onnx`: file -> what onnx.json says; `latency`: what latency.json says
    command  makes the run again;  labelled  whether the data have labels
    The front matter leaves the licence open: that of the data and the dense network decides.
    """
    compressed = Measurement.from_dict(ticket["ticket"])
    data, network = str(spec["data"]["factory"]), str(spec["model"]["factory"])
    measure = measure_of(labelled)
    matter = _front_matter(ticket, experiment, data, network, labelled)
    head = yaml.safe_dump(matter, sort_keys=False)
    trained = ticket["arm"] in ticket["curves"]
    how = "retrained" if trained else "refitted in closed form, not trained"
    trust = f', trust=["{network}"]' if ":" in network else ""
    bits = sorted({int(b) for b in ticket["schedule"]["bits"].values()})
    batch = ", ".join(map(str, (1, *ticket["input"]["shape"])))
    widths = f"{bits[0]}-{bits[-1]}" if len(bits) > 1 else "".join(map(str, bits)) or "32"
    return f"""---
{head}---

# {experiment}, ticket {ticket["id"]}

A {network} trained on {data}, compressed {ticket["ratio"]:.3g}{TIMES} to {size(compressed.bytes)}:
channels cut and weights quantized to {widths} bits, layer by layer, on a schedule that the
searcher `{ticket["searcher"]}` found. What survived was {how} (arm `{ticket["arm"]}`).

## Intended use

Classifying images like those of {data}, where memory or download size is scarce. It is a
result to compare with and to build on; check it on your own images before you rely on it.

## Data

Trained and measured on `{data}` {json.dumps(spec["data"].get("args", {}))}. The figures below
are on its {ticket["split"]} split, where nothing else is said.{"" if labelled else _NO_LABELS}

## Measured

Split: {ticket["split"]}. Seed: {ticket["seed"]}. One run.
{_floor(ticket)}
{_table(ticket, measure)}
Bytes are those of the written `weights.safetensors`; a control has the ticket's architecture
and bits. Density is {measure} in % per 10^6 bytes. BOPs are MACs {TIMES} weight bits {TIMES}
activation bits.
{_files(delivered, measure)}
## Limits

- It knows the classes of {data} and answers with one of them for any image.
- Inputs must be prepared as in training: {" x ".join(map(str, ticket["input"]["shape"]))}
  (channels, height, width), pixels minus {ticket["input"]["mean"]:.6g}, divided by
  {ticket["input"]["std"]:.6g}.
- Compression hits rare classes and unusual images harder than the mean {measure} shows.
- One seed: differences of a few tenths of a point between arms are noise.
- Small on disk is not fast by itself: speed depends on the runtime's support for few bits.

## Load

PyTorch:

```python
import torch
from rlcompress.core.artifact import load_artifact

images = torch.zeros({batch})  # yours, prepared as above
model = load_artifact("weights.safetensors"{trust})
with torch.no_grad():
    logits = model(images)
```

{_onnx_example(delivered, batch)}
Made by `{command}`, seed {ticket["seed"]}, spec {ticket["spec_hash"]}.
"""


def delivered(folder: Path) -> dict[str, Any]:
    """A ticket's `onnx.json` and `latency.json`; {} for what is not there."""
    paths = {"onnx": folder / "onnx.json", "latency": folder / "latency.json"}
    found = {k: json.loads(p.read_text()) if p.exists() else {} for k, p in paths.items()}
    # Earlier versions measured on the test split: such a file is exported again.
    found["onnx"] = {name: f for name, f in found["onnx"].items() if "agreement" in f}
    return found


def _front_matter(
    ticket: Mapping[str, Any], experiment: str, data: str, network: str, labelled: bool
) -> dict[str, Any]:
    answers = {
        "type": "accuracy" if labelled else "agreement",
        "value": round(float(ticket["ticket"]["accuracy"]), 6),
        **({} if labelled else {"name": "agreement with the dense network"}),
    }
    return {
        # That of the data and of the dense network decides.
        "license": "other",
        "license_name": "see-data-and-dense-network",
        "library_name": "pytorch",
        "pipeline_tag": "image-classification",
        "tags": [
            "image-classification",
            "model-compression",
            "pruning",
            "quantization",
            "lottery-ticket",
            network,
        ],
        "datasets": [data],
        "metrics": [answers["type"]],
        "model-index": [
            {
                "name": f"{experiment}-{ticket['id']}",
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": data, "type": data, "split": str(ticket["split"])},
                        "metrics": [
                            answers,
                            {
                                "type": "bytes",
                                "value": ticket["ticket"]["bytes"],
                                "name": "size of weights.safetensors",
                            },
                        ],
                    }
                ],
            }
        ],
    }


def _floor(ticket: Mapping[str, Any]) -> str:
    short = below_floor(ticket)
    return f"\n**Below the accuracy floor**: {short}.\n" if short else ""


def _table(ticket: Mapping[str, Any], measure: str) -> str:
    rows = {"dense": Measurement.from_dict(ticket["dense"])}
    for i, (arm, measured) in enumerate(arm_measurements(ticket).items()):
        rows[f"**ticket ({arm})**" if i == 0 else f"control: {arm}"] = measured
    lines = [
        f"| | {measure} | bytes | parameters | MACs | BOPs | density |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {name} | {100 * m.accuracy:.2f} % | {m.bytes:,} | {m.params:,} | {m.macs:,} "
        f"| {m.bops:,} | {m.density:,.1f} |"
        for name, m in rows.items()
    ]
    return "\n".join(lines) + "\n"


def _files(delivered: Mapping[str, Any], measure: str) -> str:
    """The ONNX files: size, answers on validation images, speed."""
    if not delivered["onnx"]:
        return ""
    lines = [
        "",
        "Answers on the validation images that chose the ticket:",
        "",
        f"| file | bytes | of them codes, scales, floats | validation {measure} "
        "| the ticket's answers | logits differ by |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {name} | {f['bytes']:,} | {f['container_bytes']:,} "
        f"| {100 * f['validation_accuracy']:.2f} % | {100 * f['agreement']:.2f} % "
        f"| {f['difference']:.1e} |"
        for name, f in delivered["onnx"].items()
    ]
    if delivered["latency"]:
        names = list(next(iter(delivered["latency"].values())))
        lines += ["", f"| ms in onnxruntime, one thread | {' | '.join(names)} |"]
        lines.append("| --- |" + " ---: |" * len(names))
        lines += [
            f"| batch {batch} | {' | '.join(f'{times[n]:.2f}' for n in names)} |"
            for batch, times in delivered["latency"].items()
        ]
    return "\n".join(lines) + "\n"


def _onnx_example(delivered: Mapping[str, Any], batch: str) -> str:
    if "model.onnx" not in delivered["onnx"]:
        return ""
    return f"""ONNX Runtime:

```python
import numpy
import onnxruntime

images = numpy.zeros(({batch}), dtype=numpy.float32)  # yours, prepared as above
session = onnxruntime.InferenceSession("model.onnx")
logits = session.run(["logits"], {{"images": images}})[0]
```
"""
