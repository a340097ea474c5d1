#!/bin/bash
# The same command on every machine of a run without a scheduler; all see the same output folder.
#
#   NODES=2 FIRST=host-1 bash docs/launch/torchrun.sh recipe=pg19_gca trainer=ddp
#
# Machines find each other at port 29500 of the first. A process that dies ends all; the same command resumes.
set -euo pipefail
: "${NODES:=1}" "${FIRST:=localhost}" "${DEVICES:=8}"
exec torchrun --nnodes "$NODES" --nproc-per-node "$DEVICES" --rdzv-backend c10d --rdzv-id longhaul \
    --rdzv-endpoint "$FIRST:29500" train.py trainer.num_nodes="$NODES" trainer.devices="$DEVICES" "$@"
