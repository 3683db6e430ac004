"""Compression as a callback of a training framework: the hooks are those of PyTorch Lightning's
`Callback`, and nothing of Lightning is imported. With it installed, derive from its class:

    class Compression(lightning.Callback): ...
    lightning.Trainer(max_epochs=20, callbacks=[Compression(example_input, target=20.0)])

    uv run python -m examples.callback      # the same hooks, called by a loop of 20 lines
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import rlcompress


class Compression:
    """Compresses the module that is trained. `small` is the network at the end.

    Arguments: those of `rlcompress.DynamicCompressor` but the model.
    """

    def __init__(self, example_input: torch.Tensor, **options: Any) -> None:
        self.example_input, self.options = example_input, options
        self.compressor: rlcompress.DynamicCompressor | None = None
        self.small: nn.Module | None = None
        self._saved: Mapping[str, Any] | None = None

    def setup(self, trainer: Any, module: nn.Module, stage: str) -> None:
        """Before the optimizer is made and a checkpoint's weights are loaded."""
        if stage == "fit":
            self.compressor = rlcompress.DynamicCompressor(
                module, self.example_input, **self.options
            )

    def on_train_start(self, trainer: Any, module: nn.Module) -> None:
        if self.compressor is not None and self._saved is not None:
            self.compressor.load_state_dict(self._saved)

    def on_train_batch_end(
        self, trainer: Any, module: nn.Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the optimizer's step; the gradients are still there."""
        assert self.compressor is not None
        self.compressor.step(outputs["loss"])

    def on_train_end(self, trainer: Any, module: nn.Module) -> None:
        assert self.compressor is not None
        self.small = self.compressor.finalize()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.compressor is None else self.compressor.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._saved = state


def fit(module: nn.Module, data: TensorDataset, callback: Compression, epochs: int) -> None:
    """What a framework does, and in which order it calls."""
    callback.setup(None, module, "fit")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    callback.on_train_start(None, module)
    for epoch in range(epochs):
        torch.manual_seed(epoch)
        module.train()
        loader = DataLoader(data, batch_size=64, shuffle=True, drop_last=True)
        for number, batch in enumerate(loader):
            images, labels = batch
            loss = F.cross_entropy(module(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            callback.on_train_batch_end(None, module, {"loss": loss.detach()}, batch, number)
    callback.on_train_end(None, module)


def main() -> None:
    from examples.own_loop import accuracy, digits, network

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--target", type=float, default=20.0, help="times fewer bytes")
    options = parser.parse_args()
    torch.manual_seed(0)
    train, test = digits()
    callback = Compression(
        torch.zeros(1, 1, 8, 8),
        target=options.target,
        pace=rlcompress.Pace(warmup=100, recovery_steps=10, rounds=2, watch=20),
    )
    fit(network(), train, callback, options.epochs)
    assert callback.compressor is not None
    assert callback.small is not None
    print(
        f"{callback.compressor.ratio:.1f}x fewer bytes, test {accuracy(callback.small, test):.1%}"
    )


if __name__ == "__main__":
    main()
