#!/usr/bin/env bash
# On a machine with a package index, in the checkout's root: put into .gpu/, which git ignores, what a bare GPU machine
# lacks. Then copy the tree with .gpu/ there and run `bash benchmarks/gpu/campaign.sh`.
#   bash benchmarks/gpu/prepare.sh [wheels] [tokenizer]   both by default
#   .gpu/wheels     about 27 MiB: what an image with torch has not (PYTHON_VERSION=3.12, x86-64)
#   .gpu/tokenizer  SmolLM2's, 2 MiB; the models are made where the GPU is, with random weights
# MAX_BYTES (64 MiB): the tree with .gpu/ must be smaller than that.
set -euo pipefail
[ -d trainer ] && [ -d benchmarks/gpu ] || { echo "start this in the checkout's root"; exit 2; }
PY=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
WANTED=${*:-wheels tokenizer}
PYTHON_VERSION=${PYTHON_VERSION:-3.12}

pin() { sed -n "s/^$1==//p" constraints.txt; }
without_warnings() { grep -v WARNING >&2 || true; }
download() { # FOLDER REQUIREMENT…
  local platforms=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_24_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux1_x86_64)
  "$PY" -m pip download -q --no-deps --only-binary=:all: --implementation cp --python-version "$PYTHON_VERSION" \
    "${platforms[@]/#/--platform=}" -d "$@" 2> >(without_warnings)
}

wheels() {
  mkdir -p .gpu/wheels
  local name requirements=() bitsandbytes
  for name in transformers peft hydra-core omegaconf datasets multiprocess dill hjson pydantic pydantic_core \
    annotated-types typing-inspection nltk defusedxml gguf trl liger-kernel; do requirements+=("$name==$(pin "$name")"); done
  download .gpu/wheels "${requirements[@]}"
  # There are only sources of these. DeepSpeed is built without its own ops: afina uses none.
  for name in deepspeed antlr4-python3-runtime rouge_score; do
    DS_BUILD_OPS=0 "$PY" -m pip wheel -q --no-deps -w .gpu/wheels "$name==$(pin "$name")" 2> >(without_warnings)
  done
  bitsandbytes=$(mktemp -d)
  download "$bitsandbytes" "bitsandbytes==$(pin bitsandbytes)"
  "$PY" benchmarks/gpu/strip_wheel.py "$bitsandbytes"/*.whl .gpu/wheels \
    bitsandbytes/libbitsandbytes_cuda130.so bitsandbytes/libbitsandbytes_cpu.so
  rm -r "$bitsandbytes"
}

tokenizer() {
  local model file
  model=$("$PY" -m trainer.cli fetch smollm2_135m | tail -1)
  mkdir -p .gpu/tokenizer
  for file in tokenizer.json tokenizer_config.json special_tokens_map.json chat_template.jinja generation_config.json; do
    if [ -f "$model/$file" ]; then cp "$model/$file" .gpu/tokenizer/; fi
  done
}

for part in $WANTED; do
  case $part in wheels | tokenizer) "$part" ;; *) echo "not wheels or tokenizer: $part"; exit 2 ;; esac
done
tree=0
if git rev-parse --git-dir >/dev/null 2>&1; then
  tree=$(git ls-files -z --cached --others --exclude-standard | xargs -0 du -cb 2>/dev/null | tail -1 | cut -f1)
fi
carried=$(du -sb --exclude=out .gpu | cut -f1)
echo "the tree has $tree bytes, .gpu/ $carried: $((tree + carried)) of ${MAX_BYTES:=67108864}"
[ $((tree + carried)) -lt "$MAX_BYTES" ]
