"""GRPO + OISD as a training loop: data, rollouts, rewards, policy updates, evaluation, logs."""
