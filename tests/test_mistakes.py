"""What a user can get wrong: each mistake is told in plain lines (what, where, what is allowed,
what to do), ends in exit code 2 or 3, and leaves nothing half-written."""

from __future__ import annotations

import itertools
import textwrap
from pathlib import Path

import pytest

from tests.mistakes import assert_told

# --- words on the command line -------------------------------------------------------------------

COMMANDS = {
    "unknown experiment": (["run", "tinny"], 'no such experiment; did you mean "tiny"?'),
    "no KEY=VALUE": (["run", "tiny", "--set", "seed"], "must be KEY=VALUE, such as"),
    "no file": (["run", "tiny", "--file", "my.yaml"], "my.yaml: no such file; run from the folder"),
    "a folder as file": (["ls", "--file", "."], "cannot be read"),
    "check without a name": (["check"], "check wants an EXPERIMENT or --model"),
    "check of both": (["check", "tiny", "--model", "vgg19"], "one of the two"),
    "check of a model, with options": (
        ["check", "--model", "vgg19", "--set", "seed=1", "--file", "experiments.yaml"],
        "check: --file, --set: only with an EXPERIMENT",
    ),
    "check of a name, with a shape": (
        ["check", "tiny", "--input", "3,32,32", "--classes", "5"],
        "check: --input, --classes: only with --model",
    ),
    "factory without a colon": (["check", "--model", "vgg18"], 'did you mean "vgg19"?'),
    "factory nowhere": (["check", "--model", "nosuch.mod:net"], "cannot import nosuch.mod"),
    "factory misspelt": (["check", "--model", "tests.toy:toy_netwrk"], "toy_network"),
    "two numbers for a shape": (["check", "--model", "vgg19", "--input", "3,32"], "three whole"),
    "an image too small": (
        ["check", "--model", "vgg19", "--input", "3,4,4"],
        "cannot be run on an input",
    ),
    "folder is a file": (["run", "tiny", "--out", "experiments.yaml"], "is a file; name another"),
    "fresh on a foreign folder": (["run", "tiny", "--out", ".", "--fresh"], "not a run folder"),
    "ticket before a search": (["ticket", "tiny"], "nothing searched yet; rlcompress search tiny"),
    "export before a ticket": (["export", "tiny"], "no ticket of these options yet"),
    "report before a search": (["report", "tiny"], "nothing searched yet; rlcompress run tiny"),
    "tune without a space": (["tune", "tiny"], "tune.space is empty; for example"),
    "tickets before any": (["tickets"], "no ticket yet (no runs/*/mlflow.db here)"),
    "show before any": (["tickets", "show", "ppo-1"], "no tickets yet (no runs/*/mlflow.db here)"),
}


@pytest.mark.parametrize(("words", "says"), COMMANDS.values(), ids=COMMANDS)
def test_commands(rlcompress, words, says):
    assert_told(rlcompress(*words), says)
    assert [path.name for path in Path().iterdir()] == ["experiments.yaml"]


USAGE = {
    "unknown verb": (["rnu", "tiny"], "Did you mean 'run'?"),
    "unknown option": (["run", "tiny", "--sat", "seed=1"], "No such option: --sat"),
    "no experiment": (["run"], "Missing argument 'EXPERIMENT'"),
    "a second name": (["run", "tiny", "small"], "unexpected extra argument"),
    "an option without a value": (["run", "tiny", "--out"], "requires an argument"),
    "no number": (["check", "--model", "vgg19", "--classes", "ten"], "should be a valid integer"),
    "no classes": (["check", "--model", "vgg19", "--classes", "0"], "should be greater than or"),
}


@pytest.mark.parametrize(("words", "says"), USAGE.values(), ids=USAGE)
def test_usage(rlcompress, words, says):
    told = rlcompress(*words)
    assert (told.code, told.out) == (2, "")
    assert says in told.err
    assert [path.name for path in Path().iterdir()] == ["experiments.yaml"]


# --- options -------------------------------------------------------------------------------------

OPTIONS = {
    "unknown section": ("serch.episodes=3", 'did you mean "search"?'),
    "unknown key": ("search.episods=3", 'did you mean "episodes"?'),
    "right key, wrong section": ("episodes=3", "did you mean search.episodes?"),
    "unknown searcher": ("search.searcher=pppo", 'did you mean "ppo"?'),
    "unknown recovery": ("search.recovery=refit", "must be one of"),
    "unknown arm": ("ticket.arms=[rewound]", "rewind"),
    "unknown device": ("device=gpu", "must be one of auto, cpu, cuda"),
    "unknown clip rule": ("search.clip=l2", "must be one of auto, kl, mse"),
    "text for a number": ("seed=soon", "must be a whole number, 0 or more and below 4294967296"),
    "fraction for a count": ("search.episodes=2.5", "must be a whole number, 1 or more"),
    "truth for a count": ("ppo.epochs=true", "must be a whole number, 1 or more"),
    "number for a list": ("search.bits=4", "must be a list"),
    "list for a mapping": ("model=[vgg19]", "must be a mapping"),
    "no path for weights": ('dense.weights=""', "must not be empty"),
    "none for a number": ("dense.lr=", "must be a number, above 0"),
    "negative seed": ("seed=-1", "greater than or equal to 0"),
    "no episodes": ("search.episodes=0", "greater than or equal to 1"),
    "infinite rate": ("dense.lr=.inf", "finite"),
    "keep above one": ("search.keeps=[1.0, 1.5]", "less than or equal to 1"),
    "keeps without one": ("search.keeps=[0.5]", "must include 1.0"),
    "nine bits": ("search.bits=[2, 9]", "less than or equal to 8"),
    "a value twice": ("search.bits=[2, 2]", "twice"),
    "target upside down": ("search.target=[9, 4]", "1 < low <= high"),
    "target of one": ("search.target=[1, 1]", "1 < low <= high"),
    "smoothing of one": ("dense.label_smoothing=1.0", "less than 1"),
    "rewind behind the end": ("dense.rewind_epoch=2", "below dense.epochs (2)"),
    "floor beyond accuracy": ("ticket.floor=101", "less than or equal to 100"),
    "warmup too short": ("dynamic.warmup=10", "less than half of dynamic.warmup = 10"),
    "watch too long": ("dynamic.watch=20", "less than half of dynamic.warmup = 21"),
    "space of nothing": ("tune.space={ppo.lr: {}}", "exactly one of"),
    "space of no option": ("tune.space={ppo.rl: {choice: [1]}}", 'did you mean "ppo.lr"?'),
    "space of a date": ("tune.space={ppo.lr: {grid: [2020-01-01]}}", "grid.0 = "),
    "argument of a date": ("model.args.a=[1, {b: 2020-01-01}]", "model.args.a = "),
    "more threads than any machine": ("threads=3000000000", "less than or equal to 4096"),
    "not YAML": ("search.target=[4", "line 1"),
}


@pytest.mark.parametrize(("option", "says"), OPTIONS.values(), ids=OPTIONS)
def test_options(rlcompress, option, says):
    told = rlcompress("run", "tiny", "--set", option)
    assert_told(told, says)
    assert option.partition("=")[0].split(".")[-1] in told.err
    assert [path.name for path in Path().iterdir()] == ["experiments.yaml"]


FILES = {
    "a key twice": ("experiments:\n  a: {}\n  a: {}", 'the key "a" is given twice'),
    "nothing in it": ("", "must be a mapping"),
    "a misspelt top": ("experiment: {}", 'did you mean "experiments"?'),
    "a name that is no folder": ("experiments: {a/b: {}}", "must be letters, digits"),
    "a circle": ("experiments: {tiny: {extends: b}, b: {extends: tiny}}", "circle"),
    "extends nothing": ("experiments: {tiny: {extends: tinyy}}", 'did you mean "tiny"?'),
    "no network": ("experiments: {tiny: {data: {factory: digits}}}", "missing, and has no default"),
}


@pytest.mark.parametrize(("text", "says"), FILES.values(), ids=FILES)
def test_files(rlcompress, text, says):
    Path("experiments.yaml").write_text(text)
    told = rlcompress("run", "tiny")
    assert told.code == 2
    assert says in told.err
    assert all(line.startswith("experiments.yaml: ") for line in told.err.splitlines())
    assert not Path("runs").exists()


# --- one's own network and data ------------------------------------------------------------------

_numbers = itertools.count()

MODEL = """
    import torch
    from torch import nn
    class Net(nn.Module):
        def __init__(self, num_classes=10, in_channels=1):
            super().__init__()
            self.conv = nn.Conv2d(in_channels, 8, 3, padding=1)
            self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
            self.head = nn.Linear(8, num_classes)
        def forward(self, x):
            x = self.conv2(self.conv(x).relu()).relu()
            return self.head(x.mean((2, 3)))
"""

#: A target within reach of so small a network.
REACHED = ("--set", "search.target=[2, 3]")

MODELS = {
    "a tuple": ("class make(Net):\n def forward(self, x): return super().forward(x), x", "tuple"),
    "a mapping": ("class make(Net):\n def forward(self, x): return {'y': x}", "returns a dict"),
    "no tensor": ("class make(Net):\n def forward(self, x): return 3", "returns a int"),
    "features, not logits": (
        "class make(Net):\n def forward(self, x): return self.conv(x)",
        "allowed: logits (1, 10)",
    ),
    "too few classes": ("def make(num_classes): return Net(3)", "returns (1, 3) for one image"),
    "no layers": ("def make(): return nn.Flatten()", "no Conv2d or Linear layer to compress"),
    "three channels for one": ("def make(): return Net(10, 3)", "1, 1, 16, 16"),
    "no module": ("def make(): return 'resnet'", "returns a torch.nn.Module"),
    "an argument too many": ("def make(depth): return Net()", "depth"),
    "its constructor fails": ("def make(): return {}['size']", "KeyError: 'size' (mine"),
    "its forward fails": (
        "class make(Net):\n def forward(self, x): return self.hed(x)",
        "no attribute 'hed'",
    ),
    "one row whatever the batch": (
        "class make(Net):\n def forward(self, x): return super().forward(x).view(1, -1)",
        "returns (1, 20) for two images; allowed: logits (2, 10)",
    ),
    "no batch": (
        "class make(Net):\n def forward(self, x): return super().forward(x).view(1, 10)",
        "cannot be run on two images: RuntimeError: shape '[1, 10]'",
    ),
    "its training fails": (
        "class make(Net):\n"
        " def forward(self, x): return super().forward(x.aux if self.training else x)",
        "cannot be trained on 2 images: AttributeError: 'Tensor' object has no attribute 'aux' (m",
    ),
    "its training answers otherwise": (
        "class make(Net):\n"
        " def forward(self, x): return [None] if self.training else super().forward(x)",
        "in training returns NoneType for 2 images; allowed: logits (2, classes), alone or",
    ),
    "weight norm as it was": (
        "def make():\n net = Net()\n nn.utils.weight_norm(net.conv)\n return net",
        "module 'conv' is under torch.nn.utils.weight_norm, which no copy holds; allowed: torch.nn"
        ".utils.parametrizations.weight_norm",
    ),
    "spectral norm as it was": (
        "def make():\n net = Net()\n"
        " [nn.utils.spectral_norm(m) for m in (net.conv, net.head)]\n return net",
        "module 'conv' and 1 more are under torch.nn.utils.spectral_norm",
    ),
    "pruning not removed": (
        "def make():\n"
        " import torch.nn.utils.prune as prune\n net = Net()\n"
        " prune.l1_unstructured(net.conv, 'weight', 0.5)\n prune.identity(net.conv, 'bias')\n"
        " return net",
        "module 'conv' is under torch.nn.utils.prune, which no copy holds; allowed: torch.nn.utils"
        ".prune.remove(module, name)",
    ),
    "TorchScript": ("def make(): return torch.jit.script(Net())", "the network is TorchScript"),
    "TorchScript, traced": (
        "def make(): return torch.jit.trace(Net().eval(), torch.zeros(2, 1, 16, 16))",
        "the network is TorchScript, whose layers cannot be read; allowed: the torch.nn.Module",
    ),
    "lazy modules": (
        "def make(): return nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(10))",
        "module '0' and 1 more are lazy, without shapes yet; allowed: the network after a first",
    ),
    "a tensor that no copy holds": (
        "class make(Net):\n"
        " def forward(self, x):\n  self.last = self.conv(x)\n  return super().forward(x)",
        "make cannot be copied: Only Tensors created explicitly",
    ),
    "no numbers": (
        "class make(Net):\n def forward(self, x): return super().forward(x) * float('nan')",
        "make puts out logits that are not finite, for 2 of 2 images; allowed: finite ones",
    ),
    "weights that do not fit a head": ("def make(): return nn.Linear(5, 10)", "cannot be run on"),
}


@pytest.mark.parametrize("verb", ["check", "search"])
@pytest.mark.parametrize(("code", "says"), MODELS.values(), ids=MODELS)
def test_models(rlcompress, verb, code, says):
    name = f"mine{next(_numbers)}"
    Path(f"{name}.py").write_text(textwrap.dedent(MODEL) + code + "\n")
    told = rlcompress(verb, "tiny", "--set", f"model.factory={name}:make", *REACHED)
    assert_told(told, says)
    assert not Path("runs/tiny/dense").exists()


DATA = """
    import torch
    def images(n, shape=(1, 16, 16), classes=10):
        g = torch.Generator().manual_seed(0)
        return [(torch.randn(*shape, generator=g), i % classes) for i in range(n)]
"""

DATASETS = {
    "an empty split": ("def make(): return images(64), [], images(64)", "split is empty"),
    "one class": ("def make(): return [images(64, classes=1)] * 3", "only one class"),
    "images of varying size": (
        "def make(): return [images(9) + images(9, (1, 20, 16))] * 3",
        "images of varying shape",
    ),
    "splits of varying size": (
        "def make(): return images(64), images(64, (1, 20, 20)), images(64)",
        "(1, 16, 16)",
    ),
    "images without channels": (
        "def make(): return [images(64, (16, 16))] * 3",
        "of shape (16, 16)",
    ),
    "three channels for one": (
        "def make(): return [images(64, (3, 16, 16))] * 3",
        "(1, 3, 16, 16)",
    ),
    "one split": ("def make(): return images(64)", "returns train, validation and test"),
    "no labels": ("def make(): return [[x for x, _ in images(64)]] * 3", "dense.weights = FILE"),
    "no tensors": ("def make(): return [[(3, y) for _, y in images(64)]] * 3", "pairs of an image"),
    "labels that are words": (
        "def make(): return [[(x, 'cat') for x, _ in images(64)]] * 3",
        "the label 'cat'",
    ),
    "labels below zero": (
        "def make(): return [[(x, y - 1) for x, y in images(64)]] * 3",
        "the label -1",
    ),
    "images with holes": (
        "def make(): return [[(x * float('nan'), y) for x, y in images(64)]] * 3",
        "not finite",
    ),
    "images that are complex": (
        "def make(): return [[(x.to(torch.complex64), y) for x, y in images(64)]] * 3",
        "the train split has images of torch.complex64, torch.strided; allowed: real, dense",
    ),
    "images without numbers": (
        "def make(): return [[(x.to('meta'), y) for x, y in images(64)]] * 3",
        "the train split has images on meta; allowed",
    ),
    "arrays": (
        "def make(): return [[(x.numpy(), y) for x, y in images(64)]] * 3",
        "the train split has as an item a tuple of ndarray, int; allowed: pairs of an image tensor",
    ),
    "mappings": (
        "def make(): return [[{'image': x, 'label': y} for x, y in images(64)]] * 3",
        "the train split has as an item a dict of 'image', 'label'; allowed: pairs of an image",
    ),
    "images beyond all measure": (
        "def make(): return [[(1e30 * x, y) for x, y in images(64)]] * 3",
        "e+30; allowed: up to 1e+09, normalised",
    ),
    "no images at all": ("def make(): return [3, 4, 5]", "has no len()"),
    "its factory fails": ("def make(): return open('nowhere.npz')", "nowhere.npz"),
    "its item fails": (
        "class make:\n"
        " def __new__(cls): return [object.__new__(cls)] * 3\n"
        " def __len__(self): return 9\n"
        " def __getitem__(self, i): raise OSError(f'image {i} is broken')",
        "image 0 is broken",
    ),
    "an argument unknown": ("def make(size): return images(64)", "size"),
    "too few to split": ("def make(): return [images(1)] * 3", "2 or more"),
}


@pytest.mark.parametrize("verb", ["check", "search"])
@pytest.mark.parametrize(("code", "says"), DATASETS.values(), ids=DATASETS)
def test_data(rlcompress, verb, code, says):
    name = f"mine{next(_numbers)}"
    Path(f"{name}.py").write_text(textwrap.dedent(DATA) + code + "\n")
    data = f"data={{factory: '{name}:make', args: {{}}}}"
    told = rlcompress(verb, "tiny", "--set", data, "--set", "model.args.in_channels=1")
    # A line for each split.
    assert_told(told, says, lines=len(told.err.splitlines()))
    assert not Path("runs/tiny/dense").exists()


OWN_PARTS = """
def no_arguments(): return []
def search(problem, history): return []
def clip(weight): return weight
def shares(weight, bits): return weight.no_such
"""

PARTS = {
    "a searcher of nothing": (
        "search.searcher=NAME:no_arguments",
        ":no_arguments(): too many positional arguments; allowed: a function of (problem, settings,"
        " history, measure)",
    ),
    "a searcher of two": ("search.searcher=NAME:search", ":search(problem, history): too many"),
    "a baseline": ("search.baselines=[NAME:search]", ":search(problem, history): too many"),
    "a clip rule of the weight": (
        "search.clip=NAME:clip",
        ':clip", called with (weight, bits): TypeError: clip() takes 1 positional argument but 2',
    ),
    "a clip rule that fails": (
        "search.clip=NAME:shares",
        "AttributeError: 'Tensor' object has no attribute 'no_such' (mine",
    ),
}


@pytest.mark.parametrize("verb", ["check", "search"])
@pytest.mark.parametrize(("option", "says"), PARTS.values(), ids=PARTS)
def test_functions_of_ones_own(rlcompress, verb, option, says):
    name = f"mine{next(_numbers)}"
    Path(f"{name}.py").write_text(OWN_PARTS)
    assert_told(rlcompress(verb, "tiny", "--set", option.replace("NAME", name)), says)
    assert not Path("runs").exists()
