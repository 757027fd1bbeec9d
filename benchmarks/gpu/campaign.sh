#!/usr/bin/env bash
# Measure afina on this machine's GPU, what matters most first. Started in the checkout's root; README.md beside this
# file says what it needs. Settings are environment variables:
#   ONLY="env suite micro speed"    the stages to run
#   KIT_RUNS="8b8_trie 8b8_padded"  the trainings of the stage speed to run; empty: all
#   BUDGET=535                      seconds in all; what does not fit is left out
#   DRY=1                           tiny shapes on a CPU, to try the scripts
#   OUT=.gpu/out                    results.jsonl, results.json, report.md, log.txt, profile.txt, traces
#   KIT_STEPS=7  KIT_LIMIT=75       updates, and seconds, of one training of the stage speed
#   KIT_CORRECT=170  KIT_WORKERS=8  seconds of the stage suite, and its trainings at a time
#   KIT_CASES=lora,same             parts of the names of its trainings; empty: all
#   KIT_SHAPES="8b8"                the models to make; empty: all
#   KIT_WORK  KIT_MODELS  KIT_SITE  KIT_TOKENIZER   folders for runs, models (24 GB), unpacked wheels; the tokenizer
set -u
START=$(date +%s)
ROOT=$PWD
[ -d trainer ] && [ -d benchmarks/gpu ] || { echo "start this in the checkout's root"; exit 2; }
PY=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
DRY=${DRY:-}
OUT=${OUT:-$ROOT/.gpu/out}
WORK=${KIT_WORK:-${TMPDIR:-/tmp}/afina-gpu/work}
SITE=${KIT_SITE:-${TMPDIR:-/tmp}/afina-gpu/site}
TOKENIZER=${KIT_TOKENIZER:-$ROOT/.gpu/tokenizer}
ONLY=${ONLY:-env suite micro speed}
RUNS=${KIT_RUNS:-}
STEPS=${KIT_STEPS:-7}
SHAPES=${KIT_SHAPES:-8b8 1b 135m 8b}; SCALE=1; LONGEST=2048; DTYPE=bf16
if [ -n "$DRY" ]; then # on a CPU seconds mean nothing, so nothing is cut off
  BUDGET=${BUDGET:-7200}; CORRECT=${KIT_CORRECT:-3600}; LIMIT=${KIT_LIMIT:-600}; MICRO=600; SMALL=300
  SHAPES=dry; SCALE=16; LONGEST=256; DTYPE=auto; WORKERS=${KIT_WORKERS:-2}; TESTERS=1
else
  BUDGET=${BUDGET:-535}; CORRECT=${KIT_CORRECT:-170}; LIMIT=${KIT_LIMIT:-75}; MICRO=110; SMALL=60
  WORKERS=${KIT_WORKERS:-8}; TESTERS=5
fi
# models in memory where there is room: they are read once a training
SHM=$(df --output=avail -k /dev/shm 2>/dev/null | tail -1)
MODELS=${KIT_MODELS:-$([ -z "$DRY" ] && [ "${SHM:-0}" -gt 30000000 ] && echo /dev/shm || echo "${TMPDIR:-/tmp}")/afina-gpu/models}
mkdir -p "$OUT" "$WORK" "$MODELS"
[ -f "$TOKENIZER/tokenizer.json" ] || { echo "no tokenizer in $TOKENIZER: bash benchmarks/gpu/prepare.sh makes it"; exit 2; }
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 WANDB_MODE=offline
export AFINA_CACHE=$WORK/cache OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) < 8 ? $(nproc) : 8))} PYTHONPATH=$SITE:$ROOT
: >"$OUT/results.jsonl"; : >"$OUT/log.txt"; : >"$OUT/profile.txt"

seconds() { echo $(($(date +%s) - START)); }
note() { echo "[$(seconds) s] $*" | tee -a "$OUT/log.txt"; }
wants() { case " $ONLY " in *" $1 "*) return 0 ;; esac; return 1; }
leave_out() { note "$1: left out, $2"; echo "{\"stage\": \"$1\", \"skipped\": \"$2\"}" >>"$OUT/results.jsonl"; }
kit() { echo "$PY -m benchmarks.gpu.$1"; }
installed() { "$PY" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }

# stage NAME SECONDS COMMAND…: run it, and keep what it has found and how it ended. At its limit it gets ${SIGNAL:-TERM}
stage() {
  local name=$1 limit=$2 left=$((BUDGET - $(seconds))) begin code
  shift 2
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 15 ]; then leave_out "$name" "no time left"; return 0; fi
  begin=$(date +%s)
  rm -f "$WORK/$name.json"
  timeout -k 10 -s "${SIGNAL:-TERM}" "$limit" "$@" >"$WORK/$name.log" 2>&1 </dev/null
  code=$?
  $(kit collect) "$OUT/results.jsonl" "$name" "$code" $(($(date +%s) - begin)) "$WORK/$name.log" "$WORK/$name.json"
  { echo "===== $name: exit code $code"; tail -c 12000 "$WORK/$name.log"; } >>"$OUT/log.txt"
  note "$name: exit code $code"
}

# --- what a bare machine lacks, and the rows ------------------------------------------------------------------------
if [ -d .gpu/wheels ] && ! installed deepspeed; then
  stage install 120 "$PY" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" .gpu/wheels/*.whl
fi
wants env && stage env "$SMALL" $(kit environment)
if wants speed; then stage data "$SMALL" $(kit make_data) "$TOKENIZER" "$WORK/data" --scale "$SCALE"; fi

# --- does it run, is it right; the models are made meanwhile --------------------------------------------------------
if wants speed; then stage models "$((2 * SMALL))" $(kit make_models) "$TOKENIZER" "$MODELS" $SHAPES & fi
if wants suite; then
  # interrupted, pytest still says what failed
  SIGNAL=INT stage pytest "$CORRECT" "$PY" -m pytest tests/gpu -v --tb=short -n "$TESTERS" -p no:cacheprovider -p no:benchmark &
  stage correct "$CORRECT" $(kit correctness) "$WORK/correct" --workers "$WORKERS" --seconds $((CORRECT - 15)) ${KIT_CASES:+--only "$KIT_CASES"}
fi
wait

# --- small questions, alone on the GPU ------------------------------------------------------------------------------
wants micro && stage micro "$MICRO" $(kit micro)

# --- speed, alone on the GPU ----------------------------------------------------------------------------------------
# what a GPU's model.kernels=auto takes, and the same without varlen; on a CPU what runs there
KERNELS=auto; SDPA="[lora,swiglu,rope,rms_norm]"
[ -n "$DRY" ] && KERNELS="[varlen,lora,rms_norm]" && SDPA="[lora,rms_norm]"

# base MODEL DATA: overrides of every training
base() {
  echo data=alpaca "model.name_or_path=$MODELS/$([ -n "$DRY" ] && echo dry || echo "$1")" "data.path=$WORK/data/$2.jsonl" \
    data.format=prompt_completion data.template=plain "data.max_length=$LONGEST" data.validation=0 "model.dtype=$DTYPE" "model.kernels=$KERNELS" \
    log=off schedule=constant optim.learning_rate=2e-4 batch.epochs=100 "batch.max_steps=$STEPS" \
    checkpoint.every_steps=0 eval.before=false
}
chosen() { [ -z "$RUNS" ] || case " $RUNS " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

# afina NAME MODEL DATA PROFILE overrides…
afina() {
  local name=$1 model=$2 data=$3 profile=$4
  shift 4
  chosen "$name" || return 0
  stage "$name" "$LIMIT" $(kit train_timed) ${profile:+--profile "$OUT/profile.txt"} "$WORK/$name.json" \
    $(base "$model" "$data") "run.dir=$WORK/runs" "run.name=$name" run.overwrite=true "$@"
}

# sweep NAME MODEL DATA overrides…: eight trials as one fused group, then one of them by itself; NAME_lone is that alone
sweep() {
  local name=$1 model=$2 data=$3 options="--trials 8" run
  shift 3
  for run in "$name" "${name}_lone"; do
    { chosen "$name" || chosen "$run"; } && stage "$run" "$LIMIT" $(kit train_together) $options "$WORK/$run.json" \
      $(base "$model" "$data") "run.dir=$WORK/runs" "run.name=$run" run.overwrite=true "$@"
    options=
  done
}

# trl NAME MODEL DATA "OPTIONS" overrides…
trl() {
  local name=$1 model=$2 data=$3 options=$4
  shift 4
  chosen "$name" || return 0
  installed trl || { leave_out "$name" "TRL is not installed"; return 0; }
  stage "$name" "$LIMIT" $(kit train_trl) $options "$WORK/$name.json" $(base "$model" "$data") "$@"
}

if wants speed; then
  U="batch.global_size=64 batch.micro_tokens=8192"; S="batch.global_size=256 batch.micro_tokens=8192"
  [ -n "$DRY" ] && U="batch.global_size=16 batch.micro_tokens=256" && S=$U
  ON="model.gradient_checkpointing=true"; OFF="model.gradient_checkpointing=false"
  SELECTIVE="model.gradient_checkpointing=selective"; NONE="model.kernels=none"
  afina 8b_trie_nockpt         8b   unshared "" $U $OFF
  afina 8b_trie_nockpt_12k     8b   unshared "" ${U/8192/12288} $OFF
  trl   8b8_trl_free           8b8  unshared "--padding-free --liger" $U $ON
  afina 8b8_trie               8b8  unshared 1  $U $ON
  afina 8b8_trie_none          8b8  unshared 1  $U $ON $NONE
  afina 8b8_trie_sdpa          8b8  unshared "" $U $ON "model.kernels=$SDPA"
  afina 8b8_padded             8b8  unshared "" $U $ON batch.packing=padded
  afina 8b8_shared_trie        8b8  shared   "" $S $ON
  afina 8b8_shared_padded      8b8  shared   "" $S $ON batch.packing=padded
  afina 8b8_trie_nockpt        8b8  unshared "" $U $OFF
  afina 8b8_trie_selective     8b8  unshared "" $U $SELECTIVE
  afina 8b8_qlora              8b8  unshared "" $U $ON method=qlora
  afina 8b_trie                8b   unshared "" $U $ON
  afina 8b_trie_selective      8b   unshared "" $U $SELECTIVE
  afina 1b_trie                1b   unshared "" $U $OFF
  afina 1b_trie_none           1b   unshared "" $U $OFF $NONE
  afina 135m_trie              135m unshared 1  $U $OFF
  afina 135m_trie_none         135m unshared "" $U $OFF $NONE
  if [ -z "$DRY" ] || command -v "${CXX:-c++}" >/dev/null; then
    afina 8b8_trie_compile     8b8  unshared "" $U $ON model.compile=true
  elif chosen 8b8_trie_compile; then
    leave_out 8b8_trie_compile "torch.compile needs a C++ compiler on a CPU"
  fi
  afina 8b8_trie_deterministic 8b8  unshared "" $U $ON run.deterministic=true
  trl   8b8_trl_padded         8b8  unshared "" $U $ON
  afina 8b8_16k                8b8  unshared "" ${U/8192/16384} $ON
  # rows of 62 to 145 tokens, 96 in the mean: about 256 and 2,048 tokens a trial and update, all trials in one forward
  P="batch.global_size=3 batch.micro_tokens=24576"; Q="batch.global_size=21 batch.micro_tokens=24576"
  [ -n "$DRY" ] && P="data.max_length=128 batch.global_size=3 batch.micro_tokens=2048" && Q="batch.global_size=8 batch.micro_tokens=2048"
  sweep 8b8_sweep_256          8b8  short    $P $OFF
  sweep 8b8_sweep_2048         8b8  short    $Q $OFF
fi
$(kit report) "$OUT/results.jsonl" ${DRY:+--dry} --json "$OUT/results.json" >"$OUT/report.md"
code=$?
tail -c 11000 "$OUT/report.md"
note "end"
exit $code
