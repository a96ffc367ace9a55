"""Policy weights on the wire: one contiguous buffer and a manifest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Version = tuple[int, int]


class WeightsError(ValueError):
    """Published weights are damaged, not finite, or belong to another network."""


@dataclass(frozen=True, kw_only=True)
class PackedWeights:
    """Tensors flattened into one byte buffer.

    ``manifest`` has plain types only: version [fence, update], dtype, tensors
    [[name, shape, offset in elements], …], sha256 of the buffer, config hash.
    """

    buffer: NDArray[np.uint8]
    manifest: dict[str, Any]

    @property
    def version(self) -> Version:
        """Return (fence, update); weights are ordered by it."""
        fence, update = self.manifest["version"]
        return fence, update

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The verified tensors in float32; the work is done once, by whoever asks first.

        Raises:
            WeightsError: see `unpack`.
        """
        return unpack(self)


def pack(
    tensors: dict[str, Tensor],
    version: Version,
    config_hash: str = "",
    dtype: torch.dtype = torch.bfloat16,
) -> PackedWeights:
    """Copy floating-point tensors into one buffer on the CPU. Blocks for one device transfer."""
    names = sorted(tensors)
    flat = torch.cat([tensors[name].detach().flatten().to(dtype) for name in names]).cpu()
    offsets = np.cumsum([0, *(tensors[name].numel() for name in names)])
    buffer = flat.view(torch.uint8).numpy()
    manifest = {
        "version": list(version),
        "dtype": str(dtype).removeprefix("torch."),
        "tensors": [
            [name, list(tensors[name].shape), int(offset)]
            for name, offset in zip(names, offsets[:-1], strict=True)
        ],
        "sha256": hashlib.sha256(buffer.data).hexdigest(),
        "config_hash": config_hash,
    }
    return PackedWeights(buffer=buffer, manifest=manifest)


def unpack(weights: PackedWeights) -> dict[str, Tensor]:
    """Verify and return the tensors in float32, copied out of the buffer.

    Raises:
        WeightsError: the hash, the sizes or the values are wrong.
    """
    digest = hashlib.sha256(np.ascontiguousarray(weights.buffer).data).hexdigest()
    if digest != weights.manifest["sha256"]:
        raise WeightsError(
            f"weights {weights.version} are damaged: sha256 {digest[:12]}… does not match the "
            f"manifest's {weights.manifest['sha256'][:12]}…; the old weights are kept"
        )
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(weights.manifest["dtype"])
    if dtype is None:
        raise WeightsError(
            f"weights have dtype {weights.manifest['dtype']!r}, expected bfloat16 or float32"
        )
    flat = torch.from_numpy(np.array(weights.buffer)).view(dtype).float()
    if not torch.isfinite(flat).all():
        raise WeightsError(f"weights {weights.version} are not finite; the old weights are kept")
    tensors = {}
    for name, shape, offset in weights.manifest["tensors"]:
        size = int(np.prod(shape))
        if offset < 0 or offset + size > flat.numel():
            raise WeightsError(
                f"weights {weights.version}: tensor {name!r} lies outside the buffer"
            )
        tensors[name] = flat[offset : offset + size].reshape(shape)
    return tensors
