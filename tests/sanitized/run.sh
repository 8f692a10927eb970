#!/usr/bin/env bash
# Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer, and runs its tests and a fuzz over its
# functions with it. PYTHON: a Python with the package's test dependencies, pybind11, cmake and ninja (python3);
# CXX: the compiler (c++); FUZZ_SECONDS, FUZZ_SEED: length and seed of the fuzz (20, 0).
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)')
export CXX=${CXX:-c++}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m cmake -S "$root" -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Debug -DMEDBRIDGE_SANITIZE=ON \
  -DCMAKE_MAKE_PROGRAM="$("$python" -c 'import ninja; print(ninja.BIN_DIR)')/ninja" \
  -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >"$work/log" \
  || { cat "$work/log"; exit 1; }
"$python" -m cmake --build "$work/build"

# An installed or editable medbridge must not win. So the tests run in an environment of their own, which finds the
# packages of $PYTHON but none of its .pth files, and before them this package: the sources around the new extension.
mkdir -p "$work/site/medbridge"
for part in "$root"/medbridge/*; do
  case $part in *_native*.so | *_native*.pyd | *__pycache__) ;; *) ln -s "$part" "$work/site/medbridge/" ;; esac
done
cp "$work"/build/_native*.so "$work/site/medbridge/"
"$python" -m venv --without-pip "$work/env"
{
  printf '%s\n' "$work/site" "$root/kernels"
  "$python" -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")'
} >"$("$work/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sanitized.pth"

unset PYTHONPATH
# Without the current folder on the path: the repository holds a medbridge too.
export PYTHONSAFEPATH=1 PYTHONNOUSERSITE=1 PYTHONDONTWRITEBYTECODE=1
export OMP_WAIT_POLICY=PASSIVE ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
# The C++ runtime too: the sanitizer looks for its throw before the extension has loaded it.
export LD_PRELOAD="$($CXX -print-file-name=libasan.so) $($CXX -print-file-name=libstdc++.so)"

cd "$root"
"$work/env/bin/python" - "$work/site" <<'CHECK'
import ctypes, pathlib, sys
from medbridge import _native
file = pathlib.Path(_native.__file__)
assert file.is_relative_to(sys.argv[1]), f"{file} was imported, not the sanitized extension"
assert b"__asan_init" in file.read_bytes() and b"__ubsan_handle" in file.read_bytes(), f"{file} isn't instrumented"
assert hasattr(ctypes.CDLL(None), "__asan_init"), "libasan isn't loaded"
print(f"sanitized extension: {file}")
CHECK
tests=()
for name in passk votes rewards bootstrap_curve spectra; do
  if [ -f "tests/support/test_$name.py" ]; then tests+=("tests/support/test_$name.py"); fi
done
"$work/env/bin/python" -m pytest -q --noconftest -p no:cacheprovider "${tests[@]}"
"$work/env/bin/python" tests/sanitized/fuzz.py --seconds "${FUZZ_SECONDS:-20}" --seed "${FUZZ_SEED:-0}"
