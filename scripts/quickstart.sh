#!/usr/bin/env bash
# From nothing to an answer, on a machine without a GPU: environment, export, verification, one question.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

BUNDLE="$ROOT/out/tiny-llava"
BIN="$VENV/bin"

say "1/3 exporting tiny-llava at keep 1.0 and 0.55 to $BUNDLE"
"$BIN/lightkv-export" tiny-llava --keep 1.0 --keep 0.55 --out "$BUNDLE" --overwrite
say "2/3 comparing the bundle with the PyTorch reference"
"$BIN/lightkv" verify "$BUNDLE"
say "3/3 asking about recipes/tiny-llava/example.png"
"$BIN/lightkv" run "$BUNDLE" --keep 0.55 --image "$ROOT/recipes/tiny-llava/example.png" \
    --prompt "What colour is the star?" --max-new-tokens 8
say "done; next: .venv/bin/lightkv inspect out/tiny-llava, or lightkv chat out/tiny-llava"
