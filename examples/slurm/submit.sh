#!/bin/bash
# Several jobs at once, on a login node:
#
#   submit.sh chain COUNT [SBATCH OPTIONS] -- [FLAGS OF tools/train_rl.py]
#   submit.sh sweep FILE  [SBATCH OPTIONS] -- [FLAGS OF tools/train_rl.py]
#
# chain: COUNT jobs that go on with one run, each after the one before ended, however it ended; for clusters where a
#        job may not requeue itself, and for time limits that cannot be raised. Those that are not needed end at once.
#        OISD_CHAIN=singleton: by --dependency=singleton instead of afterany, so that more can be added later.
# sweep: an array job with a task for every line of FILE; a line holds the flags that differ, # begins a comment. Task
#        N writes to OUTPUT/N. SBATCH OPTIONS such as --array=0-9%2 replace the array, for example to limit how many
#        run at once.
set -euo pipefail

OISD_REPO=${OISD_REPO:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
export OISD_REPO
script=$OISD_REPO/examples/slurm/train.sbatch

usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2; exit 2; }

(($# >= 2)) || usage
kind=$1 what=$2 options=()
shift 2
while (($#)) && [[ $1 != -- ]]; do options+=("$1"); shift; done
(($#)) || usage
shift

case $kind in
    chain)
        [[ $what =~ ^[1-9][0-9]*$ ]] || { echo "error: COUNT is $what: expected a number of jobs" >&2; exit 2; }
        previous=""
        for ((job = 0; job < what; job++)); do
            dependency=() resume=()
            if [[ -n $previous ]]; then
                resume=(--resume)
                dependency=(--dependency "afterany:$previous")
            fi
            [[ ${OISD_CHAIN:-afterany} != singleton ]] || dependency=(--dependency singleton)
            previous=$(sbatch --parsable "${dependency[@]}" "${options[@]}" "$script" "$@" "${resume[@]}")
            previous=${previous%%;*}
            echo "$previous"
        done
        ;;
    sweep)
        [[ -f $what ]] || { echo "error: $what does not exist: expected a file with a line of flags per run" >&2; exit 2; }
        count=$(grep -cvE '^[[:space:]]*(#|$)' "$what") || { echo "error: $what has no line of flags" >&2; exit 2; }
        OISD_SWEEP=$(realpath "$what") sbatch --parsable --array "0-$((count - 1))" "${options[@]}" "$script" "$@"
        ;;
    *) usage ;;
esac
