"""What is told before anything is written, and what a corrected command finds again."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from rlcompress import spec, stages
from rlcompress.core.errors import UserError
from rlcompress.core.files import read_json, save_json
from rlcompress.core.tensors import save_tensors
from rlcompress.lock import Lock
from rlcompress.stages import Workspace
from rlcompress.stages.zoo import members
from tests.mistakes import assert_told, contents
from tests.toy import toy_network

MISTAKES = {
    "no weights": ("dense.weights=nope.pt", "no such file"),
    "no data": ("data={factory: 'mistaken:data', args: {}}", "cannot import mistaken"),
    "no model": ("model={factory: 'tests.toy:toy_netwrok', args: {}}", "toy_network"),
    "drawn anew": (
        "model={factory: 'tests.core.test_kept:Drawn', args: {by: torch}}",
        "draws what a file does not hold; allowed: ",
    ),
    "out of reach": ("search.target=[4, 1000]", "is possible"),
    "no searcher": ("search.searcher=mistaken:search", "cannot import mistaken"),
    "no policy": (
        "search={searcher: untrained, policy: nowhere}",
        "search.policy = nowhere: no policy.json",
    ),
    "no clip rule": ("search.clip=mistaken:clip", "cannot import mistaken"),
}


@pytest.mark.parametrize(("option", "says"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_moves_nothing(rlcompress, searched, option, says):
    shutil.copytree(searched, "runs/tiny")
    before = contents(Path("runs"))
    for fresh in ((), ("--fresh",)):
        assert_told(rlcompress("search", "tiny", "--set", option, *fresh), says)
        assert contents(Path("runs")) == before


@pytest.mark.parametrize(("option", "says"), MISTAKES.values(), ids=MISTAKES)
def test_check_tells_it_too(rlcompress, option, says):
    assert_told(rlcompress("check", "tiny", "--set", option), says)
    assert not Path("runs").exists()


def test_check_judges_by_the_dense_network_of_its_options(rlcompress, searched):
    """Another one that lies there says nothing of them; loaded weights are trained."""
    shutil.copytree(searched, "runs/tiny")
    before = contents(Path("runs"))
    untrained = "of the untrained network: only its time means anything"
    model = "model={factory: cnn, args: {width: 0.2}}"
    for option, trained in (("seed=0", True), ("dense.lr=0.05", False), (model, False),
                            (weights("w.safetensors", 0), True)):  # fmt: skip
        told = rlcompress("check", "tiny", "--set", option, "--json")
        assert told.code == 0, told.err
        assert (untrained not in told.out + told.err) is trained
        assert (json.loads(told.out)["expected_seconds"]["dense"] == 0) is trained
    assert contents(Path("runs")) == before


@pytest.mark.parametrize("verb", ["run", "search"])
def test_fresh_moves_the_old_run_aside(rlcompress, searched, monkeypatch, verb):
    """Once the new one can begin: its dense network is trained from the start."""
    shutil.copytree(searched, "runs/tiny")
    before = contents(Path("runs/tiny"))

    def stop(run: Workspace) -> None:
        assert not (run.folder / "dense").exists()
        raise UserError("stop")

    monkeypatch.setattr(stages, "train_dense", stop)
    for count in (1, 2, 3):
        told = rlcompress(verb, "tiny", "--fresh")
        assert_told(told, f"the old run is now in {Path(f'runs/tiny.{count}').resolve()}", lines=2)
    assert contents(Path("runs/tiny.1")) == before
    assert {path.name for path in Path("runs").iterdir()} == {
        "tiny",
        *(f"tiny.{n}" for n in (1, 2, 3)),
    }
    assert {path.name for path in Path("runs/tiny").iterdir()} == {"lock", "log.txt", "spec.yaml"}


@pytest.mark.parametrize(("option", "says"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_makes_nothing(rlcompress, option, says):
    assert_told(rlcompress("search", "tiny", "--set", option), says)
    assert not Path("runs").exists()


DYNAMIC = {
    "out of reach": ("dynamic.target=5000", "target = 5000: from 1 to "),
    "no policy": ("search.policy=nowhere", "search.policy = nowhere: no policy.json"),
    "no model": MISTAKES["no model"],
}


@pytest.mark.parametrize(("option", "says"), DYNAMIC.values(), ids=DYNAMIC)
def test_a_mistake_of_dynamic_makes_and_moves_nothing(rlcompress, searched, option, says):
    assert_told(rlcompress("dynamic", "tiny", "--set", option), says)
    assert not Path("runs").exists()
    shutil.copytree(searched, "runs/tiny")
    Path("runs/tiny/dynamic").mkdir()
    save_json(Path("runs/tiny/dynamic/ticket.json"), {"inputs": "other"})
    before = contents(Path("runs"))
    assert_told(rlcompress("dynamic", "tiny", "--set", option), says)
    assert contents(Path("runs")) == before


ZOO = """{
    one: {model: {factory: 'tests.toy:toy_netwrok'}, data: {factory: digits}},
    two: {model: {factory: cnn}, data: {factory: 'gone:data'}},
    three: {model: {factory: cnn, args: {width: 0.2}}, data: {factory: digits}}}"""


def test_mistakes_of_a_zoo_are_told_at_once(rlcompress):
    words = ("--set", f"zoo.networks={ZOO}", "--set", "search.target=[4, 9000]")
    told = rlcompress("train-policy", "tiny", *words)
    for says in (
        "search.target = [4.0, 9000.0]: at most",
        'zoo.networks.one: factory "tests.toy:toy_netwrok"',
        'zoo.networks.two: factory "gone:data"',
    ):
        assert_told(told, says, lines=3)
    assert not Path("runs").exists()


def test_loaded_weights_are_those_of_the_experiments_own_network(rlcompress):
    file = spec.load_experiments("experiments.yaml")
    options = [f"zoo.networks={ZOO}", weights("w.safetensors", 0)]
    run = Workspace("tiny", spec.resolve(file, "tiny", options), Path("runs/tiny"))
    assert [member.experiment.dense.weights for member in members(run).values()] == [None] * 3
    assert run.experiment.dense.weights == "w.safetensors"


def test_mistakes_of_all_kinds_are_told_at_once(rlcompress):
    options = ("search.clip=away:clip", "data={factory: 'gone:data', args: {}}")
    options += ("model={factory: 'lost:net', args: {}}", "search.policy=nowhere")
    words = [word for option in options for word in ("--set", option)]
    told = rlcompress("search", "tiny", "--searcher", "untrained", *words)
    for says in ("import away", "import gone", "import lost", "search.policy = nowhere"):
        assert_told(told, says, lines=4)


def test_what_other_options_set_aside_comes_back(rlcompress, searched):
    shutil.copytree(searched, "runs/tiny")
    before = contents(Path("runs/tiny"))
    assert rlcompress("search", "tiny", "--set", "dense.lr=0.05").code == 0
    assert rlcompress("search", "tiny").code == 0
    after = contents(Path("runs/tiny"))
    assert {name: after[name] for name in before} == before


def weights(path: str, seed: int) -> str:
    torch.manual_seed(seed)
    save_tensors(Path(path), toy_network().state_dict())
    return f"dense.weights={path}"


def test_other_weights_under_the_same_name_are_another_network(rlcompress):
    option = weights("w.safetensors", 0)
    assert rlcompress("search", "tiny", "--set", option).code == 0
    first = contents(Path("runs/tiny/dense"))["trained.safetensors"]
    weights("w.safetensors", 1)
    told = rlcompress("search", "tiny", "--set", option)
    assert "set-aside/dense.1" in told.out + told.err
    assert contents(Path("runs/tiny/dense"))["trained.safetensors"] != first
    # What was loaded stands for a file that is gone.
    Path("w.safetensors").unlink()
    again = rlcompress("search", "tiny", "--set", option)
    assert again.code == 0, again.err
    assert "made from other options" not in again.out + again.err


def test_a_searcher_without_a_schedule_says_so(rlcompress, searched):
    """The main one ends the command, again and again; a baseline is passed over with a line."""
    shutil.copytree(searched, "runs/tiny")
    narrow = ("--set", "search.target=[4.0001, 4.0002]")
    says = "uniform has no schedule within search.target = [4.0001, 4.0002]; widen it"
    for _ in range(2):
        assert_told(rlcompress("search", "tiny", *narrow), says)
    told = rlcompress(
        "search", "tiny", *narrow, "--searcher", "random", "--set", "search.baselines=[uniform]"
    )
    assert told.code == 0, told.err
    assert says in told.out
    assert not Path("runs/tiny/search/uniform.done").exists()


SPLITS = """
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

images, labels = load_digits(return_X_y=True)
x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
y = torch.tensor(labels)


def data(by):
    draw = {"global": np.random, "anew": np.random.default_rng()}[by]
    order = torch.from_numpy(draw.permutation(len(x)))
    parts = order[:300], order[300:500], order[500:600]
    return [TensorDataset(x[part], y[part]) for part in parts]
"""


@pytest.mark.parametrize(("by", "alike"), [("global", True), ("anew", False)])
def test_splits_that_are_drawn_anew_are_told(rlcompress, by, alike):
    """Else a ticket is tested on what the dense network was trained on."""
    Path("splits.py").write_text(SPLITS)
    option = ("--set", f"data={{factory: 'splits:data', args: {{by: {by}}}}}")
    assert rlcompress("search", "tiny", *option).code == 0
    before = contents(Path("runs"))
    told = rlcompress("search", "tiny", *option, "--set", "search.episodes=5")
    if alike:
        assert told.code == 0, told.err
        return
    assert_told(told, "data splits:data: other images or labels in train, validation, test than ")
    assert contents(Path("runs")) == before
    assert rlcompress("search", "tiny", *option, "--fresh").code == 0


def test_images_that_changed_under_the_same_labels_are_told(rlcompress):
    Path("splits.py").write_text(SPLITS)
    option = ("--set", "data={factory: 'splits:data', args: {by: global}}")
    assert rlcompress("search", "tiny", *option).code == 0
    path = Path("runs/tiny/dense/metrics.json")
    metrics = read_json(path)
    metrics["data"]["test"]["means"][3] += 0.1
    save_json(path, metrics)
    told = rlcompress("search", "tiny", *option, "--set", "search.episodes=5")
    assert_told(told, "other images or labels in test than ")
    # Older versions wrote nothing of them.
    del metrics["data"]
    save_json(path, metrics)
    assert rlcompress("search", "tiny", *option, "--set", "search.episodes=5").code == 0


def state(**changes: object) -> dict[str, object]:
    return {**toy_network().state_dict(), **changes}


UNFIT = {
    "a key less": (lambda: dict(list(state().items())[1:]), "missing: 0.weight"),
    "a key more": (lambda: state(other=torch.zeros(1)), "not in the network: other"),
    "another head": (lambda: toy_network(5).state_dict(), "--set model.args.num_classes=5"),
    "not finite": (lambda: state(**{"1.bias": torch.full((8,), torch.nan)}), "not finite: 1.bias"),
    "a tensor": (lambda: torch.zeros(3), "holds a Tensor"),
    "a list": (lambda: [torch.zeros(3)], "holds a list"),
    "a whole network": (toy_network, "allowed: a state dict, as torch.save(model.state_dict(), "),
}


@pytest.mark.parametrize(("make", "says"), UNFIT.values(), ids=UNFIT)
def test_weights_that_do_not_fit(rlcompress, make, says):
    torch.save(make(), "w.pt")
    assert_told(rlcompress("search", "tiny", "--set", "dense.weights=w.pt"), says)
    assert not Path("runs").exists()


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 cut off"])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_files_that_hold_no_weights(rlcompress, name, content):
    Path(name).write_bytes(content)
    told = rlcompress("search", "tiny", "--set", f"dense.weights={name}")
    assert_told(told, f"dense.weights = {name}: not readable as weights")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    ],
    ids=["a checkpoint", "distributed"],
)
def test_weights_as_trainers_write_them(rlcompress, wrap):
    torch.save(wrap(toy_network().state_dict()), "w.pt")
    assert rlcompress("search", "tiny", "--set", "dense.weights=w.pt").code == 0


SHUFFLED = """
import torch
from tests.toy import toy_network

def net():
    model = toy_network()
    model.register_buffer("perm", torch.randperm(64))
    return model
"""


def test_constants_that_every_seed_draws_anew(rlcompress):
    """No file would hold them."""
    Path("shuffled.py").write_text(SHUFFLED)
    told = rlcompress("search", "tiny", "--set", "model={factory: 'shuffled:net', args: {}}")
    assert_told(told, "perm (torch.int64): not what shuffled:net builds")
    assert not Path("runs").exists()


UNLABELLED = """
from rlcompress.core.data import digits

def images():
    data = digits(size=16)
    return [list(s.images()) for s in (data.train, data.validation, data.test)]

def some_labelled():
    train, validation, test = images()
    return train, validation, [(x, 3) for x in test]
"""


@pytest.fixture
def unlabelled(rlcompress):
    Path("bare.py").write_text(UNLABELLED)
    return ("--set", "data={factory: 'bare:images', args: {}}")


def test_no_labels_at_all(rlcompress, unlabelled):
    """A trained network and images: a ticket, whose accuracy is agreement with that network."""
    words = (*unlabelled, "--set", weights("w.safetensors", 0), "--set", "export.onnx=false")
    told = rlcompress("run", "tiny", *words, "--set", "ticket.epochs=1")
    assert told.code == 0, told.out + told.err
    assert "agreement with dense" in told.out + told.err
    (path,) = Path("runs/tiny/tickets").glob("*/ticket.json")
    ticket = read_json(path)
    assert ticket["dense"]["accuracy"] == 1.0
    assert 0.1 < ticket["ticket"]["accuracy"] <= 1.0
    assert "| | agreement with dense | bytes |" in path.with_name("card.md").read_text()
    page = Path("runs/tiny/report/index.html").read_text()
    assert "<th>agreement with dense, %</th>" in page
    assert "<th>accuracy, %</th>" not in page


def test_no_labels_and_nothing_that_answers(rlcompress, unlabelled):
    told = rlcompress("run", "tiny", *unlabelled)
    assert_told(told, "data: no labels, so nothing can be trained on them")
    told = rlcompress("dynamic", "tiny", *unlabelled, "--set", weights("w.safetensors", 0))
    assert_told(told, "dynamic: needs labels")
    told = rlcompress("run", "tiny", "--set", "data={factory: 'bare:some_labelled', args: {}}")
    assert_told(told, "labels in test only")
    assert not Path("runs").exists()


def test_compress_writes_what_it_was_asked(rlcompress):
    """Its experiments file holds the --set too: other verbs find its run with the file alone."""
    sets = ("data.args.size=16", "ticket.epochs=1", "export.onnx=false", "ticket.fit_images=64")
    sets += ("calibration.fit_images=64", "calibration.score_images=64", "ppo.num_env_runners=0")
    words = ["--model", "tests.toy:toy_network", "--data", "digits", "--evaluations", "2"]
    words += ["--target", "5", "--weights", "w.safetensors"]
    weights("w.safetensors", 0)
    told = rlcompress("compress", *words, *(word for text in sets for word in ("--set", text)))
    assert told.code == 0, told.out + told.err
    run = Path("runs/toy-toy_network-digits-5x")
    name = ("--file", str(run / "experiments.yaml"), "--out", str(run))
    again = rlcompress("export", run.name, *name)
    assert again.code == 0, again.err
    (path,) = run.glob("tickets/*/ticket.json")
    assert json.loads(path.read_text())["ratio"] >= 5
    command = shlex.join(["rlcompress", "run", run.name, *name])
    assert f"Made by `{command}`" in path.with_name("card.md").read_text()
    assert f"<pre>{command}</pre>" in (run / "report" / "index.html").read_text()


def test_compress_leaves_the_file_of_a_run_at_work_alone(rlcompress):
    weights("w.safetensors", 0)
    words = ("--model", "tests.toy:toy_network", "--data", "digits", "--set", "data.args.size=16")
    with Lock(Path("run")):
        Path("run/experiments.yaml").write_text("theirs")
        told = rlcompress(
            "compress", *words, "--target", "5x", "--weights", "w.safetensors", "--out", "run"
        )
        assert_told(told, "run: in use by")
        assert Path("run/experiments.yaml").read_text() == "theirs"


def test_compress_tells_mistakes_of_all_kinds_at_once(rlcompress):
    words = ("--model", "nope:factory", "--data", "x", "--target", "20q", "--set", "search.foo=1")
    told = rlcompress("compress", *words)
    for says in ("--target 20q", "search.foo", "cannot import nope", "data.factory"):
        assert_told(told, says, lines=4)
    told = rlcompress("compress", *words[:4], "--target", "9x", "--weights", "nope.pt")
    for says in ("cannot import nope", "data.factory"):
        assert_told(told, says, lines=2)
    assert not Path("runs").exists()
