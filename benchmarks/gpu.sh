#!/bin/sh
# Build, check and time aufast on this machine's GPU. It needs the repository, a Python with torch >= 2.11 for CUDA,
# and nvcc with its C++ compiler, no other package. Each stage alone is meant to fit ten minutes; all of them together
# time for up to half an hour.
#
#   benchmarks/gpu.sh                            build, check, sanitize, time
#   benchmarks/gpu.sh build                      compile csrc/, into build/gpu
#   benchmarks/gpu.sh check [NAME...]            agreement, the papers' sizes, same bits, streams, …
#   benchmarks/gpu.sh sanitize [TOOL...]         memcheck, racecheck, initcheck of compute-sanitizer
#   benchmarks/gpu.sh time [OPERATOR...] [--minutes M] [--only TEXT] [--out FILE]
#
# Records go to benchmarks/results/local/, written after every run; one worth keeping is copied up by hand. PYTHON names the interpreter.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

# The package as it would be installed, gathered without an installer, ahead of the sources; `under` is a tool that watches.
under=
run() {
  program=$1
  shift
  $under "$PYTHON" -c "import sys; sys.path.insert(0, 'build/gpu'); from $program import main; sys.exit(main())" "$@"
}

build() {
  rm -rf build/gpu
  mkdir -p build/gpu
  cp -R aufast build/gpu/aufast
  cp -R kernels build/gpu/aufast/kernels
  FORCE_CUDA=1 "$PYTHON" build_kernels.py build/gpu/aufast
  run aufast.cli backends
  "$PYTHON" -c 'import json, sys; cuda = json.load(open("build/gpu/aufast/_build.json"))["cuda"]
sys.exit(None if cuda["built"] else "the CUDA part was not built: " + cuda["reason"])'
}

sanitize() {
  if ! command -v compute-sanitizer > /dev/null; then
    echo 'sanitize: compute-sanitizer is not on PATH; what it would find stays open'
    return 0
  fi
  for tool in ${*:-memcheck racecheck initcheck}; do
    echo "sanitize: $tool"
    # Every allocation its own, so that a read past one is seen; our kernels alone, as torch's take long.
    under="env PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 570 compute-sanitizer --tool $tool --error-exitcode 9"
    under="$under --kernel-regex kns=roi_crop --kernel-regex kns=graph_ --kernel-regex kns=region_conv"
    run benchmarks.gpu check same_bits_again
  done
  under=
}

stage=${1:-all}
[ $# -eq 0 ] || shift
case $stage in
  build) build ;;
  check) run benchmarks.gpu check "$@" ;;
  sanitize) sanitize "$@" ;;
  time) run benchmarks.gpu time "$@" ;;
  all)
    build
    run benchmarks.gpu check
    failed=0
    run benchmarks.gpu time --minutes 30 || failed=$? # a run was left out; the sanitizers do not need it
    sanitize # last: it takes long, and some virtual machines refuse it the device
    exit "$failed"
    ;;
  *)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
