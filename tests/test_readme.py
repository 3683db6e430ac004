"""The README's library example is run as it stands, by itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"

BEFORE = """
import torch
from rlcompress.core.models import build_model
torch.manual_seed(0)
torch.set_num_threads(1)
model = build_model("torchvision.models:resnet18", {}, num_classes=10, in_channels=3, seed=0)
images, labels = torch.randn(160, 3, 32, 32), torch.randint(10, (160,))
"""
AFTER = """
import os, sys
assert os.path.getsize("small.safetensors") == evaluator.evaluate(schedule).bytes
assert os.path.getsize("small.safetensors") < evaluator.dense.bytes / 20
small.model.eval()
with torch.no_grad():
    assert again(images).shape == (160, 10)
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"ray", "mlflow", "gymnasium"}, loaded & {"ray", "mlflow", "gymnasium"}
"""


def test_the_library_alone_in_ten_lines(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    lines = [line for line in code.splitlines() if line and not line.startswith("from ")]
    assert len(lines) <= 10
    program = BEFORE + code + AFTER
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Measurement(accuracy=") == 2
