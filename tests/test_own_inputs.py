"""What a user's own network, data and weights may look like."""

from __future__ import annotations

import errno
import itertools
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from rlcompress.core.data import build_data
from rlcompress.core.tensors import load_tensors
from rlcompress.stages.weights import load_weights
from tests.mistakes import Told, assert_told
from tests.toy import toy_network

_numbers = itertools.count()

OWN = """
    import torch
    from torch import nn
    class Net(nn.Module):
        def __init__(self, num_classes=10):
            super().__init__()
            self.conv = nn.Conv2d(1, 8, 3, padding=1)
            self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
            self.head = nn.Linear(8, num_classes)
        def forward(self, x):
            x = self.conv2(self.conv(x).relu()).relu()
            return self.head(x.mean((2, 3)))
"""


def assert_passes(told: Told) -> None:
    assert not told.code, told.err


def own(code: str) -> str:
    """The module that holds it."""
    name = f"owned{next(_numbers)}"
    Path(f"{name}.py").write_text(textwrap.dedent(OWN) + code + "\n")
    return name


def check(rlcompress, module: str, *words: str) -> Told:
    small = ("--set", f"model.factory={module}:make", "--set", "search.target=[2, 3]")
    return rlcompress("check", "tiny", *small, *words)


@pytest.mark.parametrize(
    "answer", ["[y, x]", "(y, x)", "{'aux': x, 'out': y}", "{'loss': None, 'logits': y, 'x': x}"]
)
def test_what_training_returns_besides_the_logits(rlcompress, answer):
    code = f"""class make(Net):
    def forward(self, x):
        y = super().forward(x)
        return {answer} if self.training else y"""
    assert_passes(check(rlcompress, own(code)))


def test_a_network_that_comes_frozen_is_trained(rlcompress):
    code = """def make():
    model = Net()
    return model.requires_grad_(False)"""
    module = own(code)
    assert_passes(check(rlcompress, module))
    options = ("--set", f"model.factory={module}:make", "--set", "search.target=[2, 3]")
    assert_passes(rlcompress("search", "tiny", *options))
    before, after = (
        load_tensors(Path(f"runs/tiny/dense/{name}.safetensors"))[0] for name in ("init", "trained")
    )
    assert not any(torch.equal(before[name], after[name]) for name in before)


class Wrapped(nn.Module):
    """Names of its own that begin as a wrapper's do."""

    def __init__(self) -> None:
        super().__init__()
        self.module = toy_network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


STATES = {
    "compiled": (toy_network, lambda state: {f"_orig_mod.{n}": t for n, t in state.items()}),
    "Lightning": (
        toy_network,
        lambda state: {"state_dict": {f"model.{n}": t for n, t in state.items()}},
    ),
    "compiled, distributed": (
        toy_network,
        lambda state: {f"module._orig_mod.{n}": t for n, t in state.items()},
    ),
    "names that begin with module": (Wrapped, lambda state: state),
    "those, distributed": (Wrapped, lambda state: {f"module.{n}": t for n, t in state.items()}),
    "without counts of batches": (
        toy_network,
        lambda state: {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")},
    ),
    "halves": (toy_network, lambda state: {n: t.half() for n, t in state.items()}),
}


@pytest.mark.parametrize(("make", "wrap"), STATES.values(), ids=STATES)
def test_weights_as_trainers_and_wrappers_name_them(make, wrap, tmp_path):
    there, model = make(), make()
    torch.save(wrap(there.state_dict()), tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    for name, tensor in there.named_parameters():
        assert torch.equal(model.get_parameter(name), tensor.half().float()) or torch.equal(
            model.get_parameter(name), tensor
        )


FIRST = "0.weight"
ODD = {
    "sparse": (lambda t: t.to_sparse(), "0.weight (torch.sparse_coo; allowed: torch.strided)"),
    "on no device": (lambda t: t.to("meta"), "0.weight (on meta, without numbers)"),
    "quantized": (
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        "0.weight (quantized; allowed: dequantized)",
    ),
    "complex": (
        lambda t: t.to(torch.complex64),
        "0.weight (torch.complex64, the network's is torch.float32)",
    ),
    "integers": (
        lambda t: (100 * t).to(torch.int8),
        "0.weight (torch.int8, the network's is torch.float32)",
    ),
}


@pytest.mark.parametrize(("change", "says"), ODD.values(), ids=ODD)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_that_are_no_plain_floats(rlcompress, change, says):
    state = toy_network().state_dict()
    torch.save({**state, FIRST: change(state[FIRST])}, "w.pt")
    assert_told(rlcompress("search", "tiny", "--set", "dense.weights=w.pt"), says)
    assert not Path("runs").exists()


def test_variances_below_zero(rlcompress):
    state = toy_network().state_dict()
    torch.save({**state, "1.running_var": -state["1.running_var"]}, "w.pt")
    told = rlcompress("search", "tiny", "--set", "dense.weights=w.pt")
    assert_told(told, "below zero: 1.running_var")


@pytest.mark.parametrize("held", [lambda m: m, lambda m: {"model": m}])
def test_a_file_with_a_whole_module(rlcompress, held):
    torch.save(held(toy_network()), "w.pt")
    told = rlcompress("search", "tiny", "--set", "dense.weights=w.pt")
    assert_told(told, "a whole module, or other objects than tensors (torch.nn.modules.container.S")
    assert "as torch.save(model.state_dict(), PATH) writes it" in told.err


def test_weights_that_may_not_be_read(rlcompress, monkeypatch):
    """It is the file that is in the way, not the run folder."""
    Path("w.pt").write_bytes(b"")
    opened = Path.open

    def refusing(path: Path, *args, **options):
        if path.name == "w.pt":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", refusing)
    told = rlcompress("search", "tiny", "--set", "dense.weights=w.pt")
    assert_told(told, "dense.weights = w.pt: cannot be read: Permission denied")
    assert not Path("runs").exists()


def test_weights_of_a_variable_that_is_not_set(rlcompress):
    words = ("--model", "tests.toy:toy_network", "--data", "digits", "--set", "data.args.size=16")
    told = rlcompress("compress", *words, "--target", "5x", "--weights", "")
    assert_told(told, "--weights: empty; allowed: a file, or no --weights to train one")
    assert not Path("runs").exists()


@pytest.mark.parametrize("out", ["broken", "broken/run", "loop", "loop/run"])
def test_a_folder_behind_a_link_to_nowhere(rlcompress, out):
    Path("broken").symlink_to("gone")
    Path("loop").symlink_to("loop")
    for verb in ("check", "search"):
        told = rlcompress(verb, "tiny", "--out", out)
        assert_told(told, "is a link to nowhere; name another with --out DIR")
    assert not Path("gone").exists()


ALWAYS_WRONG = """
from rlcompress.core.data import digits

def make():
    data = digits(size=16)
    train, validation = ([(x, int(y)) for x, y in zip(s.images(), s.labels_N) if y < 5]
                         for s in (data.train, data.validation))
    return train, validation, [(x, 9) for x, _ in validation[:20]]
"""


def test_a_dense_network_that_is_always_wrong(rlcompress):
    """On the test split: nothing is so many times denser."""
    Path("wrong.py").write_text(ALWAYS_WRONG)
    data = ("--set", "data={factory: 'wrong:make', args: {}}")
    words = (*data, "--set", "ticket.epochs=1", "--set", "ticket.fit_images=64")
    assert_passes(rlcompress("search", "tiny", *words))
    told = rlcompress("ticket", "tiny", *words)
    assert_passes(told)
    (line,) = [line for line in told.out.splitlines() if line.startswith("density, %/MB")]
    assert line.split()[2] == "0.0"


GRADIENTS = """
import torch
from rlcompress.core.data import Data, Split, digits

def items():
    data, scale = digits(size=16), torch.ones(1, requires_grad=True)
    return [[(scale * x, y) for x, y in zip(split.images(), split.labels_N)]
            for split in (data.train, data.validation, data.test)]

def splits():
    x, y = torch.ones(8, 1, 16, 16, requires_grad=True), torch.arange(8) % 2
    return Data(*[Split(x * 2, y) for _ in range(3)], 2)
"""


@pytest.mark.parametrize("factory", ["items", "splits"])
def test_images_that_a_computation_with_gradients_made(tmp_path, monkeypatch, factory):
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"owned{next(_numbers)}"
    (tmp_path / f"{name}.py").write_text(GRADIENTS)
    data = build_data(f"{name}:{factory}", {})
    for split in (data.train, data.validation, data.test):
        assert not split.raw_NCHW.requires_grad
