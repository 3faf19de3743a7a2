#!/bin/sh
# The first twelve minutes on a GPU: one command, in the order in which to look for what is wrong.
# Usage: bench/gpu/first_minutes.sh [--dry-run] OUT_DIR [PYTHON]
# Each check has a limit of its own, and all together have LIMIT_S seconds (default 700). OUT_DIR/table.txt has a line
# for each check as soon as it ends, OUT_DIR/NAME.log what it printed, also when its time ran out. Ends with status 3
# where there is no CUDA device, 1 if anything failed or ran out of time. --dry-run does the same on the CPU, with
# stand-ins: its figures mean nothing, but a slip in a command shows before a GPU is rented.
set -u
dry=
[ "${1:-}" = --dry-run ] && { dry=1; shift; }
[ $# -ge 1 ] || { sed -n '2,8p' "$0" | cut -c3-; exit 2; }
out=$1
python=${2:-python3}
cd "$(dirname "$0")/../.." || exit 2
if [ -z "$dry" ] && { ! [ -e /dev/nvidiactl ] || ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }
then
  echo "no CUDA device: nothing was measured" >&2
  exit 3
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
table=$out/table.txt
: > "$table"
ends=$(($(date +%s) + ${LIMIT_S:-700}))
failed=0
export PYTHONUNBUFFERED=1 VLLM_CACHE_ROOT="${VLLM_CACHE_ROOT:-/var/tmp/tokenpool-vllm}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/var/tmp/tokenpool-triton}"

check() {  # NAME SECONDS COMMAND...
  name=$1; limit=$2; shift 2
  [ -z "$dry" ] || limit=$((limit * 4))  # several may share the cores
  left=$((ends - $(date +%s)))
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -lt 5 ]; then
    word="no time left"; failed=1
  else
    echo "== $name (at most $limit s)" >&2
    began=$(date +%s)
    timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1
    status=$?
    case $status in 0) word=ok;; 3) word="no device";; 124|137) word="out of time";; *) word="FAILED ($status)";; esac
    [ $status -eq 0 ] || failed=1
    word="$word $(($(date +%s) - began))s"
  fi
  told=$(grep -h '^result:' "$out/$name.log" 2>/dev/null | tail -1)
  [ -n "$told" ] || told=$(tail -1 "$out/$name.log" 2>/dev/null | cut -c1-100)
  printf '%-14s %-18s %s\n' "$name" "$word" "$told" >> "$table"
}

laws=tests/gpu/test_device_laws.py
exact=tests/gpu/test_token_exactness.py
mib=512 device=cuda eager=
if [ -n "$dry" ]; then  # tests run on the CPU where they can, else their stand-ins do
  export GPU_TESTS_ON_CPU=1
  laws=tests/memory/test_device_cuda.py device=cpu eager=--eager
else
  export VLLM_BATCH_INVARIANT=1  # or batches of another size change last bits, and tokens, without a fault
fi
check doctor 30 "$python" -m tokenpool.cli.main doctor
check memory_laws 60 "$python" -m pytest -x -rs "$laws"
if [ -n "$dry" ]; then
  check link 60 "$python" -m pytest -x tests/test_bench_gpu.py -k link
else
  check link 45 "$python" -m bench.gpu.link --mib $mib --repeats 3 --json "$out/link.json"
fi
check eager 110 "$python" -m pytest -x -rs $exact -k "eager and FLASH_ATTN"
if [ -z "$dry" ]; then
  check graphs 110 "$python" -m pytest -x -rs $exact -k "graphs and FLASH_ATTN"
  unset VLLM_BATCH_INVARIANT
fi
check engine_cost 120 "$python" -m bench.gpu.engine_cost --device $device $eager --models 2 --json "$out/engine_cost.json"
if [ -n "$dry" ]; then
  check switch 30 "$python" -m bench.gpu.switch --help
else
  check switch_1b 60 "$python" -m bench.gpu.switch --shapes 1b --switches 6 --json "$out/switch_1b.json"
  check switch_8b 120 "$python" -m bench.gpu.switch --shapes 8b --switches 4 --json "$out/switch_8b.json"
  export VLLM_BATCH_INVARIANT=1
  check triton 110 "$python" -m pytest -x -rs $exact -k "eager and TRITON_ATTN"
fi
cat "$table"
exit $failed
