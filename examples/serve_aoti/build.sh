#!/bin/sh
# Builds `serve` beside this script, or in the folder given: sh build.sh [FOLDER]. Python only says where torch is.
set -e
here=$(dirname "$0")
torch=$(${PYTHON:-python} -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
${CXX:-c++} -std=c++20 -O2 "$here/main.cpp" -o "${1:-$here}/serve" -isystem "$torch/include" \
    -L"$torch/lib" -ltorch -ltorch_cpu -lc10 -ldl -Wl,-rpath,"$torch/lib"
