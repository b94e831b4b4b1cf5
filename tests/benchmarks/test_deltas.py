"""The delta benchmark counts what travels, and its retrained models are ones."""

from __future__ import annotations

import random

import numpy as np

from benchmarks.deltas import Case, forms, last_layer, movement, sent, trained, went_on


def test_what_travels_is_counted_in_percent_of_the_file() -> None:
    before, other = random.Random(1).randbytes(10_000), random.Random(2).randbytes(10_000)
    nothing = sent(Case("unrelated", before, other))
    assert (nothing.share, nothing.codec) == (100.0, "whole file")
    half = sent(Case("half", before, before[:5000] + other[5000:]))
    assert 50 < half.share < 55 and half.plain > 99


def test_retraining_moves_all_weights_or_the_last_layer_only() -> None:
    rows = np.random.default_rng(1).normal(size=(600, 9)).astype(np.float32)
    net = trained(rows[:300], 16, 2, 7)
    tuned, anew = went_on(net, rows, 1e-5), last_layer(net, rows)
    assert 0 < movement(net, tuned) < 5
    assert all((a != b).mean() > 0.9 for a, b in zip(net.coefs_, tuned.coefs_, strict=True))
    assert [bool((a == b).all()) for a, b in zip(net.coefs_, anew.coefs_, strict=True)] == [True, True, False]
    files = forms(net, rows)
    assert len(files["fp32"]) > len(files["fp16"]) > len(files["int8"]) * 0.5
