#!/usr/bin/env bash
# Train on a Slurm cluster: sbatch --nodes=8 launch/slurm.sh --config chairs-8x8 --data DIR --out RUN ...
# One rank per GPU; mpirun finds the nodes of the job. After a failure, training is restarted up to three times. The
# same command resumes from the newest checkpoint: one is written five minutes before the time limit (USR1), or on
#   scancel --batch --signal=USR1 JOB
#SBATCH --job-name=pwcnet
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
set -euo pipefail
# sbatch runs a copy of this file; the checkout is where it was submitted.
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
[ -f launch/env.sh ] || {
    echo "error: $PWD is not the checkout; submit from there: sbatch launch/slurm.sh ..." >&2
    exit 1
}
source launch/env.sh
help_if_asked train/main.py "$@"
[ -n "${SLURM_JOB_ID:-}" ] && [ -n "${SLURM_NTASKS:-}" ] ||
    fail "not in a Slurm batch job; submit it: sbatch --nodes=2 launch/slurm.sh ..., or without Slurm:" \
        "mpirun -n RANKS launch/train.sh ..."
# The cluster may have its own mpirun; each rank loads the library that belongs to it.
command -v mpirun >/dev/null || set_up
case " $* " in
*" --device"*) device=() ;;
*) device=(--device gpu) ;;
esac
# Ranks bind themselves; mpirun would refuse more ranks than physical cores, but Slurm counts hardware threads.
exec launch/retry.sh 3 mpirun --bind-to none -n "$SLURM_NTASKS" launch/train.sh ${device[@]+"${device[@]}"} "$@"
