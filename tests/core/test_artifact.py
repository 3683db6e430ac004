"""The file is the network: same answers read back, and nothing but an error from a broken one."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save
from safetensors.torch import save_file

from rlcompress.core.artifact import (
    ArtifactError,
    ModelRef,
    load_artifact,
    pack,
)
from rlcompress.core.codec import pack_codes, unpack_codes
from rlcompress.core.cost import CostModel
from rlcompress.core.errors import UserError
from rlcompress.core.files import save_bytes
from rlcompress.core.fold import snap
from rlcompress.core.prune import attach_masks, cut
from rlcompress.core.quant import attach_fake_quant, max_code, scale_of
from rlcompress.core.schedule import Schedule


def write(net, path, schedule, seed=0):
    """Cuts, snaps and writes; returns the network that computes what the file should."""
    small = cut(net.model, net.network, net.kept(schedule, seed))
    bits, scales = net.quantized(small, schedule)
    scales = snap(small, net.network, bits, scales)
    save_bytes(path, pack(small, net.network, net.ref, bits, scales))
    return net.fake_quantized(small, bits, scales)


@given(bits=st.integers(2, 8), count=st.integers(0, 100), seed=st.integers(0, 2**16))
def test_codes_survive_packing_in_no_more_bytes_than_they_need(bits, count, seed):
    top, step = max_code(bits), 2 if bits <= 3 else 1
    codes = np.random.default_rng(seed).choice(np.arange(-top, top + 1, step), count)
    packed = pack_codes(codes, bits)
    assert len(packed) == -(-count * bits // 8)
    assert np.array_equal(unpack_codes(packed, count, bits), codes)


@given(choice=st.data(), seed=st.integers(0, 2**16))
@settings(max_examples=8)
def test_masked_is_cut_is_written_is_read_back(net, close, scratch, choice, seed):
    """The whole chain, quantized, and the file as large as the cost model says."""
    schedule = choice.draw(net.schedules())
    kept = net.kept(schedule, seed)
    bits = {name: schedule.width(name) for name in net.network.layers}
    modules = dict(net.model.named_modules())
    scales = {n: scale_of(modules[n].weight, 0.8, b) for n, b in bits.items() if b != 32}

    masked = copy.deepcopy(net.model)
    attach_fake_quant(masked, net.network, bits, scales)
    attach_masks(masked, net.network, kept)
    small = cut(net.model, net.network, kept)
    for name in scales:
        layer = net.network.layers[name]
        if layer.group:
            scales[name] = scales[name][torch.from_numpy(kept[layer.group])]
    close(net.out(masked), net.out(net.fake_quantized(small, bits, scales)))

    scales = snap(small, net.network, bits, scales)
    snapped = net.out(net.fake_quantized(small, bits, scales))
    save_bytes(scratch, pack(small, net.network, net.ref, bits, scales))
    close(snapped, net.out(load_artifact(scratch)))
    assert scratch.stat().st_size == CostModel(net.network).cost(schedule).bytes


@pytest.mark.parametrize("net", ["mobilenetv2"], indirect=True)
def test_another_process_reads_the_same_network(net, close, tmp_path):
    names = [*net.network.layers]
    schedule = Schedule(
        dict.fromkeys(net.network.groups, 0.6), {n: 2 + i % 7 for i, n in enumerate(names[:-5])}
    )
    wanted = net.out(write(net, tmp_path / "a", schedule))
    save_file({"images": net.images}, tmp_path / "images")
    program = (
        "import sys; from safetensors.torch import load_file, save_file\n"
        "from rlcompress.core.artifact import load_artifact\n"
        "folder = sys.argv[1]; images = load_file(folder + '/images')['images']\n"
        "logits = load_artifact(folder + '/a')(images).detach()\n"
        "save_file({'logits': logits}, folder + '/logits')\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    close(wanted, torch.from_numpy(load_file(tmp_path / "logits")["logits"]))


def test_learned_steps_are_written(vgg, close, tmp_path):
    schedule = Schedule(bits=dict.fromkeys(vgg.network.layers, 4))
    small = copy.deepcopy(vgg.model)
    bits, scales = vgg.quantized(small, schedule)
    trained = vgg.fake_quantized(small, bits, {n: 1.5 * s for n, s in scales.items()})
    packed = pack(trained, vgg.network, vgg.ref, bits, scales)
    save_bytes(tmp_path / "a", packed)
    close(vgg.out(trained), vgg.out(load_artifact(tmp_path / "a")), relative=2e-2)


def test_snapping_changes_answers_little(trained, close):
    """Half floats under one exponent: 11 bits a scale and a bias."""
    schedule = Schedule(bits=dict.fromkeys(trained.network.layers, 8))
    small = copy.deepcopy(trained.model)
    bits, scales = trained.quantized(small, schedule)
    before = trained.out(trained.fake_quantized(small, bits, scales))
    scales = snap(small, trained.network, bits, scales)
    close(before, trained.out(trained.fake_quantized(small, bits, scales)), relative=1e-2)


def test_snapping_twice_is_snapping_once(vgg):
    schedule = Schedule(bits=dict.fromkeys(vgg.network.layers, 3))
    model = copy.deepcopy(vgg.model)
    bits, scales = vgg.quantized(model, schedule)
    scales = snap(model, vgg.network, bits, scales)
    first = pack(model, vgg.network, vgg.ref, bits, scales)
    scales = snap(model, vgg.network, bits, scales)
    assert pack(model, vgg.network, vgg.ref, bits, scales) == first


def test_files_are_read_where_gradients_are_off(vgg, tmp_path):
    write(vgg, tmp_path / "a", Schedule())
    wanted = vgg.out(load_artifact(tmp_path / "a"))
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert torch.equal(load_artifact(tmp_path / "a")(vgg.images), wanted)


def test_writing_leaves_no_other_file(vgg, tmp_path):
    write(vgg, tmp_path / "a", Schedule())
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_arguments_that_do_not_fit_the_header_are_refused(vgg):
    ref = ModelRef("vgg19", {"width": 0.0625, "note": "x" * 4000}, 10, (1, 32, 32))
    with pytest.raises(UserError, match="do not fit"):
        pack(vgg.model, vgg.network, ref, {}, {})


# --- broken files ---------------------------------------------------------------------------


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


def with_manifest(intact: bytes, **changes) -> bytes:
    """The same data behind another manifest, its digest made to match."""
    from rlcompress.core.artifact import _digest

    size = int.from_bytes(intact[:8], "little")
    manifest = json.loads(json.loads(intact[8 : 8 + size])["__metadata__"]["rlcompress"]) | changes
    data = intact[8 + size :]
    manifest["sha256"] = _digest(manifest, data)
    tensors = {"data": np.frombuffer(data, np.uint8)}
    return save(tensors, metadata={"rlcompress": json.dumps(manifest)})


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
    path = choice.draw(st.sampled_from(["model", "layers", "norms", "unused"]))
    owner, key = changed, path
    for _ in range(choice.draw(st.integers(0, 2))):
        place = owner[key]
        if isinstance(place, list) and place:
            owner, key = place, choice.draw(st.integers(0, len(place) - 1))
        elif isinstance(place, dict) and place:
            owner, key = place, choice.draw(st.sampled_from(sorted(place)))
    owner[key] = choice.draw(_JUNK | _NUMBERS)
    scratch.write_bytes(with_manifest(intact, **changed))
    try:
        model = load_artifact(scratch)
    except ArtifactError:
        return
    # Every number comes from the file: at most 16 codes a byte.
    assert sum(t.numel() for t in model.state_dict().values()) <= 16 * len(intact)


@pytest.fixture(scope="module")
def wanted(vgg, intact, tmp_path_factory) -> torch.Tensor:
    path = tmp_path_factory.mktemp("wanted") / "a"
    path.write_bytes(intact)
    return vgg.out(load_artifact(path))


@pytest.fixture(scope="module")
def manifest(intact) -> dict:
    size = int.from_bytes(intact[:8], "little")
    return json.loads(json.loads(intact[8 : 8 + size])["__metadata__"]["rlcompress"])


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
        {"layers": [[2, 4, 1, 4, 0, 0, 3]]},
        {"layers": [[2, 4, 1, 4, 0, 0, 3]] * 17},
        {"layers": [[2, 10**9, 1, 4, 0, 0, 3]] * 17},
        {"layers": [[2, 0, 1, 4, 0, 0, 3]] * 17},
        {"layers": [[2, 4, 1, 1, 0, 0, 3]] * 17},
        {"layers": [[2, 4, 1, 4, "a", 0, 3]] * 17},
        {"layers": [[999, 4, 1, 4, 0, 0, 3]] * 17},
        {"layers": [[2, 4, 1, 4, 0, 0, 2]] * 17},
        {"layers": [[]] * 17},
        {"layers": None},
        {"norms": [[3, 4]]},
        {"norms": [[2, 4]]},
        {"unused": [2]},
        {"unused": [0]},
        {"unused": ["a"]},
    ],
    ids=repr,
)
def test_a_manifest_that_lies_is_refused(intact, tmp_path, changes):
    refuses(tmp_path / "a", with_manifest(intact, **changes))


def test_the_unchanged_manifest_is_taken(vgg, intact, tmp_path):
    (tmp_path / "a").write_bytes(with_manifest(intact))
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
    from rlcompress.core import artifact

    ref = artifact.ModelRef(
        "subprocess:Popen", {"args": ["touch", str(tmp_path / "ran")]}, 10, (1, 32, 32)
    )
    manifest = {"format": artifact.FORMAT, "model": [ref.factory, dict(ref.args), 10, [1, 32, 32]]}
    manifest["sha256"] = artifact._digest(manifest, b"")
    packed = artifact.save_safetensors(
        {"data": np.zeros(0, np.uint8)}, metadata={"rlcompress": json.dumps(manifest)}
    )
    (tmp_path / "crafted").write_bytes(packed)
    with pytest.raises(artifact.ArtifactError, match="if you trust that code"):
        load_artifact(tmp_path / "crafted")
    assert not (tmp_path / "ran").exists()
