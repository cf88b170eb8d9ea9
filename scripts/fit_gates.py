"""Refit the constants of `gruqat_hf.arithmetic.gates` and print them with their errors.

Needs scipy, which the package itself does not. The constants in the package are part of the checkpoint format: this script
documents where they came from, and its output must not be pasted over them.

    python scripts/fit_gates.py
"""

from __future__ import annotations

import numpy as np
from numpy.polynomial import Polynomial
from numpy.polynomial.chebyshev import cheb2poly, chebvander
from scipy.optimize import linprog

FLOAT = np.float32
SEED = 0x7EF30000
INTERVALS = (7.85, 7.9, 7.95, 8.0, 8.05)


def fit_centre() -> tuple[np.float32, float]:
    """The centre that makes the reciprocal's error smallest, and the mean factor by which the reciprocal then is too large."""
    d = (1 + np.arange(0, 2**23, 5) / 2**23).astype(FLOAT)
    t = d * reciprocal_seed(d).astype(np.float64)
    found = []
    for step in range(80):
        z = 1 + step * 2.0**-23 - t
        product = t * (1 + (z + z * z) * (1 + z * z))
        found.append((np.ptp(product) / 2, 1 + step * 2.0**-23, (product.max() + product.min()) / 2))
    error, centre, factor = min(found)
    print(f"reciprocal: centre {float(centre).hex()}, relative error {error:.2e} before rounding")
    return FLOAT(centre), factor


def fit_rational(end: float) -> tuple[np.ndarray, np.ndarray]:
    """Minimax tanh(x) = x P(x^2) / Q(x^2) on [0, end], degrees 3 and 4, Q monic, never above 1 and equal to 1 at the end.

    Differential correction: each round is a linear program around the last denominator.
    """
    x = np.unique(np.concatenate([end * (1 - np.cos(np.linspace(0, np.pi, 600))) / 2, np.linspace(0, 2, 200)]))[1:]
    target = np.tanh(x)
    weight = np.maximum(target, 0.5)  # half way from absolute to relative error, so that small inputs keep their slope
    bottom = chebvander(2 * (x / end) ** 2 - 1, 4)
    top = bottom[:, :4] * x[:, None] / end
    none, previous, error, best = np.zeros((len(x), 1)), np.ones(len(x)), 1e-2, None
    while True:
        rows = [np.hstack([s * top, -(s * target + error * weight)[:, None] * bottom, -previous[:, None]]) for s in (1, -1)]
        rows += [np.hstack([top, -bottom, none]), np.hstack([0 * top, -bottom, none])]
        limits = np.concatenate([np.zeros(3 * len(x)), np.full(len(x), -1e-5)])
        solution = linprog(
            [0] * 9 + [1], np.vstack(rows), limits, np.hstack([top[-1:], -bottom[-1:], [[0]]]), [0],
            [(None, None)] * 4 + [(-1, 1)] * 5 + [(None, None)],
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )  # fmt: skip
        if solution.status:
            break
        p, q = solution.x[:4], solution.x[4:9]
        previous = bottom @ q
        reached = np.max(np.abs(top @ p / previous - target) / weight)
        if best is not None and reached > 0.999 * error:
            break
        error, best = reached, (p, q)
    square = Polynomial([-1, 2 / end**2])
    p, q = (Polynomial(cheb2poly(c))(square).coef for c in best)
    return p / end / q[-1], q / q[-1]


def factor(q: np.ndarray) -> list[tuple[tuple[float, float], ...]]:
    """The ways to write a monic quartic with real roots as (s^2 + a s + b)(s^2 + c s + d)."""
    roots = np.sort(Polynomial(q).roots())
    if np.iscomplexobj(roots):
        return []
    splits = (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2)))
    return [tuple((-(roots[i] + roots[j]), roots[i] * roots[j]) for i, j in split) for split in splits]


def reciprocal_seed(d: np.ndarray) -> np.ndarray:
    return (np.int32(SEED) - d.view(np.int32)).view(FLOAT)


def evaluate(x: np.ndarray, p: list, q: list, centre: np.float32) -> np.ndarray:
    """The recipe of `gates.py` without its clamp, in fp32."""
    s = x * x
    n = (((p[0] * s + p[1]) * s + p[2]) * s + p[3]) * x
    d = ((s + q[0][0]) * s + q[0][1]) * ((s + q[1][0]) * s + q[1][1])
    y = reciprocal_seed(d)
    z, r = centre - d * y, n * y
    w = z * z
    return r + (z + w) * r * (w + FLOAT(1))


def main() -> None:
    centre, bias = fit_centre()
    sweep = np.linspace(0, 8, 4_000_001).astype(FLOAT)
    tail = np.arange(FLOAT(7).view(np.int32), FLOAT(8).view(np.int32), dtype=np.int32).view(FLOAT)
    candidates = []
    for end in INTERVALS:
        exact_p, exact_q = fit_rational(end)
        p = [FLOAT(c / bias) for c in exact_p[::-1]]
        for pair in factor(exact_q):
            q = [(FLOAT(a), FLOAT(b)) for a, b in pair]
            # The first input whose rounded value reaches 1 becomes the clamp: nothing below it exceeds 1, all above it is 1.
            values = evaluate(tail, p, q, centre)
            first = np.argmax(values >= 1)
            if values[first] != 1:
                continue
            clamp = tail[first]
            x = np.minimum(sweep, clamp)
            error = np.max(np.abs(evaluate(x, p, q, centre) - np.tanh(sweep.astype(np.float64))))
            candidates.append((error, clamp, p, q))
            print(f"fitted to [0, {end}]: clamp {clamp:.6f}, max error {error:.3e}")
    error, clamp, p, q = min(candidates, key=lambda c: c[0])
    print(f"\nbest: max error {error:.3e}")
    print("TANH_CLAMP       ", float(clamp).hex(), clamp)
    print("TANH_NUMERATOR   ", [float(c).hex() for c in p], p)
    print("TANH_DENOMINATOR ", [(float(a).hex(), float(b).hex()) for a, b in q], q)
    print("RECIPROCAL_SEED  ", hex(SEED))
    print("RECIPROCAL_CENTRE", float(centre).hex(), centre)


if __name__ == "__main__":
    main()
