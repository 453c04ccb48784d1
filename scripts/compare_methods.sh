#!/usr/bin/env bash
# Trains several runs at once, one process each, spread over the machine's GPUs, and prints their table.
# usage: scripts/compare_methods.sh "COMMON OVERRIDES" "OVERRIDES OF RUN 1" "OVERRIDES OF RUN 2" ...
# example: scripts/compare_methods.sh "task=sst2 trainer=quick model.path=FOLDER task.data_dir=FOLDER" "method=full" "method=mam"
set -u
common=$1; shift
output=${OUTPUT_DIR:-outputs}
gpus=$(python3 -c "import torch; print(max(1, torch.cuda.device_count()))")
index=0
for run in "$@"; do
  # shellcheck disable=SC2086 # the overrides are words
  CUDA_VISIBLE_DEVICES=$((gpus - 1 - index % gpus)) OMP_NUM_THREADS=2 \
    python3 -m peftbench train $common $run output_dir="$output" >"/tmp/run-$index.log" 2>&1 &
  index=$((index + 1))
done
wait
for ((i = 0; i < index; i++)); do
  grep -q "The run is in" "/tmp/run-$i.log" || { echo "run $i did not come through:"; tail -n 5 "/tmp/run-$i.log"; }
done
COLUMNS=180 python3 -m peftbench results "$output"
