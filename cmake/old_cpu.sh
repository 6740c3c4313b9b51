#!/usr/bin/env bash
# Runs the C++ tests on processors that this machine emulates. An instruction that such a processor
# does not have ends a program there, so a test that passes has reached none.
set -euo pipefail
build=$1
# Nehalem (2008) has no AVX; Haswell (2013) has AVX2, FMA and F16C, but no AVX-512. What is switched
# off is what the emulator does not have and would warn of.
for cpu in Nehalem Haswell,-pcid,-x2apic,-tsc-deadline,-hle,-invpcid,-rtm; do
  echo "${cpu%%,*}:"
  for test in "$build"/test_*; do
    qemu-x86_64-static -cpu "$cpu" "$test"
  done
done

# Nehalem runs the lowest level only, and the emulator does refuse what a processor does not have.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
echo 'int main(int n, char **) { double v[4] = {}; v[n] = n; for (double &x : v) x *= x; return v[0]; }' \
  > "$folder/avx.cpp"
c++ -O3 -march=x86-64-v3 -o "$folder/avx" "$folder/avx.cpp"
if qemu-x86_64-static -cpu Nehalem "$folder/avx" 2> /dev/null; then
  echo "expected AVX to be an illegal instruction on the emulated Nehalem, but it ran"
  exit 1
fi
echo "AVX is an illegal instruction on the emulated Nehalem, as it should be"
