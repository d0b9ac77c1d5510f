"""fusedrnn against torch.nn, onnxruntime and the machine's own limits, over a grid of shapes:
`python -m benchmarks.bench_grid`, some minutes for each dtype. Not for pytest.

All sides take turns in one process: every row is checked before it is timed and
printed, losses too. Here a layer is a model's first: its input needs no gradient.
"""

from __future__ import annotations

import datetime
import itertools
import os
import sys
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from time import perf_counter

import torch

import fusedrnn

from . import common

try:
    import onnx
    import onnxruntime
except ImportError:  # its columns say so
    onnx = onnxruntime = None

FIRST_SHAPES = ((1, 100, 32), (1, 100, 128), (1, 100, 512), (8, 100, 128))  # B, T, H; and I = H
SHAPES = (*FIRST_SHAPES, (32, 100, 256), (64, 50, 512), (64, 50, 1024))
MODES = {"inference": "no_grad", "training": "forward+backward"}  # their names here and in common
DTYPES = ("float32", "float64", "bfloat16")
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
# ONNX's order of the gates, as indices into torch's: i f g o to i o f g, and r z n to z r n.
ONNX_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
ROUNDS, QUICK_ROUNDS = 9, 3
ROW_SECONDS = 4.0  # after these a row starts no further round
GEMM_SIZE = 1024
FAILED = "**check failed**"
COLUMNS = (
    "| B, T, H | mode | threads | torch.nn ms | fusedrnn ms | ratio | quartiles | onnxruntime ms "
    "| ratio | GFLOP/s | of GEMM | of L2 | ran | rounds |"
)
RULE = "|---|---|--:|--:|--:|--:|---|--:|--:|--:|--:|--:|---|--:|"


@dataclass(frozen=True)
class Row:
    """What is timed in a row of the table."""

    cell: str
    dtype: str
    shape: tuple[int, int, int]
    threads: int
    mode: str

    @property
    def gflop(self) -> float:
        """Of all products, 2 G H (I + H) B T; in training three times that, as is usually counted.

        Where the input needs no gradient, training does less: 2.5 times with I = H.
        """
        batch, steps, size = self.shape
        one_pass = 2 * GATES[self.cell] * size * (size + size) * batch * steps / 1e9
        return one_pass * (3 if self.mode == "training" else 1)

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.cell} {self.dtype} {shape} {self.mode}, threads: {self.threads}"


@dataclass(frozen=True)
class Limits:
    """What the machine does at best on some number of threads."""

    gemm: dict[str, float]  # by dtype, GFLOP/s
    l2: float  # GB/s
    l2_bytes: int


def l2_bytes() -> int:
    """The L2 cache of a core; 1 MiB if the system does not tell."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 1 << 20


def best_seconds(call: Callable, times: int) -> float:
    return min(timeit.repeat(call, number=times, repeat=10)) / times


def measure_limits(threads: int) -> Limits:
    gemm = {}
    for name in DTYPES:
        a = torch.randn(GEMM_SIZE, GEMM_SIZE).to(getattr(torch, name))
        gemm[name] = 2 * GEMM_SIZE**3 / best_seconds(partial(torch.mm, a, a), 1) / 1e9
    l2 = threads * l2_bytes()
    half, quarter = torch.randn(l2 // 8), torch.randn(l2 // 16)  # of 4 bytes each
    seconds = best_seconds(half.sum, 100) - best_seconds(quarter.sum, 100)
    return Limits(gemm, l2 / 4 / seconds / 1e9, l2)


def onnx_call(cell: str, case: common.Case, threads: int) -> Callable[[], list]:
    """The case's forward pass as one ONNX node, run by onnxruntime."""
    weight_ih, weight_hh, bias_ih, bias_hh = (
        torch.cat([p.detach().chunk(GATES[cell])[gate] for gate in ONNX_GATES[cell]])
        for p in case.module.parameters()
    )
    weights = {"W": weight_ih, "R": weight_hh, "B": torch.cat((bias_ih, bias_hh))}
    results = ["Y", "Y_h", "Y_c"][: 3 if cell == "LSTM" else 2]
    attributes = {"hidden_size": weight_hh.shape[1]}
    if cell == "GRU":  # torch's GRU, where r scales a product and not h
        attributes["linear_before_reset"] = 1
    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(cell, ["X", *weights], results, **attributes)],
        cell,
        [onnx.helper.make_tensor_value_info("X", float32, case.input.shape)],
        [onnx.helper.make_tensor_value_info(name, float32, None) for name in results],
        [onnx.numpy_helper.from_array(w.numpy()[None], name) for name, w in weights.items()],
    )
    opset = onnx.helper.make_opsetid("", 14)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {"X": case.input.numpy()}
    return lambda: session.run(results, feed)


def check_onnx(call: Callable[[], list], case: common.Case) -> None:
    """Raises AssertionError unless onnxruntime computes what torch.nn does."""
    for got, expected in zip(call(), case.values("no_grad"), strict=True):
        got = torch.from_numpy(got).reshape(expected.shape)
        # Far above roundings, which are not ours to judge; a wrong graph is far off.
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def what_ran(before: dict[str, int]) -> str:
    """What has computed fusedrnn's calls since `before`; "kernels" if nothing else has."""
    names = [name for name, count in fusedrnn.ops.counts.items() if count > before[name]]
    only_kernels = all(name.startswith("kernel") for name in names)
    return "kernels" if only_kernels else ", ".join(names)


def ratio(value: float) -> str:
    return f"{value:.2f}" + (" **slower**" if value < 1 else "")


def l2_share(row: Row, seconds: float, limits: Limits) -> str:
    """With B = 1, the rate at which weight_hh is read, each step and each step back, of the L2's.

    weight_ih is not in it: one read can serve many steps.
    """
    batch, steps, size = row.shape
    if batch > 1:
        return "-"
    weight_hh = GATES[row.cell] * size * size * getattr(torch, row.dtype).itemsize
    read = weight_hh * steps * (2 if row.mode == "training" else 1)
    beyond = " (beyond L2)" if weight_hh > limits.l2_bytes else ""
    return f"{read / seconds / 1e9 / limits.l2:.0%}{beyond}"


class Grid:
    """Times rows; keeps the ratios, and the messages of failed checks."""

    def __init__(self, rounds: int, limits: dict[int, Limits]) -> None:
        self.rounds, self.limits = rounds, limits
        self.failures: list[str] = []
        self.ratios: dict[tuple, list[tuple[float, str]]] = {}  # with the shape that has it

    def passes(self, row: Row, check: Callable, *arguments: object) -> bool:
        try:
            check(*arguments)
        except (RuntimeError, AssertionError) as error:
            self.failures.append(f"{row}: {str(error).splitlines()[0]}")
            return False
        return True

    def row(self, row: Row, cases: dict[str, common.Case], expected: list[torch.Tensor]) -> str:
        """The row of the table, checked and timed."""
        shape, mode = ", ".join(map(str, row.shape)), MODES[row.mode]
        columns = [shape, row.mode, str(row.threads)]
        if not self.passes(row, common.check_values, cases, mode, expected):
            return line([*columns, FAILED, *[""] * (COLUMNS.count("|") - 5)])
        calls: dict[str, Callable] = {name: case.call(mode) for name, case in cases.items()}
        before = dict(fusedrnn.ops.counts)
        with common.grad_mode(mode):
            timing = common.interleave(calls, self.rounds, ROW_SECONDS)
        ran = what_ran(before)
        key = (row.cell, row.dtype, row.mode, row.threads)
        self.ratios.setdefault((*key, "torch.nn"), []).append((timing.speedup(), shape))
        low, high = timing.quartiles
        columns += [f"{timing.ms(name):.3f}" for name in ("torch.nn", "fusedrnn")]
        columns += [ratio(timing.speedup()), f"{low:.2f} to {high:.2f}"]
        if (row.mode, row.dtype) != ("inference", "float32"):
            columns += ["-", "-"]
        elif not onnxruntime:
            columns += ["not installed", "-"]
        else:
            columns += self.onnx_columns(row, cases, (*key, "onnxruntime"), shape)
        limits, seconds = self.limits[row.threads], timing.ms("fusedrnn") / 1e3
        rate = row.gflop / seconds
        columns += [f"{rate:.1f}", f"{rate / limits.gemm[row.dtype]:.0%}"]
        columns += [l2_share(row, seconds, limits), ran, str(len(timing.rounds["fusedrnn"]))]
        return line(columns)

    def onnx_columns(
        self, row: Row, cases: dict[str, common.Case], key: tuple, shape: str
    ) -> list[str]:
        # In turns of its own: between its calls onnxruntime's threads go on spinning, and torch.nn
        # and fusedrnn would be timed on what cores that leaves.
        call = onnx_call(row.cell, cases["torch.nn"], row.threads)
        if not self.passes(row, check_onnx, call, cases["torch.nn"]):
            return [FAILED, "-"]
        calls = {"fusedrnn": cases["fusedrnn"].call(MODES[row.mode]), "onnxruntime": call}
        with common.grad_mode(MODES[row.mode]):
            timing = common.interleave(calls, self.rounds, ROW_SECONDS)
        speedup = timing.speedup("onnxruntime")
        self.ratios.setdefault(key, []).append((speedup, shape))
        return [f"{timing.ms('onnxruntime'):.3f}", ratio(speedup)]

    def means(self) -> list[str]:
        lines = [
            "| cell | dtype | mode | threads | over | mean ratio | lowest | at B, T, H | slower |",
            "|---|---|---|--:|---|--:|--:|---|--:|",
        ]
        for key, pairs in sorted(self.ratios.items()):
            values = [value for value, _ in pairs]
            lowest, shape = min(pairs)
            slower = f"{sum(value < 1 for value in values)} of {len(values)}"
            mean = f"{geometric_mean(values):.2f}"
            lines.append(line([*map(str, key), mean, ratio(lowest), shape, slower]))
        return lines


def line(columns: Sequence[str]) -> str:
    return f"| {' | '.join(columns)} |"


class Progress:
    """A line on stderr with the time left, by what the rows so far took of their estimates."""

    def __init__(self, rows: Sequence[Row], rounds: int, limits: dict[int, Limits]) -> None:
        self.estimates = []
        for row in rows:
            call = row.gflop / limits[row.threads].gemm[row.dtype]
            timed = 3 * rounds * max(call, common.ROUND_NS / 1e9)
            self.estimates.append(min(timed, max(ROW_SECONDS, 9 * call)) + 6 * call)
        self.done, self.start = 0, perf_counter()

    def step(self, row: Row) -> None:
        passed, total = sum(self.estimates[: self.done]), sum(self.estimates)
        scale = (perf_counter() - self.start) / passed if passed else 1
        left = datetime.timedelta(seconds=round((total - passed) * scale))
        self.done += 1
        text = f"{self.done}/{len(self.estimates)}, about {left} left: {row}"
        print(f"{text:<79}", end="\r", file=sys.stderr, flush=True)  # the next line covers it


def header(rounds: int, limits: dict[int, Limits]) -> str:
    runtime = f"onnxruntime {onnxruntime.__version__}" if onnxruntime else "no onnxruntime"
    rates = "\n".join(
        line([str(n), *(f"{limit.gemm[dtype]:.0f}" for dtype in DTYPES), f"{limit.l2:.0f}"])
        for n, limit in limits.items()
    )
    return f"""# fusedrnn over a grid of shapes on the CPU

- {common.machine()}, {runtime}; threads: {", ".join(map(str, limits))}
- {datetime.date.today()}, commit {common.commit()}, Python {sys.version.split()[0]}, load average \
at the start {os.getloadavg()[0]:.2f}
- one layer, input size = hidden size = H, T steps, batch B; medians of {rounds} rounds in which \
all take turns, in either order by turns, or of as many as fit {ROW_SECONDS:.0f} s
- training: forward, and backward from a random gradient of output to every weight, not to the input
- before its timing, each row was checked: fusedrnn against torch.nn in float64, onnxruntime \
against torch.nn
- ratio: how many times faster fusedrnn is; quartiles: of its ratio to torch.nn
- onnxruntime: in turns with fusedrnn alone, its weights laid out once before; on two threads \
either may find the other's idle thread still spinning on a core, so that ratio is rough
- of GEMM: fusedrnn's GFLOP/s, of torch.mm's in the row's dtype. 2 G H (I + H) B T operations, in \
training three times as many; it does 2.5 times, so there the true share is 5/6 of what is printed
- of L2, B = 1: the bytes of weight_hh, every step and every step back, per second, of the rate \
below. A weight_hh that stays in L1 can be read faster
- ran: what computed fusedrnn's calls, as its counters say

Limits: torch.mm, {GEMM_SIZE}^3, best of 10. L2: torch.sum of float32 in half of the L2 of all \
threads, less that in a quarter, so that the price of a call drops out; best of 10 times 100 calls.

| threads | {" | ".join(f"{dtype} GFLOP/s" for dtype in DTYPES)} | L2 GB/s |
|--:|--:|--:|--:|--:|
{rates}"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.TableParser("benchmarks.bench_grid", __doc__, rounds=None)
    parser.add_argument("--dtypes", type=common.list_of(DTYPES), default=list(DTYPES))
    parser.add_argument("--quick", action="store_true", help="few rounds, the first shapes")
    options = parser.options(arguments)
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    lines: list[str] = []

    def emit(*new: str) -> None:
        lines.extend(new)
        print(*new, sep="\n", flush=True)

    limits = {}
    for threads in options.threads:
        with common.threads(threads):
            limits[threads] = measure_limits(threads)
    emit(header(options.rounds, limits))
    shapes = FIRST_SHAPES if options.quick else SHAPES
    rows = [
        Row(*values)
        for values in itertools.product(
            options.cells, options.dtypes, shapes, options.threads, MODES
        )
    ]
    grid, progress = Grid(options.rounds, limits), Progress(rows, options.rounds, limits)
    for (cell, dtype), section in itertools.groupby(rows, lambda row: (row.cell, row.dtype)):
        emit("", f"## {cell}, {dtype}", "", COLUMNS, RULE)
        for (batch, steps, size), group in itertools.groupby(section, lambda row: row.shape):
            cases = common.make_cases(cell, batch, size, steps, getattr(torch, dtype), inner=False)
            expected = common.exact(cases["torch.nn"], MODES["training"])
            for row in group:
                progress.step(row)
                with common.threads(row.threads):
                    emit(grid.row(row, cases, expected))
    failures = [f"Failed checks: {len(grid.failures)}.", *(f"- {text}" for text in grid.failures)]
    emit("", "## Geometric means", "", *grid.means(), "", *failures)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")
    return 1 if grid.failures else 0


if __name__ == "__main__":
    sys.exit(main())
