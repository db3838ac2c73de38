#!/bin/sh
# cuda_check.sh LOG COMMAND...: runs nvcc and keeps what ptxas says in LOG. Prints one line: the most registers that any
# kernel of the file takes; or, when the command fails or a kernel spills, the complaints.
log=$1
shift
if ! "$@" >"$log" 2>&1; then
  grep -vE '^ptxas info|^ +0 bytes stack frame, 0 bytes spill' "$log" >&2
  exit 1
fi
if grep -E '[1-9][0-9]* bytes spill (stores|loads)' "$log" >&2; then exit 1; fi
registers=$(sed -n 's/.*Used \([0-9]*\) registers.*/\1/p' "$log" | sort -n | tail -1)
[ -n "$registers" ] || { echo "no kernel in $log" >&2; exit 1; }
echo "$(basename "$log" .cubin.log): at most $registers registers"
