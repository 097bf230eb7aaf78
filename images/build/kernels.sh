#!/bin/sh
# In the builder stage of the CUDA variant: compile mamba-ssm and causal-conv1d from their locked sources into /opt/venv.
#   kernels.sh "8.0 9.0 10.0" JOBS
set -eu
cd /build
capabilities=$1
jobs=$2
export UV_NO_CACHE=1 UV_OFFLINE=1 UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy
/build/tools/bin/uv pip install -q --no-index --find-links wheels --require-hashes --no-deps --target /build/site -r build.txt

# The wheels' CUDA lies in lib, and has no name without a version: what links with it looks in lib64 for libcudart.so.
cuda=/build/site/nvidia/cu13
ln -s lib "$cuda/lib64"
ln -s libcudart.so.13 "$cuda/lib/libcudart.so"

# Both packages compile for a fixed list of GPUs and read no setting: nvcc itself is told which ones.
flags=
for capability in $capabilities; do
  number=$(echo "$capability" | tr -d .)
  flags="$flags -gencode arch=compute_$number,code=sm_$number"
done
mv "$cuda/bin/nvcc" "$cuda/bin/nvcc.real"
cat > "$cuda/bin/nvcc" <<EOF
#!/build/tools/bin/python
import os, sys
given = sys.argv[1:]
kept = [word for i, word in enumerate(given) if word != "-gencode" and (i == 0 or given[i - 1] != "-gencode")]
compiles = any(word.endswith(".cu") for word in kept)
os.execv("$cuda/bin/nvcc.real", ["$cuda/bin/nvcc", *kept, *("$flags".split() if compiles else [])])
EOF
chmod +x "$cuda/bin/nvcc"

export CUDA_HOME=$cuda PATH="$cuda/bin:/build/site/bin:/opt/venv/bin:$PATH" PYTHONPATH=/build/site MAX_JOBS=$jobs
export NVCC_THREADS=1 NVCC_APPEND_FLAGS="-cudart shared"
export MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE
/build/tools/bin/uv pip install -v --no-index --find-links wheels --require-hashes --no-deps --no-build-isolation \
  --compile-bytecode -p /opt/venv/bin/python -r requirements.sources.txt 2> /build/kernels.log || {
  tail -n 60 /build/kernels.log
  exit 1
}

# What was compiled, as the files themselves say it.
triton=$(ls -d /opt/venv/lib/python3.11/site-packages/triton/backends/nvidia/bin)
for file in /opt/venv/lib/python3.11/site-packages/*_cuda*.so; do
  found=$("$triton/cuobjdump" --list-elf "$file" | sed -n 's/.*\.\(sm_[0-9a-z]*\)\..*/\1/p' | sort -u | tr '\n' ' ')
  echo "$(basename "$file"): $found"
  for capability in $capabilities; do
    case " $found" in
      *" sm_$(echo "$capability" | tr -d .) "*) ;;
      *) echo "$file has no code for $capability" >&2 && exit 1 ;;
    esac
  done
done
