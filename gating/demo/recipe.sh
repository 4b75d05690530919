#!/usr/bin/env bash
# Remakes the demo: three specialists of one small model, and their gate.
#
#   gating/demo/recipe.sh DATA OUTPUT
#
# DATA: a folder with train.DOMAIN.jsonl.gz and validation.DOMAIN.jsonl.gz for the domains text, code and math
# (docs/training.md, "Data"). OUTPUT: a new folder, or one of an earlier call that was stopped: every step goes on from
# its last checkpoint, and one that is done is not done again. What it measured and made is in OUTPUT/demo.
set -euo pipefail

data=$(realpath "$1")
mkdir -p "$2"
output=$(realpath "$2")
here=$(dirname "$(realpath "$0")")
domains=(text code math)

# One thread for each process: two processes side by side then use two cores better than one process with two threads.
export OMP_NUM_THREADS=1

# Frozen weights are in bfloat16 as they are stored; adapters and gate are kept in float32 while they learn.
# Rows are computed one at a time: without padding that is faster on a CPU. 512 tokens hold nine rows of ten whole.
common=(--precision bfloat16 --max-length 512 --micro-rows-per-domain 1 --resume)

train() {
  local result=$1
  shift
  [ -f "$output/$result/fusion.yaml" ] || ultrafuser train "$@" "${common[@]}" --output "$output/$result" 2>> "$output/$result.log"
}

# 1. Specialists: a rank-8 adapter for each domain, read in the specialist's own template.
#    The learning rate is from a sweep on math over 24 steps of 8 rows (validation loss, 1.745 untrained):
#    5e-4 1.387, 1e-3 1.334, 2e-3 1.304, 4e-3 1.283. A longer run wants a little less than the best.
specialist() {
  train "specialist-$1" "$here/base.yaml" --specialist "$1" \
    --data "$data/train.$1.jsonl.gz" --eval-data "$data/validation.$1.jsonl.gz" --eval-limit 50 --eval-every 50 \
    --steps 150 --rows-per-domain 16 --learning-rate 3e-3 --warmup-steps 10 --save-every 10
}
for name in "${domains[@]}"; do
  specialist "$name" &
done
wait

# The three of them in one fusion, as they enter the two stages.
sed -E "s|^( *)chat_template: .*|&\n\1adapter: ADAPTER|" "$here/base.yaml" > "$output/specialists.yaml"
for name in "${domains[@]}"; do
  sed -i "0,/adapter: ADAPTER/s|ADAPTER|./specialist-$name/adapters/$name|" "$output/specialists.yaml"
done

files=()
eval_files=()
for name in "${domains[@]}"; do
  files+=("$data/train.$name.jsonl.gz")
  eval_files+=("$data/validation.$name.jsonl.gz")
done

# 2. Stage 1: the gate alone, on hidden states that are computed once.
OMP_NUM_THREADS=2 train stage1 "$output/specialists.yaml" --stage 1 --cache-states \
  --data "${files[@]}" --limit 400 --eval-data "${eval_files[@]}" --eval-limit 50 --eval-every 50 \
  --steps 150 --rows-per-domain 8 --learning-rate 1e-3 --warmup-steps 10

# 3. Stage 2: gate and adapters together, balanced, gently: a step has few rows here, and their noise undoes more than
#    they teach at higher rates. One adapter (math) learning on for 60 steps of 4 rows, validation loss (1.1666 before):
#    3e-4 1.1685, 1e-3 1.1900.
OMP_NUM_THREADS=2 train stage2 "$output/stage1" --stage 2 \
  --data "${files[@]}" --eval-data "${eval_files[@]}" --eval-limit 50 --eval-every 60 \
  --steps 60 --rows-per-domain 4 --learning-rate 1e-4 --gate-learning-rate 5e-4 --warmup-steps 5 --save-every 5

# 4. What it is worth, on data nobody trained on; the baseline are the specialists as they entered stage 2.
[ -f "$output/loss.json" ] || OMP_NUM_THREADS=2 ultrafuser eval "$output/stage2" --loss \
  --data "text=$data/validation.text.jsonl.gz" "code=$data/validation.code.jsonl.gz" \
  "math=$data/validation.math.jsonl.gz" --limit 150 --baseline "$output/stage1" --max-length 512 --batch-size 1 \
  --precision bfloat16 --json "$output/loss.json" > "$output/loss.md" 2> "$output/loss.log"

# 5. The files to ship.
python "$here/collect.py" "$output"
