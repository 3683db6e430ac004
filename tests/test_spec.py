from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rlcompress.spec import (
    Experiment,
    SpecError,
    load_experiments,
    read_resolved,
    resolve,
    spec_hash,
    write_resolved,
)

ROOT = Path(__file__).parents[1]
MINIMAL = {"model": {"factory": "vgg19"}, "data": {"factory": "digits"}}


def load(tmp_path: Path, text: str):
    path = tmp_path / "experiments.yaml"
    path.write_text(text)
    return load_experiments(path)


def problems(call, *args) -> list[str]:
    with pytest.raises(SpecError) as caught:
        call(*args)
    return caught.value.lines


def experiment(**changes) -> Experiment:
    return Experiment.model_validate(MINIMAL | changes)


SMALL = """
experiments:
  small:
    model: {factory: vgg19, args: {width: 0.25}}
    data: {factory: digits}
    search: {episodes: 30}
"""


class TestShippedExperiments:
    names = tuple(load_experiments(ROOT / "experiments.yaml").experiments)

    def test_names(self):
        pairs = [f"{n}-{d}" for n in ("vgg19", "mobilenetv2") for d in ("fashion", "cifar10")]
        others = {"quickstart", "quickstart-mobilenet", "resnet18-fashion", "zoo"}
        assert set(self.names) == {*others, *pairs}

    @pytest.mark.parametrize("name", names)
    def test_resolve_with_a_description(self, name):
        resolved = resolve(load_experiments(ROOT / "experiments.yaml"), name)
        assert resolved.description
        assert "\n" not in resolved.description

    def test_a_new_network_drops_the_args_of_the_old_one(self):
        file = load_experiments(ROOT / "experiments.yaml")
        assert resolve(file, "quickstart").model.args == {"width": 0.25}
        assert resolve(file, "mobilenetv2-cifar10").model.args == {"stem_stride": 1}


class TestMerge:
    def test_order(self, tmp_path):
        file = load(
            tmp_path,
            """
defaults:
  seed: 1
  dense: {epochs: 3, batch_size: 8, lr: 0.5, weight_decay: 0.1}
experiments:
  root:
    model: {factory: vgg19}
    data: {factory: digits}
    dense: {batch_size: 16, lr: 0.25, weight_decay: 0.2}
    search: {bits: [2, 3, 4]}
  middle:
    extends: root
    dense: {lr: 0.125, weight_decay: 0.3}
  leaf:
    extends: middle
    dense: {weight_decay: 0.4}
    search: {bits: [8]}
""",
        )
        leaf = resolve(file, "leaf", ["seed=7"])
        dense = leaf.dense
        assert (dense.epochs, dense.batch_size, dense.lr, dense.weight_decay) == (3, 16, 0.125, 0.4)
        assert leaf.seed == 7
        assert leaf.search.bits == (8,)
        assert leaf.search.episodes == 200
        assert resolve(file, "root").dense.weight_decay == 0.2

    @pytest.mark.parametrize(
        ("override", "args"),
        [
            ("model.factory=resnet18", {}),
            ("model.factory=vgg19", {"width": 0.25}),
            ("model.args.depth=2", {"width": 0.25, "depth": 2}),
            ("model={factory: resnet18, args: {depth: 2}}", {"depth": 2}),
        ],
    )
    def test_args_belong_to_their_factory(self, tmp_path, override, args):
        assert resolve(load(tmp_path, SMALL), "small", [override]).model.args == args

    def test_overrides_are_yaml_and_the_last_one_counts(self, tmp_path):
        resolved = resolve(
            load(tmp_path, SMALL),
            "small",
            ["search.target=[4, 5.5]", "ppo.lr=1e-4", "export.onnx=false", "threads=2", "threads="],
        )
        assert resolved.search.target == (4.0, 5.5)
        assert resolved.ppo.lr == 1e-4
        assert resolved.export.onnx is False
        assert resolved.threads is None

    def test_own_factories(self, tmp_path):
        overrides = ["model.factory=my.nets:tiny", "data.factory=my_data:load"]
        resolved = resolve(load(tmp_path, SMALL), "small", overrides)
        assert (resolved.model.factory, resolved.data.factory) == ("my.nets:tiny", "my_data:load")

    def test_a_blank_experiment_has_the_defaults(self, tmp_path):
        file = load(
            tmp_path,
            "defaults: {model: {factory: vgg19}, data: {factory: digits}}\nexperiments: {plain: }",
        )
        assert resolve(file, "plain") == experiment()

    @pytest.mark.parametrize("name", ["a", "b", "outside"])
    def test_circle(self, tmp_path, name):
        file = load(
            tmp_path, "experiments: {a: {extends: b}, b: {extends: a}, outside: {extends: a}}"
        )
        (line,) = problems(resolve, file, name)
        assert "circle" in line
        assert "a -> b" in line

    def test_extends_leads_nowhere(self, tmp_path):
        file = load(tmp_path, SMALL + "  big: {extends: smal}")
        (line,) = problems(resolve, file, "big")
        assert "big: extends" in line
        assert 'did you mean "small"?' in line


class TestProblems:
    def test_all_at_once_with_place_value_and_nearest_match(self, tmp_path):
        file = load(
            tmp_path,
            """
defaults:
  seed: soon
experiments:
  base:
    model: {factory: vgg18}
    data: {factory: digits}
    search: {bits: [2, 9]}
  child:
    extends: base
    search: {serchers: 3, searcher: pppo, target: [9, 4], keeps: [0.5]}
    dense: {epochs: 2, rewind_epoch: 2}
""",
        )
        lines = problems(resolve, file, "child", ["ticket.top=0", "noequals", "dense.lr=[1"])
        at = f"{tmp_path / 'experiments.yaml'}: child: "
        expected = [
            (f"{at}(from defaults) seed = ", '"soon"', "whole number, 0 or more"),
            (f"{at}(from base) model.factory = ", '"vgg18"', 'did you mean "vgg19"?'),
            (f"{at}(from base) search.bits.1 = ", "9", "8"),
            (f"{at}search.serchers = ", "3", 'did you mean "searcher"? (allowed: searcher, '),
            (f"{at}search.searcher = ", '"pppo"', 'did you mean "ppo"?'),
            (f"{at}search.target = ", "[9, 4]", "low <= high"),
            (f"{at}search.keeps = ", "[0.5]", "1.0"),
            (f"{at}dense.rewind_epoch = ", "2", "below dense.epochs (2)"),
            (f"{at}--set ticket.top = ", "0", "greater than or equal to 1"),
            ("--set noequals: ", "", "KEY=VALUE"),
            ("--set dense.lr=[1: ", "", "line 1"),
        ]
        for start, value, allowed in expected:
            assert any(
                line.startswith(start + value) and allowed in line.removeprefix(start)
                for line in lines
            ), (start, lines)
        assert len(lines) == len(expected)

    def test_unknown_experiment_and_bad_override(self, tmp_path):
        lines = problems(resolve, load(tmp_path, SMALL), "smal", ["x"])
        assert 'smal: no such experiment; did you mean "small"?' in lines[0]
        assert lines[1].startswith("--set x: ")

    @pytest.mark.parametrize(
        ("override", "hint"),
        [
            ("serch.episodes=3", 'did you mean "search"?'),
            ("episodes=3", "did you mean search.episodes?"),
            ("search.qqqq=3", "no such key (allowed: searcher,"),
            ("search=3", "must be a mapping (keys: searcher,"),
            ("search..episodes=3", "KEY=VALUE"),
            ("extends=other", "no such key"),
            ("search.episodes=", "whole number, 1 or more"),
            ("search.episodes=3.0", "whole number, 1 or more"),
            ("search.episodes=true", "whole number, 1 or more"),
            ("dense.augment=1", "boolean"),
            ("dense.lr='0.1'", "number"),
            ("dense.lr=.inf", "finite"),
            ("dense.epochs=1", "dense.rewind_epoch = 1: must be below dense.epochs (1)"),
            ("search.bits=[]", "at least 1"),
            ("search.bits=[3, 3]", "twice"),
            ("search.keeps=[1.0, 0.0]", "greater than 0"),
            ("search.target=[1.0, 4]", "1 < low"),
            ("search.target=[8]", "search.target.1: missing"),
            ("search.baselines=random", "must be a list"),
            ("search.baselines=[randon]", 'did you mean "random"?'),
            ("device=cudda", 'did you mean "cuda"?'),
            ("device=CPU", 'did you mean "cpu"?'),
            ("tune.space={ppo.lr: {grd: [1]}}", 'did you mean "grid"? (allowed: grid, choice,'),
            ("model.factory=os.path", "package.module:function"),
            ("model.args={day: 2020-01-01}", "numbers, text"),
            ("seed=-1", "greater than or equal to 0"),
        ],
    )
    def test_override(self, tmp_path, override, hint):
        (line,) = problems(resolve, load(tmp_path, SMALL), "small", [override])
        assert hint in line
        assert override.partition("=")[0].split(".")[0] in line

    @pytest.mark.parametrize(
        ("text", "hints"),
        [
            ("a: [1", ["line 1, column 6: "]),
            ("experiments:\n  a: {}\n  a: {}", ['line 3, column 3: the key "a" is given twice']),
            ("", ["must be a mapping"]),
            ("[1, 2]", ["must be a mapping"]),
            ("experiment: {}", ["experiments: missing", 'did you mean "experiments"?']),
            ("experiments: 3", ["experiments = 3: must be a mapping"]),
            ("experiments: {a: 3, b: {extends: 4}}", ["experiments.a = 3", "b.extends = 4"]),
            ("experiments: {../a: {}, 3: {}}", ["letters, digits", "valid string"]),
            ("a: 2020-99-99", ["not YAML"]),
            ("a: \0", ["not YAML"]),
        ],
    )
    def test_layout(self, tmp_path, text, hints):
        lines = problems(load, tmp_path, text)
        assert len(lines) == len(hints)
        for hint in hints:
            assert any(hint in line for line in lines), lines
        assert all(line.startswith(str(tmp_path / "experiments.yaml")) for line in lines)

    def test_missing_file(self, tmp_path):
        (line,) = problems(load_experiments, tmp_path / "none.yaml")
        assert line.startswith(f"{tmp_path / 'none.yaml'}: no such file")
        assert "--file" in line

    def test_unreadable_files(self, tmp_path):
        (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
        assert "UTF-8" in problems(load_experiments, tmp_path / "latin.yaml")[0]
        assert "cannot be read" in problems(load_experiments, tmp_path)[0]

    def test_pickles(self):
        error = SpecError("one", "two")
        assert pickle.loads(pickle.dumps(error)).lines == ["one", "two"]

    def test_frozen(self):
        with pytest.raises(ValidationError):
            experiment().dense.epochs = 3


class TestHash:
    def test_known_value(self):
        # A change of this value orphans every run folder there is.
        assert spec_hash(experiment()) == "d043e3b8f0f3"

    def test_twelve_hex_digits_that_change_with_a_result(self):
        seen = {
            spec_hash(experiment(**change))
            for change in (
                {},
                {"seed": 1},
                {"dense": {"epochs": 13}},
                {"ticket": {"epochs": 13}},
                {"ppo": {"lr": 0.5}},
                {"model": {"factory": "vgg19", "args": {"width": 0.5}}},
            )
        }
        assert len(seen) == 6
        assert all(len(digest) == 12 and int(digest, 16) >= 0 for digest in seen)

    @pytest.mark.parametrize(
        "change",
        [
            {"seed": 0},
            {"dense": {"epochs": 12}},
            {"search": {"bits": [2, 3, 4, 5, 6, 8], "target": [8, 40]}},
            {"tracking": {"uri": "http://localhost:5000"}},
            {"description": "the same"},
            {"device": "cpu"},
            {"threads": 3},
            {"ppo": {"address": "auto"}},
            {"ppo": {"num_env_runners": 9, "num_gpus_per_env_runner": 0.5}},
        ],
    )
    def test_defaults_and_places_stay_out(self, change):
        assert spec_hash(experiment(**change)) == spec_hash(experiment())

    def test_independent_of_order(self):
        one = experiment(model={"factory": "vgg19", "args": {"a": 1, "b": {"c": 2, "d": 3}}})
        two = experiment(model={"args": {"b": {"d": 3, "c": 2}, "a": 1}, "factory": "vgg19"})
        assert spec_hash(one) == spec_hash(two)

    def test_sections(self):
        plain, tuned = experiment(), experiment(search={"episodes": 3})
        dense = ("model", "data", "dense", "seed")
        assert spec_hash(plain, *dense) == spec_hash(tuned, *dense)
        assert spec_hash(plain, "search") != spec_hash(tuned, "search")
        with pytest.raises(ValueError, match="serch"):
            spec_hash(plain, "serch")


def args() -> st.SearchStrategy:
    scalars = (
        st.none()
        | st.booleans()
        | st.integers(-(2**40), 2**40)
        | st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False)
        | st.text(max_size=8)
        | st.sampled_from(["1e-3", "null", "yes", "0x1f", "2020-01-01", "~", "=", "<<", " a"])
    )
    values = st.recursive(
        scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v)
    )
    return st.dictionaries(st.text(max_size=5), values, max_size=4)


def experiments() -> st.SearchStrategy:
    positive = st.floats(1e-12, 1e6, allow_subnormal=False)
    return st.fixed_dictionaries(
        {
            "model": st.fixed_dictionaries(
                {"factory": st.sampled_from(["vgg19", "my.net:make"])}, optional={"args": args()}
            ),
            "data": st.fixed_dictionaries({"factory": st.just("digits")}),
        },
        optional={
            "dense": st.fixed_dictionaries(
                {"epochs": st.integers(2, 500)}, optional={"lr": positive, "augment": st.booleans()}
            ),
            "search": st.fixed_dictionaries(
                {},
                optional={
                    "bits": st.lists(st.integers(2, 8), min_size=1, unique=True),
                    "target": st.tuples(st.floats(1.5, 9), st.floats(9, 200)).map(list),
                    "searcher": st.sampled_from(["ppo", "random"]),
                },
            ),
            "ppo": st.fixed_dictionaries({}, optional={"num_env_runners": st.integers(0, 9)}),
            "seed": st.integers(0, 2**32 - 1),
            "threads": st.none() | st.integers(1, 64),
            "description": st.text(),
        },
    ).map(Experiment.model_validate)


@given(experiments())
def test_written_and_read_again_is_equal(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("run") / "new" / "spec.yaml"
    write_resolved(written, "a-name", path)
    name, read, stored_hash = read_resolved(path)
    assert (name, read) == ("a-name", written)
    assert stored_hash == spec_hash(written) == spec_hash(read)
    assert list(path.parent.iterdir()) == [path]


def test_resolved_file_goes_through_resolve_again(tmp_path):
    first = resolve(load(tmp_path, SMALL), "small", ["ppo.lr=1e-5"])
    write_resolved(first, "small", tmp_path / "spec.yaml")
    spec = (tmp_path / "spec.yaml").read_text().partition("spec:\n")[2]
    again = load(tmp_path, "experiments:\n  small:\n  " + spec.replace("\n", "\n  "))
    assert resolve(again, "small") == first


def test_resolved_file_names_every_option(tmp_path):
    write_resolved(experiment(), "x", tmp_path / "spec.yaml")
    text = (tmp_path / "spec.yaml").read_text()
    assert "experiment: x\nhash: d043e3b8f0f3\n" in text
    assert "bits: [2, 3, 4, 5, 6, 8]" in text
    assert "rewind_epoch: 1" in text


def test_unsound_resolved_file(tmp_path):
    path = tmp_path / "spec.yaml"
    assert "no such file" in problems(read_resolved, path)[0]
    path.write_text("experiment: x\nspec: {model: {factory: vgg19}, seeed: 3}")
    lines = problems(read_resolved, path)
    assert len(lines) == 3
    assert any('spec.seeed = 3: no such key; did you mean "seed"?' in line for line in lines)
