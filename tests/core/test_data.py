"""Splits that never meet, and how data sets are found."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch

from rlcompress.core.data import (
    FASHION_MNIST_FOLDER,
    Data,
    Split,
    build_data,
    digits,
    fashion_mnist,
)
from rlcompress.core.errors import UserError


def images_of(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.raw_NCHW}


def test_digits_are_997_400_400_and_disjoint(data):
    parts = [images_of(split) for split in (data.train, data.validation, data.test)]
    assert [len(part) for part in parts] == [997, 400, 400]
    assert len(set.union(*parts)) == 1797
    assert data.num_classes == 10
    assert data.example().shape == (1, 1, 32, 32)


def test_every_call_splits_alike(data):
    assert torch.equal(digits(32).test.raw_NCHW, data.test.raw_NCHW)
    assert torch.equal(digits(16).test.labels_N, data.test.labels_N)


def test_images_are_normalised_by_the_train_split(data):
    images = data.train.images()
    assert float(images.mean()) == pytest.approx(0, abs=1e-4)
    assert float(images.std()) == pytest.approx(1, abs=1e-4)
    assert (data.test.mean, data.test.std) == (data.train.mean, data.train.std)


@pytest.mark.parametrize(
    ("score", "final", "given"),
    [(100, 50, (100, 150)), (399, 0, (200, 200)), (200, 999, (200, 300))],
)
def test_validation_parts_share_no_image_but_the_finals_hold_the_score(data, score, final, given):
    first, second, rest = data.validation_parts(score, final, seed=1)
    assert (len(first), len(second)) == given
    assert images_of(first) <= images_of(second)
    assert not images_of(second) & images_of(rest)
    assert images_of(second) | images_of(rest) == images_of(data.validation)


def test_samples_are_seeded_and_without_repetition(data):
    sample = data.validation.sample(50, seed=2)
    assert len(images_of(sample)) == 50
    assert torch.equal(sample.labels_N, data.validation.sample(50, seed=2).labels_N)
    assert not torch.equal(sample.labels_N, data.validation.sample(50, seed=3).labels_N)
    assert len(data.validation.sample(10**6, seed=0)) == 400


@pytest.mark.skipif(not FASHION_MNIST_FOLDER.exists(), reason="dataset-fashion-mnist not installed")
def test_fashion_mnist_is_the_real_one():
    data = fashion_mnist()
    assert [len(s) for s in (data.train, data.validation, data.test)] == [55_000, 5_000, 10_000]
    assert data.train.raw_NCHW.dtype == torch.uint8
    assert data.test.raw_NCHW.shape == (10_000, 1, 32, 32)
    assert torch.bincount(data.test.labels_N).tolist() == [1000] * 10
    assert not data.test.raw_NCHW[..., :2, :].any()
    assert not images_of(data.validation) & images_of(data.train.sample(5000, 0))
    with pytest.raises(UserError, match="28 or more"):
        fashion_mnist(size=20)


def write_idx(path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes()))


def test_a_folder_of_idx_files_is_read_and_a_cut_off_one_refused(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 5010), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", images[:, 0, 0] % 10)
    data = fashion_mnist(root=str(tmp_path), size=28)
    assert torch.equal(data.test.raw_NCHW[:, 0], torch.from_numpy(images))
    assert len(data.train) == 10

    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    with pytest.raises(UserError, match="cut off"):
        fashion_mnist(root=str(tmp_path))
    with pytest.raises(UserError, match="nothere"):
        fashion_mnist(root=str(tmp_path / "nothere"))


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("digit", 'did you mean "digits"'),
        ("nosuchmodule:make", "nosuchmodule"),
        ("rlcompress.core.data:digit", 'did you mean "digits"'),
        ("builtins:dict", "train, validation and test"),
    ],
)
def test_unknown_factories_get_the_nearest_match(factory, says):
    with pytest.raises(UserError, match=says):
        build_data(factory, {})


def test_arguments_a_factory_does_not_take_are_named():
    with pytest.raises(UserError, match="sise"):
        build_data("digits", {"sise": 16})


USERS = """
import torch
def parts(sizes=(6, 3, 3), shape=(3, 8, 8)):
    return [[(torch.full(shape, float(i)), i % 3) for i in range(n)] for n in sizes]
def varying():
    return [[(torch.zeros(1, 8 + i, 8), 0) for i in range(3)]] * 3
def mixed():
    return [[(torch.zeros(1, 8, 8), 0), (torch.zeros(1, 8, 8).byte(), 1)]] * 3
def unlabelled():
    return [torch.utils.data.TensorDataset(torch.ones(n, 1, 8, 8)) for n in (6, 3, 3)]
def half():
    return [[(torch.zeros(1, 8, 8), 0), torch.zeros(1, 8, 8)]] * 3
class Huge:
    def __len__(self):
        return 10**8
    def __getitem__(self, i):
        assert i == 0, "reads on, though there is no room"
        return torch.zeros(3, 224, 224), 0
def huge():
    return [Huge()] * 3
"""


def test_a_users_factory_of_three_data_sets(tmp_path, monkeypatch):
    (tmp_path / "users_own_data.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    data = build_data("users_own_data:parts", {})
    assert isinstance(data, Data)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [6, 3, 3]
    assert (data.num_classes, data.train.raw_NCHW.shape[1]) == (3, 3)
    assert torch.equal(data.train.images()[5], torch.full((3, 8, 8), 5.0))
    alone = build_data("users_own_data:unlabelled", {})
    assert (alone.labelled, len(alone.train), alone.num_classes) == (False, 6, 0)
    with pytest.raises(UserError, match="varying shape"):
        build_data("users_own_data:varying", {})
    with pytest.raises(UserError, match="empty"):
        build_data("users_own_data:parts", {"sizes": [0, 1, 1]})
    with pytest.raises(UserError, match=r"images of torch.float32 and of torch.uint8"):
        build_data("users_own_data:mixed", {})
    with pytest.raises(UserError, match="1 labels for its first 2 images"):
        build_data("users_own_data:half", {})
    with pytest.raises(
        UserError, match=r"takes 56076.0 GiB \(100,000,000 images of \(3, 224, 224\)"
    ):
        build_data("users_own_data:huge", {})
