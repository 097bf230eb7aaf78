#!/bin/sh
# Stands where Triton looks for a C compiler ($CC): it knows one file, and answers with what was built for this image.
here=/opt/harness/triton
source=$1
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then output=$2; fi
  shift
done
if [ -n "${output:-}" ] && [ -f "$here/driver.c.sha256" ] &&
  [ "$(sha256sum < "$source" 2>/dev/null)" = "$(cat "$here/driver.c.sha256")" ]; then
  exec cp "$here/cuda_utils.so" "$output"
fi
echo "cc: this image has no compiler; it answers for Triton's driver.c alone, not for $source" >&2
exit 1
