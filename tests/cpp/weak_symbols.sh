#!/bin/sh
# weak_symbols.sh OBJECT...: fails if an object of the upper instruction sets holds a weak symbol, or no symbol at all.
status=0
for object in "$@"; do
  symbols=$(nm -C "$object") || exit 1
  if weak=$(echo "$symbols" | grep -E '^[^ ]* +[WVu] '); then
    echo "$object has weak symbols:"
    echo "$weak"
    status=1
  fi
  if ! echo "$symbols" | grep -qE ' [TRD] '; then
    echo "$object has no symbols"
    status=1
  fi
done
[ $# -gt 20 ] || { echo "only $# objects were given"; status=1; }
[ $status -eq 0 ] && echo "$# objects, no weak symbol"
exit $status
