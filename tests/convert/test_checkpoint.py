"""Checkpoints on disk: loaded at any layout, written atomically, refused with one line where damaged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_oisd.convert import checkpoint
from megatron_oisd.convert.checkpoint import latest_iteration, load_model, read_arguments, save_model, stored_dtype
from megatron_oisd.convert.families import arguments_from_hf_config
from megatron_oisd.convert.hf_files import SafetensorsDirectory, read_hf_config, tokenizer_size
from megatron_oisd.convert.hf_to_mcore import convert_hf_to_mcore
from megatron_oisd.convert.manifest import MANIFEST
from megatron_oisd.convert.output import LATEST, replace_directory
from megatron_oisd.convert.weights import load_hf_weights
from megatron_oisd.errors import OISDError
from tests.helpers.checkpoints import build_chunks, differences, export, make_hf_checkpoint, make_tokenizer
from tests.helpers.ranks import run_ranks


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    root = tmp_path_factory.mktemp("hf")
    return {
        tied: make_hf_checkpoint(root / f"tied{tied}", tied=tied, tokenizer=True, shard_size="100KB")
        for tied in (True, False)
    }


@pytest.fixture(scope="module")
def mcore(hf: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Saved at TP 1, PP 1."""
    root = tmp_path_factory.mktemp("mcore")
    for tied, source in hf.items():
        convert_hf_to_mcore(source, root / f"tied{tied}", verify=False, progress=False)
    return {tied: root / f"tied{tied}" for tied in hf}


def _load_and_save(
    source: Path, hf: Path, target: Path | None, layout: tuple[int, int, int | None]
) -> tuple[list[str], bool]:
    """Load at a layout, compare with HF, save again; return what was wrong and whether every value was filled.

    Ranks are daemonic processes, in which a strategy that starts writer processes would fail.
    """
    tp, pp, vpp = layout
    arguments = read_arguments(source)
    chunks = build_chunks(arguments, tp=tp, pp=pp, vpp=vpp)
    load_model(chunks, source)
    wrong = differences(export(chunks, arguments), dict(SafetensorsDirectory(hf)))
    clean = all(not p.isnan().any() for chunk in chunks for p in chunk.parameters())
    if target is not None:
        save_model(chunks, target, 7, arguments, hf_source=hf, extra_state={"note": [1, "two"]})
    return wrong, clean


@pytest.mark.parametrize(
    ("tied", "layout"),
    [
        (True, (2, 1, None)),
        (True, (1, 2, None)),
        (True, (2, 2, None)),
        (False, (2, 2, None)),
        (False, (1, 2, 2)),
    ],
)
def test_saved_at_one_layout_loaded_at_another_and_back(
    tied: bool, layout: tuple[int, int, int | None], hf: dict[bool, Path], mcore: dict[bool, Path], tmp_path: Path
) -> None:
    ranks = layout[0] * layout[1]
    for wrong, clean in run_ranks(ranks, _load_and_save, mcore[tied], hf[tied], tmp_path / "again", layout):
        assert wrong == []
        assert clean
    # Padding shrinks on the way back to TP 1.
    ((wrong, clean),) = run_ranks(1, _load_and_save, tmp_path / "again", hf[tied], None, (1, 1, None))
    assert wrong == []
    assert clean
    assert latest_iteration(tmp_path / "again") == 7
    assert stored_dtype(tmp_path / "again") == torch.float32
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == ["hf", "iter_0000007", LATEST]
    assert tokenizer_size(tmp_path / "again" / "hf") == 290


def _extra_state(hf: Path, directory: Path) -> tuple[Any, ...]:
    from megatron.core.dist_checkpointing import ShardedTensor

    arguments = arguments_from_hf_config(read_hf_config(hf))
    chunks = build_chunks(arguments, tp=1, pp=1)
    load_hf_weights(chunks, arguments, SafetensorsDirectory(hf))
    moments = torch.arange(6.0)
    extra: dict[str, Any] = {"optimizer": {"m": ShardedTensor.from_rank_offsets("optimizer.m", moments)}, "seed": 3}
    save_model(chunks, directory, 1, arguments, hf_source=hf, extra_state=extra)
    save_model(chunks, directory, 2, arguments)
    save_model(chunks, directory, 2, arguments, extra_state={"seed": 4})  # replaces
    target = torch.zeros(6)
    template = {"optimizer": {"m": ShardedTensor.from_rank_offsets("optimizer.m", target)}}
    first = load_model(chunks, directory, 1, extra_state=template)
    second = load_model(chunks, directory)
    try:
        load_model(chunks, directory, 2, extra_state=template)
        lacking = "loaded"
    except OISDError as error:
        lacking = str(error)
    args = first["args"]
    return (
        first["optimizer"]["m"].tolist(), first["seed"], first["iteration"], second["seed"], second["iteration"],
        args.padded_vocab_size, args.tensor_model_parallel_size, lacking, sorted(second),
    )  # fmt: skip


def test_extra_state_comes_back(hf: dict[bool, Path], tmp_path: Path) -> None:
    ((moments, seed, iteration, seed2, iteration2, padded, tp, lacking, names),) = run_ranks(
        1, _extra_state, hf[True], tmp_path / "out"
    )
    assert moments == [0, 1, 2, 3, 4, 5]
    assert (seed, iteration, seed2, iteration2) == (3, 1, 4, 2)
    assert (padded, tp) == (384, 1)
    assert "lacks optimizer.m" in lacking
    assert names == ["args", "checkpoint_version", "iteration", "seed"]
    assert latest_iteration(tmp_path / "out") == 2


def _killed_while_writing(hf: Path, directory: Path) -> str:
    from megatron.core import dist_checkpointing

    arguments = arguments_from_hf_config(read_hf_config(hf))
    chunks = build_chunks(arguments, tp=1, pp=1)
    load_hf_weights(chunks, arguments, SafetensorsDirectory(hf))
    save_model(chunks, directory, 1, arguments, hf_source=hf)
    original = dist_checkpointing.save

    def dies(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        raise OSError(28, "No space left on device")

    dist_checkpointing.save = dies
    try:
        save_model(chunks, directory, 2, arguments)
    except OISDError as error:
        return str(error)
    finally:
        dist_checkpointing.save = original
    return "saved"


def test_failed_save_leaves_the_last_one_in_force(hf: dict[bool, Path], tmp_path: Path) -> None:
    (message,) = run_ranks(1, _killed_while_writing, hf[True], tmp_path / "out")
    assert "No space left on device" in message
    assert "iter_0000002" in message
    assert latest_iteration(tmp_path / "out") == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["hf", "iter_0000001", LATEST]


def _messages(directories: list[Path], good: Path) -> list[str]:
    arguments = read_arguments(good)
    chunks = build_chunks(arguments, tp=1, pp=1)
    messages = []
    for directory in directories:
        try:
            load_model(chunks, directory)
            messages.append("loaded")
        except OISDError as error:
            messages.append(str(error))
    return messages


def test_damaged_checkpoints_are_refused_with_one_line(mcore: dict[bool, Path], tmp_path: Path) -> None:
    def damaged(name: str) -> Path:
        path = Path(shutil.copytree(mcore[True], tmp_path / name)) / "iter_0000000"
        (path / MANIFEST).unlink()  # it would see nearly all of it; training checkpoints have none
        return path

    cases: dict[str, list[str]] = {}
    next(damaged("deleted").glob("*.distcp")).unlink()
    cases["deleted"] = [".distcp is missing"]
    data = next(damaged("truncated").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1000])
    cases["truncated"] = [".distcp has", "bytes, expected"]
    data = next(damaged("garbage").glob("*.distcp"))
    data.write_bytes(b"\0" * data.stat().st_size)
    cases["garbage"] = ["cannot be loaded", "damaged"]
    has_common = (mcore[True] / "iter_0000000" / "common.pt").is_file()  # until Megatron-Core 0.18
    for name in (".metadata", "metadata.json", *(["common.pt"] if has_common else [])):
        (damaged(f"no{name}") / name).unlink()
        cases[f"no{name}"] = [f"{name} is missing"]
    (damaged("bad metadata") / ".metadata").write_bytes(b"not a pickle")
    cases["bad metadata"] = ["metadata cannot be read"]
    (damaged("bad common") / "common.pt").write_bytes(b"not a pickle")
    cases["bad common"] = ["cannot be loaded", "damaged"]
    shutil.rmtree(damaged("no iteration"))
    cases["no iteration"] = ["iter_0000000 does not exist", "no iterations at all"]
    (damaged("no latest").parent / LATEST).unlink()
    cases["no latest"] = [LATEST, "convert_hf_to_mcore"]
    (damaged("bad latest").parent / LATEST).write_text("newest")
    cases["bad latest"] = ["'newest'", "iteration number"]
    cases["absent"] = ["is not a Megatron checkpoint"]

    (messages,) = run_ranks(1, _messages, [tmp_path / name for name in cases], mcore[True])
    for (name, words), message in zip(cases.items(), messages, strict=True):
        assert "\n" not in message, name
        assert str(tmp_path / name) in message
        for word in words:
            assert word in message, name


def test_a_checkpoint_of_a_newer_megatron_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.dist_checkpointing import serialization

    monkeypatch.setattr(serialization, "_legacy_common_state_exists", None, raising=False)
    checkpoint._check_common_state(tmp_path, {"common_state/shard_0_1": None}, "cure")
    monkeypatch.delattr(serialization, "_legacy_common_state_exists")
    with pytest.raises(OISDError, match=r"megatron-core 0\.19 or newer"):
        checkpoint._check_common_state(tmp_path, {"common_state/shard_0_1": None}, "cure")
    with pytest.raises(OISDError, match=r"common\.pt is missing; cure"):
        checkpoint._check_common_state(tmp_path, {"model": None}, "cure")
    (tmp_path / "common.pt").touch()
    checkpoint._check_common_state(tmp_path, {"model": None}, "cure")


def test_every_rank_of_a_damaged_load_fails(mcore: dict[bool, Path], tmp_path: Path) -> None:
    data = next((Path(shutil.copytree(mcore[True], tmp_path / "bad")) / "iter_0000000").glob("*.distcp"))
    data.write_bytes(b"\0" * data.stat().st_size)
    for (message,) in run_ranks(2, _messages_at_pp2, [tmp_path / "bad"], mcore[True]):
        assert "cannot be loaded" in message
        assert "\n" not in message


def _messages_at_pp2(directories: list[Path], good: Path) -> list[str]:
    chunks = build_chunks(read_arguments(good), tp=1, pp=2)
    messages = []
    for directory in directories:
        try:
            load_model(chunks, directory)
            messages.append("loaded")
        except OISDError as error:
            messages.append(str(error))
    return messages


def _other_model(good: Path, other: Path) -> list[str]:
    chunks = build_chunks(read_arguments(other), tp=1, pp=1)
    try:
        load_model(chunks, good)
    except OISDError as error:
        return [str(error)]
    return ["loaded"]


def test_checkpoint_of_another_model_is_refused(mcore: dict[bool, Path], tmp_path: Path) -> None:
    for change in ({"num_hidden_layers": 6}, {"intermediate_size": 128}):
        other = tmp_path / str(change)
        hf = make_hf_checkpoint(tmp_path / f"hf{change}", tied=True, **change)
        (other / "hf").mkdir(parents=True)
        shutil.copy(hf / "config.json", other / "hf")
        ((message,),) = run_ranks(1, _other_model, mcore[True], other)
        assert "cannot be loaded" in message
        assert "\n" not in message


def test_arguments_need_the_hf_directory(mcore: dict[bool, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(mcore[True], tmp_path / "copy"))
    (copy / "hf" / "config.json").write_text("{")
    with pytest.raises(OISDError, match="not valid JSON"):
        read_arguments(copy)
    (copy / "hf" / "config.json").unlink()
    with pytest.raises(OISDError, match=r"config\.json cannot be read"):
        read_arguments(copy)
    shutil.rmtree(copy / "hf")
    with pytest.raises(OISDError, match="has no hf/"):
        read_arguments(copy)


def test_damaged_safetensors_are_refused(hf: dict[bool, Path], tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(hf[True], tmp_path / name))

    directory = copy("truncated")
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(OISDError, match=f"{shard.name} is damaged"):
        SafetensorsDirectory(directory)
    shard.unlink()
    with pytest.raises(OISDError, match=f"{shard.name} is missing"):
        SafetensorsDirectory(directory)
    directory = copy("index")
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model.norm.weight", "model.norm.weigth"))
    with pytest.raises(OISDError, match=r"has model\.norm\.weight, which .* does not list"):
        SafetensorsDirectory(directory)
    index.write_text("[]")
    with pytest.raises(OISDError, match="not a valid safetensors index"):
        SafetensorsDirectory(directory)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").touch()
    with pytest.raises(OISDError, match="only pickled weights"):
        SafetensorsDirectory(tmp_path / "pickled")
    with pytest.raises(OISDError, match="no weights"):
        SafetensorsDirectory(tmp_path / "nothing")


def test_tokenizer_larger_than_the_model_is_refused(hf: dict[bool, Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(hf[True], tmp_path / "large"))
    make_tokenizer(301).save_pretrained(directory)
    with pytest.raises(OISDError, match="301 tokens and the model 300 rows"):
        convert_hf_to_mcore(directory, tmp_path / "out", progress=False)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(OISDError, match=r"tokenizer in .* cannot be loaded"):
        tokenizer_size(directory)
    assert not (tmp_path / "out").exists()


def test_replaced_directory_is_never_half_of_each(tmp_path: Path) -> None:
    for name in ("work", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_directory(tmp_path / "work", tmp_path / "target")
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
    assert [p.name for p in (tmp_path / "target").iterdir()] == ["work"]
