#!/usr/bin/env bash
# Builds both extensions with AddressSanitizer and UndefinedBehaviorSanitizer, and runs their tests and a fuzz over their
# functions with them. PYTHON: a Python with the package's test dependencies, pybind11, cmake and ninja (python3);
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

# Installed or editable packages must not win. So the tests run in an environment of their own, which finds the packages
# of $PYTHON but none of its .pth files, and before them these two: the sources around the new extensions.
mkdir -p "$work/site/medbridge" "$work/site/medbridge_kernels"
for part in "$root"/medbridge/* "$root"/kernels/medbridge_kernels/*; do
  package=$(basename "$(dirname "$part")")
  case $part in *_native*.so | *_native*.pyd | *__pycache__) ;; *) ln -s "$part" "$work/site/$package/" ;; esac
done
cp "$work"/build/_native*.so "$work/site/medbridge/"
cp "$work"/build/kernels/_native*.so "$work/site/medbridge_kernels/"
"$python" -m venv --without-pip "$work/env"
{
  printf '%s\n' "$work/site"
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
import medbridge._native, medbridge_kernels._native
for module in medbridge._native, medbridge_kernels._native:
    file = pathlib.Path(module.__file__)
    assert file.is_relative_to(sys.argv[1]), f"{file} was imported, not the sanitized extension"
    assert b"__asan_init" in file.read_bytes() and b"__ubsan_handle" in file.read_bytes(), f"{file} isn't instrumented"
    print(f"sanitized extension: {file}")
assert hasattr(ctypes.CDLL(None), "__asan_init"), "libasan isn't loaded"
CHECK
tests=()
for name in passk votes rewards bootstrap_curve spectra; do
  if [ -f "tests/support/test_$name.py" ]; then tests+=("tests/support/test_$name.py"); fi
done
"$work/env/bin/python" -m pytest -q --noconftest -p no:cacheprovider "${tests[@]}" tests/kernels/test_native.py
"$work/env/bin/python" tests/sanitized/fuzz.py --seconds "${FUZZ_SECONDS:-20}" --seed "${FUZZ_SEED:-0}"
