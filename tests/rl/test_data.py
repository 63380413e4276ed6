"""Prompt files: what is read, what is refused and how the refusal reads; tokenising; the sampler's determinism."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_oisd.errors import OISDError
from megatron_oisd.rl.data import PromptRecord, PromptSampler, load_prompts, tokenize_prompts

DATA = Path(os.environ.get("OISD_DATA", Path(__file__).resolve().parents[2] / ".." / "shared" / "data"))
USER = {"role": "user", "content": "1+1?"}


def parquet_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), path)
    return path


def jsonl_file(path: Path, *entries: Any) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def parquet_row(index: int | None = 0, **changes: Any) -> dict[str, Any]:
    return {
        "data_source": "toy",
        "prompt": [USER],
        "reward_model": {"ground_truth": "2"},
        "extra_info": {"index": index},
        **changes,
    }


def test_parquet_rows_become_records(tmp_path: Path) -> None:
    rows = [parquet_row(7), parquet_row(3, reward_model={"ground_truth": "½"}, data_source=None)]
    records = load_prompts(parquet_file(tmp_path / "toy set.parquet", rows))
    assert records[0] == PromptRecord("7", [USER], "2", "toy")
    assert (records[1].id, records[1].ground_truth, records[1].data_source) == ("3", "½", "toy set")


def test_placeholder_indices_give_row_numbers(tmp_path: Path) -> None:
    rows = [parquet_row(-1), parquet_row(None), parquet_row(1)]
    assert [record.id for record in load_prompts(parquet_file(tmp_path / "a.parquet", rows))] == ["row-1", "row-2", "1"]


def test_jsonl_accepts_both_keys_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = jsonl_file(
        tmp_path / "toy.jsonl",
        {"messages": [USER], "ground_truth": 2, "id": "first", "data_source": "mine"},
        {"prompt": [USER], "ground_truth": " x\u2028y"},
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\n"))
    first, second = load_prompts(path)
    assert first == PromptRecord("first", [USER], "2", "mine")
    assert (second.id, second.data_source, second.ground_truth) == ("row-3", "toy", " x\u2028y")


def test_system_prompt_is_added_only_where_there_is_none(tmp_path: Path) -> None:
    own = {"role": "system", "content": "own"}
    path = jsonl_file(
        tmp_path / "a.jsonl",
        {"messages": [USER], "ground_truth": "2"},
        {"messages": [own, USER], "ground_truth": "2"},
    )
    first, second = load_prompts(path, system_prompt="given")
    assert first.messages == [{"role": "system", "content": "given"}, USER]
    assert second.messages == [own, USER]


GOOD = {"messages": [USER], "ground_truth": "2"}


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"messages": [USER]}, "no ground truth"),
        ({"messages": [USER], "ground_truth": "  "}, "no ground truth"),
        ({"messages": [USER], "ground_truth": 0.5}, "ground truth is a float"),
        ({"messages": [USER], "ground_truth": True}, "ground truth is a bool"),
        ({"messages": "1+1?", "ground_truth": "2"}, "prompt is a str"),
        ({"messages": [], "ground_truth": "2"}, "prompt is empty"),
        ({"messages": ["1+1?"], "ground_truth": "2"}, "message 1 has no role"),
        ({"messages": [{"role": "user"}], "ground_truth": "2"}, "message 1 has no role"),
        ({"messages": [{"role": "human", "content": "x"}], "ground_truth": "2"}, "'human'"),
        ({"messages": [USER, {"role": "assistant", "content": "2"}], "ground_truth": "2"}, "must end with the user's"),
        ({"question": "1+1?", "ground_truth": "2"}, "no key 'messages'"),
        ({"messages": [USER], "ground_truth": "2", "id": [1]}, "id is a list"),
        ({"messages": [USER], "ground_truth": "2", "data_source": 4}, "data_source is a int"),
        ({"messages": [{"role": "user", "content": "\ud800"}], "ground_truth": "2"}, "not UTF-8"),
        ([1, 2], "a JSON list"),
        (
            {"messages": [{"role": "user", "content": "x" * 10 * 2**20}], "ground_truth": "2"},
            "a prompt of 10,485,760 characters, expected at most 1,000,000",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_row_is_named(tmp_path: Path, entry: Any, said: str) -> None:
    path = jsonl_file(tmp_path / "bad.jsonl", GOOD, entry)
    with pytest.raises(OISDError) as raised:
        load_prompts(path)
    message = str(raised.value)
    assert said in message
    assert message.startswith(f"{path}: row 2: ")
    assert "\n" not in message


def test_bad_files_are_named(tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(OISDError) as raised:
            load_prompts(path)
        message = str(raised.value)
        assert str(path) in message
        assert "\n" not in message
        return message

    assert "no such file" in refused(tmp_path / "absent.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    assert "no such file" in refused(tmp_path / "folder.jsonl")
    (tmp_path / "a.csv").write_text("x")
    assert "'.csv'" in refused(tmp_path / "a.csv")
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "holds no prompts" in refused(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\n" + json.dumps(GOOD).encode() + b"\n\xe9\n")
    assert "row 3: byte 0 is not UTF-8" in refused(tmp_path / "latin.jsonl")
    (tmp_path / "cut.jsonl").write_text('{"messages": [')
    assert "row 1: not a JSON object" in refused(tmp_path / "cut.jsonl")
    twice = jsonl_file(tmp_path / "twice.jsonl", {**GOOD, "id": "a"}, {**GOOD, "id": "b"}, {**GOOD, "id": "a"})
    message = refused(twice)
    assert "row 3: id 'a' was used by row 1" in message


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    good = parquet_file(tmp_path / "good.parquet", [parquet_row()])
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(good.read_bytes()[:-20])
    with pytest.raises(OISDError, match=r"cut\.parquet: not a readable parquet file"):
        load_prompts(cut)
    (tmp_path / "zero.parquet").write_bytes(b"")
    with pytest.raises(OISDError, match=r"zero\.parquet: not a readable parquet file"):
        load_prompts(tmp_path / "zero.parquet")
    with pytest.raises(OISDError, match=r"no column 'reward_model' \(columns: answer, prompt\)"):
        load_prompts(parquet_file(tmp_path / "columns.parquet", [{"answer": "2", "prompt": [USER]}]))
    rows = [parquet_row(0), parquet_row(1, reward_model={"ground_truth": None})]
    with pytest.raises(OISDError, match="row 2: no ground truth"):
        load_prompts(parquet_file(tmp_path / "truth.parquet", rows))
    with pytest.raises(OISDError, match="row 1: the prompt is a str"):
        load_prompts(parquet_file(tmp_path / "text.parquet", [parquet_row(prompt="1+1?")]))
    with pytest.raises(OISDError, match="row 2: id '4' was used by row 1"):
        load_prompts(parquet_file(tmp_path / "twice.parquet", [parquet_row(4), parquet_row(4)]))


def test_parquet_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    # Arrow itself does not check: bytes of another encoding can sit in a string column.
    buffer = arrow.py_buffer(b"ok\xe9t\xe9")
    offsets = arrow.array([0, 2, 5], type=arrow.int32()).buffers()[1]
    sources = arrow.StringArray.from_buffers(2, offsets, buffer)
    table = arrow.Table.from_pylist([parquet_row(0), parquet_row(1)]).set_column(0, "data_source", sources)
    pyarrow.parquet.write_table(table, tmp_path / "latin.parquet")
    with pytest.raises(OISDError, match="row 2: text that is not UTF-8"):
        load_prompts(tmp_path / "latin.parquet")


@pytest.mark.skipif(not DATA.is_dir(), reason="the public problem sets are not here (OISD_DATA)")
@pytest.mark.parametrize(
    ("name", "rows"), [("deepmath-5k", 5000), ("math500", 500), ("amc2023", 40), ("aime_2024", 30), ("aime_2025", 30)]
)
def test_the_papers_problem_sets_load(name: str, rows: int) -> None:
    records = load_prompts(DATA / f"{name}.parquet", system_prompt="not used: the files bring their own")
    assert len(records) == rows
    assert len({record.id for record in records}) == rows
    assert all([message["role"] for message in record.messages] == ["system", "user"] for record in records)
    assert all("\\boxed{}" in record.messages[0]["content"] for record in records)


class ToyTokenizer:
    """One token per character, marked as the transformers interface asks."""

    chat_template: str | None = "toy"

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool, **options: Any
    ) -> list[int]:
        assert tokenize
        assert options.pop("return_dict") is False
        if any(message["role"] == "system" for message in messages):
            raise ValueError("no system\nrole")
        text = "".join(message["content"] for message in messages) + "x" * options.pop("extra", 0)
        assert not options
        return [ord(letter) for letter in text] + ([-1] if add_generation_prompt else [])


def records_of(*texts: str, role: str = "user") -> list[PromptRecord]:
    return [PromptRecord(str(i), [{"role": role, "content": text}], "2", "toy") for i, text in enumerate(texts)]


def test_long_prompts_are_dropped_and_counted() -> None:
    kept, dropped = tokenize_prompts(records_of("abc", "abcd", "ab"), ToyTokenizer(), max_prompt_tokens=4)
    assert dropped == 1
    assert [(prompt.record.id, prompt.token_ids) for prompt in kept] == [("0", [97, 98, 99, -1]), ("2", [97, 98, -1])]


def test_template_arguments_reach_the_template() -> None:
    (prompt,), _ = tokenize_prompts(
        records_of("a"), ToyTokenizer(), max_prompt_tokens=9, template_arguments={"extra": 2}
    )
    assert prompt.token_ids == [97, 120, 120, -1]


def test_tokenizing_refusals() -> None:
    with pytest.raises(OISDError, match="none of the 2 prompts; the shortest has 3 tokens"):
        tokenize_prompts(records_of("abc", "ab"), ToyTokenizer(), max_prompt_tokens=2)
    with pytest.raises(OISDError, match=r"prompt '0': .* refuses it \(no system role\)"):
        tokenize_prompts(records_of("a", role="system"), ToyTokenizer(), max_prompt_tokens=9)
    bare = ToyTokenizer()
    bare.chat_template = None
    with pytest.raises(OISDError, match="no chat template"):
        tokenize_prompts(records_of("a"), bare, max_prompt_tokens=9)


def test_a_transformers_tokenizer_gives_plain_token_ids() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("jinja2")

    words = {word: i for i, word in enumerate(["[UNK]", "user:", "one", "two", "assistant:"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    kept, dropped = tokenize_prompts(records_of("one two", "one two two"), tokenizer, max_prompt_tokens=4)
    assert dropped == 1
    assert kept[0].token_ids == [1, 2, 3, 4]


def test_sampler_covers_an_epoch_without_repeats() -> None:
    sampler = PromptSampler(12, 4, seed=0)
    for epoch in range(3):
        drawn = [index for step in range(3) for index in sampler.step(3 * epoch + step)]
        assert sorted(drawn) == list(range(12))
    assert sampler.step(0) + sampler.step(1) != sampler.step(3) + sampler.step(4)


def test_sampler_needs_no_state() -> None:
    steps = [PromptSampler(50, 8, seed=3).step(i) for i in range(20)]
    resumed = PromptSampler(50, 8, seed=3)
    assert [resumed.step(i) for i in reversed(range(20))] == steps[::-1]
    assert [PromptSampler(50, 8, seed=4).step(i) for i in range(20)] != steps


def test_sampler_order_is_fixed_for_ever() -> None:
    # A change here would make a resumed run train on other prompts than the one it continues.
    assert PromptSampler(7, 3, seed=42).step(5) == [5, 4, 1]


def test_sampler_leaves_a_different_remainder_out_each_time() -> None:
    sampler = PromptSampler(10, 4, seed=1)
    assert sampler.steps_per_epoch == 2
    counts: Counter[int] = Counter()
    for step in range(200):
        indices = sampler.step(step)
        assert len(set(indices)) == 4
        counts.update(indices)
    # 100 epochs, each prompt in with probability 8/10: 80 expected, standard deviation 4.
    assert all(60 <= counts[index] <= 100 for index in range(10))


@pytest.mark.parametrize("per_step", [0, -1, 6])
def test_sampler_refuses_an_impossible_step(per_step: int) -> None:
    with pytest.raises(OISDError, match=f"prompts_per_step {per_step}"):
        PromptSampler(5, per_step, seed=0)
