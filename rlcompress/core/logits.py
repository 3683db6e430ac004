"""The refit of the layer that puts out the logits: towards what the dense network says of each
image, not towards its numbers.

    min_W,b  mean over positions of KL(softmax t || softmax(X W + b)) + r |W - W0|^2

W0 is the ridge regression's answer. The problem is convex; L-BFGS solves it in coordinates in which
the inputs are uncorrelated (Liu & Nocedal, 1989; SciPy's).
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import minimize

from rlcompress.core.moments import Sample, Sums

#: Steps of L-BFGS, fewer where one takes long: multiplications of them all.
LEAST_STEPS, MOST_STEPS, WORK = 6, 30, 1e10
#: Each is two vectors as long as the weights.
CORRECTIONS = 5
#: Of the ridge that the regression chose: KL bends less than a square does.
SHARE = 0.05


def refit_logits(
    sample: Sample, logits_PO: torch.Tensor, w_GDo: torch.Tensor, ridge: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """w_GDo and the outputs (O,) at the inputs' means, from the regression's `w_GDo` on, of a layer
    of one group; None where inputs outnumber the
    positions not held out. `ridge` is the regression's."""
    if not isinstance(sample.whole, Sums):
        return None
    gram_DD = sample.whole.gram_GDD[0] / sample.positions
    eye_DD = torch.eye(len(gram_DD)).to(gram_DD)
    energy = gram_DD.diagonal().mean()
    lower_DD, failed = torch.linalg.cholesky_ex(gram_DD + (0.01 * energy + 1e-8) * eye_DD)
    if bool(failed):
        return None
    white_DD = torch.linalg.solve_triangular(lower_DD, eye_DD, upper=False)
    x_PD = sample.centred()[0]
    rows_PE = torch.cat([x_PD @ white_DD.T, x_PD.new_ones(len(x_PD), 1)], 1)
    base_PO = x_PD @ w_GDo[0] + sample.mean_O
    wanted_PO = logits_PO.softmax(1)
    shape = rows_PE.shape[1], logits_PO.shape[1]
    pull = float(SHARE * ridge * energy)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        """Cross entropy, which differs from KL by a constant, and the pull; and the gradient."""
        v_EO = torch.from_numpy(flat).to(base_PO).view(shape)
        said_PO = (base_PO + rows_PE @ v_EO).log_softmax(1)
        change_DO = white_DD.T @ v_EO[:-1]
        gradient_EO = rows_PE.T @ (said_PO.exp() - wanted_PO) / len(base_PO)
        gradient_EO[:-1] += 2 * pull * (white_DD @ change_DO)
        lost = pull * change_DO.square().sum() - (wanted_PO * said_PO).sum(1).mean()
        return float(lost), gradient_EO.double().cpu().numpy().ravel()

    start = np.zeros(shape[0] * shape[1])
    steps = int(np.clip(WORK / (2 * len(rows_PE) * start.size), LEAST_STEPS, MOST_STEPS))
    options = {"maxiter": steps, "maxcor": CORRECTIONS}
    done = minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
    v_EO = torch.from_numpy(done.x).to(base_PO).view(shape)
    if not bool(torch.isfinite(v_EO).all()):
        return None
    return w_GDo + white_DD.T @ v_EO[:-1], sample.mean_O + v_EO[-1]
