#!/bin/sh
# In the builder stage: compile the one C file that Triton hands to a compiler when it first meets a
# GPU, and leave a `cc` in the image that answers with the result. Everything else it compiles itself, with the ptxas
# that it brings along. So the image needs no C compiler, and asks of none anything that it was not built with.
set -eu
backend=/opt/venv/lib/python3.11/site-packages/triton/backends/nvidia
to=/opt/harness/triton
mkdir -p "$to"
cp build/cc.sh "$to/cc"
chmod 755 "$to/cc"
[ -f "$backend/driver.c" ] || exit 0
# The driver's library comes from the host at run time; here only its name is needed, and must stand in the result.
mkdir -p /build/stub
echo | gcc -shared -Wl,-soname,libcuda.so.1 -o /build/stub/libcuda.so.1 -x c -
gcc "$backend/driver.c" -O3 -shared -fPIC -Wno-psabi -o "$to/cuda_utils.so" -L/build/stub \
  -Wl,--no-as-needed -l:libcuda.so.1 \
  -I"$backend/include" -I/usr/include/python3.11
sha256sum < "$backend/driver.c" > "$to/driver.c.sha256"
/build/tools/bin/python -c "import sys; sys.exit(b'libcuda.so.1' not in open(sys.argv[1], 'rb').read())" "$to/cuda_utils.so"
