"""Every instruction set that this machine has, each in a process of its own; and wrong choices."""

from pathlib import Path

import pytest
from helpers import python

import fusedrnn

TESTS = Path(__file__).parent


@pytest.mark.parametrize("isa", ["generic", "neon_bf16", "avx2", "avx512", "avx512_bf16", "amx"])
def test_the_kernel_tests_pass(isa):
    if isa == fusedrnn.isa():
        pytest.skip(f"{isa} is what this process runs: its tests are part of this run")
    probe = python("-c", "import fusedrnn; print(fusedrnn.isa())", FUSEDRNN_ISA=isa)
    if "this CPU lacks it" in probe.stderr or "is not known" in probe.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert probe.stdout.strip() == isa
    run = python(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
        *(str(TESTS / f"test_{n}.py") for n in ("sequence", "nonlinearities", "bf16_products")),
        FUSEDRNN_ISA=isa,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


def test_the_kernel_tests_pass_where_torch_has_no_dlpack_exchange():
    # As before torch 2.10: the bindings read tensors through their Python attributes.
    run = python(
        "-c",
        "import sys, pytest, torch; del torch.Tensor.__dlpack_c_exchange_api__; "
        "sys.exit(pytest.main(sys.argv[1:]))",
        "-q", "-x", "-p", "no:cacheprovider", "-k", "not bits", str(TESTS / "test_sequence.py"),
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


def test_an_unknown_isa_names_the_known_ones():
    run = python("-c", "import fusedrnn", FUSEDRNN_ISA="sse9")
    assert run.returncode != 0
    assert "RuntimeError: FUSEDRNN_ISA=sse9 is not known. Expected one of" in run.stderr
    assert "generic" in run.stderr


def test_a_missing_extension_says_what_to_type():
    run = python("-c", "import sys; sys.modules['fusedrnn._C'] = None; import fusedrnn")
    assert run.returncode != 0
    assert "RuntimeError: fusedrnn's compiled extension" in run.stderr
    assert "pip install ." in run.stderr
