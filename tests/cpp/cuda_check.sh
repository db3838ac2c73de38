#!/bin/sh
# cuda_check.sh LOG COMMAND...: runs nvcc for several architectures and keeps what ptxas says in LOG. Prints one line: the
# most registers that any kernel of the file takes; or, when the command fails, a kernel spills or an architecture is
# missing, the complaints.
log=$1
shift
if ! "$@" >"$log" 2>&1; then
  grep -vE '^ptxas info|^ +0 bytes stack frame, 0 bytes spill' "$log" >&2
  exit 1
fi
if grep -E '[1-9][0-9]* bytes spill (stores|loads)' "$log" >&2; then exit 1; fi
registers=$(sed -n 's/.*Used \([0-9]*\) registers.*/\1/p' "$log" | sort -n | tail -1)
[ -n "$registers" ] || { echo "no kernel in $log" >&2; exit 1; }
for arch in 75 80 86 89 90 100 120; do
  grep -q "for 'sm_$arch'" "$log" || { echo "$log says nothing of sm_$arch" >&2; exit 1; }
done
echo "$(basename "$log" .fatbin.log): at most $registers registers on seven architectures"
