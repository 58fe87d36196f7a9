#!/bin/sh
# Checks what `make` needs before anything is made: Python 3.10 to 3.14 with headers, venv and pip, and a C++20 compiler.
#
# Every missing thing is named with what would mend it; all checks run, then the script fails if any did. On success it
# writes "PYTHON=… CXX=…" as shell assignments to the file named by $1, for the Makefile. PYTHON and CXX choose by hand.
set -u

out=${1:?usage: preflight.sh OUT_FILE}
missing=0
note() {
    printf 'preflight: %s\n' "$@" >&2
    missing=1
}

suits='import sys; raise SystemExit(not (3, 10) <= sys.version_info[:2] <= (3, 14))'
has_headers='import os, sysconfig; raise SystemExit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'
has_venv='import venv, ensurepip'
runs() { "$1" -c "$2" >/dev/null 2>&1; }

# --- Python: the one asked for, or the first that has everything, or the first of the right version ---
candidates=${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python3.14 python}
python=
for candidate in $candidates; do
    runs "$candidate" "$suits" || continue
    : "${python:=$candidate}"
    if runs "$candidate" "$has_headers" && runs "$candidate" "$has_venv"; then
        python=$candidate
        break
    fi
done

if [ -z "$python" ]; then
    for candidate in $candidates; do
        found=$("$candidate" -V 2>/dev/null) && note "  found: $candidate is $found"
    done
    note "no Python from 3.10 to 3.14 among: $candidates. Install one, or name it: make PYTHON=/path/to/python3 …"
else
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    runs "$python" "$has_headers" ||
        note "$python ($version) has no Python.h. Debian, Ubuntu: apt-get install python$version-dev; Fedora: dnf install python$version-devel"
    runs "$python" "$has_venv" ||
        note "$python ($version) cannot make a virtual environment (module venv or ensurepip). Debian, Ubuntu: apt-get install python$version-venv"
fi

# --- compiler: the one asked for, or the first that compiles and links C++20 ---
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cat >"$work/probe.cpp" <<'CPP'
#include <bit>
#include <concepts>
#include <span>
template <std::unsigned_integral T>
int width(std::span<const T> values) { return values.empty() ? 0 : std::bit_width(values.front()); }
extern "C" int probe(unsigned value) { return width(std::span<const unsigned>(&value, 1)); }
CPP
builds_cpp20() {
    # Unquoted on purpose: CXX may be two words, "ccache g++".
    # shellcheck disable=SC2086
    $1 -std=c++20 -O1 -fPIC -shared "$work/probe.cpp" -o "$work/probe.so" >>"$work/log" 2>&1
}
compiler=
if [ -n "${CXX:-}" ]; then
    builds_cpp20 "$CXX" && compiler=$CXX
else
    for candidate in c++ g++ clang++ g++-14 g++-13 g++-12 g++-11 g++-10; do
        builds_cpp20 "$candidate" && compiler=$candidate && break
    done
fi
if [ -z "$compiler" ]; then
    note "no compiler builds C++20 (${CXX:-c++, g++, clang++, g++-14 … g++-10} tried; gcc from 10, clang from 12)." \
        "  Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; or name it: make CXX=/path/to/g++ …" \
        "  it said: $(grep -m 1 -i error "$work/log" || head -n 1 "$work/log")"
fi

[ "$missing" -eq 0 ] || exit 1
python=$("$python" -c 'import sys; print(sys.executable)')
printf 'PYTHON="%s"\nCXX="%s"\n' "$python" "$compiler" >"$out"
printf 'preflight: %s (%s), %s\n' "$python" "$version" "$($compiler --version | head -n 1)"
