# Functions of train.sbatch, in the order in which it calls them. Run in the batch shell, outside any container.
# shellcheck shell=bash

readonly DONE=0 WRONG_FLAGS=2 AGAIN=75 REFUSED=78  # exit codes; 75: megatron_oisd/rl/preemption.py
RESTARTS=${SLURM_RESTART_COUNT:-0}
JOB=${SLURM_JOB_ID:-0}  # for Slurm's commands; an array's own number, which one of its tasks has, would mean all tasks
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
ASKED=""         # not empty once Slurm has warned the job
STEP_PID=""      # the srun that is waited for
SERVERS_PID=""
readonly TASK=$OISD_REPO/examples/slurm/task.sh

join() { (IFS=,; echo "$*"); }

say() { echo "[$(date +%H:%M:%S)] $*"; }

# The last value of --NAME among flags: option NAME FLAGS...
option() {
    local name=--$1 value=""
    shift
    while (($#)); do
        case $1 in
            "$name") value=${2:-} ;;
            "$name="*) value=${1#*=} ;;
        esac
        shift
    done
    printf '%s' "$value"
}

has_flag() {
    local name=--$1 flag
    shift
    for flag in "$@"; do [[ $flag == "$name" ]] && return 0; done
    return 1
}

take_flags() {
    FLAGS=("$@")
    OUTPUT=$(option output "${FLAGS[@]}")
    if [[ -z $OUTPUT ]]; then
        echo "error: --output is missing on the command line: expected a run directory that all nodes see" >&2
        exit $REFUSED
    fi
    if [[ -n ${OISD_SWEEP:-} ]]; then  # submit.sh sweep: one line of flags for each array task
        local lines words
        mapfile -t lines < <(grep -vE '^[[:space:]]*(#|$)' "$OISD_SWEEP")
        if ((SLURM_ARRAY_TASK_ID >= ${#lines[@]})); then
            echo "error: $OISD_SWEEP has ${#lines[@]} lines of flags, none for array task $SLURM_ARRAY_TASK_ID" >&2
            exit $REFUSED
        fi
        read -ra words <<<"${lines[SLURM_ARRAY_TASK_ID]}"
        OUTPUT=$OUTPUT/$(printf %03d "$SLURM_ARRAY_TASK_ID")
        FLAGS+=("${words[@]}" --output "$OUTPUT")
    fi
    STATE=$OUTPUT/slurm
    SIGNATURE=""  # what makes a run the same, without what a later job of a chain adds
    local flag
    for flag in "${FLAGS[@]}"; do [[ $flag == --resume ]] || SIGNATURE+="$(printf %q "$flag") "; done
    if ((RESTARTS)) && ! has_flag resume "${FLAGS[@]}"; then FLAGS+=(--resume); fi
    LOGS=$STATE/${SLURM_JOB_ID:-0}.$RESTARTS
    export OISD_LOGS=$LOGS
    [[ -n $OISD_DRY_RUN ]] || mkdir -p "$LOGS" || exit $REFUSED
    say "job $JOB, start $((RESTARTS + 1)); logs: $LOGS"
}

# Later jobs of a chain have nothing to do once one has finished the run.
leave_if_finished() {
    if [[ -f $STATE/finished && $(<"$STATE/finished") == "$SIGNATURE" ]]; then
        say "this run is finished: nothing to do (remove $STATE/finished to start the trainer all the same)"
        exit $DONE
    fi
}

# Slurm warns before the time limit (--signal=B:USR1@300), and by SIGTERM when it takes the job away.
ask_to_leave() {
    INTERRUPTED=1
    [[ -z $ASKED ]] || return 0
    ASKED=1
    say "asked to leave: the trainer writes a checkpoint"
    [[ -z $STEP_PID ]] || kill -USR1 "$STEP_PID" 2>/dev/null
    watch_time_limit &
    WATCH_PID=$!
}

# What is on disk is whole at any moment: rather requeue without a new checkpoint than run into the time limit.
watch_time_limit() {
    trap - USR1 TERM
    local end
    end=$(date -d "$(squeue --noheader --jobs "$JOB" --format %e)" +%s 2>/dev/null) || return 0
    while (($(date +%s) < end - 20)); do
        sleep 1
        kill -0 $$ 2>/dev/null || return 0  # the job is over
    done
    # Only a child of the batch script: the number may be another process's by now.
    [[ -z $STEP_PID || $(ps -o ppid= -p "$STEP_PID" | tr -d ' ') != "$$" ]] || kill -KILL "$STEP_PID"
}

find_nodes() {
    local all
    if [[ -n $OISD_NODES ]]; then
        IFS=, read -ra all <<<"$OISD_NODES"
    else
        mapfile -t all < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    fi
    local training=$((${#all[@]} - OISD_ROLLOUT_NODES))
    if ((training < 1)); then
        echo "error: OISD_ROLLOUT_NODES is $OISD_ROLLOUT_NODES of ${#all[@]} nodes: at least one must train" >&2
        exit $REFUSED
    fi
    NODES=("${all[@]}")
    TRAIN_NODES=("${all[@]:0:training}")
    SERVER_NODES=("${all[@]:training}")
    MASTER_ADDR=$(address "${TRAIN_NODES[0]}")
    # Distinct for jobs that share a node, and for the restarts of one: the port may still be closing.
    MASTER_PORT=$((20000 + (${SLURM_JOB_ID:-0} * 16 + RESTARTS) % 10000))
    export MASTER_ADDR MASTER_PORT
    BINDS_CPUS=$(scontrol show config 2>/dev/null | grep -E '^TaskPlugin .*(affinity|cgroup)')
}

# How the others reach a node.
address() {
    # shellcheck disable=SC2059
    printf "$OISD_HOST_FORMAT" "$1"
}

# step NAME NODES... -- TASK...: a task on each node (or OISD_TASKS_PER_NODE), logged to NAME.log; returns its exit
# code. On a signal the shell goes on waiting.
step() {
    start_step "$@"
    [[ -n $OISD_DRY_RUN ]] && return 0
    [[ -z $ASKED ]] || kill -USR1 "$STEP_PID"
    local code
    while :; do
        INTERRUPTED=""
        wait "$STEP_PID"
        code=$?
        [[ -n $INTERRUPTED ]] || break  # else the code is the signal's
    done
    STEP_PID=""
    return $code
}

start_step() {
    local name=$1 nodes=() tasks=${OISD_TASKS_PER_NODE:-1}
    shift
    while [[ $1 != -- ]]; do nodes+=("$1"); shift; done
    shift
    local command=(
        srun --nodes="${#nodes[@]}" --ntasks=$((${#nodes[@]} * tasks)) --ntasks-per-node="$tasks"
        --nodelist="$(join "${nodes[@]}")" --job-name="$name"
        --overcommit --wait="$OISD_WAIT_S" --kill-on-bad-exit=0
        --output="$LOGS/$name.out" --error="$LOGS/$name.err"
    )
    # All of a node's CPUs for all of its ranks, which one task starts.
    [[ -z $BINDS_CPUS ]] || command+=(--cpu-bind=none)
    if [[ -n $OISD_CONTAINER ]]; then
        local mounts
        # One name for all steps of the job: the image is unpacked once.
        mounts=$(printf '%s\n' "$OISD_REPO" "$PWD" "$(realpath -m "$OUTPUT")" | sort -u | sed 's/.*/&:&/' | paste -sd,)
        command+=(
            --container-image="$OISD_CONTAINER" --container-name="oisd-${SLURM_JOB_ID:-0}"
            --container-mounts="$mounts${OISD_MOUNTS:+,$OISD_MOUNTS}" --container-workdir="$PWD"
        )
    fi
    command+=(bash "$TASK" "$@")
    if [[ -n $OISD_DRY_RUN ]]; then
        printf '%q ' "${command[@]}"
        echo
        return 0
    fi
    "${command[@]}" &
    STEP_PID=$!
}

check_nodes() {
    ((OISD_PREFLIGHT)) || return 0
    local common=(--nodes "$(join "${NODES[@]}")" --rollout-nodes "$(join "${SERVER_NODES[@]}")")
    common+=(--ranks-per-node "$OISD_RANKS_PER_NODE" --gpus-per-node "${SLURM_GPUS_ON_NODE:-0}" --folder "$LOGS")
    step probe "${NODES[@]}" -- run python "$OISD_REPO/tools/preflight.py" probe "${common[@]}" --master "$MASTER_ADDR" \
        --wait "$OISD_SHARED_WAIT_S" -- "${FLAGS[@]}"
    [[ -z $ASKED ]] || end_job $AGAIN
    step check "${NODES[0]}" -- run python "$OISD_REPO/tools/preflight.py" check "${common[@]}" --reports "$LOGS/probe.out" \
        -- "${FLAGS[@]}"
    local code=$?
    [[ -n $OISD_DRY_RUN ]] && return 0
    [[ -z $ASKED ]] || end_job $AGAIN
    cat "$LOGS/check.out" "$LOGS/check.err"
    if ((code)); then
        ((code == REFUSED)) || tail -n 20 "$LOGS/probe.err"
        say "the preflight ended with $code: nothing was started, and the job is not requeued"
        exit $REFUSED
    fi
}

# Servers on the last nodes of the job, and the flags by which the trainer finds them.
start_servers() {
    ((${#SERVER_NODES[@]})) || return 0
    local per_node=$((${SLURM_GPUS_ON_NODE:-0} / OISD_ROLLOUT_TP)) urls=() index node
    ((per_node > 0)) || per_node=1
    for ((index = 0; index < per_node * ${#SERVER_NODES[@]}; index++)); do
        node=${SERVER_NODES[index / per_node]}
        urls+=("http://$(address "$node"):$((OISD_ROLLOUT_PORT + index))")
    done
    FLAGS+=(--rollout-engine vllm_server --rollout-urls "$(join "${urls[@]}")")
    local flags=()
    ((OISD_ROLLOUT_TP > 1)) && flags+=(--tensor-parallel-size "$OISD_ROLLOUT_TP")
    # shellcheck disable=SC2206
    flags+=($OISD_ROLLOUT_FLAGS --trainer-flags "${FLAGS[@]}")  # model and precision are the trainer's
    OISD_TASKS_PER_NODE=$per_node start_step servers "${SERVER_NODES[@]}" -- serve "${flags[@]}"
    [[ -n $OISD_DRY_RUN ]] && return 0
    SERVERS_PID=$STEP_PID
    STEP_PID=""
    local deadline=$((SECONDS + OISD_ROLLOUT_START_S)) url
    for url in "${urls[@]}"; do
        until answers "$url"; do
            if [[ -n $ASKED ]]; then end_job $AGAIN; fi
            if ((SECONDS > deadline)) || ! kill -0 "$SERVERS_PID" 2>/dev/null; then
                say "$url did not start within $OISD_ROLLOUT_START_S s; its last words ($LOGS/servers.err):"
                tail -n 20 "$LOGS/servers.err"
                end_job 1
            fi
            sleep 1
        done
    done
    say "${#urls[@]} rollout servers answer"
}

# Whether a server's /health says 200.
answers() {
    local host=${1#http://}
    # shellcheck disable=SC2016
    timeout 5 bash -c '
        exec 3<>"/dev/tcp/$1/$2" && printf "GET /health HTTP/1.0\r\nHost: %s\r\n\r\n" "$1" >&3 && head -n 1 <&3
    ' _ "${host%:*}" "${host##*:}" 2>/dev/null | grep -q ' 200'
}

# end_job CODE: what the job does next, after the trainer ended with CODE.
end_job() {
    local code=$1
    if [[ -n $OISD_DRY_RUN ]]; then exit $DONE; fi
    [[ -z ${WATCH_PID:-} ]] || kill "$WATCH_PID" 2>/dev/null
    local servers_ended=""
    if [[ -n $SERVERS_PID ]]; then
        kill -0 "$SERVERS_PID" 2>/dev/null || servers_ended=1
        kill -TERM "$SERVERS_PID" 2>/dev/null
    fi
    if ((code == DONE)); then
        printf '%s' "$SIGNATURE" >"$STATE/finished"
        say "finished"
        exit $DONE
    fi
    if [[ -z $ASKED ]] && ((code != AGAIN)); then
        [[ ! -s $LOGS/train.err ]] || tail -n 20 "$LOGS/train.err"
        [[ ! -s $LOGS/rank_0.log ]] || { say "the end of $LOGS/rank_0.log:"; tail -n 5 "$LOGS/rank_0.log"; }
    fi
    # Slurm is ending the job itself: cancelled, or a node failed, and then Slurm requeues it.
    local job_state
    job_state=$(squeue --noheader --jobs "$JOB" --format %T 2>/dev/null)
    if [[ $job_state != RUNNING ]]; then
        say "the job is $job_state: left to Slurm"
        exit "$code"
    fi
    if ((code == WRONG_FLAGS)) && [[ -z $ASKED$servers_ended ]]; then
        say "the trainer refused its input (exit code 2): not requeued"
        exit "$code"
    fi
    # Starts since the last one that left something new behind.
    local progress failures=0 stops=0 at=""
    progress=$(newest_checkpoint)-$(find "$OUTPUT/rollout_state" -type f 2>/dev/null | sort | cksum | cut -d ' ' -f 1)
    [[ -f $STATE/attempts ]] && read -r failures stops at <"$STATE/attempts"
    [[ $at == "$progress" ]] || failures=0 stops=0
    if [[ -n $ASKED ]] || ((code == AGAIN)); then
        code=$AGAIN
        requeue_unless $((++stops > OISD_MAX_STOPS)) "left when asked to, at checkpoint $(newest_checkpoint)"
    else
        requeue_unless $((++failures > OISD_MAX_FAILURES)) "failed ($code), at checkpoint $(newest_checkpoint)"
    fi
    exit "$code"
}

newest_checkpoint() { cat "$OUTPUT/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || echo none; }

# Of end_job, whose variables it uses.
requeue_unless() {
    echo "$failures $stops $progress" >"$STATE/attempts"
    if (($1)); then
        say "$2; nothing new came of the last $((failures + stops)) starts: not requeued"
        rm -f "$STATE/attempts"  # who submits it again means it
    elif say "$2: requeued" && trap - USR1 TERM && scontrol requeue "$JOB"; then
        sleep 60  # Slurm ends this script
    else
        say "it cannot be requeued: submit it again with --resume, or use a chain (submit.sh chain)"
    fi
}
