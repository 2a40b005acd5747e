#!/bin/bash
# smollm3-3b-1 after step 4000: the checkpoint is measured, in a job of its own.
#SBATCH --job-name=smollm3-3b-1-evaluate-4000
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --partition=train
#SBATCH --qos=high
#SBATCH --time=02:00:00
#SBATCH --account=lab
#SBATCH --reservation=night
#SBATCH --no-requeue
#SBATCH --output=runs/smollm3-3b-1/logs/evaluations/4000-%j.log
set -o pipefail
prologue='module load "cuda 12"'
# It may set whatever it likes, but not how this script goes on, nor end it as if all were well.
trap 'echo "error: slurm.prologue ended its shell with exit code $?" >&2; exit 1' EXIT
started_in=$PWD
eval "$prologue"
set +eu -o pipefail
cd "$started_in" || exit 1
trap - EXIT
export PYTHONPATH=/shared/clone/runs/smollm3-3b-1/jobs/1/code"${PYTHONPATH:+:$PYTHONPATH}"
exec /shared/clone/.venv/bin/python -P -m launch.evaluate.job runs/smollm3-3b-1 4000 --device cpu --benchmarks
