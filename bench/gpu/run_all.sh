#!/bin/sh
# First hour on a GPU: checks in the order in which to look for what is wrong, then measurements; at most 9 minutes.
# Usage: bench/gpu/run_all.sh OUT_DIR [PYTHON]     Writes OUT_DIR/NAME.log and OUT_DIR/NAME.json, a table last.
# Ends with status 3 and measures nothing where there is no CUDA device, 1 if anything failed or ran out of time.
set -u
if [ $# -lt 1 ]; then sed -n '2,5p' "$0" | cut -c3-; exit 2; fi
out=$1
python=${2:-python3}
cd "$(dirname "$0")/../.." || exit 2
# Not from the tests' own skips: a run in which everything is skipped must not look well.
if ! [ -e /dev/nvidiactl ] || ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no CUDA device: nothing was measured" >&2
  exit 3
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
table=$out/table.txt
: > "$table"
failed=0

check() {  # NAME SECONDS COMMAND...
  name=$1; limit=$2; shift 2
  echo "== $name (at most $limit s)" >&2
  timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1
  status=$?
  case $status in 0) word=ok;; 3) word="no device";; 124|137) word="out of time";; *) word="FAILED ($status)";; esac
  [ $status -eq 0 ] || failed=1
  printf '%-14s %-14s %s\n' "$name" "$word" "$(grep -h '^result:' "$out/$name.log" | tail -1)" >> "$table"
}

check doctor 30 "$python" -m tokenpool.serve.cli doctor
check memory_laws 40 "$python" -m pytest -x -rs tests/gpu/test_device_laws.py
check eager 90 "$python" -m pytest -x -rs tests/gpu/test_token_exactness.py -k eager
check graphs 90 "$python" -m pytest -x -rs tests/gpu/test_token_exactness.py -k graphs
check link 30 "$python" -m bench.gpu.link --json "$out/link.json"
check switch_1b 50 "$python" -m bench.gpu.switch --shapes 1b --json "$out/switch_1b.json"
check switch_8b 90 "$python" -m bench.gpu.switch --shapes 8b --switches 6 --json "$out/switch_8b.json"
check goodput 120 "$python" -m bench.gpu.goodput --policies slack --rates 1 --shapes 1b --requests 30 \
  --device-mib 8192 --json "$out/goodput.json"
cat "$table"
exit $failed
