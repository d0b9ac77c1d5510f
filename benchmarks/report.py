"""`python -m benchmarks report` and `compare`: markdown made of the JSON files of `run`, and of
nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from statistics import geometric_mean
from typing import Any

from . import bench_cuda, common, suite
from .suite import Mean, ratio

Content = dict[str, Any]
NOTES = """\
- one layer, input size = hidden size = H, T steps, batch B; T = 1: a cell. Times are medians of the
  rounds in which a peer and fusedrnn take turns, in either order by turns
- training: forward, and backward from a random gradient of the output to every weight; for a cell
  to its input and state as well
- before its timing each row was checked against torch.nn in float64
- ratio: how many times faster fusedrnn is; quartiles: of its ratio to torch.nn. loop: the cells in
  plain torch operations (fusedrnn/reference.py). onnxruntime has its weights laid out once before,
  and its threads are told to stop spinning between its calls
- of torch.mm: of its GFLOP/s in the row's dtype, counting the products only
- of L2, B = 1: the bytes of weight_hh, every step and every step back, per second, of what
  torch.sum reads there. A weight_hh that stays in L1 can be read faster
- ran: what computed fusedrnn's calls, as its counters say
- rounds, crowded: in which the threads had not got a core each; such a round is waited out for a
  while. The host of a virtual machine may run two of its CPUs on one core"""
MEMORY_NOTES = """\
saved: the storages that forward keeps for backward, without parameters, input and states. peak: by
how much one pass forward and backward raises the memory in use at most; on the CPU the process's
resident memory, scratch memory and what malloc wastes included. ratio: torch.nn's to fusedrnn's."""
PEERS = {"loop": "loop ms", "torch.compile": "torch.compile ms", "onnxruntime": "onnxruntime ms"}


def line(columns: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, columns))} |"


def table(titles: Sequence[str], text_columns: int, lines: Sequence[Sequence[object]]) -> list[str]:
    """Markdown; the first `text_columns` are aligned to the left, the others to the right."""
    rule = "|---" * text_columns + "|--:" * (len(titles) - text_columns) + "|"
    return [line(titles), rule, *map(line, lines)]


def shape_of(row: Content) -> str:
    return f"{row['batch']}, {row['steps']}, {row['size']}"


def by_dtype_and_cell(content: Content) -> dict[tuple[str, str], list[Content]]:
    found: dict[tuple[str, str], list[Content]] = {}
    for row in content["rows"]:
        found.setdefault((row["dtype"], row["cell"]), []).append(row)
    return found


def row_columns(row: Content, columns: int) -> list[str]:
    start = [shape_of(row), row["mode"], row["threads"] or "-"]
    if "failed" in row:
        return [*start, f"**failed: {row['failed']}**", *[""] * (columns - len(start) - 1)]
    theirs = row["peers"]["torch.nn"]
    low, high = theirs.get("quartiles", (None, None))
    found = [*start, f"{theirs['ms']:.3f}", f"{theirs['fusedrnn_ms']:.3f}", ratio(theirs["ratio"])]
    found.append("-" if low is None else f"{low:.2f} to {high:.2f}")
    for name in PEERS:
        peer = row["peers"].get(name, {})
        if "failed" in peer:
            found.append("**check failed**")
        elif "ratio" in peer:
            found.append(f"{peer['ms']:.3f} ({ratio(peer['ratio'])})")
        else:
            found.append("-")
    rates = "gflops" in row
    found += [f"{row['gflops']:.1f}", f"{row['of_gemm']:.0%}"] if rates else ["-", "-"]
    beyond = " (beyond L2)" if row.get("beyond_l2") else ""
    found.append(f"{row['of_l2']:.0%}{beyond}" if "of_l2" in row else "-")
    ran = row["ran"] if row["ran"].startswith("kernels") else f"**{row['ran']}**"
    crowded = f" ({theirs['crowded']} crowded)" if theirs.get("crowded") else ""
    return [*found, ran, f"{theirs['rounds']}{crowded}"]


def row_tables(content: Content) -> list[str]:
    titles = ["B, T, H", "mode", "threads", "torch.nn ms", "fusedrnn ms", "ratio", "quartiles"]
    titles += [f"{title} (ratio)" for title in PEERS.values()]
    titles += ["GFLOP/s", "of torch.mm", "of L2", "ran", "rounds"]
    lines = []
    for (dtype, cell), rows in by_dtype_and_cell(content).items():
        lines += ["", f"## {cell}, {dtype}", ""]
        lines += table(titles, 2, [row_columns(row, len(titles)) for row in rows])
    return lines


def memory_table(content: Content) -> list[str]:
    """Of the training rows; on one number of threads, as it hardly depends on them."""
    names = ("torch.nn", "fusedrnn")
    rows = [row for row in content["rows"] if row.get("memory")]
    rows = [row for row in rows if row["threads"] == rows[0]["threads"]]
    if not rows:
        return []
    lines = []
    for row in rows:
        columns = [row["cell"], row["dtype"], shape_of(row)]
        for kind in ("saved_bytes", "peak_bytes"):
            theirs, ours = (row["memory"][name][kind] for name in names)
            if theirs is None or ours is None:
                columns += ["not measured"] * 2 + ["-"]
                continue
            columns += [f"{theirs / 1024:.0f}", f"{ours / 1024:.0f}"]
            columns.append(memory_ratio(theirs, ours))
        lines.append(columns)
    titles = ["cell", "dtype", "B, T, H"]
    for kind in ("saved", "peak"):
        titles += [f"{kind} KiB, torch.nn", "fusedrnn", "ratio"]
    return [
        "",
        "## Memory of training",
        "",
        *MEMORY_NOTES.split("\n"),
        "",
        *table(titles, 3, lines),
    ]


def memory_ratio(theirs: int, ours: int) -> str:
    if not theirs or not ours:
        return "-"
    return f"{theirs / ours:.2f}" + (" **more**" if ours > theirs else "")


def means_table(content: Content) -> list[str]:
    """Over the shapes; beside a mean, in how many of them fusedrnn is slower."""
    means = suite.means(content)
    names = [name for name in PEERS if any(key[-1] == name for key in means)]
    lines = []
    for (*what, name), mean in means.items():
        if name == "torch.nn":
            others = [means.get((*what, other)) for other in names]
            columns = [*(part or "-" for part in what), mean_of(mean)]
            columns += [f"{ratio(mean.lowest[0])} at {mean.lowest[1]}"]
            lines.append(columns + ["-" if each is None else mean_of(each) for each in others])
    titles = ["cell", "dtype", "mode", "threads", "over torch.nn", "lowest", *names]
    return ["", "## Geometric means", "", *table(titles, 4, lines)] if lines else []


def mean_of(mean: Mean) -> str:
    return f"{ratio(mean.value)} ({mean.losses} of {len(mean.ratios)} slower)"


def losses(content: Content) -> list[str]:
    """Every row and every workload's training in which fusedrnn is slower than a peer."""
    found = [
        f"- {suite.name_of(row)}: {peer['ratio']:.2f} of {name}"
        for row in content["rows"]
        for name, peer in row["peers"].items()
        if peer.get("ratio", 1) < 1
    ]
    found += [
        f"- {record['name']} {training['title']}: {training['speedup']:.2f} of torch.nn"
        for record in content["workloads"]
        for training in record.get("trainings", ())
        if (training["speedup"] or 1) < 1
    ]
    return ["", f"Rows in which fusedrnn is slower: {len(found)}.", *found]


def not_kernels(content: Content) -> list[str]:
    found = [
        f"- {suite.name_of(row)}: {row['ran']}"
        for row in content["rows"]
        if not row.get("ran", "kernels").startswith("kernels")
    ]
    return ["", f"Rows that not the kernels alone computed: {len(found)}.", *found]


def missing(content: Content) -> list[str]:
    """Peers that no row has, and those that single rows have not, by reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in content["rows"]:
        for name, peer in row["peers"].items():
            if "missing" in peer:
                reasons.setdefault((name, peer["missing"]), []).append(suite.name_of(row))
    found = [f"- {name}, in every row: {why}" for name, why in content["missing"].items()]
    found += [
        f"- {name}, in every row: left out (--backends)" for name in content.get("left_out", ())
    ]
    found += [
        f"- {name}, in {len(names)} of {len(content['rows'])} rows, the first {names[0]}: {why}"
        for (name, why), names in reasons.items()
    ]
    return ["", f"Peers that are missing: {len(found)}.", *found]


def numbers(content: Content, dtype: str) -> list[str]:
    """README's table: layers over torch.nn, the numbers of threads beside each other."""
    found = {
        (row["cell"], row["mode"], shape_of(row), row["threads"]): row["peers"]["torch.nn"]["ratio"]
        for row in content["rows"]
        if (row["dtype"], row["threads"] is None) == (dtype, False)
        and row["steps"] > 1
        and "failed" not in row
    }
    measured = dict.fromkeys(key[2] for key in found)
    usual = [", ".join(map(str, shape)) for shape in suite.SHAPES]
    shapes = [s for s in usual if s in measured] or list(measured)
    lines = []
    for shape in shapes:
        columns = [shape]
        for mode, cell in itertools.product(suite.MODES, common.CELLS):
            values = [found.get((cell, mode, shape, n)) for n in content["environment"]["threads"]]
            columns.append(" / ".join("-" if v is None else bold_loss(v) for v in values))
        lines.append(columns)
    if not lines:
        return []
    threads = " / ".join(map(str, content["environment"]["threads"]))
    head = f"Threads: {threads}. The first three columns are inference, the others training."
    title = f"## Over torch.nn, {dtype}"
    return ["", title, "", head, "", *table(["B, T, H", *common.CELLS * 2], 1, lines)]


def bold_loss(value: float) -> str:
    return f"**{value:.2f}**" if value < 1 else f"{value:.2f}"


def workload_tables(content: Content) -> list[str]:
    trainings, measures, totals = [], [], []
    for record in content["workloads"]:
        if "failed" in record:
            totals.append([record["name"], f"**failed: {record['failed']}**"])
            continue
        totals.append([record["name"], f"{record['seconds']:.0f}"])
        for training in record["trainings"]:
            line = [record["name"], training["title"]]
            for times in (training["step_ms"], training["seconds"]):
                both = [times.get(name) for name in common.IMPLEMENTATIONS]
                line += ["-" if t is None else f"{t:.1f}" for t in both]
                line.append("-" if None in both else ratio(both[0] / both[1]))
            trainings.append(line)
        for measure in record["measures"]:
            reached = measure["reached"] or {}
            for name, value in measure["values"].items():
                verdict = {True: "reached", False: "**not reached**", None: "-"}[reached.get(name)]
                threshold = measure["threshold"] or "-"
                number = "NaN" if value is None else f"{value:.4f}"
                measures.append([record["name"], measure["name"], name, number, threshold, verdict])
    if not totals:
        return []
    quick = any(record.get("quick") for record in content["workloads"])
    titles = ["workload", "training", "ms a step, torch.nn", "fusedrnn", "ratio"]
    titles += ["seconds in all, torch.nn", "fusedrnn", "ratio"]
    return [
        "",
        "## Workloads" + " with --quick, which trains less than a threshold may take" * quick,
        "",
        *table(titles, 2, trainings),
        "",
        *table(["workload", "measure", "backend", "value", "threshold", ""], 3, measures),
        "",
        *table(["workload", "seconds from start to end"], 1, totals),
    ]


def cuda_lines(content: Content) -> list[str]:
    if "cuda" not in content:
        return []
    found = content["cuda"]
    lines = ["", "## The GPU", ""]
    lines += [f"- {name}: {value}" for name, value in found["machine"].items()]
    lines.append("- times are the GPU's alone, on the path that fusedrnn chooses")
    lines += ["", f"Lost or not reached: {len(found['lost'] + found['not reached'])}."]
    lines += [f"- {text}" for text in found["lost"] + found["not reached"]]
    lines += ["", "## Limits of the GPU", "", *bench_cuda.limit_lines(found["limits"])]
    return [*lines, *packed_table(found["packed"])]


def packed_table(entries: Sequence[Content]) -> list[str]:
    """bench_cuda's packed lines: on either path, whatever fusedrnn chooses."""
    modes = {name: mode for mode, name in suite.MODES.items()}
    paths = ("step", "block")
    lines = []
    for entry in entries:
        shape = entry.get("shape", bench_cuda.PACKED)  # the first files do not have it
        columns = [entry["cell"], entry["number"], ", ".join(map(str, shape))]
        columns += [modes[entry["mode"]], f"{entry['device_ms'][bench_cuda.THEIRS]:.3f}"]
        columns += [bench_cuda.ratio(entry, path, "device_ms") for path in paths]
        lines.append(columns)
    titles = ["cell", "dtype", "B, T, H", "mode", "torch.nn ms", *(f"{p} ms" for p in paths)]
    head = ["", "## Packed sequences of lengths even from 1 to T", ""]
    return [*head, *table(titles, 4, lines)] if lines else []


def incomplete(content: Content) -> list[str]:
    done = len(content["rows"]) + len(content["workloads"])
    total = content["expected_rows"]
    return [] if content["complete"] else ["", f"**INCOMPLETE: {done} of {total} rows.**"]


def summary(content: Content) -> list[str]:
    """What `run` ends with: means, losses, and what is wrong or missing."""
    failures = suite.failures(content)
    lines = [*means_table(content), *losses(content), *not_kernels(content), *missing(content)]
    return [*lines, "", f"Failed: {len(failures)}.", *(f"- {text}" for text in failures)]


def report(content: Content) -> str:
    lines = [f"# fusedrnn's benchmark suite: {content['suite']}", *incomplete(content), ""]
    lines += [*suite.start_lines(content), *NOTES.split("\n"), *cuda_lines(content)]
    for dtype in dict.fromkeys(row["dtype"] for row in content["rows"]):
        lines += numbers(content, dtype)
    lines += [*row_tables(content), *memory_table(content)]
    lines += [*workload_tables(content), *summary(content)]
    return "\n".join(lines) + "\n"


# Two files ----------------------------------------------------------------------------------------


def differences(a: Content, b: Content) -> list[str]:
    """What of the machines and programs is not the same."""
    names = ("cpu", "cores", "isa", "limited", "gpu", "threads", "torch", "python")
    pairs = ((name, *(c["environment"].get(name) for c in (a, b))) for name in names)
    return [f"{name} {one} and {two}" for name, one, two in pairs if one != two]


def timed(content: Content) -> dict[str, dict[str, float]]:
    """fusedrnn's time and its ratio to torch.nn, by row; and of a workload's trainings."""
    found = {
        suite.name_of(row): {
            "ms": row["peers"]["torch.nn"]["fusedrnn_ms"],
            "ratio": row["peers"]["torch.nn"]["ratio"],
        }
        for row in content["rows"]
        if "failed" not in row
    }
    for record in content["workloads"]:
        for training in record.get("trainings", ()):
            if training["speedup"] is None:
                continue
            name = f"{record['name']} {training['title']}".strip() + ", a step"
            speedup = {"ms": training["step_ms"]["fusedrnn"], "ratio": training["speedup"]}
            found[name] = speedup
    return found


def compare(a: Content, b: Content) -> str:
    """A line for each row of both; above 1, B is faster."""
    lines = []
    different = differences(a, b)
    if different:
        lines += [f"WARNING: not the same machine or program: {'; '.join(different)}", ""]
    for name, content in (("A", a), ("B", b)):
        machine = content["environment"]
        text = f"{name}: commit {machine['commit']}, {machine['date']}"
        text += "; INCOMPLETE" * (not content["complete"])
        noisy = any(noise["noisy"] for noise in content["noise"].values())
        lines.append(text + "; BUSY OR NOISY MACHINE" * noisy)
    one, two = timed(a), timed(b)
    common_rows = [name for name in one if name in two]
    columns = []
    for name in common_rows:
        times = one[name]["ms"] / two[name]["ms"]
        speedups = two[name]["ratio"] / one[name]["ratio"]
        columns.append(
            [
                name,
                f"{one[name]['ms']:.3f}",
                f"{two[name]['ms']:.3f}",
                ratio(times),
                f"{one[name]['ratio']:.2f}",
                f"{two[name]['ratio']:.2f}",
                ratio(speedups),
            ]
        )
    titles = ["row", "fusedrnn ms, A", "B", "A / B", "over torch.nn, A", "B", "B / A"]
    lines += ["", *table(titles, 1, columns)] if columns else []
    if common_rows:
        times = geometric_mean(one[name]["ms"] / two[name]["ms"] for name in common_rows)
        speedups = geometric_mean(two[name]["ratio"] / one[name]["ratio"] for name in common_rows)
        lines += [
            "",
            f"Geometric means of {len(common_rows)} rows, above 1 where B is faster: "
            f"time {times:.3f}, ratio to torch.nn {speedups:.3f}.",
        ]
    else:
        lines += ["", "No row is in both files."]
    for title, first, second in (("A", one, two), ("B", two, one)):
        only = [name for name in first if name not in second]
        lines += ["", f"Only in {title}: {len(only)}.", *(f"- {name}" for name in only)] * bool(
            only
        )
    return "\n".join(lines) + "\n"
