#!/usr/bin/env bash
# Which kind of gate is best on frozen specialists? Every kind, three times, from the same cached states.
#
#   gating/demo/ablation.sh FUSION DATA OUTPUT [TRAIN OPTIONS]
#
# FUSION: a trained fusion or a preset (demo), whose own gate is what the others are held against. DATA: as of recipe.sh.
# OUTPUT: a new folder, or one of an earlier call that was stopped; OUTPUT/kinds.md has the tables, OUTPUT/kinds.json the
# figures. TRAIN OPTIONS go behind those written here, of which the last counts: --steps 300, --limit 1000.
# KINDS and SEEDS in the environment leave some out, ROWS says how many rows of each domain are evaluated on.
set -euo pipefail

fusion=$1
data=$(realpath "$2")
mkdir -p "$3"
output=$(realpath "$3")
shift 3
read -ra kinds <<< "${KINDS:-paper joint probabilities scaled smoothed joint+scaled joint+smoothed joint+probabilities+scaled+smoothed}"
read -ra seeds <<< "${SEEDS:-0 1 2}"
domains=(text code math)

files=()
named=()
for name in "${domains[@]}"; do
  files+=("$data/train.$name.jsonl.gz")
  named+=("$name=$data/validation.$name.jsonl.gz")
done

# As stage 1 of recipe.sh; the states of the rows are computed once for all runs.
gates=()
for kind in "${kinds[@]}"; do
  for seed in "${seeds[@]}"; do
    own="$output/$kind-$seed"
    gates+=("$kind-$seed=$own")
    [ -f "$own/fusion.yaml" ] || ultrafuser train "$fusion" --stage 1 --cache-states --fresh-gate --gate-kind "$kind" \
      --seed "$seed" --data "${files[@]}" --limit 400 --steps 150 --rows-per-domain 8 --micro-rows-per-domain 1 \
      --learning-rate 1e-3 --warmup-steps 10 --max-length 512 --precision bfloat16 --resume "$@" \
      --output "$own" 2>> "$own.log"
  done
done

ultrafuser eval "$fusion" --loss --gates "${gates[@]}" --data "${named[@]}" --limit "${ROWS:-500}" --mixed-turns 100 \
  --max-length 512 --batch-size 1 --precision bfloat16 --json "$output/kinds.json" > "$output/kinds.md" 2> "$output/kinds.log"
cat "$output/kinds.md"
