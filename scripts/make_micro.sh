#!/usr/bin/env bash
# Rebuild the shipped micro model from nothing: parts, world, three stages, evaluation, assets.
# Hours on two cores, 10 GB of features; run again after a stop, it takes the trainings up where they were and makes an
# unfinished world anew.
set -euo pipefail
cd "$(dirname "$0")/.."
apollo=${APOLLO:-.venv/bin/apollo}
resume() { [ -e "$1" ] && echo --resume || true; }

ship=".venv/bin/python scripts/ship.py"

for part in siglip internvideo2 llm-1m; do
  [ -e "runs/parts/$part/model" ] || $apollo part "$part" --out "runs/parts/$part" --seed 0 $(resume "runs/parts/$part")
  $ship "$part"
done
[ -e runs/world/world.json ] || { rm -rf runs/world; $apollo world make runs/world --num-videos 5000 --seed 0; }
[ -e runs/held_out/world.json ] || { rm -rf runs/held_out; $apollo world make runs/held_out --num-videos 450 --seed 1 --split test; }
if [ -e runs/micro ]; then $apollo train --resume --out runs/micro; else
  $apollo train micro --out runs/micro --set data_dir=runs/world feature_cache_dir=runs/features
fi
$ship micro
$apollo eval apollo/assets/micro --data runs/held_out --condition video frame text --out runs/eval_micro
.venv/bin/python scripts/readme_table.py runs/eval_micro
