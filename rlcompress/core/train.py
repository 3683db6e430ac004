"""One training loop for everything that is trained: dense networks, tickets, controls.

Resumable and reproducible: order and augmentation follow from (seed, epoch) alone and the
optimizer's state is saved with the weights, so a run that was cut off ends bit for bit where
an undisturbed one does (on one device and thread count). Checkpoints are safetensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from rlcompress.core.cost import Cost
from rlcompress.core.data import Split
from rlcompress.core.errors import UserError, blame
from rlcompress.core.fisher import sound_logits
from rlcompress.core.measure import compare, divergence
from rlcompress.core.process import seeded
from rlcompress.core.schedule import Measurement
from rlcompress.core.tensors import load_tensors, save_tensors


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD with Nesterov momentum 0.9, one-cycle learning rate (10 % warm-up).

    lr is the peak;  distill  share of the loss (0-1) that is the KL to the teacher's predictions
    """

    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    augment: bool = False
    distill: float = 0.0


def _batches(split: Split, recipe: Recipe, seed: int, epoch: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(split), generator=generator)
    # The last, partial batch would give its batch norms noise: it is dropped, others take turns.
    count = max(1, len(order) // recipe.batch_size)
    yield from order[: count * recipe.batch_size].split(recipe.batch_size)


def _augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random crop after padding by an eighth, and a random mirror, the same for a batch half."""
    down, right = images.shape[-2] // 8, images.shape[-1] // 8
    padded = F.pad(images, (right, right, down, down))
    top, left = (
        int(torch.randint(0, 2 * pad + 1, (1,), generator=generator)) for pad in (down, right)
    )
    cropped = padded[..., top : top + images.shape[-2], left : left + images.shape[-1]]
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1).to(images.device), cropped.flip(-1), cropped)


def one_cycle(step: int, total: int) -> float:
    """Share of the peak learning rate (Smith & Topin, 2019): linear up over the first tenth, then
    linear to zero."""
    warm = max(1, total // 10)
    return min((step + 1) / warm, max(0.0, (total - step) / max(1, total - warm)))


def sgd(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.SGD:
    """Nesterov momentum 0.9. Biases, batch norms and quantizer steps have no reason to be small:
    they do not decay."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.SGD(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=lr,
        momentum=0.9,
        nesterov=True,
        weight_decay=weight_decay,
    )


def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor, lr: float) -> None:
    """One step at learning rate `lr`, the gradient's norm held to 5."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(_parameters(optimizer), 5.0)
    optimizer.step()


def first_output(outputs: Any) -> Any:
    """The logits of a network that in training returns more: auxiliary heads behind them
    (GoogLeNet), or a mapping that has them under "out" (torchvision's segmenters) or "logits", else
    as its first tensor."""
    if isinstance(outputs, Mapping):
        named = [outputs.get(key) for key in ("out", "logits")]
        tensors = [t for t in (*named, *outputs.values()) if isinstance(t, torch.Tensor)]
        return tensors[0] if tensors else outputs
    return outputs[0] if isinstance(outputs, tuple | list) and outputs else outputs


def require_trains(model: nn.Module, images: torch.Tensor) -> None:
    """Raises UserError unless a copy of the network, in training mode, answers `images`
    (N, C, H, W) with logits (N, classes), and gradients come back from them."""
    name, probe, count = type(model).__name__, copy.deepcopy(model).train(), len(images)
    try:
        with seeded(0):
            logits = first_output(probe(images))
            shape = tuple(getattr(logits, "shape", ()))
            rows = len(shape) == 2 and shape[0] == count
            if rows:
                sound_logits(model, logits.detach())
                F.cross_entropy(logits, torch.zeros(count, dtype=torch.long)).backward()
    except UserError:
        raise
    except Exception as error:  # the user's own code raises what it likes
        raise UserError(f"{name} cannot be trained on {count} images: {blame(error)}") from error
    if not rows:
        raise UserError(
            f"{name} in training returns {shape or type(logits).__name__} for {count} images; "
            f"allowed: logits ({count}, classes), alone or first in a tuple, list or mapping"
        )


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@dataclass(frozen=True)
class Checkpoint:
    """Training after `epoch` epochs. The tensors (`model.*`, `momentum.*`) are on the CPU and may
    be the live ones: they change with the next epoch."""

    epoch: int
    curve: list[dict[str, Any]]
    tensors: dict[str, torch.Tensor]

    def save(self, path: Path, key: str) -> None:
        save_tensors(path, self.tensors, key=key, epoch=self.epoch, curve=self.curve)

    @staticmethod
    def load(path: Path, key: str) -> Checkpoint | None:
        """None without a file, or if it was saved under another key."""
        if not path.exists():
            return None
        tensors, metadata = load_tensors(path)
        if metadata.get("key") != key:
            return None
        return Checkpoint(int(metadata["epoch"]), list(metadata["curve"]), tensors)

    def weights(self) -> dict[str, torch.Tensor]:
        return {
            n.removeprefix("model."): t for n, t in self.tensors.items() if n.startswith("model.")
        }

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model.load_state_dict(self.weights())
        for i, parameter in enumerate(_parameters(optimizer)):
            if f"momentum.{i}" in self.tensors:
                buffer = self.tensors[f"momentum.{i}"].to(parameter)
                optimizer.state[parameter]["momentum_buffer"] = buffer

    @staticmethod
    def of(
        epoch: int,
        curve: list[dict[str, Any]],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> Checkpoint:
        tensors = {f"model.{n}": t.cpu() for n, t in model.state_dict().items()}
        for i, parameter in enumerate(_parameters(optimizer)):
            buffer = optimizer.state[parameter].get("momentum_buffer")
            if buffer is not None:
                tensors[f"momentum.{i}"] = buffer.cpu()
        return Checkpoint(epoch, list(curve), tensors)


def teach(teacher: nn.Module, data: Split) -> torch.Tensor:
    """The teacher's log-probabilities (N, classes) on the CPU."""
    return logits_of(teacher, data).log_softmax(1)


def epochs(
    model: nn.Module,
    data: Split,
    recipe: Recipe,
    *,
    seed: int,
    validation: Split | None = None,
    teacher: nn.Module | None = None,
    taught: torch.Tensor | None = None,
    resume: Checkpoint | None = None,
) -> Iterator[Checkpoint]:
    """Trains `model` in place, from `resume` on; a checkpoint an epoch, with the model in eval
    mode. Its curve has a row an epoch: `epoch`, `step`, `loss` (mean over the epoch),
    `validation_accuracy` (0-1, or None).

    Of a network that returns several outputs in training, the first is trained.

    With `recipe.distill`: `teacher` sees every augmented batch; without augmentation `taught`
    (see `teach`) says the same for less. A teacher stays as it is. Raises UserError where there is
    none, and if the loss stops being finite.
    """
    device = next(model.parameters()).device
    model.to(memory_format=torch.channels_last)
    optimizer = sgd(model, recipe.lr, recipe.weight_decay)
    start, curve = 0, []
    if resume is not None:
        resume.restore(model, optimizer)
        start, curve = resume.epoch, list(resume.curve)
    if not recipe.distill:
        teacher = taught = None
    elif recipe.augment:
        taught = None
    elif taught is not None:
        teacher = None
    if recipe.distill and teacher is None and taught is None:
        raise UserError(f"distill = {recipe.distill}: there is no teacher to learn from")
    if teacher is not None:
        teacher = copy.deepcopy(teacher).eval()
        if not recipe.augment:
            taught, teacher = teach(teacher, data), None
    taught = None if taught is None else taught.to(device)
    steps = max(1, len(data) // recipe.batch_size)
    total = steps * recipe.epochs
    for epoch in range(start, recipe.epochs):
        model.train()
        noise = torch.Generator().manual_seed(seed * 1_000_003 + epoch + 500_000)
        losses = []
        with seeded(seed * 1_000_003 + epoch):
            for i, index in enumerate(_batches(data, recipe, seed, epoch)):
                images = data.images(index).to(device, memory_format=torch.channels_last)
                labels = data.labels_N[index].to(device)
                if recipe.augment:
                    images = _augment(images, noise)
                # Its code may change what it is given, which the teacher reads too.
                logits = first_output(model(images if teacher is None else images.clone()))
                loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
                wanted = None
                if taught is not None:
                    wanted = taught[index]
                elif teacher is not None:
                    with torch.no_grad():
                        wanted = teacher(images).log_softmax(1)
                if wanted is not None:
                    loss = (1 - recipe.distill) * loss + recipe.distill * divergence(logits, wanted)
                descend(optimizer, loss, recipe.lr * one_cycle(epoch * steps + i, total))
                losses.append(loss.detach())
        mean = float(torch.stack(losses).mean())
        if not mean == mean or mean == float("inf"):
            raise UserError(
                f"training loss is {mean} in epoch {epoch + 1}; try a lower lr (now {recipe.lr})"
            )
        model.eval()
        row = {
            "epoch": epoch + 1,
            "step": (epoch + 1) * steps,
            "loss": mean,
            "validation_accuracy": None if validation is None else top1(model, validation),
        }
        curve.append(row)
        yield Checkpoint.of(epoch + 1, curve, model, optimizer)
    model.eval()


def train(
    model: nn.Module,
    data: Split,
    recipe: Recipe,
    *,
    seed: int,
    validation: Split | None = None,
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    key: str = "",
    on_epoch: Callable[[int, dict[str, Any]], None] = lambda epoch, row: None,
) -> list[dict[str, Any]]:
    """All `epochs` of a training; the curve. `checkpoint` is written after every epoch, behind
    `on_epoch`, and left for the caller to remove; one with another `key` is ignored."""
    resume = None if checkpoint is None else Checkpoint.load(checkpoint, key)
    curve = [] if resume is None else resume.curve
    for state in epochs(
        model,
        data,
        recipe,
        seed=seed,
        validation=validation,
        teacher=teacher,
        resume=resume,
    ):
        curve = state.curve
        on_epoch(state.epoch, curve[-1])
        if checkpoint is not None:
            state.save(checkpoint, key)
    return curve


def distill(
    model: nn.Module,
    images: torch.Tensor,
    taught: torch.Tensor,
    steps: int,
    *,
    seed: int,
    lr: float = 0.02,
    batch: int = 64,
) -> None:
    """Trains `model` in place for some steps towards `taught`, log-probabilities (N, classes) of
    `images` (N, C, H, W); no labels. It is left in eval mode."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True)
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed):
        for step in range(steps):
            index = torch.randperm(len(images), generator=generator)[:batch].to(images.device)
            loss = divergence(first_output(model(images[index])), taught[index])
            descend(optimizer, loss, lr * one_cycle(step, steps))
    model.eval()


@torch.inference_mode()
def logits_of(model: nn.Module, split: Split, batch: int = 512) -> torch.Tensor:
    """(N, classes) on the CPU, the model in eval mode on its own device."""
    device = next(model.parameters()).device
    model.eval()
    return torch.cat(
        [
            model(
                split.images(slice(at, at + batch)).to(device, memory_format=torch.channels_last)
            ).cpu()
            for at in range(0, len(split), batch)
        ]
    )


def top1(model: nn.Module, split: Split) -> float:
    """Accuracy, 0-1."""
    return float((logits_of(model, split).argmax(1) == split.labels_N).float().mean())


def measure(model: nn.Module, split: Split, dense_logits: torch.Tensor, cost: Cost) -> Measurement:
    """A network's measurement on a split; `dense_logits` are the dense network's on it."""
    return cost.measurement(*compare(logits_of(model, split), dense_logits, split.labels_N))
