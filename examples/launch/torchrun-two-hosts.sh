#!/usr/bin/env bash
# Two hosts with 4 GPUs each. Run the same command on both; HOST is the name or address of either one of them.
# A worker that dies brings the whole group back, at most 3 times, from the newest whole checkpoint.
#
#   HOST=node0 ./torchrun-two-hosts.sh
set -euo pipefail

torchrun \
  --nnodes 2 \
  --nproc-per-node 4 \
  --max-restarts 3 \
  --rdzv-backend c10d \
  --rdzv-endpoint "${HOST:?the name of one of the two hosts}:29400" \
  --rdzv-id llama3-8b \
  -m colrow train configs/llama3-8b-tp4.yaml \
  --mesh.tp 4 --mesh.dp-shard 2 \
  --train.steps 5000 --train.global-batch 16 \
  --run.dir /shared/runs/llama3-8b --checkpoint.every 500 --checkpoint.asynchronous True
