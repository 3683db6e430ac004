"""ONNX: the ticket for onnxruntime and whatever else reads the format."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from rlcompress.core.errors import UserError, first_line
from rlcompress.core.files import save_bytes
from rlcompress.core.onnx_graph import (
    container_bytes,
    layer_codes,
    simplify,
    slim,
    store_codes,
    versions,
)
from rlcompress.core.onnx_int8 import quantize_activations

#: Largest allowed difference of the outputs, as a share of the largest one.
TOLERANCE = 1e-3
#: Share of the images on which int8 activations must keep the network's answer.
AGREEMENT = 0.8
#: Images at once in the check.
BATCH = 64


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file that onnxruntime has run."""

    path: Path
    bytes: int  # on disk
    container_bytes: int  # its tensors alone: codes in their integer type, scales, floats
    difference: float  # largest difference of the outputs / largest output
    agreement: float  # share of the images with the same answer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What exporter and quantizer print, warn and log is no news to the user."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _root_cause(error: BaseException) -> str:
    """The first line of what went wrong first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind it: torch's exporter stumbles while it cleans up."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _build(
    model: nn.Module,
    bits: Mapping[str, int],
    scales: Mapping[str, torch.Tensor],
    images: torch.Tensor,
    int8: bool,
) -> Any:
    """The ModelProto."""
    layers = layer_codes(model, bits, scales)
    opset, ir_version = versions({} if int8 else bits)
    program = torch.onnx.export(
        model,
        (images[:2],),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=opset,
        dynamo=True,
        # It would fold batch norms into weights before they are codes.
        optimize=False,
        verbose=False,
    )
    assert program is not None
    store_codes(program.model, layers, int8=int8)
    simplify(program.model)
    proto = program.model_proto
    if int8:
        proto = quantize_activations(proto, images.numpy())
    proto.ir_version = ir_version
    slim(proto)
    return proto


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what fails is raised
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _compare(model: nn.Module, session: Any, images: torch.Tensor) -> tuple[float, float]:
    """Largest difference relative to the largest output; share of images with the same answer."""
    theirs, ours = [], []
    # The first image alone: the batch dimension really is free.
    for part in [images[:1], *images[1:].split(BATCH)]:
        theirs.append(session.run(["logits"], {"images": part.numpy()})[0])
        with torch.inference_mode():
            ours.append(model(part).numpy())
    a, b = np.concatenate(theirs), np.concatenate(ours)
    difference = float(np.abs(a - b).max() / max(float(np.abs(b).max()), 1e-6))
    return difference, float((a.argmax(-1) == b.argmax(-1)).mean())


def export_onnx(
    model: nn.Module,
    bits: Mapping[str, int],
    scales: Mapping[str, torch.Tensor],
    images: torch.Tensor,
    path: Path | str,
    *,
    activations: Literal["float", "int8"] = "float",
) -> OnnxFile:
    """Writes a compressed network to `path` with a free batch dimension; checks it on `images`.

    model        a network whose quantized weights are exactly codes x scale (`load_artifact`)
    bits         layer -> weight bits; a layer that is missing, or has 32, stays float32
    scales       layer -> scale_O of the layers below 32 bits
    images       (N, C, H, W) float32, N >= 2: for tracing, for the check, and for the ranges of
                 int8 activations (then a hundred or more, of the training data)
    activations  "float": weights in the narrowest integer type that holds their codes, computed
                 with in float32. "int8": weights in INT8 with the same codes, the activations
                 of their layers in 8 bits: bigger, but integer arithmetic.

    The file must give the network's outputs to within `TOLERANCE` in onnxruntime;
    with int8 activations it must be finite and agree on the answer to `AGREEMENT` of the images
    (a ticket that changes more answers than that has lost what it was retrained for).

    Raises UserError, and leaves nothing behind, if the network cannot be exported, a quantized
    weight is not in the exported graph or not codes x scale, or the file fails the check.
    """
    import onnx

    path = Path(path)
    # Weights that lie channels last would export with a detour through strides.
    model = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format).eval()
    int8 = activations == "int8"
    hint = "--set export.onnx=false"
    try:
        with _quiet():
            proto = _build(model, bits, scales, images, int8)
            onnx.checker.check_model(proto, full_check=True)
    except UserError as error:
        raise UserError(f"{path}: {error}; {hint}") from error
    except Exception as error:  # whatever a network makes torch's exporter or the quantizer raise
        if _interrupted(error):
            raise KeyboardInterrupt from error
        raise UserError(
            f"{path}: the network cannot be exported to ONNX: {_root_cause(error)}; {hint}"
        ) from error
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_bytes(part, proto.SerializeToString())
        try:
            with _quiet():
                difference, agreement = _compare(model, _session(part, 1), images)
        except Exception as error:  # onnxruntime's errors have no common class
            raise UserError(
                f"{path}: onnxruntime cannot run it: {_root_cause(error)}; {hint}"
            ) from error
        if not np.isfinite(difference) or (difference > TOLERANCE and not int8):
            raise UserError(
                f"{path}: onnxruntime differs by {difference:.2e} (allowed {TOLERANCE}); {hint}"
            )
        if agreement < AGREEMENT:
            raise UserError(
                f"{path}: with int8 activations only {agreement:.0%} of {len(images)} images get "
                f"the same answer (wanted {AGREEMENT:.0%})"
            )
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return OnnxFile(path, path.stat().st_size, container_bytes(proto), difference, agreement)


def latency(
    paths: Sequence[Path],
    images_shape: Sequence[int],
    batch: int,
    *,
    runs: int = 30,
    threads: int = 1,
    seconds: float = 10.0,
) -> list[float]:
    """Median seconds a run of each ONNX file in onnxruntime on the CPU.

    images_shape  (C, H, W);  batch  images a run
    seconds       no new round begins after them, once there were five

    The files take turns, each round one run of every file, so that all see the same noise of
    the machine.
    """
    generator = np.random.default_rng(0)
    feed = {"images": generator.standard_normal((batch, *images_shape), dtype=np.float32)}
    sessions = [_session(Path(path), threads) for path in paths]
    taken: list[list[float]] = [[] for _ in sessions]
    begun = time.perf_counter()
    for round_ in range(-2, runs):  # the first two warm up
        if round_ >= 5 and time.perf_counter() - begun > seconds:
            break
        for turn in range(len(sessions)):
            # Who runs behind the largest network finds its caches cold: each has to, in turn.
            number = (turn + round_) % len(sessions)
            start = time.perf_counter()
            sessions[number].run(None, feed)
            if round_ >= 0:
                taken[number].append(time.perf_counter() - start)
    return [statistics.median(times) for times in taken]


def onnx_logits(path: Path | str, images: torch.Tensor) -> torch.Tensor:
    """(N, classes) of an ONNX file's network in onnxruntime, for images (N, C, H, W)."""
    session = _session(Path(path), threads=0)
    parts = [session.run(["logits"], {"images": x.numpy()})[0] for x in images.split(BATCH)]
    return torch.from_numpy(np.concatenate(parts))
