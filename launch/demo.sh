#!/usr/bin/env bash
# See it work on any machine with Python: generate example data, convert it, train PWC-Net with two ranks under mpirun,
# and evaluate. Steps already done are not repeated; remove data/example* and runs/example to start afresh.
# Arguments are recipe overrides (key=value).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked "" "$@"
set_up tensorboard
cd "$root"

precision=precision=auto
[[ " $* " == *" precision="* ]] && precision=

step() { printf '\n== %s\n' "$*" >&2; }

step "1/4 example data: data/example"
# Profile 1, of which a network learns more within minutes, is what the figures in README.md were measured with.
python prep/synthesize.py --out data/example --profile 1

step "2/4 conversion to MindRecord: data/example-mindrecord"
python prep/convert.py flyingchairs --root data/example --out data/example-mindrecord \
    --split-file data/example/validation.txt --shards 4

step "3/4 training on two ranks: runs/example"
mpirun --oversubscribe -n 2 launch/train.sh --config example --data data/example-mindrecord \
    --out runs/example ${precision:+"$precision"} "$@"

step "4/4 evaluation"
checkpoints=(runs/example/checkpoints/step-????????.ckpt)
python train/evaluate.py --data data/example-mindrecord --split val \
    --ckpt "${checkpoints[-1]}" --out runs/example/evaluation --batch 4

cat <<EOF

Pictures: $root/runs/example/evaluation/flow.png
Curves:   $environment/bin/tensorboard --logdir $root/runs/example/tensorboard
EOF
