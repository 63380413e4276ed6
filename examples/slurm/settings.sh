# Settings of the job scripts: what is not set in the environment that sbatch hands on gets its value here.
# shellcheck shell=bash

# --- where the software is ---
export OISD_REPO                                  # the checkout, on a file system that all nodes see
export OISD_VENV=${OISD_VENV:-}                   # virtual environment to activate on every node; empty: none
export OISD_CONTAINER=${OISD_CONTAINER:-}         # image for Pyxis (srun --container-image); empty: none
export OISD_MOUNTS=${OISD_MOUNTS:-}               # what the container mounts besides the checkout: /data:/data,...
export OISD_SETUP=${OISD_SETUP:-}                 # shell file that every task sources first: module load ...
export OISD_ENTRY=${OISD_ENTRY:-$OISD_REPO/tools/train_rl.py}  # e.g. a script of yours that adds rewards

# --- how a job runs ---
export OISD_RANKS_PER_NODE=${OISD_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}  # one for each GPU; 1 without any
export OISD_HOST_FORMAT=${OISD_HOST_FORMAT:-%s}   # how nodes reach each other, from their names: %s-ib0
export OISD_WAIT_S=${OISD_WAIT_S:-60}             # the other nodes are ended so long after the first one ended
export OISD_DRY_RUN=${OISD_DRY_RUN:-}             # print the srun commands instead of running them
export OISD_NODES=${OISD_NODES:-}                 # node names for a dry run outside a job

# --- starting again ---
# A job requeues itself until the run is finished, but at most so often in a row without anything new on disk:
export OISD_MAX_STOPS=${OISD_MAX_STOPS:-5}        # after it was asked to leave
export OISD_MAX_FAILURES=${OISD_MAX_FAILURES:-2}  # after it failed: a node died, NCCL gave up, ...

# --- rollout servers on nodes of their own ---
export OISD_ROLLOUT_NODES=${OISD_ROLLOUT_NODES:-0}  # the last so many nodes of the job serve, the others train
export OISD_ROLLOUT_TP=${OISD_ROLLOUT_TP:-1}      # GPUs of one server; a node gets as many servers as it has GPUs for
export OISD_ROLLOUT_PORT=${OISD_ROLLOUT_PORT:-$((30000 + ${SLURM_JOB_ID:-0} * 16 % 2000))}  # of the first server
export OISD_ROLLOUT_START_S=${OISD_ROLLOUT_START_S:-900}  # they may take so long to start
export OISD_ROLLOUT_FLAGS=${OISD_ROLLOUT_FLAGS:-}  # further flags of tools/serve_rollouts.py and of vLLM

# --- checks ---
export OISD_PREFLIGHT=${OISD_PREFLIGHT:-1}        # 0: start without checking the nodes
export OISD_SHARED_WAIT_S=${OISD_SHARED_WAIT_S:-60}  # a file written by one node is seen by the others within this

# --- what ranks find in their environment, unless it holds other values ---
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}  # Megatron overlaps communication that way
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}  # a rank whose peer died ends, too
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
