"""What a conversion will do, tensor by tensor; the converters follow it and ``--dry-run`` prints it.

A plan belongs to a model, not to a direction: every Megatron parameter with the HF tensors it is made of, and its place
in the checkpoint. It is made from shapes alone, see :func:`megatron_oisd.convert.torch_dist.shapes_only_model`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_oisd.convert.families import dimensions, expand, numbered
from megatron_oisd.convert.fused import unfused
from megatron_oisd.convert.safetensors_io import ShardedWriter
from megatron_oisd.convert.torch_dist import (
    DEFAULT_KEYS,
    KeyStyle,
    ParameterReader,
    describe_place,
    pieces_of,
    shapes_only_model,
    storage_id,
)
from megatron_oisd.convert.weights import assemble, checked, cut, local_parameters
from megatron_oisd.runtime.model import ModelArguments


@dataclass(frozen=True)
class PlannedParameter:
    """One Megatron parameter and what it is made of."""

    rule: Any
    layer: int | None
    parameter: nn.Parameter
    """Of the shapes-only model: shape, dtype and identity, no data."""
    place: str
    """Key in the distributed checkpoint and, in a tensor of several layers, the layer."""
    hf: dict[str, tuple[int, ...]]
    """The HF tensors and their shapes, in order."""

    @property
    def nbytes(self) -> int:
        """Bytes of the parameter in the Megatron checkpoint."""
        return self.parameter.numel() * self.parameter.dtype.itemsize

    def from_hf(self, tensors: Mapping[str, Tensor], arguments: ModelArguments) -> Tensor:
        """Make the parameter's data, in its dtype, from full HF tensors."""
        # Cast first: what is put together then is of one dtype, and no more than one tensor is there twice.
        parts = [checked(tensors, name, shape).to(self.parameter.dtype) for name, shape in self.hf.items()]
        return cut(self.rule, parts, arguments, 0, 1, self.parameter.shape).contiguous()

    def to_hf(self, data: Tensor, arguments: ModelArguments) -> Iterator[tuple[str, Tensor]]:
        """Yield the HF tensors that the parameter's ``data`` holds."""
        parts = assemble(self.rule, [data], arguments)
        del data  # the parts have memory of their own
        for name in self.hf:
            yield name, parts.pop(0)


class Plan:
    """All parameters of a model, in the order of its forward pass; needs Megatron's parallel state.

    Args:
        arguments: the model's shape.
        dtype: of the Megatron checkpoint's weights.
        style: of its keys.
    """

    def __init__(
        self,
        arguments: ModelArguments,
        dtype: torch.dtype,
        *,
        style: KeyStyle = DEFAULT_KEYS,
    ) -> None:
        self.arguments, self.dtype, self.style = arguments, dtype, style
        self.model = shapes_only_model(arguments, dtype)
        sizes, pieces = dimensions(arguments), pieces_of(self.model, style)
        local = {(entry.rule.megatron[0], entry.layer): entry for entry in local_parameters([self.model], arguments)}
        self.parameters: list[PlannedParameter] = []
        for rule, layer in expand(arguments):
            if rule.copy_of is None:
                entry = local.pop((rule.megatron[0], layer))
                hf = {numbered(s.name, layer): tuple(sizes[symbol] for symbol in s.shape) for s in rule.hf}
                place = describe_place(pieces[storage_id(entry.parameter)][0])
                self.parameters.append(PlannedParameter(rule, layer, entry.parameter, place, hf))
        assert not local, f"no rule for {next(iter(local))}"

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every HF tensor and its shape, in the order in which :meth:`to_hf` yields them."""
        return {name: shape for entry in self.parameters for name, shape in entry.hf.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters in the Megatron checkpoint."""
        return sum(entry.nbytes for entry in self.parameters)

    @property
    def numel(self) -> int:
        """Number of weights, padding included."""
        return sum(entry.parameter.numel() for entry in self.parameters)

    def from_hf(self, tensors: Mapping[str, Tensor]) -> Mapping[int, Callable[[], Tensor]]:
        """Return what makes each parameter's data, by :func:`~megatron_oisd.convert.torch_dist.storage_id`."""
        tensors = unfused(tensors, self.arguments)
        return {
            storage_id(entry.parameter): partial(entry.from_hf, tensors, self.arguments) for entry in self.parameters
        }

    def to_hf(self, reader: ParameterReader) -> Iterator[tuple[str, Tensor]]:
        """Yield every HF tensor, in the stored dtype, reading one parameter at a time."""
        for entry in self.parameters:
            yield from entry.to_hf(reader.read(entry.parameter), self.arguments)

    def peak_bytes(self) -> int:
        """Estimate what a conversion holds at once, above the interpreter: a parameter, its parts and one piece."""
        return max(3 * entry.nbytes for entry in self.parameters)

    def lines(self, writer: ShardedWriter | None = None) -> Iterator[str]:
        """Describe every parameter, the files and the totals, for people.

        Args:
            writer: of the HF checkpoint, for the way there; None for the way to Megatron.
        """
        dtype, sizes = _name(self.dtype), self.hf_shapes
        for entry in self.parameters:
            hf, shape = " + ".join(entry.hf), "x".join(map(str, entry.parameter.shape))
            what = f"{entry.rule.layout} {shape} {dtype}"
            if writer is None:
                yield f"{hf} -> {entry.place}  {what} {entry.nbytes} bytes"
            else:
                size = sum(map(math.prod, entry.hf.values())) * writer.dtype.itemsize
                yield f"{entry.place} -> {hf}  {what} -> {_name(writer.dtype)} {size} bytes"
        weights, nbytes = self.numel, self.nbytes
        if writer is not None:
            dtype, weights = _name(writer.dtype), sum(map(math.prod, sizes.values()))
            nbytes = weights * writer.dtype.itemsize
            for file, tensors in writer.files.items():
                size = sum(math.prod(sizes[name]) for name in tensors) * writer.dtype.itemsize
                yield f"{file}: {len(tensors)} tensors, {_size(size)}"
        yield (
            f"{len(sizes)} HF tensors, {len(self.parameters)} Megatron parameters, {weights} weights, {_size(nbytes)} "
            f"in {dtype}; largest parameter {_size(max(entry.nbytes for entry in self.parameters))}"
        )
        yield f"peak memory: about {_size(self.peak_bytes())} and the interpreter's own (0.6 GiB)"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(count: int) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.4g} GiB"
