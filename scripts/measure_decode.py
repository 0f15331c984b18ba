"""Does a decode step cost what is filled, or what is allowed? tiny-llava with room for 1024 and for 8192 tokens.

    python scripts/measure_decode.py [--fill 700] [--steps 200] [--lowering modern]

Both bundles take turns, step by step, at the same fill, so the ratio of the medians holds on a noisy machine.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from lightkv_export.bench import device_name
from lightkv_export.pipeline import ExportRequest, export_bundle
from lightkv_export.runtime import load
from lightkv_export.runtime.generation import Request
from lightkv_export.runtime.sequence import Sequence
from lightkv_export.runtime.tokens import Tokens

LIMITS = (1024, 8192)
WARMUP = 20


def filled_sequence(bundle: Path, fill: int, threads: int | None) -> Sequence:
    """A conversation about one image whose caches hold exactly `fill` tokens (keep 1.0)."""
    session = load(bundle, threads=threads).session(1.0)
    session.append("What is in the picture?", [np.zeros((96, 96, 3), np.uint8)])
    session.generate(Request(forced=(7,)))
    for _ in range(fill - session.sequence.length):
        session.sequence.step(Tokens.of([7], -1), {})
    return session.sequence


def step_ms(sequence: Sequence, fill: int) -> float:
    """One decode step at this fill; the new row is forgotten afterwards."""
    start = time.perf_counter()
    sequence.step(Tokens.of([7], -1), {})
    elapsed = 1000 * (time.perf_counter() - start)
    sequence.rollback(fill)
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fill", type=int, default=700, help="tokens in the caches (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="counted steps per bundle (default: %(default)s)")
    parser.add_argument("--lowering", default="modern", help="modern or portable (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: all)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sequences = {}
        for limit in LIMITS:
            out = Path(scratch) / str(limit)
            print(f"exporting tiny-llava with room for {limit} tokens", file=sys.stderr)
            export_bundle(
                ExportRequest(model="tiny-llava", out=out, keeps=(1.0,), lowering=args.lowering, max_tokens=limit)
            )
            sequences[limit] = filled_sequence(out, args.fill, args.threads)
        times = {limit: [] for limit in LIMITS}
        for round_ in range(WARMUP + args.steps):
            for limit, sequence in sequences.items():
                elapsed = step_ms(sequence, args.fill)
                if round_ >= WARMUP:
                    times[limit].append(elapsed)
    medians = {limit: statistics.median(values) for limit, values in times.items()}
    for limit, values in times.items():
        low, high = np.percentile(values, [10, 90])
        print(f"room for {limit}: {medians[limit]:.3f} ms per step (10 to 90 %: {low:.3f} to {high:.3f})")
    ratio = medians[LIMITS[1]] / medians[LIMITS[0]]
    print(f"ratio {ratio:.3f} on {device_name()}")
    figures = {str(limit): medians[limit] for limit in LIMITS}
    print(json.dumps({"fill": args.fill, "lowering": args.lowering, "ms": figures, "ratio": ratio}))


if __name__ == "__main__":
    main()
