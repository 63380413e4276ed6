"""Two training steps of NeMo-Aligner's real actors on a layout, and the same from a dense float64 model.

Run by ``tests/integrations/test_nemo_aligner.py`` with torchrun, in an environment with NeMo-Aligner, NeMo and the
Megatron-Core that they need; imported by nothing. The actor is built by its own constructor and driven by the calls of
its own trainer (``prepare_for_training``, ``prepare_for_training_step``, ``get_loss_and_metrics``,
``finish_training_step``). What needs a GPU is replaced here: TensorRT-LLM, Transformer Engine's layer specs and one
helper that NeMo takes from Apex, by Megatron-Core's function of the same name. The optimizer is plain SGD between the
two steps, without clipping, which needs Apex.
"""

from __future__ import annotations

import argparse
import os
import sys
import types
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["NVIDIA_PYTORCH_VERSION"] = "25.01"  # NeMo parses it

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oisd.config import OISDConfig
from tests.helpers.mcore import PADDED, VOCAB, Layout, Rollouts, assemble, build_chunks, fill, pieces
from tests.helpers.mcore import transformer as transformer_config_of
from tests.helpers.mcore_reference import DenseLosses
from tests.helpers.mcore_run import gather_shards

OISD = OISDConfig(
    layers=(1, 3), lambda_think=3.0, lambda_attn=3.0, attn_window=3, attn_global_keys=3, attn_queries=6
)  # fmt: skip
LAYOUTS = {
    "one": Layout("one", oisd=OISD),
    "pp2": Layout("pp2", pp=2, oisd=OISD),
    "pp2 tied": Layout("pp2 tied", pp=2, tied=True, oisd=OISD),
    "pp2 token": Layout("pp2 token", pp=2, oisd=replace(OISD, aggregation="token")),
    "tp2": Layout("tp2", tp=2, oisd=OISD),
    "dp2": Layout("dp2", dp=2, oisd=OISD),
    # With Megatron-Core's distributed optimizer: its DDP and finalize_model_grads in the place of NeMo's reductions.
    "pp2 mcore": Layout("pp2 mcore", pp=2, oisd=OISD, ddp=(("name", "mcore_distributed_optim"),)),
    "dp2 mcore overlap": Layout(
        "dp2 mcore overlap",
        dp=2,
        oisd=OISD,
        ddp=(("name", "mcore_distributed_optim"), ("overlap_grad_sync", True), ("ddp_bucket_size", 4000)),
    ),
    "pp2 plain": Layout("pp2 plain", pp=2, oisd=replace(OISD, lambda_think=0.0, lambda_attn=0.0)),
}
STEPS, ROLLOUTS, LENGTH, LEARNING_RATE, RATIO_EPS = 2, 4, 32, 0.05, 0.2
BYTES = 259  # of NeMo's byte-level tokenizer; less than PADDED, whose rest NeMo's policy loss does not leave out


@dataclass
class Step:
    """One optimizer step's rollouts; ``[B, s - 1]`` tensors speak of the prediction of token t + 1."""

    tokens: Tensor
    mask: Tensor
    is_end: Tensor
    rewards: Tensor
    baseline: Tensor
    advantages: Tensor
    old: Tensor

    def batch(self, algorithm: str, rows: slice) -> dict[str, Tensor]:
        """As the trainers make it."""
        batch = {"mask": self.mask.float(), "response_tokens": self.tokens, "is_end": self.is_end}
        if algorithm == "reinforce":
            batch |= {"rewards_with_kl": self.rewards, "baseline": self.baseline}
        else:
            batch |= {"advantages": self.advantages, "prev_logprobs": self.old}
        return {name: tensor[rows].clone() for name, tensor in batch.items()}

    def weights(self, algorithm: str) -> Tensor:
        """``[B, s - 1]`` advantages of the predictions."""
        if algorithm == "reinforce":
            return (self.rewards - self.baseline).unsqueeze(1).expand(self.mask.shape)
        return self.advantages


def make_step(number: int, algorithm: str) -> Step:
    """Ragged responses, one that did not end, advantages of both signs, one clipped.

    ``"grpo"``: PPO's actor with group-normalised advantages, as GRPO has them; ``"ppo"``: other ones at each position.
    """
    generator = torch.Generator().manual_seed(100 + number)
    tokens = torch.randint(0, VOCAB, (ROLLOUTS, LENGTH), generator=generator)
    mask = torch.zeros(ROLLOUTS, LENGTH - 1, dtype=torch.bool)
    for row, length in enumerate([24, 32, 16, 28]):
        mask[row, 3 + row : length - 2 + row % 2] = True
    is_end = torch.tensor([True, True, True, False])
    rewards, baseline = torch.tensor([0.7, -1.6, 0.4, 1.0]), torch.tensor([0.1, 0.2, 0.7, 0.3])
    advantages = torch.randn(ROLLOUTS, LENGTH - 1, generator=generator)
    if algorithm == "grpo":
        normalised = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        advantages = normalised.unsqueeze(1).expand(mask.shape).clone()
    old = -5.5 + 0.2 * torch.randn(ROLLOUTS, LENGTH - 1, generator=generator)
    return Step(tokens, mask, is_end, rewards, baseline, advantages, old)


# ---------------------------------------------------------------------------------------------------------- the actor


def replace_what_needs_a_gpu() -> None:
    """Before anything of NeMo-Aligner is imported."""
    tensorrt: Any = types.ModuleType("nemo_aligner.utils.trt_llm")
    tensorrt.GPTGenerateTRTLLM = None
    sys.modules[tensorrt.__name__] = tensorrt

    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import layers
    from nemo.collections.nlp.models import nlp_model
    from nemo.collections.nlp.models.language_modeling import megatron_gpt_model
    from nemo.collections.nlp.modules.common.megatron import build_model

    name = "set_defaults_if_not_set_tensor_model_parallel_attributes"
    setattr(build_model, name, getattr(layers, name))
    megatron_gpt_model.get_specs = lambda *args: get_gpt_layer_local_spec()
    nlp_model.get_megatron_pretrained_bert_models = list  # importing them fails without Transformer Engine


def actor_config(layout: Layout, oisd: dict[str, Any]) -> Any:
    """``cfg.model`` as a checkpoint and the YAML would make it together, of the model in ``tests/helpers/mcore.py``."""
    from omegaconf import OmegaConf

    common = {"length_params": {}, "sampling_params": {}, "offload_adam_states": False, "forward_micro_batch_size": 1}
    return OmegaConf.create(
        {
            "mcore_gpt": True, "megatron_amp_O2": False, "precision": 32, "transformer_engine": False,
            "micro_batch_size": 1, "global_batch_size": ROLLOUTS, "seed": 1,
            "tensor_model_parallel_size": layout.tp, "pipeline_model_parallel_size": layout.pp,
            "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4,
            "num_query_groups": 2, "kv_channels": 32, "encoder_seq_length": 128, "max_position_embeddings": 128,
            "normalization": "rmsnorm", "layernorm_epsilon": 1e-6, "bias": False, "activation": "fast-swiglu",
            "position_embedding_type": "rope", "rotary_percentage": 1.0,
            "share_embeddings_and_output_weights": layout.tied, "make_vocab_size_divisible_by": PADDED // layout.tp,
            "hidden_dropout": 0.0, "attention_dropout": 0.0, "use_cpu_initialization": True,
            "masked_softmax_fusion": False, "bias_dropout_add_fusion": False, "bias_activation_fusion": False,
            "persist_layer_norm": False, "gradient_accumulation_fusion": False, "batch_p2p_comm": False,
            "data": {}, "optim": {"name": "adam", "lr": LEARNING_RATE, **dict(layout.ddp)},
            "tokenizer": {"library": "byte-level"},
            "reinforce": common, "ppo": common | {"entropy_bonus": 0.0, "ratio_eps": RATIO_EPS}, "oisd": oisd,
        }
    )  # fmt: skip


def build_actor(layout: Layout, algorithm: str) -> Any:
    """The adapter's class, by its own constructor."""
    from lightning.pytorch.trainer.trainer import Trainer

    from megatron_oisd.integrations import nemo_aligner

    class RanksTrainer(Trainer):  # Lightning's strategies would make the process group themselves
        world_size = property(lambda self: dist.get_world_size())
        global_rank = local_rank = property(lambda self: dist.get_rank())

    actors = {"reinforce": nemo_aligner.OISDReinforceActorModel}  # type: ignore[attr-defined]
    actor_class = actors.get(algorithm) or nemo_aligner.OISDActorModel  # type: ignore[attr-defined]
    trainer = RanksTrainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, precision=32)
    assert layout.oisd is not None
    section = {name: value for name, value in vars(layout.oisd).items() if value != getattr(OISDConfig, name, None)}
    return actor_class(actor_config(layout, {**section, "layers": list(layout.oisd.layers)}), trainer)


def train(layout: Layout, algorithm: str) -> dict[str, Any]:
    """Both steps as the trainer's ``run_training`` takes them; called on every rank."""
    from megatron.core import parallel_state

    actor = build_actor(layout, algorithm)
    actor.setup_mcore_distributed_parallel()  # as NeMo's strategy does; nothing but with that optimizer
    (chunk,) = actor.get_model_module_list()
    fill([chunk])
    replica, per_rank = parallel_state.get_data_parallel_rank(), ROLLOUTS // layout.dp
    rows = slice(replica * per_rank, (replica + 1) * per_rank)
    reported = []
    for number in range(STEPS):
        for parameter in chunk.parameters():
            parameter.grad = None
        actor.prepare_for_training()
        actor.prepare_for_training_step()
        batch = make_step(number, algorithm).batch(algorithm, rows)
        _, metrics = actor.get_loss_and_metrics(batch=batch, forward_only=False)
        actor.finish_training_step()
        if actor.use_mcore_dist_optim:
            gather_shards(actor.model[0])
        reported.append(metrics)
        if number + 1 < STEPS:
            descend(chunk)
    _, evaluated = actor.get_loss_and_metrics(
        batch=make_step(STEPS - 1, algorithm).batch(algorithm, rows), forward_only=True
    )
    if actor.oisd is not None:
        actor.oisd.detach()
    return {"metrics": reported, "evaluated": evaluated, "gradients": pieces([chunk])}


def descend(model: torch.nn.Module) -> None:
    """Plain gradient descent."""
    with torch.no_grad():
        for parameter in model.parameters():
            gradient = getattr(parameter, "main_grad", parameter.grad)
            if gradient is not None:
                parameter -= LEARNING_RATE * gradient


# ---------------------------------------------------------------------------------------------------------- reference


class Reference(DenseLosses):
    """NeMo-Aligner's policy losses and OISD's, straight from the equations, one rollout after the other."""

    def _lens(self, hidden: Tensor) -> Tensor:
        model = self.model
        weight = model.shared_embedding_or_output_weight() if self.layout.tied else model.output_layer.weight
        return model.decoder.final_layernorm(hidden) @ weight[:BYTES].t()

    def step(self, number: int, algorithm: str) -> dict[str, float]:
        from megatron_oisd.losses import reference as ref

        step, oisd = make_step(number, algorithm), self.oisd
        ended = torch.nn.functional.pad(step.mask & step.is_end.unsqueeze(1), (0, 1))
        lengths = [LENGTH] * ROLLOUTS
        self.take(Rollouts(step.tokens, ended, step.rewards, step.old, lengths), number)
        names = [f"oisd/{kind}/layer_{n}" for kind in ("think", "attn") for n in oisd.layers]
        values = dict.fromkeys(["loss", *names], 0.0)
        all_tokens = ended.sum()
        for i in range(ROLLOUTS):
            tokens, advantages = step.tokens[i : i + 1], step.weights(algorithm)[i].double()
            logits = self.model(tokens, torch.arange(LENGTH).unsqueeze(0), None)[0]
            log_probs = logits.log_softmax(-1)[:-1].gather(-1, tokens[0, 1:].unsqueeze(1)).squeeze(1)
            if algorithm == "reinforce":
                policy = -log_probs * advantages
            else:
                ratio = (log_probs - step.old[i].double()).exp()
                policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - RATIO_EPS, 1 + RATIO_EPS))
            total = policy[step.mask[i]].mean() / ROLLOUTS * step.is_end[i]
            values["loss"] += total.item()
            where = ended[i].nonzero().flatten().tolist()
            weights = advantages.clamp(-oisd.advantage_clip, oisd.advantage_clip)
            share = len(where) / all_tokens if oisd.aggregation == "token" else 1.0 / ROLLOUTS
            for layer in oisd.layers if where else ():
                if oisd.lambda_think:
                    student = self._lens(self.kept["hidden", layer][:, 0])[where]
                    divergence = ref.jensen_shannon(student, logits[where][:, :BYTES].detach(), oisd.temperature)
                    think = share * (weights[where] * divergence).mean()
                    total = total + oisd.lambda_think / len(oisd.layers) * think
                    values[f"oisd/think/layer_{layer}"] += think.item()
                if oisd.lambda_attn:
                    queries = self.queries[i].nonzero().flatten().tolist()
                    each = [
                        weights[t]
                        * ref.jensen_shannon(self._scores(layer, t, keys), self._scores(4, t, keys).detach()).mean()
                        for t, keys in ((t, self._keys(t)) for t in queries)
                    ]
                    attn = share * torch.stack(each).mean()
                    total = total + oisd.lambda_attn / len(oisd.layers) * attn
                    values[f"oisd/attn/layer_{layer}"] += attn.item()
            total.backward()
        return values


def run_reference(layout: Layout, algorithm: str) -> dict[str, Any]:
    """The same two steps in one process, in float64."""
    alone = Layout(
        "reference", tied=layout.tied, oisd=layout.oisd, dtype=torch.float64, config=(("qk_layernorm", False),)
    )  # fmt: skip
    (model,) = build_chunks(alone, transformer_config_of(alone))
    fill([model])
    model.train()
    dense = Reference(model, layout, Rollouts(*(torch.zeros(1, LENGTH),) * 4, [LENGTH]))
    reported = []
    for number in range(STEPS):
        model.zero_grad()
        reported.append(dense.step(number, algorithm))
        if number + 1 < STEPS:
            descend(model)
    return {"metrics": reported, "gradients": assemble([pieces([model])])[0]}


def main() -> None:
    """Run on this rank and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--algorithms", nargs="+", default=["reinforce", "ppo", "grpo"])
    parser.add_argument("--reference", action="store_true", help="the dense model instead, on one rank")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    layout = LAYOUTS[options.layout]

    from megatron.core import parallel_state, tensor_parallel

    from megatron_oisd.runtime import cpu

    if not options.reference:
        replace_what_needs_a_gpu()
        import nemo_aligner.algorithms.ppo
        import nemo_aligner.algorithms.reinforce  # noqa: F401
    cpu.install()
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        *((1, 1) if options.reference else (layout.tp, layout.pp)),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    run = run_reference if options.reference else train
    results = {algorithm: run(layout, algorithm) for algorithm in options.algorithms}
    torch.save(results, options.output / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
