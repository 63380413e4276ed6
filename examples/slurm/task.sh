#!/bin/bash
# What srun starts on a node, inside the container where there is one: task.sh train|serve|run ARGUMENTS
set -uo pipefail

if [[ ${1:-} == rank ]]; then  # started by the launcher, in the environment made below
    shift
    exec python "$OISD_ENTRY" "$@" >>"$OISD_LOGS/rank_$RANK.log" 2>&1
fi

# shellcheck disable=SC1090,SC1091
[[ -z $OISD_SETUP ]] || source "$OISD_SETUP" || exit 78
# shellcheck disable=SC1091
[[ -z $OISD_VENV ]] || source "$OISD_VENV/bin/activate" || exit 78
export PYTHONPATH=$OISD_REPO${PYTHONPATH:+:$PYTHONPATH}
# shellcheck disable=SC2059
address=$(printf "$OISD_HOST_FORMAT" "$SLURMD_NODENAME")
kind=$1
shift

case $kind in
    train)
        # Servers fetch weights from the rank's own node.
        exec python -m megatron_oisd.runtime.launch \
            --nnodes "$SLURM_STEP_NUM_NODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$OISD_RANKS_PER_NODE" \
            --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --no-python \
            bash "$OISD_REPO/examples/slurm/task.sh" rank "$@" --rollout-weights-host "$address"
        ;;
    serve)
        if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then  # this server's share of the node's GPUs
            IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
            share=("${devices[@]:SLURM_LOCALID * OISD_ROLLOUT_TP:OISD_ROLLOUT_TP}")
            CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${share[*]}")
            export CUDA_VISIBLE_DEVICES
        fi
        trap 'kill "$server" 2>/dev/null; wait "$server"; exit 0' TERM INT
        # A server that dies is started again, and the trainer sends it the weights again. Not one that cannot start.
        while :; do
            started=$SECONDS
            python "$OISD_REPO/tools/serve_rollouts.py" --host "$address" --port $((OISD_ROLLOUT_PORT + SLURM_PROCID)) "$@" &
            server=$!
            wait "$server"
            code=$?
            ((SECONDS - started > 60)) || exit $((code ? code : 1))
            echo "the server ended with $code: started again" >&2
        done
        ;;
    run) exec "$@" ;;
    *) echo "error: $kind is no task: expected train, serve or run" >&2; exit 78 ;;
esac
