"""Images: three splits of a data set as tensors, and how they are found.

Roles. `train` fits weights and (unlabelled) the reconstruction. A seeded part of `validation`
scores schedules during search; the rest of it chooses between tickets. `test` is touched once.

N images, C channels, H x W pixels: images_NCHW.
"""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.nn import functional as F

from rlcompress.core.errors import OutsideError, UserError, blame
from rlcompress.core.inputs import LARGEST
from rlcompress.core.models import find_factory
from rlcompress.core.process import seeded

#: Of a split, that are looked at to tell it from another.
SUMMARY_IMAGES = 16
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Split:
    """images_NCHW as uint8 or float32, labels_N as int64; `images()` gives them normalised."""

    raw_NCHW: torch.Tensor
    labels_N: torch.Tensor
    mean: float = 0.0
    std: float = 1.0

    def __len__(self) -> int:
        return len(self.labels_N)

    def images(self, index: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """float32 (N, C, H, W), mean 0 and standard deviation 1 over the train split."""
        return (self.raw_NCHW[index].float() - self.mean) / self.std

    def take(self, index: torch.Tensor) -> Split:
        return Split(self.raw_NCHW[index], self.labels_N[index], self.mean, self.std)

    def summary(self) -> dict[str, Any]:
        """What tells it from another one, as JSON takes it: a digest of the labels in twelve hex
        digits, and the means of a few images, which other machines round otherwise."""
        few = self.raw_NCHW[:: max(1, len(self) // SUMMARY_IMAGES)].flatten(1).double()
        return {
            "images": len(self),
            "labels": hashlib.sha256(self.labels_N.numpy().tobytes()).hexdigest()[:12],
            "means": [float(f"{mean:.6g}") for mean in few.mean(1)],
        }

    def sample(self, count: int, seed: int) -> Split:
        """`count` images (all, if there are fewer) without repetition."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.take(order[:count])


@dataclass(frozen=True)
class Data:
    """Without labels (`labelled` false) `num_classes` is 0 and all labels are 0, until `answered`
    names what a network answers."""

    train: Split
    validation: Split
    test: Split
    num_classes: int
    labelled: bool = True

    def answered(self, answer: Callable[[Split], torch.Tensor]) -> Data:
        """With what the dense network answers as the labels of validation and test: accuracy is
        agreement with it then. `answer`: a split -> logits (N, classes)."""
        logits = {name: answer(getattr(self, name)).cpu() for name in ("validation", "test")}
        parts = {
            name: replace(getattr(self, name), labels_N=logits_NK.argmax(1))
            for name, logits_NK in logits.items()
        }
        return replace(self, num_classes=logits["test"].shape[1], **parts)

    def summary(self) -> dict[str, dict[str, Any]]:
        """Split -> its summary, before any network answered."""
        return {name: getattr(self, name).summary() for name in _FEWEST}

    def changed(self, known: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """The splits that are others than those that gave the summary `known`."""
        found = []
        for name, now in self.summary().items():
            then = known[name]
            counted = all(now[what] == then[what] for what in ("images", "labels"))
            if not counted or not np.allclose(now["means"], then["means"], 1e-3, 1e-4):
                found.append(name)
        return found

    def example(self) -> torch.Tensor:
        """One normalised image (1, C, H, W)."""
        return self.train.images(slice(0, 1))

    def validation_parts(self, score: int, final: int, seed: int) -> tuple[Split, Split, Split]:
        """Of the validation split: `score` images to score schedules with, those and `final` more
        to choose among the best, and the rest, which neither saw. Each of the first two takes at
        most half of what is left."""
        order = torch.randperm(len(self.validation), generator=torch.Generator().manual_seed(seed))
        score = min(score, len(order) // 2)
        final = score + min(final, (len(order) - score) // 2)
        parts = (order[:score], order[:final], order[final:])
        return tuple(self.validation.take(part) for part in parts)  # type: ignore[return-value]


def _splits(
    images_NCHW: torch.Tensor, labels_N: torch.Tensor, sizes: tuple[int, ...]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A fixed shuffle, cut into pieces; the last piece is what remains."""
    order = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(0))
    pieces = torch.split(order, [*sizes, len(order) - sum(sizes)])
    return [(images_NCHW[i].contiguous(), labels_N[i].contiguous()) for i in pieces]


def _data(
    train: tuple[torch.Tensor, torch.Tensor],
    validation: tuple[torch.Tensor, torch.Tensor],
    test: tuple[torch.Tensor, torch.Tensor],
    num_classes: int,
) -> Data:
    mean = float(train[0].float().mean())
    std = float(train[0].float().std())
    first, second, third = (Split(*part, mean, std) for part in (train, validation, test))
    return Data(first, second, third, num_classes)


def digits(size: int = 32) -> Data:
    """scikit-learn's 1,797 real handwritten digits, enlarged bilinearly to `size` pixels.

    997 train, 400 validation, 400 test.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images_NCHW = torch.from_numpy(bunch.images).float().unsqueeze(1)
    images_NCHW = F.interpolate(images_NCHW, size=(size, size), mode="bilinear")
    test, validation, train = _splits(images_NCHW, torch.from_numpy(bunch.target), (400, 400))
    return _data(train, validation, test, 10)


def _read_idx(path: Path) -> np.ndarray:
    """A gzipped idx file of unsigned bytes (LeCun's MNIST format)."""
    try:
        with gzip.open(path, "rb") as file:
            content = file.read()
        kind, dims = content[2], content[3]
        shape = struct.unpack(f">{dims}I", content[4 : 4 + 4 * dims])
    except (OSError, EOFError, zlib.error, IndexError, struct.error) as error:
        raise UserError(f"{path}: not a gzipped idx file: {error}") from error
    if kind != 8 or len(content) != 4 + 4 * dims + int(np.prod(shape)):
        raise UserError(f"{path}: not an idx file of unsigned bytes, or cut off")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape).copy()


def fashion_mnist(root: str | None = None, size: int = 32, train_images: int | None = None) -> Data:
    """Fashion-MNIST (Xiao et al., 2017), zero-padded to `size`: 55,000 (or the first
    `train_images` of them) / 5,000 / 10,000.

    `root` is a folder with the four gzipped idx files; by default Debian's
    `dataset-fashion-mnist`, else torchvision's download into `data/`.
    """
    folder = Path(root) if root else FASHION_MNIST_FOLDER
    if (folder / "train-images-idx3-ubyte.gz").exists():
        parts = []
        for part in ("train", "t10k"):
            images = _read_idx(folder / f"{part}-images-idx3-ubyte.gz")
            labels = _read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
            parts.append((torch.from_numpy(images), torch.from_numpy(labels).long()))
    elif root:
        raise UserError(f'data root "{root}": no train-images-idx3-ubyte.gz in it')
    else:
        parts = _torchvision("FashionMNIST")
    pad = size - parts[0][0].shape[-1]
    if pad < 0:
        raise UserError(f"data size = {size}: Fashion-MNIST has 28 pixels; allowed: 28 or more")
    around = (pad // 2, pad - pad // 2, pad // 2, pad - pad // 2)
    both = [(F.pad(images, around).unsqueeze(1), labels) for images, labels in parts]
    validation, (images_NCHW, labels_N) = _splits(*both[0], (5000,))
    train = images_NCHW[:train_images].clone(), labels_N[:train_images].clone()
    return _data(train, validation, both[1], 10)


def cifar10() -> Data:
    """CIFAR-10 (Krizhevsky, 2009) by torchvision's download into `data/`: 45,000/5,000/10,000."""
    parts = [(i.permute(0, 3, 1, 2).contiguous(), y) for i, y in _torchvision("CIFAR10")]
    validation, train = _splits(*parts[0], (5000,))
    return _data(train, validation, parts[1], 10)


def _torchvision(name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    import torchvision.datasets

    parts = []
    for train in (True, False):
        try:
            dataset = getattr(torchvision.datasets, name)("data", train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise OutsideError(
                f"data {name}: not in data/ and the download failed ({error}); "
                "put the files there or go online once"
            ) from error
        parts.append((torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets).long()))
    return parts


BUILT_IN: Mapping[str, Callable[..., Data]] = {
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
}


def _tensors(dataset: Any, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images and labels of a split; no labels where the items are images alone. One item at a time:
    a list of them all would take the memory twice."""
    count = _of(name, partial(len, dataset))
    if not count:
        raise UserError(f"data: the {name} split is empty")
    images, labels = torch.empty(0), list[int]()
    for number in range(count):
        image, label = _pair(_of(name, partial(getitem, dataset, number)), name)
        if number == 0:
            images = _room(count, image, name)
        if image.shape != images.shape[1:]:
            shapes = sorted({tuple(images.shape[1:]), tuple(image.shape)})
            raise UserError(f"data: the {name} split has images of varying shape: {shapes}")
        if image.dtype != images.dtype:
            raise UserError(
                f"data: the {name} split has images of {images.dtype} and of {image.dtype}; "
                "allowed: one of them"
            )
        images[number] = image
        if label is not None:
            labels.append(_label(label, name))
        if len(labels) not in (0, number + 1):
            raise UserError(
                f"data: the {name} split has {len(labels)} labels for its first {number + 1} "
                "images; allowed: labels for all or for none"
            )
    return images, torch.tensor(labels) if labels else None


def _of(name: str, read: Callable[[], Any]) -> Any:
    """What the user's own code says of a split; it raises what it likes."""
    try:
        return read()
    except Exception as error:
        raise UserError(f"data: the {name} split cannot be read: {blame(error)}") from error


def _pair(item: Any, name: str) -> tuple[torch.Tensor, Any]:
    """Image and label of an item; None for the label of an image alone, in a tuple or not."""
    if isinstance(item, tuple | list) and len(item) == 1:
        (item,) = item
    if isinstance(item, torch.Tensor):
        return _image(item, name), None
    if isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], torch.Tensor):
        return _image(item[0], name), item[1]
    what = type(item).__name__
    if isinstance(item, tuple | list):
        what += f" of {', '.join(type(part).__name__ for part in item) or 'nothing'}"
    elif isinstance(item, Mapping):
        what += f" of {', '.join(map(repr, item)) or 'nothing'}"
    raise UserError(
        f"data: the {name} split has as an item a {what}; allowed: pairs of an image "
        "tensor (C, H, W) and a label, or image tensors alone"
    )


def _image(image: torch.Tensor, name: str) -> torch.Tensor:
    """Without the graph that it may come from."""
    plain = image.layout == torch.strided and not image.is_meta and not image.is_quantized
    if not plain or image.is_complex():
        what = "on meta" if image.is_meta else f"of {image.dtype}, {image.layout}"
        raise UserError(f"data: the {name} split has images {what}; allowed: real, dense numbers")
    return image.detach()


def _room(count: int, image: torch.Tensor, name: str) -> torch.Tensor:
    """Memory for `count` images like this one. Raises UserError where the machine has not as much:
    the system kills what takes it all the same."""
    needed, free = count * image.nbytes, psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"data: the {name} split takes {needed / 2**30:.1f} GiB ({count:,} images of "
            f"{tuple(image.shape)}, {image.dtype}), this machine has {free / 2**30:.1f} GiB free; "
            "give a part of it, or uint8 images"
        )
    return torch.empty(count, *image.shape, dtype=image.dtype)


def _label(label: Any, name: str) -> int:
    try:
        if int(label) == label and label >= 0:
            return int(label)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise UserError(
        f"data: the {name} split has the label {label!r}; allowed: whole numbers from 0 on"
    )


#: Images that each split needs: batch norms take two, validation is cut into two parts.
_FEWEST = {"train": 2, "validation": 2, "test": 1}


def _sound(data: Data) -> Data:
    """The data, if a network can be trained and judged on it. Raises UserError with every problem
    at once."""
    found = []
    shape = tuple(data.train.raw_NCHW.shape[1:])
    for name, fewest in _FEWEST.items():
        split: Split = getattr(data, name)
        raw = split.raw_NCHW
        if raw.dim() != 4 or tuple(raw.shape[1:]) != shape:
            found.append(
                f"data: the {name} split has images of shape {tuple(raw.shape[1:])}; allowed: "
                f"(C, H, W), the same in all splits (train: {shape})"
            )
        if len(raw) != len(split) or len(split) < fewest:
            found.append(
                f"data: the {name} split has {len(raw)} images and {len(split)} labels; allowed: "
                f"as many of both, {fewest} or more"
            )
        elif raw.is_complex():
            found.append(f"data: the {name} split has images of {raw.dtype}; allowed: real numbers")
        elif raw.is_floating_point() and not bool(raw.isfinite().all()):
            number = int((~raw.isfinite().flatten(1).all(1)).nonzero()[0])
            found.append(f"data: image {number} of the {name} split has values that are not finite")
        elif max(map(abs, map(float, raw.aminmax()))) > LARGEST:
            most = max(map(abs, map(float, raw.aminmax())))
            found.append(
                f"data: the {name} split has values of up to {most:.2g}; allowed: up to "
                f"{LARGEST:.0g}, normalised"
            )
        elif data.labelled and not 0 <= split.labels_N.min() <= split.labels_N.max() < (
            data.num_classes
        ):
            low, high = int(split.labels_N.min()), int(split.labels_N.max())
            found.append(
                f"data: the {name} split has labels from {low} to {high}; allowed: 0 to "
                f"{data.num_classes - 1}, as its num_classes = {data.num_classes} says"
            )
    if data.labelled and len(data.train) and len(data.train.labels_N.unique()) < 2:
        only = int(data.train.labels_N[0])
        found.append(
            f"data: the train split has only one class ({only}); there is nothing to tell apart"
        )
    if found:
        raise UserError(*found)
    return data


def build_data(factory: str, args: Mapping[str, Any]) -> Data:
    """The data set that a built-in name or `"pkg.mod:factory"` names.

    A user's factory returns `Data`, or three map-style data sets (train, validation, test) of
    (image tensor (C, H, W), label), or of such images alone. Raises UserError on anything else.

    What it draws from the global generators of torch, NumPy and Python it draws alike each time.
    """
    function = find_factory(factory, BUILT_IN)
    with seeded(0):
        return _built(function, factory, args)


def _built(function: Callable[..., Any], factory: str, args: Mapping[str, Any]) -> Data:
    try:
        made = function(**args)
    except UserError:
        raise
    except Exception as error:  # the user's own code raises what it likes
        raise UserError(f'data "{factory}" with {dict(args)}: {blame(error)}') from error
    if isinstance(made, Data):
        splits = {name: getattr(made, name) for name in _FEWEST}
        plain = {n: replace(s, raw_NCHW=s.raw_NCHW.detach()) for n, s in splits.items()}
        return _sound(replace(made, **plain))
    if not (isinstance(made, tuple | list) and len(made) == 3):
        raise UserError(f'data "{factory}": a factory returns train, validation and test data sets')
    names = ("train", "validation", "test")
    parts = [_tensors(dataset, name) for dataset, name in zip(made, names, strict=True)]
    with_labels = [
        name for name, (_, labels) in zip(names, parts, strict=True) if labels is not None
    ]
    if len(with_labels) not in (0, 3):
        raise UserError(
            f"data: labels in {', '.join(with_labels)} only; allowed: in all or in none"
        )
    # The user's own transform has normalised these images already.
    train, validation, test = (
        Split(x, torch.zeros(len(x), dtype=torch.long) if y is None else y) for x, y in parts
    )
    most = max(int(split.labels_N.max()) for split in (train, validation, test))
    classes = most + 1 if with_labels else 0
    return _sound(Data(train, validation, test, classes, labelled=bool(with_labels)))
