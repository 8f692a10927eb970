"""The extension's combinatorics in one place: all functions of counts, votes and rewards that other code may call.

Each is documented in its own file; this one holds no code.
"""

from medbridge.support.bootstrap import CurveIntervals, bootstrap_curve
from medbridge.support.rewards import max_at_k, pass_at_k_advantages, pass_at_k_weights
from medbridge.support.spectra import Spectrum, spectrum
from medbridge.support.tables import g_pass_at_k, mean_curve, pass_at_k, pass_hat_k, reached_at_k
from medbridge.support.votes import majority_at_k

__all__ = [
    "CurveIntervals",
    "Spectrum",
    "bootstrap_curve",
    "g_pass_at_k",
    "majority_at_k",
    "max_at_k",
    "mean_curve",
    "pass_at_k",
    "pass_at_k_advantages",
    "pass_at_k_weights",
    "pass_hat_k",
    "reached_at_k",
    "spectrum",
]
