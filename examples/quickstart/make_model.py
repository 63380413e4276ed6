"""Make the quickstart's starting point: a tiny Qwen3 checkpoint, warmed up on worked and unworked arithmetic.

``python examples/quickstart/make_model.py --out model`` trains a byte-level BPE tokenizer and a model of about 0.3
million weights on the solutions of generated problems and stops at a target accuracy below what it could reach, so
that reinforcement learning has something to learn from and something to learn. A share of the solutions gives the
answer without the steps: all are right, but the model does much better when it writes the steps, which is the first
thing reinforcement learning finds out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from arithmetic import LARGEST, SYSTEM_PROMPT, Problem, make_problems, problem_stream
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_oisd.errors import OISDError, command_line
from megatron_oisd.rl.rollout.base import SamplingParams
from megatron_oisd.rl.rollout.transformers_engine import TransformersEngine

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 384
MAX_POSITIONS = 4096
IGNORED = -100
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(problems: list[Problem]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most ``VOCABULARY`` tokens: any Unicode text round-trips, digits stay single."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    frame = f"system\nuser\nassistant\n{SYSTEM_PROMPT}"
    texts = [f"{problem.question}\n{problem.worked_solution}" for problem in problems]
    core.train_from_iterator([frame, *texts], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, *, seed: int, tied: bool, layers: int, hidden: int = 128
) -> Qwen3ForCausalLM:
    """Build an untrained fp32 Qwen3 of ``layers`` layers with heads of 32, two query heads for each key head.

    Raises:
        OISDError: ``hidden`` is not a multiple of 64, or ``layers`` is below 1.
    """
    if hidden < 64 or hidden % 64:
        raise OISDError(f"hidden={hidden}: expected a multiple of 64 (query heads of 32 in pairs); pass such a value")
    if layers < 1:
        raise OISDError(f"layers={layers}: expected at least 1; pass a positive number")
    heads = max(4, hidden // 32)  # two key heads at least, for tensor parallelism of 2
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=tied,
        initializer_range=0.09,  # the usual 0.02 suits wide models; this narrow one learns slower from it
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
        # HF zeroes the padding token's row. A policy that samples the token then meets RMSNorm of a zero vector, whose
        # gradient is a thousand times everything else.
        with torch.no_grad():
            model.get_input_embeddings().weight[tokenizer.pad_token_id].normal_(std=config.initializer_range)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model.float()


def save_checkpoint(directory: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write safetensors, configs and tokenizer into ``directory``."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_random_model(
    directory: str | Path, *, seed: int = 0, tied: bool = False, layers: int = 4, hidden: int = 64
) -> Path:
    """Write the same kind of checkpoint with untrained weights, in about a second: for tests.

    Raises:
        OISDError: as :func:`build_model`.
    """
    tokenizer = train_tokenizer(make_problems("train", 500, seed=0))
    save_checkpoint(
        Path(directory), build_model(tokenizer, seed=seed, tied=tied, layers=layers, hidden=hidden), tokenizer
    )
    return Path(directory)


def prompt_ids(tokenizer: PreTrainedTokenizerFast, problem: Problem, system_prompt: str | None) -> list[int]:
    """Tokenize the chat up to where the assistant begins."""
    text = tokenizer.apply_chat_template(problem.messages(system_prompt), tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def supervised_batches(
    tokenizer: PreTrainedTokenizerFast,
    *,
    batch_size: int,
    seed: int,
    largest: int,
    short_share: float,
    system_prompt: str | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw batches of training problems for ever.

    Yields tokens and labels ``[b, s]``, padded on the right; labels are ``IGNORED`` but for the assistant's tokens
    and stand where the tokens do (not yet shifted). ``short_share`` of the solutions give the answer alone.
    """
    rng = random.Random(seed)
    stream = problem_stream("train", seed=seed + 1, largest=largest)
    while True:
        rows: list[list[int]] = []
        labels: list[list[int]] = []
        for problem in itertools.islice(stream, batch_size):
            solution = problem.short_solution if rng.random() < short_share else problem.worked_solution
            prompt = prompt_ids(tokenizer, problem, system_prompt)
            answer = tokenizer.encode(solution + IM_END, add_special_tokens=False)
            rows.append(prompt + answer)
            labels.append([IGNORED] * len(prompt) + answer)
        width = max(map(len, rows))
        yield (
            torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows]),
            torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels]),
        )


def accuracy(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[Problem],
    *,
    seed: int,
    temperature: float = 1.0,
    system_prompt: str | None = None,
) -> float:
    """Share of problems whose one sampled response ends in the right ``\\boxed{}``."""
    training = model.training
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    generation_config = model.generation_config
    engine = TransformersEngine(model, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    try:
        rollouts = engine.generate(
            [prompt_ids(tokenizer, problem, system_prompt) for problem in problems],
            SamplingParams(max_new_tokens=40, temperature=temperature),
            seeds=[seed + number for number in range(len(problems))],
        )
    finally:  # the engine takes the model over; training goes on with it
        model.train(training)
        model.generation_config = generation_config
        for parameter, wanted in zip(model.parameters(), gradients, strict=True):
            parameter.requires_grad_(wanted)
    right = 0
    for problem, (rollout,) in zip(problems, rollouts, strict=True):
        text = tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
        right += text.rstrip().endswith(problem.short_solution)
    return right / len(problems)


def warm_up(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Train on solutions until the sampled accuracy reaches ``args.target`` or ``args.max_steps`` are done.

    Returns the record that goes to ``warmup.json``. Deterministic for one seed, machine and thread count.
    """
    system_prompt = SYSTEM_PROMPT if args.system_prompt else None
    problems = make_problems("heldout", args.eval_problems, seed=args.seed, largest=args.largest)
    batches = supervised_batches(
        tokenizer,
        batch_size=args.batch_size,
        seed=args.seed,
        largest=args.largest,
        short_share=args.short_share,
        system_prompt=system_prompt,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    losses: list[float] = []
    evaluations: list[dict[str, float]] = []
    begin = time.perf_counter()
    model.train()
    with tqdm(total=args.max_steps, desc="warm-up", unit="step") as bar:
        for step, (tokens, labels) in enumerate(itertools.islice(batches, args.max_steps), start=1):
            rise = min(1.0, step / args.lr_warmup_steps)
            scale = rise * (0.1 + 0.45 * (1 + math.cos(math.pi * step / args.max_steps)))
            for group in optimizer.param_groups:
                group["lr"] = args.lr * scale
            logits = model(input_ids=tokens[:, :-1]).logits
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            bar.update()
            due = step >= args.eval_from and step % args.eval_every == 0
            if due or step == args.max_steps:
                score = accuracy(model, tokenizer, problems, seed=args.seed, system_prompt=system_prompt)
                evaluations.append({"step": step, "loss": losses[-1], "accuracy": score})
                bar.set_postfix(loss=f"{losses[-1]:.3f}", accuracy=f"{score:.3f}")
                if score >= args.target:
                    break
    return {
        "seed": args.seed,
        "steps": len(losses),
        "accuracy": evaluations[-1]["accuracy"],
        "target": args.target,
        "seconds": round(time.perf_counter() - begin, 1),
        "evaluations": evaluations,
        "losses": [round(value, 4) for value in losses],
    }


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Make a tiny Qwen3 checkpoint and warm it up by supervised learning.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=64, help="a multiple of 64 (default: %(default)s)")
    tie = parser.add_mutually_exclusive_group()
    tie.add_argument("--tied", dest="tied", action="store_true", help="share embedding and unembedding")
    tie.add_argument("--untied", dest="tied", action="store_false", help="keep them apart (default)")
    parser.set_defaults(tied=False)
    parser.add_argument("--largest", type=int, default=LARGEST, help="largest number in a story (default: %(default)s)")
    parser.add_argument(
        "--system-prompt", action="store_true", help="put the paper's system prompt before each problem"
    )
    parser.add_argument("--short-share", type=float, default=0.3, help="solutions without steps (default: %(default)s)")
    parser.add_argument("--target", type=float, default=0.4, help="sampled held-out accuracy to stop at")
    parser.add_argument("--max-steps", type=int, default=500, help="also the length of the cosine schedule")
    parser.add_argument("--eval-every", type=int, default=25)
    parser.add_argument("--eval-from", type=int, default=300, help="first step worth evaluating (default: %(default)s)")
    parser.add_argument("--eval-problems", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--lr-warmup-steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="torch threads; results depend on it in the last digits")
    args = parser.parse_args(argv)
    for name in ("max_steps", "eval_every", "eval_problems", "batch_size", "lr_warmup_steps", "threads"):
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise OISDError(f"{flag} {getattr(args, name)}: expected at least 1; pass a positive number")
    if not 0 <= args.short_share <= 1:
        raise OISDError(f"--short-share {args.short_share}: expected a share between 0 and 1; pass such a value")
    return args


@command_line
def main(argv: list[str] | None = None) -> int | None:
    """Make the tokenizer and the model, warm up, save."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    tokenizer = train_tokenizer(make_problems("train", 2000, seed=0))
    model = build_model(tokenizer, seed=args.seed, tied=args.tied, layers=args.layers, hidden=args.hidden)
    report = warm_up(model, tokenizer, args)
    save_checkpoint(args.out, model, tokenizer)
    (args.out / "warmup.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(
        f"saved {args.out}: {report['steps']} steps in {report['seconds']} s, "
        f"held-out accuracy {report['accuracy']:.3f} at temperature 1"
    )
    return None


if __name__ == "__main__":
    raise SystemExit(main())
