#!/bin/sh
# First hours on a GPU, in parts of at most 9 minutes, in the order in which to look for what is wrong.
# Usage: bench/gpu/run_all.sh OUT_DIR checks|backends|tax|switch|sleep|goodput [PYTHON]
# Writes OUT_DIR/NAME.log, OUT_DIR/NAME.json and OUT_DIR/PART.txt, a table. Ends with status 3 and measures nothing
# where there is no CUDA device, 1 if anything failed or ran out of time.
set -u
case ${2:-} in checks|backends|tax|switch|sleep|goodput) ;; *) sed -n '2,5p' "$0" | cut -c3-; exit 2;; esac
out=$1
part=$2
python=${3:-python3}
cd "$(dirname "$0")/../.." || exit 2
# Not from the tests' own skips: a run in which everything is skipped must not look well.
if ! [ -e /dev/nvidiactl ] || ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no CUDA device: nothing was measured" >&2
  exit 3
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
table=$out/$part.txt
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

exact=tests/gpu/test_token_exactness.py
case $part in
checks)  # nothing else is worth a look before these pass
  check doctor 30 "$python" -m tokenpool.cli.main doctor
  check memory_laws 60 "$python" -m pytest -x -rs tests/gpu/test_device_laws.py
  check eager 150 "$python" -m pytest -x -rs $exact -k "eager and FLASH_ATTN"
  check graphs 150 "$python" -m pytest -x -rs $exact -k "graphs and FLASH_ATTN"
  check link 60 "$python" -m bench.gpu.link --json "$out/link.json"
  ;;
backends)  # the other attention backends, and what the layout of KV costs with each
  check others_eager 150 "$python" -m pytest -rs $exact -k "eager and not FLASH_ATTN"
  check others_graphs 150 "$python" -m pytest -rs $exact -k "graphs and not FLASH_ATTN"
  check layout 230 "$python" -m bench.gpu.layout --shape 1b --rounds 1 --json "$out/layout.json"
  ;;
tax)
  check tax 530 "$python" -m bench.gpu.one_model_tax --shape 1b --rounds 3 --json "$out/tax.json"
  ;;
switch)
  check switch_1b 90 "$python" -m bench.gpu.switch --shapes 1b --json "$out/switch_1b.json"
  check switch_8b 200 "$python" -m bench.gpu.switch --shapes 8b --json "$out/switch_8b.json"
  check switch_14b 240 "$python" -m bench.gpu.switch --shapes 14b --switches 6 --json "$out/switch_14b.json"
  ;;
sleep)
  check sleep_8b 530 "$python" -m bench.gpu.switch --shapes 8b --switches 6 --sleep --json "$out/sleep_8b.json"
  ;;
goodput)
  check goodput 530 "$python" -m bench.gpu.goodput --policies slack,sleep --rates 1 --shapes 1b --models 4 \
    --requests 60 --device-mib 8192 --json "$out/goodput.json"
  ;;
esac
cat "$table"
exit $failed
