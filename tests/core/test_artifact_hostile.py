"""Files that are cut off, damaged or made to deceive."""

from __future__ import annotations

import copy
import json
import pickle
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from rlcompress.core.artifact import load_artifact
from rlcompress.core.layout import FORMAT, ArtifactError, LayerRecord, NormRecord, Table, digest
from rlcompress.core.schedule import Schedule
from tests.core.conftest import write


@pytest.fixture(scope="module")
def intact(vgg, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("intact") / "a"
    write(vgg, path, Schedule(dict.fromkeys(vgg.network.groups, 0.25), {"features.0": 4}))
    return path.read_bytes()


def refuses(path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        load_artifact(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def split(content: bytes) -> tuple[dict, bytes]:
    """Manifest and data of a file."""
    size = int.from_bytes(content[:8], "little")
    manifest = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["rlcompress"])
    return manifest, content[8 + size :]


def forged(manifest: dict, data: bytes) -> bytes:
    """A file of them with a digest that matches."""
    manifest = {**manifest, "sha256": digest(manifest, data)}
    tensors = {"data": np.frombuffer(data, np.uint8)}
    return save(tensors, metadata={"rlcompress": json.dumps(manifest)})


def with_manifest(intact: bytes, **changes) -> bytes:
    """The same data behind another manifest."""
    manifest, data = split(intact)
    return forged(manifest | changes, data)


def with_table(intact: bytes, **changes) -> bytes:
    """The same numbers behind other records."""
    manifest, data = split(intact)
    table, end = Table.unpack(data)
    return forged(manifest, replace(table, **changes).pack() + data[end:])


@given(share=st.floats(0, 1, exclude_max=True, allow_subnormal=False))
@settings(max_examples=30)
def test_a_truncated_file_is_refused(intact, scratch, share):
    refuses(scratch, intact[: int(share * len(intact))])


@given(at=st.floats(0, 1, exclude_max=True, allow_subnormal=False), bit=st.integers(0, 7))
@settings(max_examples=60)
def test_a_flipped_bit_in_the_data_is_refused(intact, scratch, at, bit):
    start = 8 + int.from_bytes(intact[:8], "little")
    broken = bytearray(intact)
    broken[start + int(at * (len(intact) - start))] ^= 1 << bit
    refuses(scratch, bytes(broken))


@st.composite
def mutations(draw):
    """What may happen to a file: bytes set, a piece cut out, doubled or moved, an end lost."""
    kind = draw(st.sampled_from(["header", "header", "anywhere", "cut", "double", "swap", "end"]))
    at, other = (draw(st.floats(0, 1, exclude_max=True, allow_subnormal=False)) for _ in range(2))
    length = draw(st.integers(1, 64))
    values = draw(st.binary(min_size=1, max_size=4))

    def mutate(content: bytes) -> bytes:
        size = len(content)
        head = 8 + int.from_bytes(content[:8], "little")
        i, j = int(at * (head if kind == "header" else size)), int(other * size)
        if kind in ("header", "anywhere"):
            return (content[:i] + values + content[i + len(values) :])[:size]
        if kind == "cut":
            return content[:i] + content[i + length :]
        if kind == "double":
            return content[: i + length] + content[i:]
        if kind == "swap":
            i, j = sorted((i, j))
            piece = content[i : i + length]
            return content[:i] + content[i + length : j + length] + piece + content[j + length :]
        return content[:i]

    return mutate


@given(mutate=mutations())
@settings(max_examples=2000)
def test_a_damaged_file_is_refused_or_means_the_same(vgg, intact, scratch, wanted, mutate):
    """The room behind the manifest is blank: other blanks there are no damage."""
    broken = mutate(intact)
    scratch.write_bytes(broken)
    try:
        model = load_artifact(scratch)
    except ArtifactError:
        return
    head = 8 + int.from_bytes(intact[:8], "little")
    assert broken[head:] == intact[head:]
    assert torch.equal(vgg.out(model), wanted)


_NUMBERS = st.one_of(st.integers(-2, 40), st.integers(-(2**70), 2**70))
_JUNK = st.recursive(
    st.none() | st.booleans() | _NUMBERS | st.floats(allow_subnormal=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@given(choice=st.data())
@settings(max_examples=600)
def test_a_hostile_manifest_is_refused_or_gives_a_small_network(intact, manifest, scratch, choice):
    """One place of it replaced by anything, its digest made to match."""
    changed = copy.deepcopy(manifest)
    place: object = changed
    owner, key = changed, "model"
    for _ in range(choice.draw(st.integers(0, 2))):
        place = owner[key]
        if isinstance(place, list) and place:
            owner, key = place, choice.draw(st.integers(0, len(place) - 1))
        elif isinstance(place, dict) and place:
            owner, key = place, choice.draw(st.sampled_from(sorted(place)))
    owner[key] = choice.draw(_JUNK | _NUMBERS)
    gives_a_small_network_or_is_refused(scratch, with_manifest(intact, **changed))


@given(
    mutate=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True, allow_subnormal=False), st.binary(max_size=6)),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=300)
def test_hostile_records_are_refused_or_give_a_small_network(intact, scratch, mutate):
    """Bytes of them set to anything, the digest made to match."""
    manifest, data = split(intact)
    _, end = Table.unpack(data)
    for share, values in mutate:
        at = int(share * end)
        data = (data[:at] + values + data[at + len(values) :])[: len(data)]
    gives_a_small_network_or_is_refused(scratch, forged(manifest, data))


def gives_a_small_network_or_is_refused(path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        model = load_artifact(path)
    except ArtifactError:
        return
    # Every number comes from the file: at most 16 codes a byte.
    assert sum(t.numel() for t in model.state_dict().values()) <= 16 * len(content)


@pytest.fixture(scope="module")
def wanted(vgg, intact, tmp_path_factory) -> torch.Tensor:
    path = tmp_path_factory.mktemp("wanted") / "a"
    path.write_bytes(intact)
    return vgg.out(load_artifact(path))


@pytest.fixture(scope="module")
def manifest(intact) -> dict:
    return split(intact)[0]


@given(content=st.binary(max_size=300))
def test_noise_is_refused(scratch, content):
    refuses(scratch, content)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "rlcompress/999"},
        {"format": None},
        {"model": ["nosuch", {}, 10, [1, 32, 32]]},
        {"model": ["vgg19", {"width": 0.0625, "nosuch": 1}, 10, [1, 32, 32]]},
        {"model": ["vgg19", {"width": 0.0625}, -10, [1, 32, 32]]},
        {"model": ["vgg19", {"width": "x"}, 10, [1, 32, 32]]},
        {"model": "vgg19"},
        {"model": None},
        {"model": ["vgg19", {"width": 1e7}, 10, [1, 32, 32]]},
    ],
    ids=repr,
)
def test_a_manifest_that_lies_is_refused(intact, tmp_path, changes):
    refuses(tmp_path / "a", with_manifest(intact, **changes))


FIRST = LayerRecord(module=2, norm=3, out=8, fan=1, bits=4, spacing=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": (FIRST,)},
        {"layers": (FIRST,) * 17},
        *(
            {"first": change}
            for change in (
                {"out": 2**32 - 1},
                {"out": 0},
                {"out": 9},
                {"fan": 2},
                {"fan": 0},
                {"bits": 0},
                {"bits": 1},
                {"bits": 9},
                {"bits": 8},
                {"bits": 32},
                {"module": 999},
                {"module": 0},
                {"norm": 2},
                {"norm": 999},
                {"norm": -1},
                {"spacing": 0},
                {"spacing": 3},
                {"spacing": 255},
                {"top": -(2**15)},
                {"step": -(2**15)},
            )
        ),
        {"norms": (NormRecord(3, 4),)},
        {"norms": (NormRecord(2, 4),)},
        {"norms": (NormRecord(3, 0),)},
        {"norms": (NormRecord(999, 4),)},
        {"unused": (2,)},
        {"unused": (0,)},
        {"unused": (999,)},
    ],
    ids=repr,
)
def test_records_that_lie_are_refused(intact, tmp_path, changes):
    layers = Table.unpack(split(intact)[1])[0].layers
    if "first" in changes:
        assert layers[0].bits == 4
        changes = {"layers": (replace(layers[0], **changes["first"]), *layers[1:])}
    refuses(tmp_path / "a", with_table(intact, **changes))


@pytest.mark.parametrize("counts", [(0, 0, 0), (16, 0, 0), (18, 0, 0), (65535,) * 3])
def test_counts_that_lie_are_refused(intact, tmp_path, counts):
    manifest, data = split(intact)
    refuses(tmp_path / "a", forged(manifest, struct.pack("<3H", *counts) + data[6:]))
    refuses(tmp_path / "a", forged(manifest, b""))


def test_a_file_in_an_older_format_names_both(intact, tmp_path):
    message = refuses(tmp_path / "a", with_manifest(intact, format="rlcompress/2"))
    assert "rlcompress/2" in message
    assert "rlcompress/3" in message
    hostile = refuses(tmp_path / "a", with_manifest(intact, format="\x1b[2J" * 10_000))
    assert len(hostile) < 200
    assert "\x1b" not in hostile


def test_the_unchanged_manifest_and_records_are_taken(vgg, intact, tmp_path):
    (tmp_path / "a").write_bytes(with_table(with_manifest(intact)))
    assert load_artifact(tmp_path / "a")(vgg.images).shape == (8, 10)


def test_other_safetensors_files_are_refused(intact, tmp_path):
    refuses(tmp_path / "a", save({"data": np.zeros(3, np.uint8)}))
    refuses(tmp_path / "a", save({"weight": np.zeros(3, np.float32)}))
    refuses(tmp_path / "a", save({"data": np.zeros((2, 2), np.float32)}, {"rlcompress": "{}"}))
    refuses(tmp_path / "a", save({"data": np.zeros(3, np.uint8)}, {"rlcompress": "[" * 100_000}))
    with pytest.raises(ArtifactError, match="nothere"):
        load_artifact(tmp_path / "nothere")


class Trap:
    """Unpickling one leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("save_it", [pickle.dump, torch.save])
def test_a_pickle_is_refused_unopened(tmp_path, save_it):
    sprung = tmp_path / "sprung"
    with open(tmp_path / "a", "wb") as file:
        save_it(Trap(sprung), file)
    refuses(tmp_path / "a", (tmp_path / "a").read_bytes())
    assert not sprung.exists()


def test_a_file_cannot_name_code_to_run(tmp_path):
    """A crafted manifest with a true checksum: nothing is imported, nothing called."""
    model = ["subprocess:Popen", {"args": ["touch", str(tmp_path / "ran")]}, 10, [1, 32, 32]]
    (tmp_path / "crafted").write_bytes(forged({"format": FORMAT, "model": model}, b""))
    with pytest.raises(ArtifactError, match="if you trust that code"):
        load_artifact(tmp_path / "crafted")
    assert not (tmp_path / "ran").exists()


def test_a_name_to_trust_is_that_name_alone(intact, tmp_path):
    """Given as a text, it is not searched for what the file names."""
    path, asks = tmp_path / "a", ["tests.toy:toy_network", {}, 10, [1, 16, 16]]
    path.write_bytes(with_manifest(intact, model=asks))
    for name in ("tests.toy:toy_network_of_mine", "", ()):
        with pytest.raises(ArtifactError, match="if you trust that code"):
            load_artifact(path, trust=name)
    for name in ("tests.toy:toy_network", ["tests.toy:toy_network"]):
        with pytest.raises(ArtifactError, match="not an intact rlcompress artifact"):
            load_artifact(path, trust=name)
