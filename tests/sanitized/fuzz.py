"""Seeded fuzz over the functions of the extensions: odd shapes, dtypes, layouts and values. run.sh adds sanitizers.

    python tests/sanitized/fuzz.py --seconds 20 --seed 0

A call must return finite numbers or NaN, of the documented shape and in the documented range, with the same bits for
plain copies of its arguments; or raise ValueError or TypeError. Anything else prints the seed and the arguments, and
fails. It compares nothing with exact values: the tests do.
"""

from __future__ import annotations

import argparse
import mmap
import os
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from medbridge import _native
from medbridge_kernels import _native as kernels

Arguments = dict[str, Any]
SLACK = 1e-9  # relative, for rounding at the ends of a range
LARGE = 3000  # items, enough for every function to use threads


@dataclass(frozen=True)
class Array:
    """What one returned array must look like."""

    shape: tuple[int, ...]
    low: float = -sys.float_info.max
    high: float = sys.float_info.max


@dataclass(frozen=True)
class Function:
    run: Callable[..., Any]
    make: Callable[[Draw], Arguments]  # valid arguments
    returns: Callable[[Arguments], list[Array]]  # for arguments that were accepted
    converts: bool  # takes the same numbers in any dtype and layout


FUNCTIONS: dict[str, Function] = {}


def fuzzed(
    name: str, returns: Callable[[Arguments], list[Array]], run: Callable[..., Any] | None = None
) -> Callable[[Callable[[Draw], Arguments]], Callable[[Draw], Arguments]]:
    """Registers a generator of valid arguments for `_native.<name>`, or for `run`; the driver spoils them."""

    def register(make: Callable[[Draw], Arguments]) -> Callable[[Draw], Arguments]:
        FUNCTIONS[name] = Function(run or getattr(_native, name, None), make, returns, converts=run is None)
        return make

    return register


class Draw:
    """Random valid arguments."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def one(self, *choices: Any) -> Any:
        return choices[self.rng.integers(len(choices))]

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def items(self) -> int:
        return LARGE if self.chance(0.02) else self.one(0, 1, 1, 2, 3, 5, 8, 17, 64)

    def samples(self, items: int) -> np.ndarray:
        """n of each item."""
        most = self.one(1, 2, 7, 16, 64, 256, 400)
        n = self.rng.integers(0, most, items, endpoint=True) if self.chance(0.5) else np.full(items, most)
        if items and self.chance(0.05):
            n[self.rng.integers(items)] = self.one(100_000, 2**31 - 1)
        return n

    def counts(self) -> Arguments:
        """n and c of some items."""
        n = self.samples(self.items())
        c = (n * self.rng.random(n.size)).round().astype(np.int64)
        return {"n": n, "c": self.one(c, c, 0 * n, n)}

    def ks(self, most: int = 300) -> np.ndarray:
        ks = self.rng.integers(1, self.one(1, 4, 20, most), self.one(0, 1, 1, 2, 5, 60), endpoint=True)
        if ks.size and self.chance(0.05):
            ks[0] = self.one(2**31 - 1, 2**31, 2**63 - 1)
        return ks

    def rewards(self) -> Arguments:
        """rewards and offsets of some items."""
        items = self.items()
        sizes = self.rng.integers(0, self.one(1, 4, 12), items, endpoint=True)
        n = int(self.one(0, 1, 2, 5, 33))
        ragged = self.chance(0.5)
        shape = (int(sizes.sum()),) if ragged else (items, n)
        scale = self.one(1.0, 1.0, 1e-310, 1e-150, 1e150, 1e299)
        rewards = self.one(
            self.rng.integers(0, 2, shape),
            self.rng.integers(-3, 4, shape),
            np.clip(self.rng.normal(size=shape), -9, 9) * scale,
            np.full(shape, self.rng.normal()),
        )
        return {"rewards": rewards, "offsets": np.concatenate([[0], np.cumsum(sizes)]) if ragged else None}


def length(value: Any) -> int:
    return int(np.shape(value)[0])


def table(low: float, high: float) -> Callable[[Arguments], list[Array]]:
    return lambda a: [Array((length(a["n"]), length(a["ks"])), low, high)]


@fuzzed("pass_at_k", table(0, 1))
@fuzzed("pass_hat_k", table(0, 1))
def counts_and_ks(draw: Draw) -> Arguments:
    return {**draw.counts(), "ks": draw.ks()}


@fuzzed("mean_curve", lambda a: [Array((length(a["ks"]),), 0, 1)])
def mean_curve(draw: Draw) -> Arguments:
    arguments = counts_and_ks(draw)
    weights = draw.rng.random(length(arguments["n"])) * draw.one(1, 1e-300, 1e300)
    return {**arguments, "weights": draw.one(None, weights)}


@fuzzed("g_pass_at_k", table(0, 1))
def g_pass_at_k(draw: Draw) -> Arguments:
    return {**counts_and_ks(draw), "tau": draw.one(1e-12, 0.25, 0.5, 1.0, float(draw.rng.uniform(0.01, 1)))}


@fuzzed("reached_at_k", table(0, 1))
def reached_at_k(draw: Draw) -> Arguments:
    arguments = counts_and_ks(draw)
    items = length(arguments["n"])
    floors = draw.one(np.zeros(items), np.full(items, 0.25), draw.rng.random(items), np.ones(items))
    return {**arguments, "floor": floors}


@fuzzed("majority_at_k", lambda a: [Array((length(a["votes"]), length(a["ks"])), 0, 1)])
def majority_at_k(draw: Draw) -> Arguments:
    items, options = draw.items(), draw.one(0, 1, 2, 5, 5, 11)
    votes = draw.rng.integers(0, draw.one(0, 1, 3, 12, 60), (items, options), endpoint=True)
    if votes.size and draw.chance(0.05):
        votes[0, 0] = 1024 - votes[0, 1:].sum()
    correct = draw.rng.integers(-1, options, items)
    abstained = draw.one(None, np.zeros(items, dtype=int), draw.rng.integers(0, 9, items))
    return {"votes": votes, "correct": correct, "ks": draw.ks(1024), "abstained": abstained}


def reward_range(arguments: Arguments) -> tuple[float, float]:
    values = np.asarray(arguments["rewards"], dtype=np.float64)
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def max_at_k_returns(arguments: Arguments) -> list[Array]:
    ragged = arguments["offsets"] is not None
    items = length(arguments["offsets"]) - 1 if ragged else length(arguments["rewards"])
    return [Array((items, length(arguments["ks"])), *reward_range(arguments))]


@fuzzed("max_at_k", max_at_k_returns)
def max_at_k(draw: Draw) -> Arguments:
    return {**draw.rewards(), "ks": draw.ks(40)}


def weights_returns(arguments: Arguments) -> list[Array]:
    low, high = reward_range(arguments)
    largest = {"none": max(-low, high), "loo": high - low, "loo_minus_one": high - low}[arguments["baseline"]]
    return [
        Array(np.shape(arguments["rewards"]), 0.0 if arguments["baseline"] == "loo_minus_one" else -largest, largest)
    ]


@fuzzed("pass_at_k_weights", weights_returns)
def pass_at_k_weights(draw: Draw) -> Arguments:
    baseline = draw.one("none", "loo", "loo_minus_one")
    return {**draw.rewards(), "k": int(draw.one(1, 2, 2, 3, 5, 32, 2**63 - 1)), "baseline": baseline}


def advantages_returns(arguments: Arguments) -> list[Array]:
    largest = float(np.sqrt(np.size(arguments["rewards"])))
    return [Array(np.shape(arguments["rewards"]), -largest, largest)]


@fuzzed("pass_at_k_advantages", advantages_returns)
def pass_at_k_advantages(draw: Draw) -> Arguments:
    return {**draw.rewards(), "k": int(draw.one(1, 2, 3, 5, 32, 2**63 - 1))}


def bootstrap_returns(arguments: Arguments) -> list[Array]:
    ks = length(arguments["ks"])
    return [Array((ks,), 0, 1)] * 6 + [Array((arguments["replicates"], ks), 0, 1)]


@fuzzed("bootstrap_curve", bootstrap_returns)
def bootstrap_curve(draw: Draw) -> Arguments:
    arguments = counts_and_ks(draw)
    groups = draw.rng.integers(-5, draw.one(0, 3, 2000), length(arguments["n"]))
    return {
        **arguments,
        "groups": draw.one(None, groups),
        "replicates": int(draw.one(1, 2, 7, 65, 200)),
        "seed": int(draw.one(0, 1, 2**64 - 1)),
        "confidence": draw.one(0.5, 0.95, 1e-9, 1 - 1e-12),
        "portable": draw.chance(0.5),
    }


def distinct_returns(arguments: Arguments) -> list[Array]:
    n, c = (np.asarray(arguments[name], dtype=np.int64) for name in ("n", "c"))
    pairs = len(np.unique(np.stack([n, c]), axis=1).T)
    return [Array((pairs,), 0, 2**31), Array((pairs,), 0, 2**31), Array((n.size,), 0, pairs)]


@fuzzed("distinct_counts", distinct_returns)
def distinct_counts(draw: Draw) -> Arguments:
    return draw.counts()


@fuzzed("binomial_likelihood", lambda a: [Array((length(a["n"]), length(a["grid"])), 0, 1)])
def binomial_likelihood(draw: Draw) -> Arguments:
    grid = np.unique(draw.rng.random(draw.one(1, 2, 9, 50)))
    return {**draw.counts(), "grid": draw.one(grid, np.linspace(0, 1, 21), np.array([0.0, 1e-300, 0.5, 1.0]))}


def spectra_returns(arguments: Arguments) -> list[Array]:
    fits, points = length(arguments["weights"]), length(arguments["grid"])
    # -inf: counts that no point of the grid allows, up to underflow
    return [Array((fits, points), 0, 1), Array((fits,), -SLACK), Array((fits,), -np.inf)]


@fuzzed("fit_spectra", spectra_returns)
def fit_spectra(draw: Draw) -> Arguments:
    arguments = binomial_likelihood(draw)
    weights = draw.rng.integers(0, 4, (draw.one(0, 1, 3), length(arguments["n"]))) * draw.one(1.0, 1e-9, 0.3)
    tolerance, iterations = draw.one(1e-6, 1e-3), int(draw.one(1, 5, 200))
    return {**arguments, "weights": weights, "tolerance": tolerance, "max_iterations": iterations}


# The functions of medbridge_kernels write into the caller's arrays and convert nothing. Here they get arrays with room
# on both sides, which must stay as it was.

ROOM = 5.5  # any number that no function writes


def with_room(shape: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, Callable[[], None]]:
    """An array to be written, and the check that nothing around it was."""
    memory = np.full((*shape[:-1], shape[-1] + 14), ROOM).astype(dtype)
    inside = memory[..., 9:-5]

    def check() -> None:
        around = np.concatenate([memory[..., :9], memory[..., -5:]], axis=-1)
        assert (around == np.asarray(ROOM).astype(dtype)).all(), "something was written beside the output"

    return inside, check


def rows_of(array: Any) -> int:
    return int(array.shape[0]) if isinstance(array, np.ndarray) and array.ndim else 0


def sweep_into_room(**arguments: Any) -> tuple[np.ndarray, ...]:
    with_entropy = arguments.pop("with_entropy")
    tokens = rows_of(arguments["logits"])
    (logprobs, check_logprobs), (entropy, check_entropy) = (with_room((tokens,), np.float32) for _ in range(2))
    lse, check_lse = with_room((tokens,), np.float64)
    kernels.sweep(**arguments, logprobs=logprobs, entropy=entropy if with_entropy is True else None, lse=lse)
    for check in (check_logprobs, check_entropy, check_lse):
        check()
    assert not (logprobs > 1e-6).any() and not (with_entropy is True and (entropy < -1e-6).any())
    return logprobs, lse


def sweep_backward_into_room(**arguments: Any) -> np.ndarray:
    logits = arguments["logits"]
    if not isinstance(logits, np.ndarray) or logits.ndim != 2:
        kernels.sweep_backward(**arguments, out=np.zeros((3, 4), np.float32))
    out, check = with_room(logits.shape, logits.dtype if logits.dtype.kind in "if" else np.float32)
    kernels.sweep_backward(**arguments, out=out)
    check()
    if arguments["dtype"] == "float32":
        return out
    return out.copy().view(np.float16).astype(np.float64) if arguments["dtype"] == "float16" else as_float32(out)


def as_float32(bfloat16: np.ndarray) -> np.ndarray:
    return (bfloat16.astype(np.uint16).astype(np.uint32) << 16).view(np.float32)


def logit_arrays(draw: Draw) -> Arguments:
    tokens, vocab = draw.one(0, 1, 2, 5, 12, 40), draw.one(0, 1, 2, 3, 15, 16, 17, 40, 129, 300, 5000)
    padding = draw.one(0, 0, 3, 16)
    values = draw.rng.normal(size=(tokens, vocab + padding)).astype(np.float32) * draw.one(0, 1, 30, 1e30)
    special = draw.rng.random(values.shape) < draw.one(0.0, 0.0, 0.1, 1.0)
    values[special] = draw.one(-np.inf, np.inf, np.nan, -3.4e38, 1e-40)
    dtype = draw.one("float32", "bfloat16", "float16")
    if dtype == "bfloat16":
        values = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.int16)
    elif dtype == "float16":
        values = values.astype(np.float16).view(np.int16)
    if dtype != "float32" and draw.chance(0.2):  # any bits at all
        values = draw.rng.integers(-(2**15), 2**15, values.shape).astype(np.int16)
    ids = draw.rng.integers(-2, vocab + 2, tokens)
    ids[draw.rng.random(tokens) < 0.1] = draw.one(-100, 2**62, -(2**63), 0)
    return {
        "logits": values[:, padding // 2 : padding // 2 + vocab],
        "dtype": dtype,
        "token_ids": ids,
        "keep": draw.one(None, draw.rng.random(tokens) < 0.6),
        "temperature": draw.one(1.0, 0.7, 1e-3, 1e3),
        "temperatures": draw.one(None, draw.rng.random(tokens).astype(np.float32) * draw.one(0, 1, 10, -1)),
    }


@fuzzed("kernels.sweep", lambda a: [Array((rows_of(a["logits"]),), -np.inf)] * 2, sweep_into_room)
def kernels_sweep(draw: Draw) -> Arguments:
    return {**logit_arrays(draw), "with_entropy": draw.chance(0.5)}


@fuzzed("kernels.sweep_backward", lambda a: [Array(a["logits"].shape, -np.inf, np.inf)], sweep_backward_into_room)
def kernels_sweep_backward(draw: Draw) -> Arguments:
    arguments = logit_arrays(draw)
    tokens = rows_of(arguments["logits"])
    row = [draw.rng.normal(size=tokens).astype(np.float32) * draw.one(0, 1, 1, 1e20) for _ in range(3)]
    entropy = draw.one(None, row[2])
    return {
        **arguments,
        "lse": draw.rng.normal(size=tokens) * draw.one(1, 20, 1e38),
        "entropy": entropy,
        "by_logprob": row[0],
        "by_entropy": None if entropy is None else draw.one(None, row[1]),
    }


def group_advantages_into_room(**arguments: Any) -> np.ndarray:
    rewards = arguments["rewards"]
    dtype = rewards.dtype if isinstance(rewards, np.ndarray) and rewards.dtype == np.float64 else np.float32
    out, check = with_room((rows_of(rewards),), dtype)
    kernels.group_advantages(**arguments, out=out)
    check()
    return out


def group_offsets(draw: Draw, rewards: int) -> np.ndarray:
    cuts = np.sort(draw.rng.integers(0, rewards, draw.one(0, 1, 5, 40), endpoint=True))
    return np.concatenate([[0], cuts, [rewards]])


@fuzzed("kernels.group_advantages", lambda a: [Array(a["rewards"].shape, -np.inf, np.inf)], group_advantages_into_room)
def kernels_group_advantages(draw: Draw) -> Arguments:
    count = draw.one(0, 1, 2, 9, 100)
    rewards = draw.one(draw.rng.normal(size=count), draw.rng.integers(0, 2, count), np.full(count, 0.1))
    rewards = rewards.astype(draw.one(np.float32, np.float64)) * draw.one(1, 1, 1e-30, 1e30)
    rewards[draw.rng.random(count) < draw.one(0, 0.2)] = draw.one(np.nan, np.inf)
    return {
        "rewards": rewards,
        "group_offsets": group_offsets(draw, count),
        "baseline": draw.one("mean", "loo", "none"),
        "scale": draw.one("std", "batch_std", "none"),
        "unbiased": draw.chance(0.5),
        "eps": draw.one(0.0, 1e-4, 1.0),
    }


def same_values(draw: Draw, array: np.ndarray) -> Any:
    """The array in another layout or dtype; the function must not notice."""
    padded = np.zeros(array.nbytes + 1, dtype=np.uint8)
    unaligned = padded[1:].view(array.dtype).reshape(array.shape)
    unaligned[...] = array
    read_only = array.copy()
    read_only.flags.writeable = False
    fits = array.dtype.kind == "i" and array.min(initial=0) >= 0 and array.max(initial=0) < 2**16
    return draw.one(
        array[::-1].copy()[::-1],
        np.repeat(array, 3, axis=-1)[..., ::3],
        np.asfortranarray(array),
        array.astype(array.dtype.newbyteorder()),
        unaligned,
        read_only,
        array.astype(np.uint16) if fits else array.copy(),
        array.tolist(),
    )


def spoilt_array(draw: Draw, array: np.ndarray) -> Any:
    """The array with another shape, dtype or value; many functions refuse many of these."""
    if array.size and draw.chance(0.5):
        value = draw.one(
            -1, 0, 1, 2, 1025, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, -(2**63), np.nan, np.inf, -0.5, 1e308
        )
        wide = np.float64 if isinstance(value, float) else np.int64 if array.dtype.kind == "i" else array.dtype
        changed = array.astype(array.dtype if array.dtype.kind == "f" else wide)
        changed[tuple(draw.rng.integers(0, array.shape))] = value
        return changed
    return draw.one(
        array[:-1],
        np.concatenate([array, array]),
        array[..., :0],
        array[None],
        array.reshape(-1),
        array.reshape(-1)[:1].sum(),
        np.broadcast_to(array.reshape(-1)[:1].sum(), array.shape),
        array.astype(draw.one(bool, "f2", "f4", "f8", "g", "c16", "u8", "i1", "O", "U", "S", "M8[s]", "V8")),
        np.ma.masked_array(array, mask=array != 0),
        [[1], [1, 2]],
        [],
        {},
        "12",
        b"12",
        object(),
        None,
    )


def spoilt_scalar(draw: Draw) -> Any:
    return draw.one(
        0, -1, 1.5, 2.0, np.nan, np.inf, -np.inf, True, None, "x", "loo", 2**63, 2**70, -(2**63), [2], 3 + 0j
    )


def case(seed: int, index: int, names: list[str]) -> tuple[str, Arguments]:
    """Name and arguments of one call: half of the calls have one spoilt argument."""
    draw = Draw(np.random.default_rng([seed, index]))
    name = draw.one(*names)
    with np.errstate(all="ignore"):
        arguments = FUNCTIONS[name].make(draw)
        spoilt = draw.one(*arguments) if draw.chance(0.5) else None
        for argument, value in arguments.items():
            if isinstance(value, np.ndarray):
                if argument == spoilt:
                    value = spoilt_array(draw, value)
                numbers = type(value) is np.ndarray and value.ndim and value.dtype.kind in "iuf"
                if numbers and FUNCTIONS[name].converts and draw.chance(0.5):
                    value = same_values(draw, value)
            elif argument == spoilt and not isinstance(value, bool):
                value = spoilt_scalar(draw)
            arguments[argument] = value
    return name, arguments


def plain(value: Any, converts: bool) -> Any:
    """The same numbers as a fresh array, of 8-byte numbers for a function that converts; other things as they are."""
    if not isinstance(value, np.ndarray | list) or np.size(value) == 0:
        return value
    if not converts:
        return np.array(value, order="C")
    array = np.asarray(value)
    if array.dtype.kind == "f":
        return array.astype(np.float64, order="C")
    return array.astype(np.uint64 if array.max() >= 2**63 else np.int64, order="C")


def arrays_of(result: Any) -> list[np.ndarray]:
    return list(result) if isinstance(result, tuple) else [result]


def call(name: str, arguments: Arguments) -> bool:
    """Calls the function and checks what it returns. False: it refused."""
    function = FUNCTIONS[name]
    try:
        found = arrays_of(function.run(**arguments))
    except (ValueError, TypeError) as refusal:
        assert str(refusal), "a refusal must say why"
        return False
    expected = function.returns(arguments)
    assert len(found) == len(expected), f"{len(found)} arrays were returned instead of {len(expected)}"
    for place, (array, wanted) in enumerate(zip(found, expected, strict=True)):
        assert array.shape == wanted.shape, f"array {place} has shape {array.shape} instead of {wanted.shape}"
        room = SLACK * max(abs(wanted.low), abs(wanted.high)) if wanted.high < sys.float_info.max else 0.0
        wide = array.astype(np.float64)
        wrong = ~(np.isnan(wide) | ((wide >= wanted.low - room) & (wide <= wanted.high + room)))
        assert not wrong.any(), f"array {place} holds {array[wrong][0]}, outside {wanted.low} to {wanted.high}"
    copies = {argument: plain(value, function.converts) for argument, value in arguments.items()}
    again = arrays_of(function.run(**copies))
    for place, (array, other) in enumerate(zip(found, again, strict=True)):
        assert array.tobytes() == other.tobytes(), f"array {place} differs from that of plain copies of the arguments"
    return True


def run(seed: int, seconds: float, names: list[str], progress: mmap.mmap) -> None:
    """Call after call until the time is up. `progress` holds the index of the present one."""
    answers = {name: Counter() for name in names}
    end = time.monotonic() + seconds
    index = 0
    while time.monotonic() < end:
        progress[:8] = struct.pack("q", index)
        name, arguments = case(seed, index, names)
        answers[name][call(name, arguments)] += 1
        index += 1
    for name, count in answers.items():
        print(f"  {name:<24} {count[True]:6} returned, {count[False]:6} refused")
        assert count[True] and count[False], f"{name}: the fuzz must meet both, give it more time"
    print(f"{index} calls, seed {seed}: nothing found")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    public = {name for name in dir(_native) if not name.startswith("_")}
    public |= {f"kernels.{name}" for name in dir(kernels) if not name.startswith("_")} - {"kernels.instruction_set"}
    if public - FUNCTIONS.keys():
        sys.exit(f"functions without a generator here: {', '.join(sorted(public - FUNCTIONS.keys()))}")
    names = [name for name in FUNCTIONS if name in public]
    # The calls are made by a child, so that the arguments can be told also when one ends the process.
    progress = mmap.mmap(-1, 8)
    if os.fork() == 0:
        try:
            run(options.seed, options.seconds, names, progress)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.wait()[1])
    if status != 0:
        index = struct.unpack("q", progress[:8])[0]
        name, arguments = case(options.seed, index, names)
        np.set_printoptions(threshold=sys.maxsize, floatmode="unique")
        print(f"failed with status {status} at call {index} of seed {options.seed}: {name}", file=sys.stderr)
        for argument, value in arguments.items():
            print(f"  {argument} = {value!r}", file=sys.stderr)
            if isinstance(value, np.ndarray):
                layout = f"strides {value.strides}, {'aligned' if value.flags.aligned else 'not aligned'}"
                print(f"    {value.dtype}, shape {value.shape}, {layout}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
