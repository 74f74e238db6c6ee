#!/usr/bin/env bash
# Two machines of eight GPUs under Slurm: one `accelerate launch` a machine, each of which starts eight processes.
#   sbatch recipes/accelerate_configs/slurm.sh recipes/<task>/vgf.yaml
#SBATCH --job-name=vgf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
set -euo pipefail

RECIPE=${1:?name a recipe: sbatch $0 recipes/<task>/vgf.yaml}
GPUS_PER_NODE=8
export MAIN_IP MAIN_PORT=29500 RECIPE GPUS_PER_NODE
MAIN_IP=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# SLURM_NODEID differs from machine to machine, so it is read where the command runs, not here.
srun --kill-on-bad-exit=1 bash -c '
    accelerate launch --config_file recipes/accelerate_configs/zero2.yaml \
        --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * GPUS_PER_NODE)) \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_IP" --main_process_port "$MAIN_PORT" \
        -m vgf_llm.train --config "$RECIPE"
'
