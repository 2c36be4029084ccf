#!/usr/bin/env bash
# An existing lmms-eval command with pruning: --model vlmprune, and method and keep among the arguments.
#     examples/lmms_eval.sh MODEL TASKS [METHOD] [KEEP]
set -euo pipefail
model=$1 tasks=$2 method=${3:-divprune} keep=${4:-0.25}
lmms-eval --model vlmprune --model_args "pretrained=$model,method=$method,keep=$keep" --tasks "$tasks" "${@:5}"
