#!/usr/bin/env bash
# Train a dozen micro models that differ in size, encoders, connector, steps and seed, and let each answer two pools of
# questions with the video, with one frame and from the text: what curation is measured on (benchmarks/curation.py).
# Many hours on two cores, after make_micro.sh; run again after a stop, it goes on where it was. Names as arguments
# make these models alone, so that several can be made side by side.
set -euo pipefail
cd "$(dirname "$0")/.."
apollo=${APOLLO:-.venv/bin/apollo}
resume() { [ -e "$1" ] && echo --resume || true; }
parts=apollo/assets/parts
image=$parts/siglip video=$parts/internvideo2
only=" $* "

make() { # NAME LLM SETTING...
  local name=$1 llm=llm-$2 run=runs/pool/$1
  [[ $only = "  " || $only = *" $name "* ]] || return 0
  if [ ! -e "$parts/$llm" ]; then
    $apollo part "$llm" --out "runs/parts/$llm" --seed 0 $(resume "runs/parts/$llm")
    .venv/bin/python scripts/ship.py "$llm"
  fi
  if [ -e "$run" ]; then $apollo train --resume --out "$run"; else
    # Encoders that are never trained give all models the same features, which are kept.
    $apollo train micro --out "$run" --set data_dir=runs/world feature_cache_dir=runs/features "model.encoders=[$image, $video]" \
      "model.llm=$parts/$llm" stages.0.steps=500 stages.1.steps=1500 stages.1.learning_rates.encoders=0 stages.1.learning_rates.connector=4e-3 stages.2.steps=1500 "${@:3}"
  fi
  for seed in 2 3; do
    $apollo eval "$run/model" --data "runs/pool/world_$seed" --condition video frame text --out "runs/pool/answers_$seed/$name"
  done
}

for seed in 2 3; do
  world=runs/pool/world_$seed
  [ -e "$world/world.json" ] || { rm -rf "$world"; $apollo world make "$world" --num-videos 1750 --seed "$seed" --split test; }
done
few="stages.0.steps=150 stages.1.steps=400 stages.2.steps=400"
make 3m 3m
make 3m_image 3m "model.encoders=[$image]"
make 3m_few 3m $few
make 1m 1m
make 1m_image 1m "model.encoders=[$image]"
make 1m_video 1m "model.encoders=[$video]"
make 1m_few 1m $few
make 1m_seed1 1m loop.seed=1
make 1m_mlp 1m model.connector.resampler=mlp_pool
make 1m_4tokens 1m model.tokens_per_clip=4
make 0.3m 0.3m
make 0.3m_image 0.3m "model.encoders=[$image]" loop.seed=1
