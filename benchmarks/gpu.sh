#!/usr/bin/env bash
# What one GPU has to show, in about six minutes:
#
#   benchmarks/gpu.sh OUT [--device cpu] [--tiny]
#
# Each part has a time limit of its own, and one that fails stops no other. After each part the folder
# OUT has summary.txt and results.tar.gz, below 16 MiB, with what every part printed and wrote.
# --device cpu --tiny tries the script itself, with small sizes and no GPU: about four minutes.
#
#   PYTHON     default .venv/bin/python, else python3
#   LIMIT      seconds in all, default 360: the parts are in order of worth, and what is left is left out
#   PARTS      names of parts, to run these alone: PARTS="compile fashion" benchmarks/gpu.sh OUT
#   EPBT_DATA  the folder with Fashion-MNIST's four files, for the part fashion
set -uo pipefail
usage() { sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
device=cuda tiny=""
out=${1:-} && [[ -n $out && $out != -* ]] && shift || usage
while [ $# -gt 0 ]; do
    case $1 in
        --device) [[ ${2:-} = cpu || ${2:-} = cuda ]] || usage; device=$2; shift 2 ;;
        --tiny) tiny=--tiny; shift ;;
        *) usage ;;
    esac
done
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
limit=${LIMIT:-360} failed=0
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
# New caches: the loss is built, and the number of slots is searched.
export TORCH_EXTENSIONS_DIR=$work/extensions XDG_CACHE_HOME=$work/cache PYTHONUNBUFFERED=1
mkdir "$work/results" "$work/runs"
: > "$out/summary.txt"

say() { echo "$*" | tee -a "$out/summary.txt"; }

part() {  # part NAME SECONDS COMMAND...: carried out within so many seconds; it prints to NAME.txt
    local name=$1 seconds=$2 begun=$SECONDS code=0 word
    shift 2
    if [[ -n ${PARTS:-} && " $PARTS " != *" $name "* ]]; then return; fi
    if [ $((limit - SECONDS)) -lt "$seconds" ]; then seconds=$((limit - SECONDS)); fi
    if [ "$seconds" -lt 5 ]; then say "$name: left out, as the time is over"; return; fi
    timeout -s INT -k 10 "$seconds" "$@" > "$work/results/$name.txt" 2>&1 || code=$?
    case $code in
        0) word=passed ;;
        124|137) word="stopped at its limit" ;;
        *) word="FAILED with exit code $code" failed=1 ;;
    esac
    say "$name: $word, $((SECONDS - begun)) s"
    if [ $code -ne 0 ]; then tail -n 3 "$work/results/$name.txt" | sed 's/^/    /'; fi
    save
}

save() {  # results.tar.gz, without weights
    (cd "$work/runs" && find . -maxdepth 2 -name '*.json*' -exec cp --parents -t "$work/results" {} +)
    cp "$out/summary.txt" "$work/results"
    (cd "$work" && find results -type f -size -2048k | tar -czf archive -T -)
    if [ "$(stat -c %s "$work/archive")" -lt $((16 << 20)) ]; then mv "$work/archive" "$out/results.tar.gz"
    else say "results.tar.gz would be larger than 16 MiB: the last one stays"; failed=1; fi
}

epbt() { echo "$python epbt.py --device $device --out $work/runs/$1 ${*:2}"; }

requirements='
import importlib.metadata, re, sys
missing = []
for line in open("requirements.txt", encoding="utf-8"):
    if name := re.match("[A-Za-z0-9_.-]+", line):
        try:
            print(name[0], importlib.metadata.version(name[0]), "(wanted: " + line.strip() + ")")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name[0])
print("missing:", " ".join(missing) or "none")
sys.exit(bool(missing))'
registers='
import subprocess, sys, torch
from torch.utils.cpp_extension import include_paths
from taylorglo_ext.build import cuda_home
capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
command = [cuda_home() + "/bin/nvcc", "-std=c++17", "-O3", "-arch=sm_%d%d" % capability, "-Xptxas", "-v",
           *("-I" + path for path in [*include_paths(), cuda_home() + "/include"]), "-c",
           "taylorglo_ext/taylorglo.cu", "-o", "/dev/null"]
said = subprocess.run(command, capture_output=True, text=True)
lines = subprocess.run(["c++filt"], input=said.stderr, capture_output=True, text=True).stdout
print(lines)
sys.exit(said.returncode)'
kernels='
import torch
from norm_relu import norm_relu
from taylorglo_ext import load, taylorglo_loss
load("fused", "cuda")
for rows, classes in ((1, 2), (7, 3), (128, 10), (129, 33), (64, 100), (33, 1000), (5, 5000), (3, 40000)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for teacher in (False, True):
            logits = torch.randn(rows, classes, device="cuda", dtype=dtype, requires_grad=True)
            labels = torch.randint(classes, (rows,), device="cuda")
            theta = 20 * torch.rand(8, device="cuda") - 10
            taught = (torch.randn_like(logits), torch.tensor(0.3, device="cuda")) if teacher else ()
            (taylorglo_loss(logits, labels, theta, *taught) * 1.7).backward()
for shape in ((128, 16, 32, 32), (3, 72, 5, 7)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shortcut in (False, True):
            x, s = (torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
                    .requires_grad_() for _ in range(2))
            y = norm_relu(torch.nn.BatchNorm2d(shape[1]).cuda(), x, s if shortcut else None)
            assert y.grad_fn.name() == "NormReluBackward"
            y.backward(torch.randn_like(y))
torch.cuda.synchronize()
print("48 calls of the loss, 12 of norm_relu")'

if [ "$device" = cuda ]; then
    tests="-m cuda" kernel="--rows 128 65536 --classes 10 1000" rounds=3
else
    tests="-m cuda tests/test_benchmarks.py" kernel="--quick --rows 128 --classes 10" rounds=1
fi
digits="--dataset digits" twice="--dataset digits --deterministic --population 6 --generations 4"
fashion="--dataset fashion --model resnet20 --precision bfloat16 --limit 10000"
fashion+=" --population 12 --generations 25 --epochs 4"
if [ -n "$tiny" ]; then
    tests="-m cuda tests/test_benchmarks.py" kernel="--quick --rows 128 --classes 10" rounds=1
    small="--population 2 --generations 2 --epochs 1"
    digits+=" $small" twice+=" $small" fashion="--dataset fashion --limit 600 --validation 100 $small"
fi
if "$python" -c "import xdist" 2> /dev/null; then tests+=" -n $(($(nproc) < 10 ? $(nproc) : 10))"; fi
throughput="$python -m benchmarks.throughput --device $device $tiny --rounds $rounds --out $work/results"

# shellcheck disable=SC2086
{
part requirements 20 "$python" -c "$requirements"
part build 150 bash -c "time $python -c 'import taylorglo_ext; print(taylorglo_ext.load(\"fused\", \"$device\"))'"
part tests 150 "$python" -m pytest -q $tests
part startup 90 "$python" -m benchmarks.startup --device $device --runs 2 --out "$work/results"
part throughput 150 $throughput
part kernel 110 "$python" -m benchmarks.kernel --device $device $kernel --out "$work/results"
part demo 60 $(epbt demo $digits)
part deterministic 60 bash -c "$(epbt one $twice) && $(epbt other $twice) &&
    cmp $work/runs/one/log.jsonl $work/runs/other/log.jsonl && echo the logs are equal"
if [ "$device" = cuda ]; then
    if command -v compute-sanitizer > /dev/null; then
        part memcheck 60 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -c "$kernels"
    else say "memcheck: left out, as there is no compute-sanitizer"; fi
    part exact 40 $throughput --deterministic
    part fashion 80 $(epbt fashion $fashion)
    part compile 120 $throughput --compile
else
    part fashion 80 $(epbt fashion $fashion)
fi
if command -v nvcc > /dev/null; then part registers 90 "$python" -c "$registers"
else say "registers: left out, as there is no nvcc"; fi
}
say "in all $SECONDS s; $([ $failed = 0 ] && echo "no part failed" || echo "parts failed")"
save
exit $failed
