#!/usr/bin/env bash
# Slurm: one run over whole hosts, saved before the time limit and gone on with by the same job in its next turn.
#   sbatch recipes/slurm.sh                                       # from the repository, on a disk that all hosts see
#   sbatch --nodes=4 --time=12:00:00 recipes/slurm.sh --set training.num_epochs=1
# Arguments go to scripts/train.py; sbatch's own options win over those below. First, once: make setup-gpu CUDA=13.
#
# Checked: bash -n, shellcheck, train's flags, and the way from the signal to the requeue with stand-ins for srun, scancel and scontrol
# (tests/test_recipes.py). Not run on a cluster. It relies on a habit of Slurm's: scancel --signal reaches the steps and not this script. In a
# step torchrun passes the signal on to its ranks, who take it as one where a site has Slurm send it to them, too.
#SBATCH --job-name=emergency-kit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# To this script alone, five minutes before the end. Not TERM: that is what scancel by a person sends, which is to end the job for good.
#SBATCH --signal=B:USR1@300
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source activate_env.sh

stopped=no
# Not `kill` to srun, which takes SIGTERM as the order to kill its tasks at once.
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

read -r first_host < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# One torchrun a host, which starts a rank a GPU. The port is of this job, so that two jobs may share a host. A host whose ranks have ended must not
# take down the one that still saves: kill-on-bad-exit. cpus-per-task is named again, since srun does not take it over from sbatch.
srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" \
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$first_host:$((20000 + SLURM_JOB_ID % 10000))" --shutdown-timeout=240 \
  scripts/train.py --profile mistral-7b --set model.backend=hf --output-dir outputs "$@" &
step=$!

code=0
wait "$step" || code=$?
if [ "$stopped" = yes ]; then
  # The signal ended that wait, not the run, which finishes its pass and saves.
  code=0
  wait "$step" || code=$?
  if [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
  fi
fi
exit "$code"
