#!/bin/bash
# smollm3-3b-8 on 2 to 8 nodes: one task a node, which starts the node's ranks.
# The code and the recipe that run are those of the moment of submission, in runs/smollm3-3b-8/jobs/1.
#SBATCH --job-name=smollm3-3b-8
#SBATCH --nodes=2-8
# Slurm gives a range's fewest nodes where these have room for the job's tasks: it asks for one on each of the most.
#SBATCH --ntasks=8
#SBATCH --overcommit
#SBATCH --cpus-per-task=4
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --partition=train
#SBATCH --qos=high
#SBATCH --time=1-00:00:00
#SBATCH --account=lab
#SBATCH --reservation=night
#SBATCH --exclude=bad[1-3]
#SBATCH --dependency=afterok:41
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=runs/smollm3-3b-8/logs/slurm-%j.log
set -o pipefail

# Before the time limit, and where somebody asks (scancel --signal=USR1 --batch), the run is told to save and stop.
asked=""
srun_pid=""
pass_on() {
    asked=$1
    [ -z "$srun_pid" ] || kill -s USR1 "$srun_pid" 2>/dev/null
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

prologue='module load "cuda 12"'
# It may set whatever it likes, but not how this script goes on, nor end it as if all were well.
trap 'echo "error: slurm.prologue ended its shell with exit code $?" >&2; exit 1' EXIT
started_in=$PWD
eval "$prologue"
set +eu -o pipefail
cd "$started_in" || exit 1
trap - EXIT
job=runs/smollm3-3b-8/jobs/1
python=/shared/clone/.venv/bin/python
restart="${SLURM_RESTART_COUNT:-0}"
# First on the path, before an installed clone that may have been edited since.
export PYTHONPATH="$PWD/$job/code${PYTHONPATH:+:$PYTHONPATH}"

# Notes this start; tokenizes what is to be tokenized. 3: there is nothing left to train.
"$python" -P -m launch.cluster.job begin "$job" --job-id "$SLURM_JOB_ID" --restart "$restart" \
    --nodes "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd, -)"
case $? in 0) ;; 3) exit 0 ;; *) exit 1 ;; esac

# What each node runs. The quotes keep this shell from expanding anything in it.
node_script=$(cat <<'END_OF_NODE_SCRIPT'
trap '' USR1  # torchrun would die of it; the ranks listen for themselves
arguments=("$@")
prologue=$4
set --  # what it sources finds no arguments
# It may set whatever it likes, but not how this script goes on, nor end it as if all were well.
trap 'echo "error: slurm.prologue ended its shell with exit code $?" >&2; exit 1' EXIT
started_in=$PWD
eval "$prologue"
set +eu -o pipefail
cd "$started_in" || exit 1
trap - EXIT
set -- "${arguments[@]}"
exec "$0" -P -m launch.cluster.node "$1" --node-rank "$SLURM_NODEID" --node-name "$SLURMD_NODENAME" \
    --num-nodes "$SLURM_NNODES" --job-id "$SLURM_JOB_ID" --restart "${SLURM_RESTART_COUNT:-0}" \
    --main-address "$2" --main-port "$3" --stop-after 100
END_OF_NODE_SCRIPT
)
main_address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
main_port=$((20000 + (SLURM_JOB_ID * 31 + restart) % 12000))

srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
    --kill-on-bad-exit=1 --wait=60 --label --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" \
    --container-mounts=/a:/b,/c:/d \
    '--comment='"'"'a'"'"'' \
    bash -c "$node_script" "$python" "$job" "$main_address" "$main_port" "$prologue" &
srun_pid=$!
[ -z "$asked" ] || pass_on "$asked"
while :; do
    wait "$srun_pid"
    code=$?
    # A signal ends the wait, not srun.
    if [ "$code" -le 128 ] || ! kill -0 "$srun_pid" 2>/dev/null; then break; fi
done

# What became of the run is read in its folder: srun's exit code can be 0 after a node has failed. A signal that comes
# now finds nothing to save, and must not end what puts the job back into the queue.
trap '' USR1 TERM
exec "$python" -P -m launch.cluster.job end "$job" --job-id "$SLURM_JOB_ID" --restart "$restart" \
    --srun-code "$code" --asked "$asked" --stop-after 100
