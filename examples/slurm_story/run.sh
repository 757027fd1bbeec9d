#!/bin/bash
# The story of a job on a cluster, told by a real Slurm of two virtual nodes on this machine: submitted on two nodes,
# preempted, back in the queue by itself, finished as if nothing had happened; then a sweep of six as an array, one trial
# of which fails and one of which is requeued; then the report. Ends with 0 when all of that held. About five minutes on
# two cores. Needs Slurm (`make packages` as root installs it) and the environment (`make check` makes it).
#
#   examples/slurm_story/run.sh [FOLDER]     FOLDER, kept: runs, logs, the report; a new temporary one otherwise
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(realpath -m "${1:-$(mktemp -d)}")
python=$PWD/.venv/bin/python
afina=$PWD/.venv/bin/afina
export PYTHONPATH=$PWD OMP_NUM_THREADS=1 WANDB_MODE=offline PATH=$PATH:/usr/sbin
# The virtual nodes are one machine, and their names do not resolve.
export MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo
mkdir -p "$work"
slurm=$(mktemp -d -p /tmp afina-story-XXXX)
chmod 755 "$slurm"  # munge refuses a socket below a folder that is closed to others
say() { printf '\n== %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }

say "a Slurm of two nodes"
SLURM_CONF=$("$python" -m tests.helpers.slurm_sandbox start "$slurm/sandbox")
export SLURM_CONF
trap '"$python" -m tests.helpers.slurm_sandbox stop "$slurm/sandbox"; sleep 2; rm -rf "$slurm" || true' EXIT
sinfo

keys=(debug=tiny batch.max_steps=150 batch.epochs=50 checkpoint.every_steps=10 data.validation=0 'eval.metrics=[loss]')
keys+=(run.dir="$work/runs")
field() { scontrol -o show job "$1" | tr ' ' '\n' | sed -n "s/^$2=//p" | head -n 1; }
# Slurm holds a requeued job back for two minutes; here that is let go after three seconds.
ended() {
  for _ in $(seq 1200); do
    case "$(field "$1" JobState) $(field "$1" Reason)" in
      "PENDING BeginTime") sleep 3; scontrol update jobid="$1" StartTime=now 2>/dev/null || true ;;
      COMPLETED* | FAILED* | CANCELLED* | TIMEOUT*) return ;;
    esac
    sleep 0.5
  done
  fail "job $1 did not end"
}
at_step() {
  for _ in $(seq 600); do grep -q "\"step\": $2," "$1/metrics.jsonl" 2>/dev/null && return; sleep 0.2; done
  fail "$1 did not come to step $2"
}

say "submitted on two nodes"
"$afina" train launch=slurm launch.nodes=2 "launch.sbatch_args=['--exclusive']" "${keys[@]}" run.name=story
job=$(cat "$work/runs/story/slurm_job.txt")
at_step "$work/runs/story" 15
"$afina" status "$work/runs"

say "a job of more weight wants both nodes"
sbatch --partition=high --nodes=2 --exclusive --output=/dev/null --wrap='sleep 3'
ended "$job"
"$afina" logs "$work/runs/story" -n 4
[ "$(field "$job" JobState) $(field "$job" Restarts)" = "COMPLETED 1" ] || fail "job $job: $(field "$job" JobState)"
grep -q '"outcome": "preempted"' "$work/runs/story/slurm.jsonl" || fail "it was not preempted"

say "the same run, which nobody disturbed"
"$python" -m trainer.torchrun --standalone --local-addr=127.0.0.1 --nproc-per-node=2 -m trainer.train \
  "${keys[@]}" run.name=undisturbed | tail -n 1
cmp "$work"/runs/{story,undisturbed}/adapter/adapter_model.safetensors || fail "the adapters differ"

say "a sweep of six as an array, two at once; the last rate is far too high"
rates=1e-4,2e-4,5e-4,1e-3,2e-3,1e30
"$afina" sweep launch=slurm launch.array_parallel=2 "${keys[@]}" run.name=rates "optim.learning_rate=$rates"
array=$(cat "$work/runs/rates/slurm_job.txt")
trials=("$work"/runs/rates/trials/*)
[ ${#trials[@]} = 6 ] || fail "${#trials[@]} trials in place of 6"
"$afina" status "$work/runs/rates"
for _ in $(seq 600); do [ "$(field "${array}_1" JobState)" = RUNNING ] && break; sleep 0.2; done
sleep 3
scontrol requeue "${array}_1"
for number in 0 1 2 3 4 5; do ended "${array}_$number"; done
"$afina" status "$work/runs/rates"
finished=$(grep -l '"status": "finished"' "$work"/runs/rates/*/summary.json | wc -l)
failed=$(grep -l '"status": "failed"' "$work"/runs/rates/*/summary.json | wc -l)
[ "$finished $failed" = "5 1" ] || fail "$finished finished and $failed failed, in place of 5 and 1"
[ "$(field "${array}_1" Restarts)" = 1 ] || fail "element 1 was not requeued"

say "the report"
"$afina" report "$work/runs/rates" --to "$work/report.html"
grep -q 'lr1e-30\|rate1e-30\|1e30' "$work/report.html" || fail "the report does not name the trial that failed"

cat <<END

Proved, on a real Slurm:
- a run on two nodes was preempted, saved, put itself back into the queue, and its adapter is byte for byte that of the
  run that nobody disturbed;
- of six trials as an array, two at once, five are finished, one of them after a requeue, and one has failed by itself,
  with its reason: $(sed -n 's/.*"message": "\(.*\)",*$/\1/p' "$work"/runs/rates/*/summary.json | head -n 1 | cut -c1-150);
- the report: $work/report.html
END
