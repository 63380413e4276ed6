"""Prompts for training and evaluation: reading them, turning them into token ids, choosing those of a step.

Two file forms are read. Parquet in the layout that RL frameworks share: ``prompt`` (a list of ``{"role", "content"}``
messages), ``reward_model.ground_truth``, and optionally ``data_source`` and ``extra_info.index``. JSON lines: one
object per line with ``messages`` (or ``prompt``), ``ground_truth``, and optionally ``id`` and ``data_source``.
Everything a user can get wrong in such a file is reported as an :class:`OISDError` with the file and the row
(counted from 1) before any model is loaded.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_oisd.errors import OISDError

CHAT_EXAMPLE = '[{"role": "user", "content": "..."}]'
ROLES = ("system", "user", "assistant", "tool")
MOST_CHARACTERS = 1_000_000
"""Of a record's messages together: what is longer is a broken export, and templates and tokenizers stall on it."""


@dataclass(frozen=True)
class PromptRecord:
    """One problem: chat messages ending with the user's turn, and the answer its reward is computed against."""

    id: str
    messages: list[dict[str, str]]
    ground_truth: str
    data_source: str


@dataclass(frozen=True)
class TokenizedPrompt:
    """A record and the token ids a rollout starts from, the generation prompt included."""

    record: PromptRecord
    token_ids: list[int]


def load_prompts(path: str | Path, *, system_prompt: str | None = None) -> list[PromptRecord]:
    """Read the problems of a ``.parquet`` or ``.jsonl`` file, in file order.

    Args:
        path: the file.
        system_prompt: put before the messages of every record that has no system message; None adds nothing.

    Returns:
        One record per row. ``id`` is the file's own identifier (``id`` in JSON lines, ``extra_info.index`` in
        parquet) or, where that is absent or negative (a common placeholder), ``row-<number>``.

    Raises:
        OISDError: the file is missing, unreadable, empty or of another type; or a row has no ground truth, a prompt
            that is not chat messages, text that is not UTF-8, or an id used before.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path], Iterator[tuple[str, _RawRow]]]] = {
        ".parquet": _read_parquet,
        ".jsonl": _read_jsonl,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise OISDError(f"{path}: file type {path.suffix!r} is not known; give a .parquet or a .jsonl file")
    if not path.is_file():
        raise OISDError(f"{path}: no such file; check the path to the prompt file")

    records: list[PromptRecord] = []
    seen: dict[str, str] = {}
    for where, raw in reader(path):
        record = _to_record(where, raw, path.stem, system_prompt)
        if record.id in seen:
            raise OISDError(f"{where}: id {record.id!r} was used by {seen[record.id]}; give every row an id of its own")
        seen[record.id] = where.removeprefix(f"{path}: ")
        records.append(record)
    if not records:
        raise OISDError(f"{path}: holds no prompts; a data set needs at least one row")
    return records


def tokenize_prompts(
    records: Sequence[PromptRecord],
    tokenizer: Any,
    *,
    max_prompt_tokens: int,
    template_arguments: Mapping[str, Any] | None = None,
) -> tuple[list[TokenizedPrompt], int]:
    """Apply the tokenizer's chat template, with the generation prompt, and drop what is too long.

    Args:
        records: the problems, order kept.
        tokenizer: a transformers tokenizer that has a chat template.
        max_prompt_tokens: longest prompt kept, in tokens.
        template_arguments: further template variables, for example ``{"enable_thinking": False}`` for Qwen3.

    Returns:
        The prompts that fit, and how many were dropped for their length.

    Raises:
        OISDError: the tokenizer has no chat template, the template refuses a record, or nothing is left.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise OISDError("the tokenizer has no chat template; use an instruction-tuned checkpoint or set chat_template")
    kept: list[TokenizedPrompt] = []
    shortest: int | None = None
    for record in records:
        try:
            # return_dict differs by default between transformers 4 and 5.
            token_ids = tokenizer.apply_chat_template(
                record.messages,
                tokenize=True,
                add_generation_prompt=True,
                return_dict=False,
                **(template_arguments or {}),
            )
        except Exception as error:  # templates are programs of the checkpoint and raise what they like
            raise OISDError(
                f"prompt {record.id!r}: the tokenizer's chat template refuses it ({_one_line(error)}); "
                "change its messages, for example drop the system message"
            ) from error
        shortest = len(token_ids) if shortest is None else min(shortest, len(token_ids))
        if len(token_ids) <= max_prompt_tokens:
            kept.append(TokenizedPrompt(record, list(token_ids)))
    if not kept:
        raise OISDError(
            f"max_prompt_tokens {max_prompt_tokens} leaves none of the {len(records)} prompts; "
            f"the shortest has {shortest or 0} tokens, so raise the limit"
        )
    return kept, len(records) - len(kept)


class PromptSampler:
    """Which prompts each training step uses: a function of (seed, step) alone, so that a resumed run is exact.

    Every epoch is a fresh permutation, cut into whole steps; the remainder of an epoch is left out, so the prompts of
    one step are always distinct, and another remainder falls out next time. The permutation orders the indices by a
    hash of (seed, epoch, index) instead of a library's generator: it is the same on every version and machine.
    """

    def __init__(self, num_prompts: int, prompts_per_step: int, seed: int) -> None:
        if prompts_per_step < 1:
            raise OISDError(f"prompts_per_step {prompts_per_step}: at least 1 is needed")
        if prompts_per_step > num_prompts:
            raise OISDError(
                f"prompts_per_step {prompts_per_step} is more than the {num_prompts} prompts there are; "
                "lower it or use a larger data set"
            )
        self.num_prompts = num_prompts
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self.steps_per_epoch = num_prompts // prompts_per_step

    def step(self, index: int) -> list[int]:
        """Return the prompt indices of step ``index`` (counted from 0): ``prompts_per_step`` distinct numbers."""
        assert index >= 0, index
        epoch, offset = divmod(index, self.steps_per_epoch)
        start = offset * self.prompts_per_step
        return list(_permutation(self.num_prompts, self.seed, epoch)[start : start + self.prompts_per_step])


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    def key(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=16).digest()

    return tuple(sorted(range(size), key=key))


@dataclass(frozen=True)
class _RawRow:
    """What a file holds for one prompt before it is checked."""

    row: int
    id: Any
    prompt: Any
    ground_truth: Any
    data_source: Any


def _read_jsonl(path: Path) -> Iterator[tuple[str, _RawRow]]:
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise OISDError(f"{path}: cannot be read ({_one_line(error)})") from error
    for row, line in enumerate(lines, start=1):
        where = f"{path}: row {row}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise OISDError(f"{where}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise OISDError(f"{where}: not a JSON object ({_one_line(error)}); each line must be one object") from error
        if not isinstance(entry, dict):
            raise OISDError(f"{where}: a JSON {type(entry).__name__}; each line must be one object")
        if "messages" not in entry and "prompt" not in entry:
            keys = ", ".join(sorted(entry)) or "none"
            raise OISDError(f"{where}: no key 'messages' or 'prompt' (keys: {keys}); give the chat messages there")
        prompt = entry["messages"] if "messages" in entry else entry["prompt"]
        yield where, _RawRow(row, entry.get("id"), prompt, entry.get("ground_truth"), entry.get("data_source"))


def _read_parquet(path: Path) -> Iterator[tuple[str, _RawRow]]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise OISDError(f"{path}: reading parquet needs pyarrow; pip install 'megatron_oisd[rl]'") from error
    try:
        # Opened here: pyarrow would read a path such as "s3=1/x.parquet" as a partitioned data set.
        with path.open("rb") as file:
            source = parquet.ParquetFile(file)
            columns = source.schema_arrow.names
            missing = [name for name in ("prompt", "reward_model") if name not in columns]
            if missing:
                raise OISDError(
                    f"{path}: no column {missing[0]!r} (columns: {', '.join(columns) or 'none'}); "
                    "expected prompt, reward_model.ground_truth and optionally data_source, extra_info"
                )
            wanted = [name for name in ("prompt", "reward_model", "data_source", "extra_info", "id") if name in columns]
            table = source.read(columns=wanted)
    except (arrow.ArrowException, OSError) as error:
        raise OISDError(f"{path}: not a readable parquet file ({_one_line(error)}); copy or write it again") from error

    for index in range(table.num_rows):
        where = f"{path}: row {index + 1}"
        try:
            entry = {name: table.column(name)[index].as_py() for name in wanted}
        except UnicodeDecodeError as error:
            raise OISDError(f"{where}: text that is not UTF-8; write the file again with UTF-8 strings") from error
        reward_model, extra_info = entry["reward_model"], entry.get("extra_info")
        identifier = entry.get("id")
        if identifier is None and isinstance(extra_info, dict):
            identifier = extra_info.get("index")
        ground_truth = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
        yield where, _RawRow(index + 1, identifier, entry["prompt"], ground_truth, entry.get("data_source"))


def _to_record(where: str, raw: _RawRow, stem: str, system_prompt: str | None) -> PromptRecord:
    messages = _check_messages(where, raw.prompt)
    if system_prompt is not None and all(message["role"] != "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system_prompt})

    truth = raw.ground_truth
    if isinstance(truth, int) and not isinstance(truth, bool):
        truth = str(truth)
    if truth is None or (isinstance(truth, str) and not truth.strip()):
        raise OISDError(f"{where}: no ground truth; every prompt needs the answer its reward is computed against")
    if not isinstance(truth, str):
        raise OISDError(f"{where}: ground truth is a {type(truth).__name__}, expected a string; write it in quotes")

    source = raw.data_source
    if source is not None and not isinstance(source, str):
        raise OISDError(f"{where}: data_source is a {type(source).__name__}, expected a string")
    for text in (truth, source or "", *(message["content"] for message in messages)):
        if not _is_utf8(text):
            raise OISDError(f"{where}: text with a lone surrogate, which is not UTF-8; remove that character")
    return PromptRecord(_identifier(where, raw), messages, truth, source or stem)


def _identifier(where: str, raw: _RawRow) -> str:
    value = raw.id
    if isinstance(value, bool) or not (value is None or isinstance(value, int | str)):
        raise OISDError(f"{where}: id is a {type(value).__name__}, expected a string or a whole number")
    if value is None or value == "" or (isinstance(value, int) and value < 0):
        return f"row-{raw.row}"
    return str(value)


def _check_messages(where: str, prompt: Any) -> list[dict[str, str]]:
    if not isinstance(prompt, list) or not prompt:
        shown = "empty" if prompt == [] else f"a {type(prompt).__name__}"
        raise OISDError(f"{where}: the prompt is {shown}, expected chat messages such as {CHAT_EXAMPLE}")
    messages = []
    for number, message in enumerate(prompt, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise OISDError(f"{where}: message {number} has no role and content text, expected {CHAT_EXAMPLE}")
        if role not in ROLES:
            raise OISDError(f"{where}: message {number} has the role {role!r}, expected one of {', '.join(ROLES)}")
        messages.append({"role": role, "content": content})
    characters = sum(len(message["content"]) for message in messages)
    if characters > MOST_CHARACTERS:
        raise OISDError(
            f"{where}: a prompt of {characters:,} characters, expected at most {MOST_CHARACTERS:,}; shorten it or "
            "leave the row out"
        )
    if messages[-1]["role"] not in ("user", "tool"):
        raise OISDError(f"{where}: the last message is the {messages[-1]['role']}'s; a prompt must end with the user's")
    return messages


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
