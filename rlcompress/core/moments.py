"""What a refit needs of a layer's sampled positions: sums of products of its inputs and wanted
outputs, or, where there are more inputs than positions, the rows themselves.

The sums of some inputs are parts of the sums of all: every keep ratio of what a layer reads is
served by one pass over the positions.

Shapes: P positions, G convolution groups, D inputs per group, O outputs, o outputs per group.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rlcompress.core.process import multiplies_bfloat16

#: One position of so many is held out.
HELD_OUT = 4
#: Inputs from where on a Gram matrix is computed in parts.
NARROW = 128
#: Mean square over mean variance of the inputs, the most that float32 can take the means out of
#: sums behind: a few thousandths of the variance would be lost.
MOST_CENTRED = 1000.0


@dataclass(frozen=True)
class Sums:
    """Of P positions: gram_GDD X'X, cross_GDo X'Y and square_Go, the diagonal of Y'Y."""

    gram_GDD: torch.Tensor
    cross_GDo: torch.Tensor
    square_Go: torch.Tensor

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.gram_GDD + other.gram_GDD,
            self.cross_GDo + other.cross_GDo,
            self.square_Go + other.square_Go,
        )

    def part(self, at_D: torch.Tensor) -> Sums:
        """Of these inputs alone."""
        gram_GDD = torch.stack([_block(gram_DD, at_D) for gram_DD in self.gram_GDD])
        return Sums(gram_GDD, self.cross_GDo.index_select(1, at_D), self.square_Go)

    def error(self, w_GDo: torch.Tensor) -> torch.Tensor:
        """(G, o) squared error of X W."""
        explained_Go = (w_GDo * (self.cross_GDo + self.left(w_GDo))).sum(1)
        # A difference of what may be nearly equal.
        return (self.square_Go - explained_Go).clamp_min(0.0)

    def energy(self, w_GDo: torch.Tensor) -> torch.Tensor:
        """(G, o) squares of X W."""
        return (w_GDo * (self.gram_GDD @ w_GDo)).sum(1)

    def energies(self) -> torch.Tensor:
        """(G, D) squares of each input."""
        return self.gram_GDD.diagonal(dim1=1, dim2=2)

    def left(self, w_GDo: torch.Tensor) -> torch.Tensor:
        """X'(Y - X W), (G, D, o)."""
        return self.cross_GDo - self.gram_GDD @ w_GDo

    def change(self, w_GDo: torch.Tensor, ridge_G: torch.Tensor) -> torch.Tensor:
        """What ridge regression pulled to `w_GDo` adds to it, (G, D, o); ridges as shares of the
        mean diagonal of X'X. Not finite in a group whose system is singular."""
        energy_G = self.energies().mean(1)
        return _solved(self.gram_GDD, self.left(w_GDo), ridge_G * energy_G)


@dataclass(frozen=True)
class Rows:
    """The same of x_GPD and y_GPo themselves: the same minimum through X X', which is the smaller
    system where inputs outnumber positions."""

    x_GPD: torch.Tensor
    y_GPo: torch.Tensor

    def __add__(self, other: Rows) -> Rows:
        x_GPD = torch.cat([self.x_GPD, other.x_GPD], 1)
        return Rows(x_GPD, torch.cat([self.y_GPo, other.y_GPo], 1))

    def part(self, at_D: torch.Tensor) -> Rows:
        return Rows(self.x_GPD.index_select(2, at_D), self.y_GPo)

    def sums(self) -> Sums:
        x_GDP = self.x_GPD.transpose(1, 2)
        return Sums(gram(self.x_GPD), x_GDP @ self.y_GPo, self.y_GPo.square().sum(1))

    def error(self, w_GDo: torch.Tensor) -> torch.Tensor:
        return (self.y_GPo - self.x_GPD @ w_GDo).square().sum(1)

    def energy(self, w_GDo: torch.Tensor) -> torch.Tensor:
        return (self.x_GPD @ w_GDo).square().sum(1)

    def energies(self) -> torch.Tensor:
        return self.x_GPD.square().sum(1)

    def change(self, w_GDo: torch.Tensor, ridge_G: torch.Tensor) -> torch.Tensor:
        x_GDP = self.x_GPD.transpose(1, 2)
        energy_G = self.x_GPD.square().sum((1, 2)) / self.x_GPD.shape[2]
        left_GPo = self.y_GPo - self.x_GPD @ w_GDo
        return x_GDP @ _solved(gram(x_GDP), left_GPo, ridge_G * energy_G)


@dataclass(frozen=True)
class Factor:
    """L of X'X + damping = L L', inputs in the order of their energy, least first; the identity in
    groups that are not `sound_G`: whose sums are not finite, or not positive definite."""

    order_GD: torch.Tensor
    lower_GDD: torch.Tensor
    sound_G: torch.Tensor

    @classmethod
    def of(cls, gram_GDD: torch.Tensor, damping_G: torch.Tensor) -> Factor | None:
        """`damping_G` as shares of the mean diagonal. None if no group is sound."""
        diagonal_GD = gram_GDD.diagonal(dim1=1, dim2=2)
        order_GD = diagonal_GD.argsort(dim=1)
        damped_GDD = _permuted(gram_GDD, order_GD)
        damping_G = damping_G * diagonal_GD.mean(1) + 1e-8
        damped_GDD.diagonal(dim1=1, dim2=2).add_(damping_G[:, None])
        lower_GDD, info = torch.linalg.cholesky_ex(damped_GDD)
        sound_G = (info == 0) & torch.isfinite(lower_GDD).flatten(1).all(1)
        if not bool(sound_G.any()):
            return None
        if not bool(sound_G.all()):
            identity = torch.eye(lower_GDD.shape[1]).to(lower_GDD)
            lower_GDD = torch.where(sound_G[:, None, None], lower_GDD, identity)
        return cls(order_GD, lower_GDD, sound_G)

    def solve(self, right_GDo: torch.Tensor) -> torch.Tensor:
        """(X'X + damping)^-1 right; not finite in groups that are not sound."""
        at_GDo = self.order_GD.unsqueeze(2).expand_as(right_GDo)
        found_GDo = torch.cholesky_solve(right_GDo.gather(1, at_GDo), self.lower_GDD)
        solved_GDo = torch.empty_like(found_GDo).scatter_(1, at_GDo, found_GDo)
        if bool(self.sound_G.all()):
            return solved_GDo
        return solved_GDo.masked_fill(~self.sound_G[:, None, None], torch.nan)


def _permuted(gram_GDD: torch.Tensor, order_GD: torch.Tensor) -> torch.Tensor:
    """Rows and columns in this order."""
    if len(gram_GDD) == 1:
        (order_D,) = order_GD
        return _block(gram_GDD[0], order_D)[None]
    fan = order_GD.shape[1]
    gram_GDD = gram_GDD.gather(1, order_GD.unsqueeze(2).expand(-1, -1, fan))
    return gram_GDD.gather(2, order_GD.unsqueeze(1).expand(-1, fan, -1))


@dataclass(frozen=True)
class Sample:
    """Inputs and wanted outputs of a layer at P positions, a quarter of them held out (none where
    there are too few).

    mean_GD, mean_O  what inputs and outputs are less by in `known` and `held`; zeros where means
             are not free
    x_PGD    the inputs themselves
    """

    known: Sums | Rows
    held: Sums | Rows | None
    mean_GD: torch.Tensor
    mean_O: torch.Tensor
    positions: int
    x_PGD: torch.Tensor | None = None

    @classmethod
    def of(
        cls, patches_PGD: torch.Tensor, targets_PO: torch.Tensor, *, centred: bool = True
    ) -> Sample:
        """If `centred`, means are left to a bias or batch norm."""
        count, groups, fan = patches_PGD.shape
        y_PO = targets_PO.float()
        mean_O = y_PO.mean(0) * centred
        y_GPo = (y_PO - mean_O).reshape(count, groups, -1).permute(1, 0, 2)
        known = count - count // HELD_OUT
        parts = [slice(0, known), slice(known, count)]
        few_bits = patches_PGD.dtype == torch.bfloat16 and patches_PGD.device.type == "cpu"
        few_bits = few_bits and multiplies_bfloat16(patches_PGD.device)
        x_PGD = patches_PGD.float()
        mean_GD = x_PGD.mean(0) * centred
        both: list[Sums | Rows]
        if few_bits and groups == 1 and NARROW < fan <= known:
            both = [_exact_sums(x_PGD[s, 0], y_GPo[0, s], mean_GD[0]) for s in parts]
        else:
            # Batches of small products would copy each of theirs.
            x_GPD = (x_PGD - mean_GD).permute(1, 0, 2).contiguous()
            y_GPo = y_GPo.contiguous()
            rows = [Rows(x_GPD[:, s], y_GPo[:, s]) for s in parts]
            both = list(rows) if fan > known else [r.sums() for r in rows]
        held = both[1] if count > known else None
        return cls(both[0], held, mean_GD, mean_O, count, x_PGD)

    def part(self, at_D: torch.Tensor) -> Sample:
        """Where the layer reads these inputs (of each group) alone."""
        held = None if self.held is None else self.held.part(at_D)
        mean_GD = self.mean_GD.index_select(1, at_D)
        return Sample(self.known.part(at_D), held, mean_GD, self.mean_O, self.positions)

    def centred(self) -> torch.Tensor:
        """x_GPD less its means."""
        assert self.x_PGD is not None
        return (self.x_PGD - self.mean_GD).permute(1, 0, 2)

    @functools.cached_property
    def whole(self) -> Sums | Rows:
        """Of all positions."""
        return self.known if self.held is None else self.known + self.held  # type: ignore[operator]


def _block(gram_DD: torch.Tensor, at_D: torch.Tensor) -> torch.Tensor:
    """These rows and columns. Two dimensions are a tenth of what a batch of one takes."""
    return gram_DD.index_select(0, at_D).index_select(1, at_D)


def _solved(gram_Gnn: torch.Tensor, right_Gno: torch.Tensor, ridge_G: torch.Tensor) -> torch.Tensor:
    """(gram + ridge)^-1 right; not finite in a group that is singular."""
    ridged_Gnn = gram_Gnn.clone()
    ridged_Gnn.diagonal(dim1=1, dim2=2).add_((ridge_G + 1e-8)[:, None])
    factor, info = torch.linalg.cholesky_ex(ridged_Gnn)
    failed_G11 = (info > 0)[:, None, None]
    return torch.cholesky_solve(right_Gno, factor).masked_fill(failed_G11, torch.nan)


def gram(x_GPD: torch.Tensor) -> torch.Tensor:
    """X'X (G, D, D), its equal halves computed once: a third less time for wide layers."""
    fan = x_GPD.shape[2]
    if fan <= NARROW:
        return x_GPD.transpose(1, 2) @ x_GPD
    half = fan // 2
    a, b = x_GPD[..., :half], x_GPD[..., half:]
    found = x_GPD.new_empty(len(x_GPD), fan, fan)
    found[:, :half, :half], found[:, half:, half:] = gram(a), gram(b)
    torch.matmul(a.transpose(1, 2), b, out=found[:, :half, half:])
    found[:, half:, :half] = found[:, :half, half:].transpose(1, 2)
    return found


def _exact_sums(x_PD: torch.Tensor, y_Po: torch.Tensor, mean_D: torch.Tensor) -> Sums:
    """`Rows.sums` of inputs that bfloat16 holds exactly, less `mean_D`: products of such numbers
    are exact in float32, where the hardware adds them up, five times as fast as others."""
    count = len(y_Po)
    with _bfloat16_products():
        gram_DD = x_PD.T @ x_PD
    sum_D = x_PD.sum(0)
    square_D = mean_D.square()
    deviation = (gram_DD.diagonal() / count - square_D).clamp_min(0).mean()
    if bool(square_D.amax() > MOST_CENTRED * deviation):
        return Rows((x_PD - mean_D)[None], y_Po[None]).sums()
    # X'X - s m' - m s' + P m m'
    left_D2 = torch.stack([-sum_D, mean_D], 1)
    gram_DD.addmm_(left_D2, torch.stack([mean_D, count * mean_D - sum_D]))
    cross_Do = _split_product(x_PD.T, y_Po) - mean_D[:, None] * y_Po.sum(0)
    return Sums(gram_DD[None], cross_Do[None], y_Po.square().sum(0)[None])


def _split_product(x_AB: torch.Tensor, y_BC: torch.Tensor) -> torch.Tensor:
    """X Y of an X that bfloat16 holds; Y is split into what it holds and what it leaves, which it
    holds to 16 bits."""
    high_BC = y_BC.bfloat16().float()
    with _bfloat16_products():
        both = x_AB @ torch.cat([high_BC, y_BC - high_BC], 1)
    return both[:, : y_BC.shape[1]] + both[:, y_BC.shape[1] :]


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Products of float32 matrices on a CPU read their factors as bfloat16."""
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before
