"""Inputs that are broken or made to harm: each is refused with one clear line, and nothing is written."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_oisd.convert.checkpoint import whole_iteration
from megatron_oisd.convert.hf_files import SafetensorsDirectory
from megatron_oisd.convert.hf_to_mcore import convert_hf_to_mcore
from megatron_oisd.convert.manifest import MANIFEST
from megatron_oisd.convert.mcore_to_hf import convert_mcore_to_hf
from megatron_oisd.convert.safe_pickle import read_metadata
from megatron_oisd.convert.safetensors_io import INDEX
from megatron_oisd.errors import OISDError
from tests.helpers.checkpoints import make_hf_checkpoint

FIRST = "model.layers.0.self_attn.q_proj.weight"


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("good")
    one = make_hf_checkpoint(root / "one", tied=True, tokenizer=True)
    convert_hf_to_mcore(one, root / "mcore", verify="none", progress=False)
    (root / "mcore" / "iter_0000000" / MANIFEST).unlink()
    sharded = make_hf_checkpoint(root / "sharded", tied=True, tokenizer=True, shard_size="100KB")
    return {"one": one, "sharded": sharded, "mcore": root / "mcore"}


def _header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _write(path: Path, header: bytes | dict[str, Any], data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the header of model.safetensors."""

    def apply(directory: Path) -> None:
        path = directory / "model.safetensors"
        header, data = _header(path)
        change(header)
        _write(path, header, data)

    return apply


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Change the tensors of model.safetensors."""

    def apply(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    return apply


def _raw(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return apply


def _text(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        (directory / name).write_text(change((directory / name).read_text()))

    return apply


def _config(**changes: Any) -> Callable[[Path], None]:
    return _text("config.json", lambda text: json.dumps(json.loads(text) | changes))


def _torch_save(directory: Path) -> None:
    torch.save({"bomb": Bomb(directory / "exploded")}, directory / "model.safetensors")


def _plain_pickle(protocol: int) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        content = [Bomb(directory / "exploded"), "x" * 10**6]
        (directory / "model.safetensors").write_bytes(pickle.dumps(content, protocol=protocol))

    return apply


def _pickles_only(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save({"bomb": Bomb(directory / "exploded")}, directory / "pytorch_model.bin")


def _link_out(directory: Path) -> None:
    outside = directory.parent / f"{directory.name} outside.safetensors"
    shutil.move(directory / "model.safetensors", outside)
    (directory / "model.safetensors").symlink_to(outside)


def _tokenizer_link(directory: Path) -> None:
    secret = directory.parent / f"{directory.name} secret"
    secret.write_text("{}")
    (directory / "chat_template.json").symlink_to(secret)


def _repeat_in_header(directory: Path) -> None:
    path = directory / "model.safetensors"
    header, data = _header(path)
    text = json.dumps(header)
    entry = json.dumps(header[FIRST])
    _write(path, (text[:-1] + f', "{FIRST}": {entry}}}').encode(), data)


ONE: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (_raw(lambda data: b""), "0 bytes are no safetensors"),
    "truncated in the length": (_raw(lambda data: data[:5]), "5 bytes are no safetensors"),
    "truncated in the header": (_raw(lambda data: data[:100]), "header claims"),
    "truncated in the data": (_raw(lambda data: data[:-100]), "its header describes"),
    "longer than it says": (_raw(lambda data: data + b"\0"), "its header describes"),
    "header of 2^63 bytes": (_raw(lambda data: b"\xff" * 7 + b"\x7f" + data[8:]), "header claims"),
    "header of 100 GB": (_raw(lambda data: struct.pack("<Q", 10**11) + data[8:]), "header claims"),
    "header is no JSON": (_raw(lambda data: struct.pack("<Q", 8) + b"nonsense" + data[8:]), "not valid JSON"),
    "header is a list": (_raw(lambda data: struct.pack("<Q", 2) + b"[]"), "no JSON object"),
    "header is nested": (_raw(lambda data: struct.pack("<Q", 10**5) + b"[" * 10**5), "not valid JSON"),
    "header is not UTF-8": (_raw(lambda data: struct.pack("<Q", 4) + b"\xff\xfe{}"), "not valid JSON"),
    "name twice in the header": (_repeat_in_header, f"names {FIRST} twice"),
    "shape is no list": (_edit(lambda h: h[FIRST].update(shape="64")), f"describes {FIRST} wrongly"),
    "negative shape": (_edit(lambda h: h[FIRST].update(shape=[-1, -8192])), f"describes {FIRST} wrongly"),
    "shape of booleans": (_edit(lambda h: h[FIRST].update(shape=[True, 8192])), f"describes {FIRST} wrongly"),
    "enormous shape": (_edit(lambda h: h[FIRST].update(shape=[2**62, 2**62])), "needs"),
    "offsets beyond the file": (_edit(lambda h: h[FIRST].update(data_offsets=[10**12, 10**12 + 32768])), "begins at"),
    "offsets backwards": (_edit(lambda h: h[FIRST]["data_offsets"].reverse()), "needs"),
    "overlapping tensors": (
        _edit(lambda h: h["model.layers.0.self_attn.o_proj.weight"].update(data_offsets=h[FIRST]["data_offsets"])),
        "begins at",
    ),
    "unknown dtype": (_edit(lambda h: h[FIRST].update(dtype="Q4_K")), "'Q4_K', expected one of F32"),
    "dtype is a list": (_edit(lambda h: h[FIRST].update(dtype=["F32"])), "expected one of F32"),
    "int8": (_tensors(lambda t: t.update({FIRST: t[FIRST].to(torch.int8)})), "stored as I8, expected one of"),
    "fp8": (_tensors(lambda t: t.update({FIRST: t[FIRST].to(torch.float8_e4m3fn)})), "stored as F8_E4M3"),
    "transposed": (_tensors(lambda t: t.update({FIRST: t[FIRST].t().contiguous()})), r"has shape \(64, 128\)"),
    "missing tensor": (_tensors(lambda t: t.pop(FIRST)), f"lacks {FIRST}"),
    "extra tensor": (_tensors(lambda t: t.update(extra=torch.zeros(1))), "has extra, which Qwen3ForCausalLM does not"),
    "torch.save under a safetensors name": (_torch_save, "is a pickle file"),
    "pickle 2 under a safetensors name": (_plain_pickle(2), "is a pickle file"),
    "pickle 4 under a safetensors name": (_plain_pickle(4), "is a pickle file"),
    "pickles only": (_pickles_only, "only pickled weights"),
    "weights are a link out": (_link_out, "is a link to"),
    "another file is a link out": (_tokenizer_link, "is a link to"),
    "both a file and an index": (lambda d: (d / INDEX).write_text('{"weight_map": {}}') and None, "has both"),
    "config: no JSON": (_text("config.json", lambda text: text[:-30]), "not valid JSON"),
    "config: a list": (_text("config.json", lambda text: "[]"), "no JSON object"),
    "config: NaN": (_text("config.json", lambda text: text.replace("20000.0", "NaN")), "NaN is no JSON number"),
    "config: nested": (_text("config.json", lambda text: "[" * 10**5), "not valid JSON"),
    "config: key twice": (_text("config.json", lambda t: t.replace("{", '{"hidden_size": 8,', 1)), "hidden_size twice"),
    "config: other width": (_config(intermediate_size=128), r"config\.json says \(128, 64\)"),
    "config: fewer layers": (_config(num_hidden_layers=3, layer_types=None), "more tensors, which Qwen3For.* does not"),
    "config: more layers": (_config(num_hidden_layers=5, layer_types=None), r"lacks model\.layers\.4"),
    "config: 10^12 layers": (_config(num_hidden_layers=10**12), "1000000000000 layers"),
    "config: 10^12 experts": (
        _config(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", num_local_experts=10**12),
        "4000000000000 layers and experts",
    ),
    "config: 999 layers": (_config(num_hidden_layers=999, layer_types=None), "says 999 layers, and"),
    "config: quantised": (_config(quantization_config={"quant_method": "fp8"}), "quantised"),
    "config: remote code": (_config(architectures=["EvilForCausalLM"], auto_map={"AutoConfig": "evil.C"}), "'EvilFor"),
}  # fmt: skip


def _index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        content = json.loads((directory / INDEX).read_text())
        change(content["weight_map"])
        (directory / INDEX).write_text(json.dumps(content))

    return apply


def _names_outside(name: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        shard = json.loads((directory / INDEX).read_text())["weight_map"][FIRST]
        target = directory / name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(directory / shard, target)
        _index(lambda placed: placed.update({FIRST: str(target) if name.startswith("/") else name}))(directory)

    return apply


def _shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def _repeat_in_index(directory: Path) -> None:
    text = (directory / INDEX).read_text()
    (directory / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{FIRST}": "x",'))


def _same_tensor_in_two_shards(directory: Path) -> None:
    first, second = _shards(directory)[:2]
    tensors = load_file(second)
    name, tensor = next(iter(load_file(first).items()))
    save_file(tensors | {name: tensor}, second)


SHARDED: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing shard": (lambda d: _shards(d)[1].unlink(), "is missing: the checkpoint is incomplete"),
    "tensor missing in its shard": (_index(lambda placed: placed.update(ghost="model-00001-of-00009.safetensors")), ""),
    "tensor that the index does not list": (_index(lambda placed: placed.pop(FIRST)), "does not list"),
    "tensor in two shards": (_same_tensor_in_two_shards, "places in"),
    "name twice in the index": (_repeat_in_index, f"names {FIRST} twice"),
    "path above": (_names_outside("../above.safetensors"), "a file name without a path"),
    "path below": (_names_outside("below/it.safetensors"), "a file name without a path"),
    "absolute path": (_index(lambda placed: placed.update({FIRST: "/etc/passwd"})), "a file name without a path"),
    "path with a zero": (_index(lambda placed: placed.update({FIRST: "a\0b"})), "a file name without a path"),
    "directory itself": (_index(lambda placed: placed.update({FIRST: ".."})), "a file name without a path"),
    "file is a number": (_index(lambda placed: placed.update({FIRST: 3})), "not a valid safetensors index"),
    "index is a list": (_text(INDEX, lambda text: "[]"), "not a valid safetensors index"),
    "index without a map": (_text(INDEX, lambda text: "{}"), "not a valid safetensors index"),
    "index is cut": (_text(INDEX, lambda text: text[:200]), "not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*ONE, *SHARDED])
def test_hf_inputs(case: str, good: dict[str, Path], tmp_path: Path) -> None:
    damage, words = ONE[case] if case in ONE else SHARDED[case]
    directory = Path(shutil.copytree(good["one" if case in ONE else "sharded"], tmp_path / "hf"))
    damage(directory)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(OISDError, match=words) as refusal:
        convert_hf_to_mcore(directory, tmp_path / "out", verify="none", progress=False)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not (directory / "exploded").exists()


def test_links_inside_and_the_hub_cache_are_followed(good: dict[str, Path], tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(good["sharded"].iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert dict(SafetensorsDirectory(snapshot)).keys() == SafetensorsDirectory(good["sharded"]).keys()
    convert_hf_to_mcore(snapshot, tmp_path / "out", verify="none", progress=False)
    inside = tmp_path / "inside"
    inside.mkdir()
    shutil.copy(good["one"] / "model.safetensors", inside / "real.bin")
    (inside / "model.safetensors").symlink_to("real.bin")
    assert len(SafetensorsDirectory(inside)) > 0


# ------------------------------------------------------------------------------------------------- Megatron's side


def _metadata(change: Callable[[Any, Path], Any]) -> Callable[[Path], None]:
    def apply(iteration: Path) -> None:
        metadata = read_metadata(iteration)
        change(metadata, iteration)
        (iteration / ".metadata").write_bytes(pickle.dumps(metadata))

    return apply


def _pieces(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(metadata: Any, iteration: Path) -> None:
        for piece in metadata.storage_data.values():
            change(piece)

    return _metadata(apply)


def _distcp(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(iteration: Path) -> None:
        path = next(iteration.glob("*.distcp"))
        path.write_bytes(change(path.read_bytes()))

    return apply


def _bomb_in_tensor(iteration: Path) -> None:
    """A pickle that runs code where a tensor should be."""
    metadata = read_metadata(iteration)
    stream = io.BytesIO()
    torch.save(Bomb(iteration / "exploded"), stream)
    path = next(iteration.glob("*.distcp"))
    start = path.stat().st_size
    with open(path, "ab") as file:
        file.write(stream.getvalue())
    for index, piece in metadata.storage_data.items():
        if index.fqn.startswith("embedding."):
            piece.offset, piece.length = start, len(stream.getvalue())
    (iteration / ".metadata").write_bytes(pickle.dumps(metadata))


MCORE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no .metadata": (lambda d: (d / ".metadata").unlink(), r"incomplete: \.metadata is missing"),
    "no metadata.json": (lambda d: (d / "metadata.json").unlink(), r"incomplete: metadata\.json is missing"),
    "no .distcp": (lambda d: next(d.glob("*.distcp")).unlink(), r"\.distcp is missing"),
    "truncated .distcp": (_distcp(lambda data: data[:-1]), "bytes, expected"),
    "zeros for data": (_distcp(lambda data: bytes(len(data))), "damaged"),
    "garbage for .metadata": (lambda d: (d / ".metadata").write_bytes(b"x") and None, "metadata cannot be read"),
    "truncated .metadata": (_metadata(lambda m, d: None), ""),
    "code in .metadata": (
        lambda d: (d / ".metadata").write_bytes(pickle.dumps(Bomb(d / "exploded"))) and None,
        r"it names posix\.mkdir, which is no part of the format",
    ),
    "code inside of .metadata": (
        _metadata(lambda m, d: setattr(m, "planner_data", Bomb(d / "exploded"))),
        r"it names posix\.mkdir, which is no part of the format",
    ),
    "code instead of a tensor": (_bomb_in_tensor, "cannot be read"),
    ".metadata is a dict": (lambda d: (d / ".metadata").write_bytes(pickle.dumps({})) and None, "it holds a dict"),
    "data elsewhere": (_pieces(lambda piece: setattr(piece, "relative_path", "../../x")), "outside the directory"),
    "data anywhere": (_pieces(lambda piece: setattr(piece, "relative_path", "/etc/passwd")), "outside the directory"),
    "negative offset": (_pieces(lambda piece: setattr(piece, "offset", -5)), "places data at -5"),
    "parameter missing": (
        _metadata(lambda m, d: m.state_dict_metadata.pop("decoder.final_layernorm.weight")),
        r"lacks decoder\.final_layernorm\.weight",
    ),
    "parameter too many": (
        _metadata(
            lambda m, d: m.state_dict_metadata.update(
                {"mtp.weight": m.state_dict_metadata["decoder.final_layernorm.weight"]}
            )
        ),
        r"has mtp\.weight, which the model of its hf/config\.json lacks",
    ),
    "parameter of another shape": (
        _metadata(
            lambda m, d: setattr(
                m.state_dict_metadata["decoder.final_layernorm.weight"], "size", torch.Size([65])
            )
        ),
        r"has shape \(65,\), and its hf/config\.json says \(64,\)",
    ),
    "parameter of integers": (
        _metadata(
            lambda m, d: setattr(
                m.state_dict_metadata["decoder.final_layernorm.weight"].properties, "dtype", torch.int8
            )
        ),
        r"stores decoder\.final_layernorm\.weight as int8, expected one of F32",
    ),
    "pieces missing": (
        _metadata(lambda m, d: m.state_dict_metadata["decoder.final_layernorm.weight"].chunks.clear()),
        "describes decoder.final_layernorm.weight incompletely",
    ),
    "metadata.json is nonsense": (lambda d: (d / "metadata.json").write_text("[") and None, "metadata cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", MCORE)
def test_megatron_inputs(case: str, good: dict[str, Path], tmp_path: Path) -> None:
    damage, words = MCORE[case]
    directory = Path(shutil.copytree(good["mcore"], tmp_path / "mcore"))
    iteration = directory / "iter_0000000"
    damage(iteration)
    if case == "truncated .metadata":
        data = (iteration / ".metadata").read_bytes()
        (iteration / ".metadata").write_bytes(data[: len(data) // 2])
        words = "metadata cannot be read"
    with pytest.raises(OISDError, match=words) as refusal:
        convert_mcore_to_hf(directory, tmp_path / "out", verify="none", progress=False)
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["mcore"]
    assert not (iteration / "exploded").exists()


def test_layers_beyond_what_is_stored_are_not_built(good: dict[str, Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(good["mcore"], tmp_path / "mcore"))
    (directory / "hf" / MANIFEST).unlink()
    _config(num_hidden_layers=900_000, layer_types=None)(directory / "hf")
    with pytest.raises(OISDError, match=r"says 900000 layers, and .* pieces of tensors: it is another model's"):
        convert_mcore_to_hf(directory, tmp_path / "out", verify="none", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mcore"]


def test_code_in_common_state_does_not_run(good: dict[str, Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(good["mcore"], tmp_path / "mcore"))
    common = directory / "iter_0000000" / "common.pt"
    if not common.is_file():
        pytest.skip("this Megatron-Core keeps plain values among the sharded objects")
    torch.save({"args": Bomb(tmp_path / "exploded")}, common)
    whole_iteration(directory)  # does not open it
    with pytest.raises(OISDError, match="cannot be loaded"):
        convert_mcore_to_hf(directory, tmp_path / "out", verify="logits", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mcore"]


def test_plain_checkpoints_pass_the_list_of_classes(good: dict[str, Path]) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    iteration = good["mcore"] / "iter_0000000"
    ours, theirs = read_metadata(iteration), FileSystemReader(iteration).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
