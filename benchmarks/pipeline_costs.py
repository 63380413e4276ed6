"""What a GRPO update costs on each pipeline stage, with and without the logit lens: seconds and bytes.

Three updates (``VARIANTS``):

* *plain*: GRPO alone;
* *student stage*: OISD as this package does it. The lens runs in the backward of the student's stage; the teacher
  comes from the last stage's forward on a channel of its own;
* *last stage*: the alternative. ``h_l`` travels forward inside the pipeline's payload, the lens runs on the last
  stage, the gradient of ``h_l`` travels back. It needs no teacher product, no replica and no message.

A stage's time is operations / (tensor-parallel size * sustained rate). Forward of a layer: its matrix products and half
of the attention square. Backward: twice that, three times with full recomputation. Output layer: 2 T V h forward for
all T tokens, and twice that backward, never recomputed. Lens: 2 N V h for each of the student's logits, the teacher's
logits (with a teacher of hidden states), the gradient of the hidden states and that of the head. Attention loss: four
times 2 Q K h.

Within a tensor-parallel group, for the lens: an all-gather of the student's rows ``[N, h]``, an all-reduce of their
fp32 gradient, and an all-gather of the teacher's rows, as rings over NVLink, by bandwidth alone. A message between
stages takes latency + bytes / bandwidth. Each rank sends the teacher's rows of its own positions: 1 / tp of the
sequence, though a larger share of the response where the first ranks hold the prompt. All-gathers are padded to the
largest share, as the package does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.pipeline_schedule import Pipeline, Teacher, simulate
from megatron_oisd.pipeline.channel import in_flight


@dataclass(frozen=True)
class Model:
    """Sizes of a dense decoder with gated MLPs and untied embeddings."""

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocabulary: int

    def layer_flops(self, length: int, batch: int) -> float:
        """Forward of a layer."""
        width = self.hidden // self.heads
        weights = self.hidden * width * (2 * self.heads + 2 * self.groups) + 3 * self.hidden * self.ffn
        return batch * (2.0 * length * weights + 2.0 * length**2 * self.heads * width)


MODELS = {
    "70b": Model("70b", 80, 8192, 28672, 64, 8, 128256),
    "405b": Model("405b", 126, 16384, 53248, 128, 8, 128256),
}


def _parameter(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """Everything that holds for all cases; each field is a flag."""

    microbatches: int = _parameter(64, "microbatches in a step on one data-parallel rank")
    tp: int = _parameter(8, "tensor-parallel size, sequence parallelism on")
    sequence: int = _parameter(8192, "tokens of a sequence")
    prompt: int = _parameter(1024, "tokens of it that are prompt: the lens does not see them")
    micro_batch: int = _parameter(1, "sequences in a microbatch")
    tflops: float = _parameter(400.0, "sustained bf16 TFLOP/s of a GPU, tensor-parallel collectives of layers included")
    hop_gbs: float = _parameter(50.0, "GB/s of a GPU between stages, for payloads, teachers and lens weights alike")
    latency_us: float = _parameter(10.0, "microseconds before the first byte of a message")
    nvlink_gbs: float = _parameter(400.0, "GB/s of a GPU within a tensor-parallel group, for the lens's collectives")
    p2p: str = _parameter("auto", "sends: auto (blocking in 1F1B, overlapped when interleaved), blocking or overlapped")
    receive: str = _parameter("at-backward", "teacher's transfer starts: at-backward (as the package does) or early")
    shard_teacher: bool = _parameter(True, "each tensor-parallel rank sends its rows (the package); else all send all")
    head_gradient: bool = _parameter(True, "whether the lens trains the unembedding: one more product")
    teacher_payload: str = _parameter("hidden", "as in OISDConfig: hidden, logits (no teacher product) or topk (none)")
    teacher_topk: int = _parameter(256, "tokens of a topk teacher")
    lens_tokens: float = _parameter(1.0, "share of the response tokens that the lens sees")
    attn_queries: int = _parameter(128, "sampled queries of a sequence in the attention loss")
    attn_keys: int = _parameter(64, "sampled keys of a query")

    def __post_init__(self) -> None:
        for name, known in (
            ("p2p", ("auto", "blocking", "overlapped")),
            ("receive", ("at-backward", "early")),
            ("teacher_payload", ("hidden", "logits", "topk")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {known}")

    @property
    def tokens(self) -> float:
        """N: rows of the lens in a microbatch."""
        return self.micro_batch * (self.sequence - self.prompt) * self.lens_tokens

    @property
    def share(self) -> float:
        """Rows of N on the tensor-parallel rank that has most: sequence parallelism shares out positions."""
        return self.micro_batch * min(self.sequence - self.prompt, self.sequence / self.tp) * self.lens_tokens

    def gather(self, row: float) -> float:
        """Seconds of an all-gather of the lens's rows, ``row`` bytes each, within a tensor-parallel group."""
        return (self.tp - 1) * self.share * row / (self.nvlink_gbs * 1e9)

    def reduce(self, row: float) -> float:
        """Seconds of an all-reduce of the same."""
        return 2 * (self.tp - 1) / self.tp * self.tokens * row / (self.nvlink_gbs * 1e9)

    def compute(self, flops: float) -> float:
        """Seconds of operations shared by a tensor-parallel group."""
        return flops / (self.tp * self.tflops * 1e12)

    def message(self, size: float) -> float:
        """Seconds of a message between stages, ``size`` bytes for each GPU."""
        return self.latency_us * 1e-6 + size / (self.hop_gbs * 1e9)


VARIANTS = ("plain", "student stage", "last stage")


@dataclass(frozen=True)
class Case:
    """One model on one pipeline with one student layer, counted from 1."""

    model: Model
    ranks: int
    chunks: int
    layer: int
    recompute: bool
    settings: Settings

    def owner(self, split: Sequence[int]) -> int:
        """Virtual stage of the student layer."""
        seen = 0
        for stage, count in enumerate(split):
            seen += count
            if self.layer <= seen:
                return stage
        raise ValueError(f"layer is {self.layer}: expected 1 to {seen}")

    def _remote(self, owner: int) -> bool:
        """Whether the student's rank is not the teacher's."""
        return owner % self.ranks != self.ranks - 1

    def buffers(self, owner: int) -> int:
        """Send buffers on the last stage in the end: the bound of the package's channel."""
        count = self.settings.microbatches
        return in_flight(self.ranks, owner % self.ranks, self.chunks, None, count) if self._remote(owner) else 0

    def seconds(self, split: Sequence[int], variant: str) -> float:
        """Simulated step."""
        pipe, once = self.pipeline(split, variant)
        return simulate(pipe).seconds + once

    def _teacher_row(self) -> float:
        """Bytes of a teacher's row that tensor-parallel ranks share out: bf16, or k pairs of fp32 and int32."""
        s = self.settings
        return {"hidden": 2.0 * self.model.hidden, "logits": 0.0, "topk": 8.0 * s.teacher_topk}[s.teacher_payload]

    def teacher_bytes(self) -> float:
        """A teacher's message for the GPU that sends most; logits (bf16) and attention (fp32) are shards already."""
        s = self.settings
        logits = 2.0 * self.model.vocabulary / s.tp if s.teacher_payload == "logits" else 0.0
        rows = (s.share if s.shard_teacher else s.tokens) * self._teacher_row() + s.tokens * logits
        return rows + self._score_bytes(self.model.heads / s.tp)

    def _score_bytes(self, heads: float) -> float:
        return 4.0 * self.settings.micro_batch * self.settings.attn_queries * self.settings.attn_keys * heads

    def parts(self, split: Sequence[int], variant: str, owner: int | None = None) -> dict[str, Any]:
        """Seconds of one microbatch on each virtual stage, forward and backward, and what they are made of."""
        m, s, last = self.model, self.settings, len(split) - 1
        layer = s.compute(m.layer_flops(s.sequence, s.micro_batch))
        output = s.compute(2.0 * s.micro_batch * s.sequence * m.vocabulary * m.hidden)
        product = s.compute(2.0 * s.tokens * m.vocabulary * m.hidden)
        again = 3 if self.recompute else 2
        forward = [count * layer for count in split]
        backward = [count * layer * again for count in split]
        forward[last] += output
        backward[last] += 2 * output
        owner = self.owner(split) if owner is None else owner
        lens, where = 0.0, last
        if variant != "plain":
            width = m.hidden // m.heads
            attention = s.compute(2.0 * s.micro_batch * s.attn_queries * s.attn_keys * m.heads * width)
            forward[last] += attention  # the teacher's scores; the student's and two gradients are the other three
            backward[owner] += 3 * attention
            products = 2 + s.head_gradient
            rows, gradient = s.gather(2 * m.hidden), s.reduce(4 * m.hidden)
            if variant == "student stage":
                where = owner
                lens = product * (products + (s.teacher_payload == "hidden")) + rows + gradient
                if s.shard_teacher:
                    lens += s.gather(self._teacher_row())
                else:  # the last stage puts them together
                    forward[last] += s.reduce(self._teacher_row())
                backward[owner] += lens
            else:  # the teacher's logits are the policy's own
                lens = product * products + rows + gradient
                forward[last] += product + rows
                backward[last] += product * (products - 1) + gradient
        return {
            "forward": forward, "backward": backward, "lens": lens, "where": where, "output": 3 * output,
            "layer": (1 + again) * layer, "layer_backward": again * layer,
        }  # fmt: skip

    def pipeline(self, split: Sequence[int], variant: str) -> tuple[Pipeline, float]:
        """The durations of a variant, and the seconds that come once in a step."""
        m, s = self.model, self.settings
        parts, owner, last = self.parts(split, variant), self.owner(split), len(split) - 1
        payload = s.micro_batch * s.sequence * m.hidden * 2.0 / s.tp
        extra = payload + self._score_bytes(m.heads / s.tp) if variant == "last stage" else 0.0
        hops = [s.message(payload + (extra if stage >= owner else 0.0)) for stage in range(last)]
        if self.ranks == 1:
            hops = [0.0] * last
        teacher, once = None, 0.0
        if variant == "student stage":
            above = sum(split[: owner + 1]) - self.layer
            before = above * parts["layer_backward"] + (2 / 3 * parts["output"] if owner == last else 0.0)
            remote = self._remote(owner)
            transfer = s.message(self.teacher_bytes()) if remote else 0.0
            teacher = Teacher(owner, before, transfer, s.receive == "early")
            if remote:
                shard = m.vocabulary * m.hidden / s.tp
                once = s.message(2 * shard) + (s.message(4 * shard) if s.head_gradient else 0.0)
        blocking = s.p2p == "blocking" or (s.p2p == "auto" and self.chunks == 1)
        work = tuple(parts["forward"]), tuple(parts["backward"])
        return Pipeline(self.ranks, s.microbatches, *work, tuple(hops), blocking, teacher), once

    def added(self, variant: str, split: Sequence[int]) -> float:
        """Computing time that a variant adds, over all of plain's: the cost where no rank ever idles."""
        plain, other = (self.parts(split, name) for name in ("plain", variant))
        return (sum(other["forward"] + other["backward"])) / sum(plain["forward"] + plain["backward"]) - 1

    def row(self, split: Sequence[int], variant: str) -> dict[str, Any]:
        """Simulate one variant."""
        pipe, once = self.pipeline(split, variant)
        run, parts, s = simulate(pipe), self.parts(split, variant), self.settings
        load = [
            sum(parts["forward"][rank :: self.ranks]) + sum(parts["backward"][rank :: self.ranks])
            for rank in range(self.ranks)
        ]
        row = {
            "model": self.model.name, "pp": self.ranks, "chunks": self.chunks, "layer": self.layer,
            "recompute": "full" if self.recompute else "none", "variant": variant, "split": _shown(split),
            "student_rank": self.owner(split) % self.ranks, "step_s": run.seconds + once, "once_s": once,
            "bubble": run.bubble, "added_work": self.added(variant, split), "layer_ms": 1e3 * parts["layer"],
            "output_ms": 1e3 * parts["output"], "lens_ms": 1e3 * parts["lens"],
            "lens_rank": parts["where"] % self.ranks if parts["lens"] else None, "load_ms": [1e3 * x for x in load],
        }  # fmt: skip
        if pipe.teacher is not None:
            sent, buffers = self.teacher_bytes(), self.buffers(self.owner(split))
            sent = sent if buffers else 0.0
            row |= {
                "teacher_wait_s": run.waited, "transfer_exposed_s": run.exposed, "message_mb": sent / 1e6,
                "teachers": run.teachers, "buffers": buffers, "buffers_mb": buffers * sent / 1e6, "tapped": run.tapped,
                "sent_in_step_mb": s.microbatches * sent / 1e6,
            }  # fmt: skip
        return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()} | {
            "load_ms": [round(value, 3) for value in row["load_ms"]]
        }


def _shown(split: Sequence[int]) -> str:
    """``[5, 5, 5, 4]`` as ``3*5 4``."""
    runs: list[list[int]] = []
    for count in split:
        if runs and runs[-1][1] == count:
            runs[-1][0] += 1
        else:
            runs.append([1, count])
    return " ".join(f"{times}*{count}" if times > 1 else str(count) for times, count in runs)
