"""Acting as an ONNX file: the graph of `dreamer.export`, with its random numbers as inputs."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dreamer.export import DESCRIPTION, ActingStep, describe, example_inputs
from dreamer.policy import Policy
from dreamer.spaces import ActionSpace, ObsSpace

UNIFORM, NORMAL = "uniform", "normal"
_DRAWS: dict[Callable[..., Any], str] = {
    torch.rand_like: UNIFORM,
    torch.rand: UNIFORM,
    torch.randn_like: NORMAL,
    torch.randn: NORMAL,
}
"""Whatever the agents draw with."""
_STATE = ("deter", "stoch", "last")
_Acted = tuple[dict[str, Tensor], Tensor, Tensor, Tensor]


class OnnxError(ValueError):
    """Acting that ONNX cannot express; the message says what and why."""


class Noise(TorchFunctionMode):
    """Hands out random numbers in the place of torch, and keeps what it has handed out.

    Args:
        source: takes "uniform" (on [0, 1)) or "normal", and a shape; returns the next numbers.
    """

    def __init__(self, source: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        super().__init__()
        self.source = source
        self.drawn: list[tuple[str, tuple[int, ...]]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Answer one call of torch."""
        kind = _DRAWS.get(func)
        if kind is None:
            return func(*args, **(kwargs or {}))
        like = args[0] if args else None
        shape = tuple(like.shape) if isinstance(like, Tensor) else _shape(args)
        self.drawn.append((kind, shape))
        return self.source(kind, shape)


class _NoisyStep(nn.Module):
    """One step of acting that draws nothing: its random numbers come last."""

    def __init__(self, step: ActingStep) -> None:
        super().__init__()
        self.step = step

    def forward(
        self,
        obs: dict[str, Tensor],
        is_first: Tensor,
        deter: Tensor,
        stoch: Tensor,
        last: Tensor,
        noise: list[Tensor],
    ) -> _Acted:
        """Choose actions as `ActingStep` does."""
        left = iter(noise)
        with Noise(lambda kind, shape: next(left)):
            acted: _Acted = self.step(obs, is_first, deter, stoch, last)
        return acted


def export_onnx(
    policy: Policy, obs_space: ObsSpace, action_space: ActionSpace, *, envs: int, mode: str
) -> bytes:
    """Return an ``.onnx`` file of acting in `envs` environments at once.

    Inputs are ``obs.<key>``, ``is_first``, ``deter``, ``stoch``, ``last`` and ``noise.0``,
    ``noise.1``, …; outputs ``action.<key>`` and ``next.deter``, ``next.stoch``, ``next.last``. The
    file's metadata has a description of them, as the files of `export_acting` do, with kind and
    shape of each noise. Latents are drawn in both modes, so there is noise in both.

    Raises:
        OnnxError: an operation of this agent has no form in ONNX, or the file exceeds 2 GiB.
        ImportError: onnx or onnxscript is not installed.
    """
    step = ActingStep(policy, mode).eval()
    inputs = example_inputs(policy, obs_space, envs)
    drawn = _drawn(step, inputs)
    noise = [torch.full(shape, 0.5) for _, shape in drawn]
    program = _converted(
        _NoisyStep(step).eval(),
        (*inputs, noise),
        [f"obs.{key}" for key in obs_space]
        + ["is_first", *_STATE, *(f"noise.{i}" for i in range(len(noise)))],
        [f"action.{key}" for key in action_space] + [f"next.{name}" for name in _STATE],
    )
    about = describe(policy, obs_space, action_space, envs=envs, mode=mode)
    about["noise"] = [{"kind": kind, "shape": list(shape)} for kind, shape in drawn]
    program.model.metadata_props[DESCRIPTION] = json.dumps(about)
    try:
        data: bytes = program.model_proto.SerializeToString()
    except ValueError as error:
        raise OnnxError(
            f"an ONNX file holds at most 2 GiB, and this agent needs more ({error}); "
            "export it for torch"
        ) from error
    return data


def _shape(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    flat = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    return tuple(int(size) for size in flat)


def _drawn(step: ActingStep, inputs: tuple[Any, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Return kind and shape of all random numbers of one step, in order."""
    before = torch.get_rng_state()
    noise = Noise(lambda kind, shape: torch.full(shape, 0.5))
    with torch.inference_mode(), noise:
        step(*inputs)
    if not torch.equal(before, torch.get_rng_state()):
        raise OnnxError("this agent draws random numbers in a way that cannot be made an input")
    return noise.drawn


def _converted(
    module: nn.Module, inputs: tuple[Any, ...], names: list[str], outputs: list[str]
) -> Any:
    try:
        with _quiet():
            return torch.onnx.export(
                torch.export.export(module, inputs),
                input_names=names,
                output_names=outputs,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as e:
        root: BaseException = e
        while root.__cause__ is not None:
            root = root.__cause__
        reason = " ".join(str(root).split())
        raise OnnxError(
            f"ONNX cannot express this agent's acting: {reason[:300]} "
            "(try --mode greedy, or export it for torch)"
        ) from e


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the exporter says about its own libraries and those that it could not find."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
