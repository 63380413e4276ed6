"""Reads checkpoints that hold the experts of a layer fused, ``[experts, ...]``, as if they were stored one by one.

transformers 5 holds experts so in memory, for which :func:`split_views` gives the single ones. On disk it splits them,
unless asked not to (``save_original_format=False``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from megatron_oisd.convert.families import FAMILIES, dimensions, expand, numbered
from megatron_oisd.convert.rules import EXPERT, LAYER, Fused, Source
from megatron_oisd.errors import OISDError
from megatron_oisd.runtime.model import ModelArguments

_Place = tuple[str, Fused, int, tuple[int, ...]]  # fused tensor, what of it, expert, shape of the piece


def unfused(tensors: Mapping[str, Tensor], arguments: ModelArguments) -> Mapping[str, Tensor]:
    """Return ``tensors``, with the experts one by one where they are stored fused."""
    places = _places(arguments, set(tensors)) if arguments.num_experts else {}
    return _Unfused(tensors, places, arguments.num_experts or 0) if places else tensors


def unfused_names(names: Iterable[str], arguments: ModelArguments) -> set[str]:
    """Return the names under which :func:`unfused` offers tensors of these names."""
    given = set(names)
    places = _places(arguments, given) if arguments.num_experts else {}
    return (given - {place[0] for place in places.values()}) | set(places)


def split_views(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a model in memory, with views of the single experts in the place of fused ones.

    A view shares its memory with the model: what is copied into it is in the model.
    """
    found: dict[str, Tensor] = {}
    sources = _fused_sources()
    for name, tensor in tensors.items():
        number = re.search(r"(?<=\.layers\.)\d+(?=\.)", name)
        pattern = f"{name[: number.start()]}{LAYER}{name[number.end() :]}" if number else name
        if pattern not in sources:
            found[name] = tensor
            continue
        layer = int(number[0]) if number else None
        for expert, whole in enumerate(tensor):
            for source, what in sources[pattern]:
                rows = len(whole) // what.parts
                single = numbered(source.name, layer).replace(EXPERT, str(expert))
                found[single] = whole.narrow(0, what.part * rows, rows)
    return found


def _fused_sources() -> dict[str, list[tuple[Source, Fused]]]:
    """What every fused tensor of the families is in single form, by its name with the placeholder."""
    found: dict[str, list[tuple[Source, Fused]]] = {}
    for rule in {rule.megatron: rule for family in FAMILIES.values() for rule in family.rules}.values():
        for source in rule.hf:
            if source.fused is not None:
                found.setdefault(source.fused.name, []).append((source, source.fused))
    return found


def _places(arguments: ModelArguments, names: set[str]) -> dict[str, _Place]:
    """Where each expert's tensor is that ``names`` have in fused form only."""
    sizes = dimensions(arguments)
    places = {}
    for rule, layer in expand(arguments):
        for source in rule.hf:
            if rule.expert is None or source.fused is None:
                continue
            name, fused = numbered(source.name, layer), numbered(source.fused.name, layer)
            if fused in names and name not in names:
                places[name] = fused, source.fused, rule.expert, tuple(sizes[symbol] for symbol in source.shape)
    return places


class _Unfused(Mapping[str, Tensor]):
    def __init__(self, tensors: Mapping[str, Tensor], places: dict[str, _Place], num_experts: int) -> None:
        self._tensors, self._places, self._experts = tensors, places, num_experts
        self._held: dict[str, Tensor] = {}
        fused = {place[0] for place in places.values()}
        self._names = [*(name for name in tensors if name not in fused), *places]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._places:
            return self._tensors[name]
        fused, what, expert, shape = self._places[name]
        if fused not in self._held:
            # The two fused tensors of a layer are asked for in turn: kept while their layer is.
            while len(self._held) > 1:
                self._held.pop(next(iter(self._held)))
            self._held[fused] = self._tensors[fused]
        tensor = self._held[fused]
        expected = (self._experts, shape[0] * what.parts, *shape[1:])
        if tuple(tensor.shape) != expected:
            raise OISDError(f"HF tensor {fused} has shape {tuple(tensor.shape)}, and config.json says {expected}")
        return tensor[expert].narrow(0, what.part * shape[0], shape[0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._places or name in self._tensors
