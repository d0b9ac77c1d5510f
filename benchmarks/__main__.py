"""The command line of the benchmark suite: `python -m benchmarks run`, `compare`, `plot`, `report`.
What runs and what is printed: suite.py, report.py, plots.py.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import bench_cuda, common, peers, plots, report, suite

SUITES = (*suite.SUITES, "cuda", "workloads")
FOLDER = Path(".benchmarks")  # of results, unless --out says otherwise
# The options of `run` that not every suite takes, and those that do.
TAKEN_BY = {
    **{name: suite.SUITES.keys() for name in ("dtype", "cells", "shapes", "rounds", "backends")},
    "threads": {*suite.SUITES, "workloads"},
    "quick": {"cuda", "workloads"},
    "names": {"workloads"},
}


def shape_list(text: str) -> list[suite.Shape]:
    shapes = []
    for item in text.split(","):
        sizes = [common.positive_int(number) for number in item.split("x")]
        if len(sizes) != 3:
            raise argparse.ArgumentTypeError(
                f"expected batch x steps x hidden size, as in 8x100x128, got {item!r}"
            )
        shapes.append((sizes[0], sizes[1], sizes[2]))
    return shapes


def results_file(text: str) -> dict[str, Any]:
    """A JSON file of `run`."""
    try:
        content = json.loads(Path(text).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise argparse.ArgumentTypeError(f"cannot read {text}: {reason}") from error
    if not isinstance(content, dict) or content.get("schema") != suite.SCHEMA:
        raise argparse.ArgumentTypeError(
            f"{text} is not a file of `python -m benchmarks run` (schema {suite.SCHEMA})"
        )
    return content


def make_parsers() -> tuple[common.Parser, dict[str, common.Parser]]:
    """The whole command line's, and each command's own."""
    parser = common.Parser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure a suite, into a JSON file")
    run.add_argument("--suite", choices=SUITES, default="quick")
    run.add_argument("--out", type=Path, help="the JSON file; of itself, in .benchmarks")
    run.add_argument("--threads", type=common.thread_list, help="1,2 of itself; workloads: one")
    run.add_argument("--dtype", type=common.list_of(suite.DTYPES), help="; ".join(suite.DTYPES))
    run.add_argument("--cells", type=common.list_of(common.CELLS), help="LSTM,GRU,RNN of itself")
    run.add_argument("--shapes", type=shape_list, help="BxTxH,... instead of the suite's")
    run.add_argument("--rounds", type=common.positive_int, help="in which each is timed once")
    run.add_argument(
        "--backends",
        type=common.list_of(list(peers.PEERS)),
        help="what is timed beside torch.nn; all of itself: " + ",".join(peers.PEERS),
    )
    run.add_argument("--quick", action="store_true", default=None, help="of cuda and workloads")
    run.add_argument("--names", type=common.list_of(list(suite.WORKLOADS)), help="of workloads")
    compare = commands.add_parser("compare", help="two JSON files, row by row")
    for name in ("A", "B"):
        compare.add_argument(name.lower(), metavar=name, type=results_file)
    plot = commands.add_parser("plot", help="heat maps and rooflines, PNG and SVG")
    plot.add_argument("file", metavar="FILE", type=Path)
    plot.add_argument("--out", type=Path, help="a folder; of itself, FILE's")
    text = commands.add_parser("report", help="a JSON file as markdown")
    text.add_argument("file", metavar="FILE", type=results_file)
    text.add_argument("--out", type=Path, help="a markdown file, instead of printing")
    return parser, commands.choices


def run(parser: common.Parser, options: argparse.Namespace) -> int:
    for name, takers in TAKEN_BY.items():
        if getattr(options, name) is not None and options.suite not in takers:
            parser.error(f"argument --{name}: --suite {options.suite} does not take it")
    parser.check_rounds(options.rounds)
    parser.require("rich")
    missing = peers.missing()
    for name in options.backends or ():
        if name in missing:
            parser.error(f"argument --backends: {name}: {missing[name]}")
    if options.suite == "workloads":
        parser.require("matplotlib")
        if len(options.threads or [1]) > 1:
            parser.error("argument --threads: --suite workloads takes one number")
    if options.suite == "cuda":
        reason = bench_cuda.unavailable()
        if reason:
            parser.error(f"--suite cuda: {reason}")
    now = datetime.datetime.now()
    path = options.out or FOLDER / f"{options.suite}-{now:%Y%m%d-%H%M%S}.json"
    parser.check_writable(path)
    usual = [common.cores()] if options.suite == "workloads" else [1, 2][: common.cores()]
    threads = options.threads or usual
    results = suite.Results(path, options.suite, threads)
    with suite.saved_when_interrupted(results) as outcome:
        if options.suite == "cuda":
            suite.run_cuda(results, bool(options.quick))
        elif options.suite == "workloads":
            arguments = ["--threads", str(threads[0])] + ["--quick"] * bool(options.quick)
            suite.run_workloads(results, options.names or list(suite.WORKLOADS), arguments)
        else:
            chosen = suite.SUITES[options.suite]
            todo = suite.rows(
                chosen,
                threads,
                options.dtype,
                options.cells or common.CELLS,
                options.shapes,
                options.rounds,
            )
            backends = options.backends or list(peers.PEERS)
            suite.run_rows(results, todo, backends, chosen.seconds)
    print("\n".join(report.summary(results.content)))
    print(f"\nResults: {path}; python -m benchmarks report {path}")
    return outcome["code"] or int(bool(results.failures))


def plot(parser: common.Parser, options: argparse.Namespace) -> int:
    parser.require("matplotlib")
    try:
        content = results_file(str(options.file))
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument FILE: {error}")
    folder = options.out or options.file.parent
    parser.check_writable(folder / "plot")
    paths = plots.plot(content, folder, options.file.stem)
    if not paths:
        parser.error(f"argument FILE: {options.file} has no timed row of a layer")
    print("\n".join(map(str, paths)))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    whole, commands = make_parsers()
    options = whole.parse_args(arguments)
    parser = commands[options.command]
    if options.command == "run":
        return run(parser, options)
    if options.command == "plot":
        return plot(parser, options)
    if options.command == "compare":
        print(report.compare(options.a, options.b), end="")
        return 0
    text = report.report(options.file)
    if options.out:
        parser.check_writable(options.out)
        common.write_whole(options.out, text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
