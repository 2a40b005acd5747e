#!/bin/bash
# smollm3-3b-1 after step 4000: the checkpoint is measured, in a job of its own.
#SBATCH --job-name=smollm3-3b-1-evaluate-4000
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --gres=gpu:2
#SBATCH --partition=eval
#SBATCH --qos=low
#SBATCH --time=01:59:00
#SBATCH --account=lab
#SBATCH --reservation=night
#SBATCH --no-requeue
#SBATCH --output=runs/smollm3-3b-1/logs/evaluations/4000-%j.log
set -o pipefail
export PYTHONPATH=/shared/clone/runs/smollm3-3b-1/jobs/1/code"${PYTHONPATH:+:$PYTHONPATH}"
# Where lighteval keeps data sets; a node without network finds those that were fetched before.
export HF_HOME='/shared/hf cache'
exec /shared/clone/.venv/bin/python -P -m launch.evaluate.job runs/smollm3-3b-1 4000 --device cuda --benchmarks
