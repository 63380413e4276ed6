"""Megatron's distributed checkpoint, written and read one parameter at a time.

Where a parameter lies in the checkpoint (its key, its place in a tensor that holds all layers, the halves of a gated
MLP) is Megatron's own knowledge: :func:`shapes_only_model` builds the model on torch's ``meta`` device, which has
shapes and no data, and its ``sharded_state_dict()`` says the rest. Every piece in there is a view of a parameter, so

* writing (:func:`streaming_strategy`) asks for a parameter's data when the writer comes to one of its pieces,
* reading (:class:`ParameterReader`) fills the pieces of one parameter from the stored tensors of any layout.

At most one parameter, the tensors it is made of and one stored piece are in memory at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_oisd.convert.manifest import HashingStream
from megatron_oisd.convert.output import brief
from megatron_oisd.convert.safe_pickle import read_metadata
from megatron_oisd.errors import OISDError
from megatron_oisd.runtime.model import ModelArguments, build_model, transformer_config

MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.", "mtp.", "encoder.", "vision_model.")
"""Beginnings of the keys that are a model's parameters; optimizer state and counters have others."""


def shapes_only_model(arguments: ModelArguments, dtype: torch.dtype) -> nn.Module:
    """Build the whole model without data; needs Megatron's parallel state for one process."""
    config = transformer_config(arguments, dtype=dtype, perform_initialization=False, use_cpu_initialization=True)
    with torch.device("meta"):
        (model,) = build_model(arguments, config)
    if not all(parameter.is_meta for parameter in model.parameters()):
        model = model.to("meta")  # modules that choose a device themselves, as Transformer Engine's do
    return model


def storage_id(tensor: Tensor) -> int:
    """Return what a tensor and its views have in common; valid while one of them lives."""
    return int(tensor.untyped_storage()._cdata)


@dataclass(frozen=True)
class KeyStyle:
    """How a checkpoint names what is in the layers; Megatron has written all four combinations."""

    layer_by_layer: bool = False
    """Keys number the layers also where all are alike; otherwise those are slices of one tensor."""
    local_experts: bool = False
    """The norm before experts is named as the local spec (``--transformer-impl local``) names it: as if it were fused
    into a dense MLP. Transformer Engine's spec leaves it a name of its own. In all else they agree."""

    @classmethod
    def of(cls, keys: Iterable[str]) -> KeyStyle:
        """Return the style of a checkpoint with these keys."""
        keys = [key for key in keys if key.startswith("decoder.layers.")]
        experts = any(".mlp.experts." in key for key in keys)
        return cls(
            layer_by_layer=any(key.split(".")[2].isdecimal() for key in keys),
            local_experts=experts and not any(".pre_mlp_layernorm." in key for key in keys),
        )


DEFAULT_KEYS = KeyStyle()
"""What this package writes, and Megatron with Transformer Engine."""


def sharded_state(model: Any, style: KeyStyle = DEFAULT_KEYS) -> dict[str, Any]:
    """Return the sharded state dict of a ``GPTModel``, with the keys of a style."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    metadata = {"non_homogeneous_layers": True} if style.layer_by_layer else None
    state: dict[str, Any] = model.sharded_state_dict(metadata=metadata)
    if style.local_experts:
        for entry in nested_values(state):
            if hasattr(entry, "key"):
                entry.key = entry.key.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
    return state


def pieces_of(model: nn.Module, style: KeyStyle = DEFAULT_KEYS) -> dict[int, list[Any]]:
    """Return Megatron's ``ShardedTensor`` descriptors of every parameter, by :func:`storage_id`.

    Args:
        model: from :func:`shapes_only_model`.
        style: of the keys.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = sharded_state(model, style)
    apply_factories(state)
    pieces: dict[int, list[Any]] = {}
    for piece in nested_values(state):
        if isinstance(piece, ShardedTensor):
            pieces.setdefault(storage_id(piece.data), []).append(piece)
    return pieces


def streaming_strategy(
    materialise: Callable[[Tensor], Tensor] | None = None, digests: dict[str, str] | None = None
) -> Any:
    """Return a Megatron save strategy: synchronous, no forks, one file for each rank that has data.

    Args:
        materialise: gives the data of a meta tensor when it is written; not needed for a model with data.
        digests: filled with the sha256 of the files that this rank writes.
    """
    from megatron.core.dist_checkpointing.strategies import torch as megatron_torch
    from torch.distributed import checkpoint

    class Planner(megatron_torch.MCoreSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            data = super().resolve_data(write_item)
            return materialise(data) if materialise and isinstance(data, Tensor) and data.is_meta else data

    class SynchronousSave(megatron_torch.TorchDistSaveShardedStrategy):
        def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
            renamed, _, _ = megatron_torch._replace_state_dict_keys_with_sharded_keys(
                sharded_state_dict, self.keep_only_main_replica
            )
            checkpoint.save(
                megatron_torch.mcore_to_pyt_state_dict(renamed, False),
                storage_writer=_writer(checkpoint_dir, digests),
                planner=Planner(dedup_replicated_tensors=False, flatten_state_dict=False),
            )

    return SynchronousSave("torch_dist", 1)


def _writer(directory: str | Path, digests: dict[str, str] | None) -> Any:
    """Torch's writer with a ``write_data`` that forgets each tensor after writing it; torch's keeps them all."""
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
    from torch.distributed.checkpoint.planner import WriteItemType
    from torch.distributed.checkpoint.storage import WriteResult
    from torch.futures import Future

    hashed = digests is not None

    class Writer(FileSystemWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            results: list[Any] = []
            name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
            items = sorted(plan.items, key=lambda item: item.type != WriteItemType.BYTE_IO)  # stable: objects first
            if items:
                with open(Path(directory) / name, "wb") as raw, closing(HashingStream(raw, hashed=hashed)) as stream:
                    for item in items:
                        begin = stream.tell()
                        _write(planner.resolve_data(item), stream)
                        length = stream.tell() - begin
                        info = _StorageInfo(name, begin, length)
                        results.append(WriteResult(index=item.index, size_in_bytes=length, storage_data=info))
                    digest = stream.finish()
                if digests is not None:
                    digests[name] = digest
            future: Any = Future()
            future.set_result(results)
            return future

    return Writer(directory, thread_count=1)


def _write(data: Any, stream: Any) -> None:
    if not isinstance(data, Tensor):
        stream.write(data.getbuffer())
        return
    data = data.detach().cpu()
    if data.untyped_storage().size() != data.nbytes:  # a view: torch.save would write all of what it looks at
        data = data.clone(memory_format=torch.contiguous_format)
    torch.save(data, stream)


class ParameterReader:
    """Reads parameters of a whole model, one at a time, from an iteration saved at any layout.

    Args:
        iteration_directory: ``DIR/iter_NNNNNNN``.
        model: from :func:`shapes_only_model`.

    Raises:
        OISDError: a parameter is missing, has another shape, or the checkpoint has parameters that the model lacks.
    """

    def __init__(self, iteration_directory: Path, model: nn.Module) -> None:
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self.directory = iteration_directory
        self._metadata = read_metadata(iteration_directory)
        self._stored: dict[str, Any] = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and key.startswith(MODEL_PREFIXES)
        }
        self._reader = FileSystemReader(iteration_directory)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._pieces = self._choose_pieces(model)
        self._check()
        self._index: dict[str, dict[int, list[Any]] | None] = {}

    @property
    def keys(self) -> list[str]:
        """Keys of the stored parameters."""
        return sorted(self._stored)

    def place(self, parameter: Tensor) -> str:
        """Say where a parameter lies: its key and, in a tensor of all layers, the layer."""
        return describe_place(self._pieces[storage_id(parameter)][0])

    def read(self, parameter: Tensor) -> Tensor:
        """Return the data of a parameter of the shapes-only model, in the stored dtype.

        Rows that only the model's padding has become zero, those that only the checkpoint's has are dropped.
        """
        pieces = self._pieces[storage_id(parameter)]
        dtype = self._stored[pieces[0].key].properties.dtype
        whole = torch.empty(parameter.shape, dtype=dtype)
        for piece in pieces:
            target = whole.as_strided(piece.data.size(), piece.data.stride(), piece.data.storage_offset())
            self._fill(piece, target[(None,) * piece.prepend_axis_num])
        return whole

    def _choose_pieces(self, model: nn.Module) -> dict[int, list[Any]]:
        pieces = pieces_of(model, KeyStyle.of(self._stored))
        absent = sorted({p.key for found in pieces.values() for p in found if p.key not in self._stored})
        if absent:
            raise OISDError(
                f"checkpoint {self.directory} lacks {', '.join(absent[:3])}: it is another model's than its "
                f"hf/config.json describes"
            )
        return pieces

    def _check(self) -> None:
        wanted = {piece.key for found in self._pieces.values() for piece in found}
        extra = sorted(key for key in self._stored if key not in wanted and not key.endswith("_extra_state"))
        if extra:
            raise OISDError(
                f"checkpoint {self.directory} has {', '.join(extra[:3])}, which the model of its hf/config.json lacks"
            )
        for found in self._pieces.values():
            for piece in found:
                stored = tuple(self._stored[piece.key].size)
                if stored != piece.global_shape and not piece.allow_shape_mismatch:
                    raise OISDError(
                        f"checkpoint {self.directory}: {piece.key} has shape {stored}, and its hf/config.json says "
                        f"{piece.global_shape}"
                    )

    def _fill(self, piece: Any, target: Tensor) -> None:
        """Copy what is stored of the region ``piece`` describes into ``target``, which has as many axes."""
        from torch.distributed.checkpoint.metadata import MetadataIndex
        from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

        entry = self._stored[piece.key]
        begin = piece.global_offset
        end = [min(b + s, limit) for b, s, limit in zip(begin, target.shape, entry.size, strict=True)]
        wanted = torch.Size(max(e - b, 0) for b, e in zip(begin, end, strict=True))
        if wanted != target.shape:
            target.zero_()
        items, covered = [], 0
        for chunk in self._chunks(piece.key, begin[0], end[0]):
            low = [max(b, o) for b, o in zip(begin, chunk.offsets, strict=True)]
            high = [min(e, o + s) for e, o, s in zip(end, chunk.offsets, chunk.sizes, strict=True)]
            lengths = torch.Size(h - b for b, h in zip(low, high, strict=True))
            if min(lengths, default=0) <= 0:
                continue
            covered += lengths.numel()
            items.append(
                ReadItem(
                    type=LoadItemType.TENSOR,
                    dest_index=MetadataIndex(piece.key),
                    dest_offsets=torch.Size(a - b for a, b in zip(low, begin, strict=True)),
                    storage_index=MetadataIndex(piece.key, chunk.offsets),
                    storage_offsets=torch.Size(a - o for a, o in zip(low, chunk.offsets, strict=True)),
                    lengths=lengths,
                )
            )
        if covered != wanted.numel():
            raise OISDError(f"checkpoint {self.directory} is damaged: its metadata describes {piece.key} incompletely")
        try:
            self._reader.read_data(LoadPlan(items), _into(target)).wait()
        except Exception as error:
            raise OISDError(
                f"checkpoint {self.directory} is damaged: {piece.key} cannot be read ({brief(error)}); save or convert "
                f"it again, or load another one with --iteration"
            ) from error

    def _chunks(self, key: str, begin: int, end: int) -> Iterator[Any]:
        """Stored chunks of a tensor that may meet ``[begin, end)`` of its first axis, mostly that of layers."""
        chunks = self._stored[key].chunks
        if key not in self._index:
            by_position: dict[int, list[Any]] | None = None
            if all(chunk.sizes[0] == 1 for chunk in chunks):
                by_position = {}
                for chunk in chunks:
                    by_position.setdefault(chunk.offsets[0], []).append(chunk)
            self._index[key] = by_position
        index = self._index[key]
        if index is None:
            yield from chunks
        else:
            for position in range(begin, end):
                yield from index.get(position, ())


def describe_place(piece: Any) -> str:
    """Say where a ``ShardedTensor`` lies: ``key`` or ``key[layer]``."""
    leading = piece.global_offset[: piece.prepend_axis_num]
    return f"{piece.key}[{', '.join(map(str, leading))}]" if leading else str(piece.key)


def _into(target: Tensor) -> Any:
    """A load planner with a single tensor to fill."""
    planner = _planner_class()()
    planner.target = target
    return planner


@functools.cache  # a class is a reference cycle: one for each tensor would keep the tensor until a collection
def _planner_class() -> Any:
    from torch.distributed.checkpoint import DefaultLoadPlanner

    class Planner(DefaultLoadPlanner):
        target: Tensor

        def resolve_tensor(self, read_item: Any) -> Tensor:
            view = self.target
            for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
                view = view.narrow(axis, start, length)
            return view

        def commit_tensor(self, read_item: Any, tensor: Tensor) -> None:
            pass

    return Planner


def materialiser(data_of: Mapping[int, Callable[[], Tensor]]) -> Callable[[Tensor], Tensor]:
    """Return a function that gives the data of any view of a shapes-only parameter.

    Args:
        data_of: makes the data of a whole parameter, by :func:`storage_id`. The one made last is kept, since the
            pieces of a parameter follow each other.
    """
    last: dict[int, Tensor] = {}

    def materialise(view: Tensor) -> Tensor:
        key = storage_id(view)
        if key not in last:
            last.clear()
            last[key] = data_of[key]()
        whole = last[key]
        # The data may itself be a view, of a tensor that holds all experts.
        return whole.as_strided(view.size(), view.stride(), whole.storage_offset() + view.storage_offset())

    return materialise
