"""The kernels among other threads and processes: called by several threads at once, in workers of
DataLoader, after a fork, inside an OpenMP region, on too few cores; and denormal numbers, whose
mode is a thread's.

What could hang runs in a child process or a thread that is given up on after a while.
"""

import ctypes
import functools
import multiprocessing
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from helpers import pair, ran
from layers import LAYER_CELLS, layer_inputs
from torch.utils.data import DataLoader, Dataset

from fusedrnn import functional, ops, reference

SIZE = (20, 8, 16, 128, 1)  # T, B, I, H, D: plan.h gives such a layer two threads, if it may
GIVE_UP = 30  # seconds; what is waited for takes a few at most


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def in_threads(*functions):
    """What each function returns, all run at once in threads of their own; fails on a hang."""
    results = [None] * len(functions)

    def work(i):
        try:
            results[i] = functions[i](), None
        except BaseException as error:
            results[i] = None, error

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    end = time.monotonic() + GIVE_UP
    for thread in threads:
        thread.join(end - time.monotonic())
        assert not thread.is_alive(), "a thread hangs"
    for _, error in results:
        if error is not None:
            raise error
    return [result for result, _ in results]


def in_process(method, function, give_up=GIVE_UP):
    """What function() returns in a child started by `method`; fails if it hangs, raises or dies."""
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=send_result, args=(sender, function), daemon=True)
    child.start()
    sender.close()
    try:
        assert receiver.poll(give_up), f"the child has not answered for {give_up} seconds"
        result, error = receiver.recv()
    finally:
        child.kill()
        child.join()
    assert error is None, error
    return result


def send_result(sender, function):
    try:
        sender.send((function(), None))
    except BaseException:
        sender.send((None, traceback.format_exc()))


def results_and_gradients(cell, inputs, grads):
    results = functional.layer(cell, *inputs)
    leaves = [inputs[0], *inputs[1], *inputs[2]]
    return [r.detach() for r in results] + list(torch.autograd.grad(results, leaves, grads))


def case(cell, size=SIZE, seed=0):
    """(cell, inputs of one layer, gradients of its results), float32."""
    inputs = layer_inputs(cell, *size, torch.float32, seed)
    with torch.no_grad():
        return cell, inputs, [torch.randn_like(r) for r in functional.layer(cell, *inputs)]


def same_bits(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def thread_ids():
    return set(os.listdir("/proc/self/task"))


def threads_started_by(call):
    """How many threads live during or right after call() that did not live before."""
    seen, done = set(), threading.Event()

    def watch():
        while not done.is_set():
            seen.update(thread_ids())
            time.sleep(0.001)

    before = thread_ids()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        call()
        seen.update(thread_ids())
    finally:
        done.set()
        watcher.join()
    return len(seen - before - {str(watcher.native_id)})


@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_this_files_layers_run_on_two_threads(cell):
    # Of the tests below, those that call from several threads or after a fork would pass trivially
    # if plan.h gave the layer one thread. An OpenMP thread is started by the first region that
    # needs it, and a new Python thread has none yet.
    cell, inputs, grads = case(cell)
    leaves = [inputs[0], *inputs[1], *inputs[2]]

    def forward_only():
        torch.set_num_threads(2)
        with torch.no_grad():
            return threads_started_by(lambda: functional.layer(cell, *inputs))

    def backward_only():
        torch.set_num_threads(1)
        started = []
        started.append(threads_started_by(lambda: started.append(functional.layer(cell, *inputs))))
        results, in_forward = started
        torch.set_num_threads(2)
        backward = lambda: torch.autograd.grad(results, leaves, grads)  # noqa: E731
        return in_forward, threads_started_by(backward)

    with ran("kernel_forward", "kernel_backward"):
        assert in_threads(forward_only) == [1]
        assert in_threads(backward_only) == [(0, 1)]


def test_four_threads_at_once_get_the_bits_of_serial_calls():
    cases = [case(cell, seed=seed) for seed, cell in enumerate(("lstm", "gru", "lstm", "gru"))]
    torch.set_num_threads(1)
    expected = [results_and_gradients(*c) for c in cases]
    together = threading.Barrier(len(cases))

    def calls(case):
        torch.set_num_threads(2)  # each thread has its own number
        together.wait(GIVE_UP)
        return [results_and_gradients(*case) for _ in range(10)]

    with ran("kernel_forward", "kernel_backward"):
        found = in_threads(*(lambda case=case: calls(case) for case in cases))
    for all_of_one, serial in zip(found, expected, strict=True):
        assert all(same_bits(one, serial) for one in all_of_one)


class Outputs(Dataset):
    """Item i: (module's output for inputs[i], kernel calls that this took, torch's threads)."""

    def __init__(self, module, inputs):
        self.module, self.inputs = module, inputs

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, i):
        before = ops.counts["kernel_forward"]
        with torch.no_grad():
            output = self.module(self.inputs[i])[0]
        return output, ops.counts["kernel_forward"] - before, torch.get_num_threads()


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_workers_of_a_data_loader(method):
    torch.set_num_threads(2)
    theirs, ours = pair("LSTM", 16, 128, num_layers=2)
    inputs = torch.randn(6, 20, 8, 16)
    with ran("kernel_forward"):
        expected = [item[0] for item in Outputs(ours, inputs)]
    loader = DataLoader(
        Outputs(ours, inputs),
        batch_size=None,
        num_workers=2,
        multiprocessing_context=method,
        timeout=GIVE_UP,
    )
    items = list(loader)
    assert len(items) == len(inputs)
    for (output, calls, threads), same, input in zip(items, expected, inputs, strict=True):
        assert (calls, threads) == (2, 1)
        assert torch.equal(output, same)
        torch.testing.assert_close(output, theirs(input)[0], rtol=5e-5, atol=5e-5)


# How a forked child whose parent has run kernels on two threads calls them itself.
AFTER_FORK = {
    "on two threads": lambda call: (torch.set_num_threads(2), call())[1],
    "on one thread": lambda call: (torch.set_num_threads(1), call())[1],
    "on two threads, from a new thread": lambda call: in_threads(
        lambda: (torch.set_num_threads(2), call())[1]
    )[0],
}


@pytest.mark.parametrize("how", AFTER_FORK)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_of_a_process_that_ran_kernels_on_two_threads(cell, how):
    torch.set_num_threads(2)
    same_case = case(cell)
    expected = results_and_gradients(*same_case)

    def child():
        with ran("kernel_forward", "kernel_backward"):
            found = AFTER_FORK[how](lambda: results_and_gradients(*same_case))
        torch.set_num_threads(1)  # torch's comparison of large tensors is parallel too
        return same_bits(found, expected)

    assert in_process("fork", child, give_up=5)
    assert same_bits(results_and_gradients(*same_case), expected)  # the parent goes on


def test_inside_an_openmp_region_a_call_starts_no_threads():
    # torch's operators run kernels, not Python, in their regions: so the region is entered through
    # ctypes. It may hold regions of its own, so that nothing but the kernel's will keeps it serial.
    with open("/proc/self/maps") as maps:
        gomp = ctypes.CDLL(re.search(r"/\S*libgomp\S*", maps.read()).group())
    body_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    def region(function):
        errors = []

        def body(_):
            try:
                function()
            except BaseException as error:
                errors.append(error)

        gomp.GOMP_parallel(body_type(body), None, 2, 0)
        if errors:
            raise errors[0]

    same_case = case("lstm", (1500, 8, 16, 128, 1))  # long enough to be watched
    torch.set_num_threads(1)
    expected = results_and_gradients(*same_case)
    found = {}

    def inside():
        if gomp.omp_get_thread_num() != 0:
            return
        call = lambda: found.update(results=results_and_gradients(*same_case))  # noqa: E731
        found["in a region"] = gomp.omp_in_parallel()
        found["by a region"] = threads_started_by(lambda: region(lambda: time.sleep(0.05)))
        found["by a call"] = threads_started_by(call)

    def outside():
        torch.set_num_threads(2)
        nested = gomp.omp_get_nested()
        gomp.omp_set_nested(1)
        try:
            region(inside)
        finally:
            gomp.omp_set_nested(nested)

    with ran("kernel_forward", "kernel_backward"):
        in_threads(outside)
    assert same_bits(found.pop("results"), expected)
    assert found == {"in a region": 1, "by a region": 1, "by a call": 0}


def used_seconds(cores):
    """The time that these cores have been in use since the machine was started."""
    with open("/proc/stat") as stat:
        lines = [line.split() for line in stat]
    times = [[int(n) for n in f[1:]] for f in lines if f[0] in {f"cpu{core}" for core in cores}]
    return sum(sum(t[:3]) + sum(t[5:8]) for t in times) / os.sysconf("SC_CLK_TCK")


def seconds_used_by(process_id):
    with open(f"/proc/{process_id}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def mean_times(cell, size, cores, settings, hog, rounds=5, seconds=0.15):
    """The mean time of a forward call on these cores in each of `settings`: the number of threads,
    and whether the process `hog`, stopped otherwise, may run. And how many of the cores others used
    meanwhile.

    The mean, since the scheduler's slices are longer than a call: most calls do not meet the other
    process at all, and those that do pay for them.
    """
    os.sched_setaffinity(0, cores)
    os.sched_setaffinity(hog, cores)
    cell, inputs, _ = case(cell, size)
    ours = (os.getpid(), hog)
    used, begin = used_seconds(cores) - sum(map(seconds_used_by, ours)), time.perf_counter()
    spent = {setting: [0, 0] for setting in settings}
    with torch.no_grad(), ran("kernel_forward"):
        for _ in range(rounds):
            for setting in settings:
                threads, busy = setting
                torch.set_num_threads(threads)
                os.kill(hog, signal.SIGCONT if busy else signal.SIGSTOP)
                functional.layer(cell, *inputs)
                start = time.perf_counter()
                while (now := time.perf_counter()) < start + seconds:
                    functional.layer(cell, *inputs)
                    spent[setting][1] += 1
                spent[setting][0] += now - start
    used = used_seconds(cores) - sum(map(seconds_used_by, ours)) - used
    others = used / (time.perf_counter() - begin)
    return {setting: total / calls for setting, (total, calls) in spent.items()}, others


LONGER = (100, *SIZE[1:])
CONTENDED = {  # cell, size, threads, cores, whether another process is busy
    "a busy process": ("lstm", LONGER, 2, 2, True),
    "64 threads on two cores": ("lstm", LONGER, 64, 2, False),
    "two threads on one core": ("gru", SIZE, 2, 1, False),
}


@pytest.mark.alone
@pytest.mark.parametrize("contended", CONTENDED)
def test_a_call_on_contended_cores_is_not_slower_than_its_share_of_them(contended):
    cell, size, threads, num_cores, busy = CONTENDED[contended]
    cores = sorted(os.sched_getaffinity(0))[:num_cores]
    if len(cores) < num_cores:
        pytest.skip(f"needs {num_cores} cores")
    settings = [(1, False), (threads, busy)]
    loop = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    for _ in range(2):
        hog = subprocess.Popen([sys.executable, "-c", loop])
        hog.send_signal(signal.SIGSTOP)
        # A process of its own: libgomp waits otherwise where other threads have used it.
        measure = functools.partial(mean_times, cell, size, cores, settings, hog.pid)
        try:
            times, others = in_process("spawn", measure)
        finally:
            hog.kill()
            hog.wait()
        if others < 0.1:
            break
    else:
        pytest.skip(f"other processes keep {others:.1f} of {num_cores} cores busy")
    print({setting: f"{1e3 * mean:.2f} ms" for setting, mean in times.items()})
    # In each case the call's share is one core or more, on which it takes the time of one thread.
    # Twice that is allowed, and half as much again since a call is shorter than the scheduler's
    # slices.
    assert times[threads, busy] <= 2 * 1.5 * times[1, False]


DECAY = 0.95  # of a state, from one step to the next
TINY = {torch.float32: 1e-40, torch.float64: 1e-310}  # denormal


def decaying(cell, dtype, H=128):
    """(input [100, 8, H], initial, weights) of a layer whose state decays, as data."""
    x, initial, weights = layer_inputs(cell, 100, 8, H, H, 1, dtype)
    with torch.no_grad():
        gates = weights[0].shape[0] // H
        weights[0].div_(H)
        weights[1].copy_(torch.full((gates * H, H), DECAY / H) if gates == 1 else weights[1] / H)
        weights[2].zero_()
        weights[3].zero_()
        if gates > 1:  # of the forget gate, or of z
            weights[2][H : 2 * H] = torch.logit(torch.tensor(DECAY))
        for state in initial:
            state.fill_(1)
    return x, initial, weights


def scale(tensors, factor):
    return [(t.detach().double() * factor).to(t.dtype) for t in tensors]


@pytest.mark.alone
@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_denormal_numbers_take_no_more_time(cell):
    torch.set_num_threads(1)
    x, initial, weights = decaying(cell, torch.float32)
    ones = [x.detach().clone(), *(s.detach().clone() for s in initial)]
    tiny = scale(ones[:1], TINY[torch.float32]) + scale(ones[1:], 5e-38)
    double = [t.detach().double() for t in (*tiny, *weights)]
    states = len(initial)
    exact = reference.scan(cell, double[0], tuple(double[1 : 1 + states]), double[1 + states :])
    smallest = torch.finfo(torch.float32).tiny
    assert (exact[0].abs() < smallest).double().mean() > 0.5
    assert (exact[0][-1].abs() > 1e-42).all()

    leaves = [x, *initial, *weights]
    grads = [torch.randn_like(r) for r in functional.layer(cell, x, initial, weights)]
    tiny_grads = scale(grads, TINY[torch.float32])
    used_grads = [torch.empty_like(g) for g in grads]

    def times(states, given):
        """Of forward and backward. In the same memory always: where it lies makes 20 percent."""
        with torch.no_grad():
            for to, source in zip([x, *initial], states, strict=True):
                to.copy_(source)
            for to, source in zip(used_grads, given, strict=True):
                to.copy_(source)
        start = time.perf_counter()
        results = functional.layer(cell, x, initial, weights)
        between = time.perf_counter()
        torch.autograd.grad(results, leaves, used_grads)
        return between - start, time.perf_counter() - between

    cases = {
        "normal": (ones, grads),
        "decaying state": (tiny, grads),
        "tiny gradients": (ones, tiny_grads),
        "both": (tiny, tiny_grads),
    }
    for _ in range(3):  # attempts: the machine may be busy with something else
        with ran("kernel_forward", "kernel_backward"):
            rounds = [{name: times(*c) for name, c in cases.items()} for _ in range(21)]
        medians = {
            name: [statistics.median(r[name][i] for r in rounds) for i in (0, 1)] for name in cases
        }
        ratios = {
            name: [t / n for t, n in zip(medians[name], medians["normal"], strict=True)]
            for name in cases
        }
        worst = max(map(max, ratios.values()))
        if worst <= 1.2:
            break
    print(cell, {name: [f"{r:.2f}" for r in both] for name, both in ratios.items()})
    assert worst <= 1.2, ratios


@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize("dtype", TINY, ids=str)
def test_denormal_numbers_are_zero_in_float32_on_every_thread_and_not_in_float64(cell, dtype):
    torch.set_num_threads(2)
    x, initial, weights = decaying(cell, dtype)
    tiny = TINY[dtype]
    with torch.no_grad():
        x.zero_()
        for state in initial:
            state.fill_(tiny)
    with ran("kernel_forward", "kernel_backward"):
        results = functional.layer(cell, x, initial, weights)
        grads = [torch.full_like(r, tiny) for r in results]
        (of_input,) = torch.autograd.grad(results, x, grads)
    # Rows or units, and the rows of the input's gradient, are split between the threads.
    for found in (*results, of_input):
        assert (found.abs() < torch.finfo(dtype).tiny).all()
        assert ((found == 0) == (dtype == torch.float32)).all()


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("dtype", TINY, ids=str)
def test_the_callers_mode_for_denormal_numbers_is_as_it_was(dtype, flush):
    cell, inputs, grads = case("gru")
    inputs = tuple(
        t.detach().to(dtype).requires_grad_()
        if isinstance(t, torch.Tensor)
        else tuple(u.detach().to(dtype).requires_grad_() for u in t)
        for t in inputs
    )
    grads = [g.to(dtype) for g in grads]
    one = torch.tensor([TINY[dtype]], dtype=dtype)
    many = one.expand(1 << 20).contiguous()  # torch computes these on two threads

    def calls():
        torch.set_num_threads(2)
        if not torch.set_flush_denormal(flush):
            pytest.skip("this CPU has no such mode")
        with ran("kernel_forward", "kernel_backward"):
            results_and_gradients(cell, inputs, grads)
        return (one * 1).item() == 0, (many * 1 == 0).double().mean().item()

    # A thread of its own: the mode is a thread's. The kernels' second thread is started while
    # `flush` is on, and starts with its starter's mode.
    flushed, share = in_threads(calls)[0]
    assert flushed is flush
    assert share == float(flush)


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_weights_replaced_during_a_call_live_until_it_ends(cell):
    # Megabytes of weights, so that the call takes milliseconds; without the reference that the
    # bindings hold, their memory is given back meanwhile.
    _, module = pair(cell, 8, 1500)
    module.requires_grad_(False)
    x = torch.randn(4, 1, 8)
    old = torch.nn.Parameter(module.weight_hh_l0.detach().clone(), requires_grad=False)
    module.weight_hh_l0 = old
    before = module(x)[0]
    for _ in range(5):
        module.weight_hh_l0 = torch.nn.Parameter(old.clone(), requires_grad=False)

        def replace():
            time.sleep(0.002)
            module.weight_hh_l0 = torch.nn.Parameter(torch.zeros_like(old), requires_grad=False)

        def call():
            with ran("kernel_forward"):
                return module(x)[0]

        result, _ = in_threads(call, replace)
        # A call that began too late saw zeros.
        assert torch.equal(result, before) or torch.equal(result, module(x)[0])


def page_faults(calls):
    # float16: 16 MB of weights as floats, and as much laid out for the tiles; no large result.
    layer = layer_inputs("lstm", 20, 8, 512, 512, 1, torch.float16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        with torch.no_grad(), ran("kernel_forward"):
            functional.layer("lstm", *layer)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts Linux's page faults")
def test_working_memory_is_kept_from_call_to_call():
    # In a process of its own, which has kept nothing of other tests.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        assert process.submit(page_faults, 2).result() >= 16  # of pages of 2 MB
        assert process.submit(page_faults, 20).result() <= 20
