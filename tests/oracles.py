"""Slow, obvious oracles: plain loops in float64, written from the papers' rules. No code shared with the package."""

from __future__ import annotations

import math

import numpy as np


def lightkv_importance(q: np.ndarray, k: np.ndarray, text: list[int]) -> list[float]:
    """ξ of every position. q [Hq, S, d], k [Hkv, S, d]; softmax over queries, summed over heads and text columns."""
    heads, length, depth = q.shape
    result = [0.0] * length
    for head in range(heads):
        key_head = head // (heads // len(k))
        for column in text:
            scores = [float(np.dot(q[head, row], k[key_head, column])) / math.sqrt(depth) for row in range(length)]
            top = max(scores)
            powers = [math.exp(score - top) for score in scores]
            total = sum(powers)
            for row in range(length):
                result[row] += powers[row] / total
    return result


def lightkv_windows(tokens: int, windows_per_side: int) -> list[list[int]]:
    """Members of each window: tokens row-major on a square; the first n mod w bands are one longer."""
    side = math.ceil(math.sqrt(tokens))
    band_of = []
    for band in range(windows_per_side):
        band_of += [band] * (side // windows_per_side + (1 if band < side % windows_per_side else 0))
    windows: dict[tuple[int, int], list[int]] = {}
    for token in range(tokens):
        windows.setdefault((band_of[token // side], band_of[token % side]), []).append(token)
    return list(windows.values())


def lightkv_merge(
    tokens: np.ndarray, importance: list[float], windows_per_side: int, ratio: float
) -> tuple[list[np.ndarray], list[int], list[int]]:
    """One image: merged tokens, the source place of each, and for each source token the survivor that holds it."""
    count = len(tokens)
    into: dict[int, list[int]] = {}
    if count >= 8 * windows_per_side**2:
        for window in lightkv_windows(count, windows_per_side):
            a_tokens, b_tokens = window[0::2], window[1::2]
            found = []
            for a in a_tokens:
                best, best_b = -math.inf, None
                for b in b_tokens:
                    norms = math.sqrt(np.dot(tokens[a], tokens[a])) * math.sqrt(np.dot(tokens[b], tokens[b]))
                    similarity = round(
                        float(np.dot(tokens[a], tokens[b])) / norms, 12
                    )  # equal tokens: 1, not 1 - 1e-16
                    if similarity > best:  # strictly: the lowest b wins a tie
                        best, best_b = similarity, b
                found.append((-best, a, best_b))
            removed = min(math.floor(ratio * len(window)), len(window) // 2)
            for _, a, b in sorted(found)[:removed]:  # ties: the lowest a
                into.setdefault(b, []).append(a)
    gone = {a: b for b, sources in into.items() for a in sources}
    kept = [token for token in range(count) if token not in gone]
    merged = []
    for token in kept:
        if token not in into:
            merged.append(tokens[token])
            continue
        weight = importance[token] + sum(importance[a] for a in into[token])
        total = importance[token] * tokens[token] + sum(importance[a] * tokens[a] for a in into[token])
        merged.append(total / max(weight, 1e-8))
    return merged, kept, [kept.index(gone.get(token, token)) for token in range(count)]


def lightkv_stage_oracle(
    hidden: np.ndarray, q: np.ndarray, k: np.ndarray, spans: list[tuple[int, int]], windows_per_side: int, ratio: float
) -> np.ndarray:
    """The whole stage: hidden [B, S, D], q [B, Hq, S, d], k [B, Hkv, S, d] -> [B, S', D]."""
    hidden, q, k = (np.asarray(array, np.float64) for array in (hidden, q, k))
    batch = []
    for row in range(len(hidden)):
        text = [place for place in range(hidden.shape[1]) if not any(start <= place < end for start, end in spans)]
        importance = lightkv_importance(q[row], k[row], text)
        sequence, place = [], 0
        for start, end in sorted(spans):
            sequence += list(hidden[row, place:start])
            sequence += lightkv_merge(hidden[row, start:end], importance[start:end], windows_per_side, ratio)[0]
            place = end
        batch.append(sequence + list(hidden[row, place:]))
    return np.array(batch)
