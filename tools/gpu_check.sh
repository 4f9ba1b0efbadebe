#!/usr/bin/env bash
# Everything a machine with a GPU should be asked, in one go: versions, kernel tests, benchmarks, short trainings.
#
#   tools/gpu_check.sh [STAGE ...]      stages: info tests rational attention model train (default: all)
#
# PYTHON (python3)   any Python with torch and timm; tests need pytest, train what tools/make_sample_data.py imports
# OUT (./gpu_check)  logs and JSON of every stage
# LIMIT (480)        seconds for one command of a stage
# DEVICE (cuda)      cpu runs tiny sizes, to try the script itself
#
# A failing stage does not stop the others; the exit code is 1 when one failed, 2 for a stage that does not exist.
set -uo pipefail

PYTHON=${PYTHON:-python3}
OUT=${OUT:-$PWD/gpu_check}
LIMIT=${LIMIT:-480}
DEVICE=${DEVICE:-cuda}
STAGES=(info tests rational attention model train)

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=$(command -v "$PYTHON") || { echo "error: no Python '${PYTHON}'. Name one: PYTHON=/path/to/python $0" >&2; exit 2; }
for stage in "$@"; do
  case " ${STAGES[*]} " in
    *" $stage "*) ;;
    *) echo "error: unknown stage '$stage'; allowed: ${STAGES[*]}" >&2; exit 2 ;;
  esac
done
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
cd "$ROOT" || exit 2
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTORCH_JIT=0
unset TRITON_INTERPRET # the kernels are to be compiled

if [ "$DEVICE" = cpu ]; then
  rational_options=(--shapes smoke,2x197x192 --rounds 5)
  attention_options=(--shapes 2x3x49x32 --grids 1 --rounds 2)
  model_archs=(vit_nano_patch8_64,kat_nano_patch8_64,karat_nano_patch8_64)
  model_options=(--batch 2 --rounds 1 --dtype bf16)
  trained=(kat_nano_patch8_64 karat_nano_patch8_64)
  sample_options=(--scenes-train 4 --scenes-val 2 --objects-train 8 --objects-val 4)
  train_options=(train.epochs=1 train.warmup_epochs=0 train.batch_size=16)
else
  rational_options=()
  attention_options=(--dtype bf16)
  model_archs=(
    vit_tiny_patch16_224,kat_tiny_patch16_224,karat_tiny_patch16_224,karkat_tiny_patch16_224
    vit_base_patch16_224,kat_base_patch16_224,karat_base_patch16_224
    swin_tiny_patch4_window7_224,karat_swin_tiny_patch4_window7_224
  )
  model_options=(--dtype bf16)
  trained=(kat_tiny_patch16_224 karat_tiny_patch16_224 karat_convit_tiny_patch16_224 karat_swin_tiny_patch4_window7_224)
  sample_options=(--scenes-train 4 --scenes-val 2)
  train_options=(train.epochs=3 data.workers=8)
fi

# Runs a command within the limit; its output goes to the terminal and to the stage's log.
limited() {
  timeout --kill-after=10 "$LIMIT" "$@" 2>&1 | tee -a "$OUT/$stage.log"
  return "${PIPESTATUS[0]}"
}

stage_info() {
  if [ "$DEVICE" != cpu ]; then limited nvidia-smi; fi
  limited "$PYTHON" -c '
import importlib, platform, torch
print("python", platform.python_version(), "| torch", torch.__version__, "| CUDA", torch.version.cuda)
for name in ("triton", "timm", "pytest", "kat_rational", "rational_kat"):
    try:
        print(name, getattr(importlib.import_module(name), "__version__", "present"))
    except ImportError as error:
        print(name, "missing:", error)
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0), "bf16", torch.cuda.is_bf16_supported())
'
}

stage_tests() {
  local status=0 code
  limited "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/backbones
  code=$?
  if [ "$code" -ne 0 ] && [ "$code" -ne 5 ]; then status=$code; fi # 5: no test has the marker
  limited "$PYTHON" -m pytest -q -p no:cacheprovider -m "not gpu" tests/backbones -k "rational or fourier or attention"
  code=$?
  if [ "$code" -ne 0 ]; then status=$code; fi
  return "$status"
}

stage_rational() {
  limited "$PYTHON" tools/benchmark.py rational --device "$DEVICE" ${rational_options[@]+"${rational_options[@]}"} \
    --json "$OUT/rational.json" --markdown "$OUT/rational.md"
}

stage_attention() {
  limited "$PYTHON" tools/benchmark.py attention --device "$DEVICE" "${attention_options[@]}" \
    --json "$OUT/attention.json" --markdown "$OUT/attention.md"
}

stage_model() {
  local status=0 code archs
  for archs in "${model_archs[@]}"; do
    limited "$PYTHON" tools/benchmark.py model --device "$DEVICE" --archs "$archs" "${model_options[@]}" \
      --json "$OUT/model_${archs%%_patch*}.json" --markdown "$OUT/model_${archs%%_patch*}.md"
    code=$?
    if [ "$code" -ne 0 ]; then status=$code; fi
  done
  return "$status"
}

stage_train() {
  local status=0 code arch
  limited "$PYTHON" tools/make_sample_data.py --out "$OUT/sample" "${sample_options[@]}" || return
  for arch in "${trained[@]}"; do
    limited "$PYTHON" tools/pretrain_cls.py --config classification/recipes/nano.yaml --device "$DEVICE" \
      data.root="$OUT/sample/classification" model.arch="$arch" train.precision=bf16 "${train_options[@]}" \
      output="$OUT/train_$arch"
    code=$?
    if [ "$code" -ne 0 ]; then status=$code; fi
  done
  return "$status"
}

failed=0
results=()
if [ "$#" -eq 0 ]; then set -- "${STAGES[@]}"; fi
for stage in "$@"; do
  echo "== $stage"
  : >"$OUT/$stage.log"
  began=$SECONDS
  "stage_$stage"
  code=$?
  took="$((SECONDS - began)) s"
  if [ "$code" -eq 0 ]; then
    results+=("$stage: ok ($took)")
  else
    failed=1
    reason="exit $code"
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then reason="longer than $LIMIT s"; fi
    results+=("$stage: FAILED ($reason), see $OUT/$stage.log")
  fi
done
echo "== summary"
printf '%s\n' "${results[@]}"
exit "$failed"
