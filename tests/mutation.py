"""Does the suite notice faults? Plants them in the kernels one by one and runs the tests that should fail.

``python -m tests.mutation`` copies the tree and checks that the named tests pass. Then it replaces one piece of text at a time
and runs that fault's tests in Triton's interpreter, in the cases that ``make test`` runs. It prints a table. The exit code is 1
where a fault survives, where its text is no longer in the source, or where the fault breaks the code, not its results.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.render import markdown_table

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Fault:
    """A piece of source text, its replacement, and the tests that must then fail.

    Attributes:
        name: the fault in words.
        path: the file, relative to the root.
        old: text that occurs in the file exactly once.
        new: the text that replaces ``old``.
        tests: pytest's names of the few tests that should fail.
    """

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]

    def planted(self, source: str) -> str:
        """Return ``source`` with the fault in place.

        Raises:
            ValueError: ``old`` does not occur in ``source`` exactly once.
        """
        count = source.count(self.old)
        if count != 1:
            raise ValueError(f"{self.path}: the text of {self.name!r} occurs {count} times")
        return source.replace(self.old, self.new)


_CONV = "tests/kernels/convolution/test_conv2d.py"
_POOL = "tests/kernels/pooling/test_max_pool2d.py"
_LINEAR = "tests/kernels/test_linear.py"
_NARROW = "tests/kernels/test_linear_narrow.py"
_SHARES = "tests/kernels/test_linear_descriptor.py::test_equal_shares"
_DESCRIPTOR = "tests/kernels/convolution/test_conv2d_descriptor.py"
_TF32 = "tests/kernels/convolution/test_conv2d_tf32.py"
_STREAM_K = "tests/kernels/convolution/test_stream_k_wgrad.py"
_TAPS = "tests/kernels/convolution/test_taps.py"
_ROWS = "tests/kernels/convolution/test_conv2d_rows.py"
_STEM_POOL = "tests/kernels/convolution/test_conv2d_stem_pool.py"

FAULTS = (
    Fault(
        "missing mask: columns right of the image are read from the next row",
        "kernels/convolution/general.py",
        "& (h < H) & (w >= 0) & (w < W)\n        if WIDE:",
        "& (h < H) & (w >= 0)\n        if WIDE:",
        (f"{_CONV}::test_forward_and_gradients",),
    ),
    Fault(
        "off by one in the padding, forward",
        "kernels/convolution/general.py",
        "o_w = o_m % Q * stride_w - pad_w",
        "o_w = o_m % Q * stride_w - pad_w + 1",
        (f"{_CONV}::test_forward_and_gradients",),
    ),
    Fault(
        "padding left out of the phase of a strided input gradient",
        "kernels/convolution/general.py",
        "phase_h = (h_first + pad_h) % STRIDE_H",
        "phase_h = h_first % STRIDE_H",
        (f"{_CONV}::test_forward_and_gradients",),
    ),
    Fault(
        "swapped strides of the output's gradient",
        "kernels/convolution/general.py",
        "o_z = o_n * stride_zn + o_p * stride_zp + o_q * stride_zq",
        "o_z = o_n * stride_zn + o_p * stride_zq + o_q * stride_zp",
        (f"{_CONV}::test_any_strides",),
    ),
    Fault(
        "unmasked store: filters past the last one",
        "kernels/convolution/general.py",
        "tl.store(p_y, cast(acc, y_ptr.dtype.element_ty), mask=m_m[:, None] & m_k[None, :])",
        "tl.store(p_y, cast(acc, y_ptr.dtype.element_ty), mask=m_m[:, None])",
        (f"{_CONV}::test_forward_and_gradients",),
    ),
    Fault(
        "wrong split bound: a split's last block is left out",
        "kernels/convolution/general.py",
        "for i_block in range(pid_split * blocks_per_split, (pid_split + 1) * blocks_per_split):\n        o_m =",
        "for i_block in range(pid_split * blocks_per_split, (pid_split + 1) * blocks_per_split - 1):\n        o_m =",
        (f"{_CONV}::test_any_split_of_the_reduction",),
    ),
    Fault(
        "dropped accumulate: only the last step of the reduction counts",
        "kernels/convolution/descriptor.py",
        "        acc = dot(b_w, b_x.T, acc, INPUT_PRECISION)",
        "        acc = dot(b_w, b_x.T, tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32), INPUT_PRECISION)",
        (f"{_DESCRIPTOR}::test_forward_and_gradients",),
    ),
    Fault(
        "a filter that is not flipped in the input gradient",
        "kernels/convolution/descriptor.py",
        "_load_filters(w_desc, R * S - 1 - rs if DGRAD else rs, c0, k0",
        "_load_filters(w_desc, rs, c0, k0",
        (f"{_DESCRIPTOR}::test_forward_and_gradients",),
    ),
    Fault(
        "off by one in the rows that a filter row's gradient leaves out",
        "kernels/convolution/descriptor_wgrad.py",
        "    p_low = tl.maximum(0, pad_h - r)\n",
        "    p_low = tl.maximum(0, pad_h - r + 1)\n",
        (f"{_DESCRIPTOR}::test_forward_and_gradients",),
    ),
    Fault(
        ">= for >: the last of equal maxima is taken",
        "kernels/pooling/kernels.py",
        "takes = (b_x > b_best) | (b_x != b_x)",
        "takes = (b_x >= b_best) | (b_x != b_x)",
        (f"{_POOL}::test_values_indices_and_gradient",),
    ),
    Fault(
        "missing NaN rule in the pool",
        "kernels/pooling/kernels.py",
        "takes = (b_x > b_best) | (b_x != b_x)",
        "takes = b_x > b_best",
        (f"{_POOL}::test_nan_infinity_and_signed_zero",),
    ),
    Fault(
        "missing NaN rule in the ReLU",
        "kernels/primitives.py",
        "return tl.where(x < 0, 0.0, x)",
        "return tl.where(x > 0, x, 0.0)",
        (f"{_CONV}::test_nan_and_infinity_propagate", f"{_LINEAR}::test_nan_propagates"),
    ),
    Fault(
        "< for <=: a gradient passes where the ReLU gave zero",
        "kernels/primitives.py",
        "return tl.where(output <= 0, 0.0, grad)",
        "return tl.where(output < 0, 0.0, grad)",
        (f"{_CONV}::test_forward_and_gradients", f"{_LINEAR}::test_forward_and_gradients"),
    ),
    Fault(
        "unmasked store of the pool's gradient",
        "kernels/pooling/kernels.py",
        "    tl.store(dx_ptr + o_e, cast(acc, dx_ptr.dtype.element_ty), mask=m_e)",
        "    tl.store(dx_ptr + o_e, cast(acc, dx_ptr.dtype.element_ty))",
        (f"{_POOL}::test_values_indices_and_gradient",),
    ),
    Fault(
        "positions of a window of more than 255 elements in one byte",
        "kernels/pooling/autograd.py",
        "return torch.uint8 if kernel_size[0] * kernel_size[1] <= 255 else torch.int32",
        "return torch.uint8",
        (f"{_POOL}::test_the_last_of_more_than_255_positions",),
    ),
    Fault(
        "dropped accumulate: the parts of a split product",
        "kernels/matmul_finish.py",
        "        acc += tl.load(part_ptr + o_e, mask=m_e, other=0.0)",
        "        acc = tl.load(part_ptr + o_e, mask=m_e, other=0.0)",
        (f"{_LINEAR}::test_through_descriptors",),
    ),
    Fault(
        "wrong split bound: the ragged last block of K is left out",
        "kernels/matmul.py",
        "    first = pid_split * blocks_per_split\n    last = tl.minimum(first + blocks_per_split, tl.cdiv(K, BLOCK_K))",
        "    first = pid_split * blocks_per_split\n    last = tl.minimum(first + blocks_per_split, K // BLOCK_K)",
        (f"{_LINEAR}::test_forward_and_gradients",),
    ),
    Fault(
        "few outputs: the ragged last block of features is left out",
        "kernels/linear_narrow.py",
        "tl.range(0, tl.cdiv(K, BLOCK_K), num_stages=STAGES)",
        "tl.range(0, K // BLOCK_K, num_stages=STAGES)",
        (f"{_NARROW}::test_forward_and_gradients",),
    ),
    Fault(
        "few outputs: the weight's gradient is of the last block of rows alone",
        "kernels/linear_narrow.py",
        "b_dw = dot(tl.trans(b_dz), b_x, b_dw, INPUT_PRECISION)",
        "b_dw = dot(tl.trans(b_dz), b_x, tl.zeros((BLOCK_N, BLOCK_K), dtype=ACC), INPUT_PRECISION)",
        (f"{_NARROW}::test_forward_and_gradients",),
    ),
    Fault(
        "few outputs: the gradient goes past the ReLU",
        "kernels/linear_narrow.py",
        "        RELU=output is not None,\n        DROPOUT=seed is not None,\n        INPUT",
        "        RELU=False,\n        DROPOUT=seed is not None,\n        INPUT",
        (f"{_NARROW}::test_forward_and_gradients", f"{_NARROW}::test_any_strides"),
    ),
    Fault(
        "a mean over all rows: ignored ones count",
        "kernels/loss_kernels.py",
        "        b_weight = tl.where(b_ignored, 0.0, b_weight)\n",
        "",
        ("tests/kernels/test_cross_entropy.py::test_options",),
    ),
    Fault(
        "a label that is no class is read as if it were one",
        "kernels/loss_kernels.py",
        "m_label = (b_label >= 0) & (b_label < C) & m_r",
        "m_label = (b_label >= 0) & m_r",
        ("tests/kernels/test_cross_entropy.py::test_a_label_that_is_no_class_makes_its_row_nan_and_no_other",),
    ),
    Fault(
        "the last of equal logits is the answer",
        "kernels/loss_kernels.py",
        "b_best = tl.where(b_top > b_max, b_here, b_best)",
        "b_best = tl.where(b_top >= b_max, b_here, b_best)",
        ("tests/kernels/test_cross_entropy.py::test_a_hit_is_where_argmax_is_the_label",),
    ),
    Fault(
        "the last part of a tile that shares cut is left out",
        "kernels/matmul_shares.py",
        "    for i in tl.static_range(1, PARTS):",
        "    for i in tl.static_range(1, PARTS - 1):",
        (_SHARES,),
    ),
    Fault(
        "the longer shares forgotten where a step's program is looked up",
        "kernels/matmul_shares.py",
        "step // (share + 1), (step - longer) // share)",
        "step // (share + 1), step // share)",
        (_SHARES,),
    ),
    Fault(
        "the part of the tile that a share begins in, where that of the tile it ends in belongs",
        "kernels/matmul_shares.py",
        "part = tl.where(low > 0, pid,",
        "part = tl.where(high < steps, pid,",
        (_SHARES,),
    ),
    Fault(
        "missing reset: a tile begins with the sum of the one before",
        "kernels/matmul_shares.py",
        "                acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)\n\n",
        "\n\n",
        (_SHARES,),
    ),
    Fault(
        "dropout takes a tile that no share cuts for a cut one",
        "kernels/matmul_shares.py",
        "acc = tl.where(is_cut, cast(acc, c_ptr.dtype.element_ty).to(tl.float32), whole)",
        "acc = cast(acc, c_ptr.dtype.element_ty).to(tl.float32)",
        ("tests/kernels/test_linear_descriptor.py::test_dropout_of_equal_shares",),
    ),
    Fault(
        "a seed used twice: every call draws the same mask",
        "kernels/dropouts.py",
        "return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)",
        "return torch.full((), 12345, dtype=torch.int64, device=device)",
        ("tests/kernels/test_dropout.py::test_calls_are_independent_and_manual_seed_governs_them",),
    ),
    Fault(
        "a counter used twice: a tensor's rows of 1024 share their random numbers",
        "kernels/primitives.py",
        "keep = tl.rand(seed, index) >= p",
        "keep = tl.rand(seed, index % 1024) >= p",
        ("tests/kernels/test_dropout.py::test_kernel_and_reference_draw_the_same_mask",),
    ),
    Fault(
        "<= for <: one part too many is added up",
        "kernels/sums.py",
        "mask = (o_part < SPLIT)[:, None] & m_e[None, :]",
        "mask = (o_part <= SPLIT)[:, None] & m_e[None, :]",
        (f"{_CONV}::test_any_split_of_the_reduction",),
    ),
    Fault(
        "off by one in the filter rows of the first layer's gradient",
        "kernels/convolution/stem.py",
        "o_f // BLOCK_M * 3 + o_r // STRIDE)",
        "o_f // BLOCK_M * 3 + (o_r + 1) // STRIDE)",
        ("tests/kernels/convolution/test_conv2d_stem_pool.py::test_gradients_are_exact_on_integers",),
    ),
    Fault(
        "unmasked store: folded columns past a filter row's last",
        "kernels/convolution/descriptor_wgrad.py",
        "    tl.store(p_out + o_c, acc, mask=m_k & (c0 + o_c < C) if FOLDED else m_k)",
        "    tl.store(p_out + o_c, acc, mask=m_k)",
        (f"{_TF32}::test_folded_columns",),
    ),
    Fault(
        "the second filter column's block of a folded one begins where the first does",
        "kernels/convolution/descriptor_wgrad.py",
        "acc2 = dot(b_z, load_images(x2_desc, h, n0, o_x + BLOCK_N, BY_BATCH), acc2, INPUT_PRECISION)",
        "acc2 = dot(b_z, load_images(x2_desc, h, n0, o_x, BY_BATCH), acc2, INPUT_PRECISION)",
        (f"{_TF32}::test_folded_columns",),
    ),
    Fault(
        "what is left of a filter row after whole chunks is left out",
        "kernels/convolution/taps.py",
        "    if REST > 0:",
        "    if REST > COLUMNS:",
        (f"{_TAPS}::test_values",),
    ),
    Fault(
        "a chunk of which a part meets the image is taken for one in the padding",
        "kernels/convolution/taps.py",
        "    low = tl.maximum(left - FIRST, 0) // BLOCK_K",
        "    low = tl.cdiv(tl.maximum(left - FIRST, 0), BLOCK_K)",
        (f"{_TAPS}::test_values",),
    ),
    Fault(
        "a share's last step is another program's too",
        "kernels/convolution/stream_k_wgrad.py",
        "high = tl.minimum(last - start, steps).to(tl.int32)",
        "high = tl.minimum(last + 1 - start, steps).to(tl.int32)",
        (f"{_STREAM_K}::test_values",),
    ),
    Fault(
        "the last part of a tile is not added",
        "kernels/convolution/stream_k_wgrad.py",
        "(start + steps - 1) // SHARE - start // SHARE + 1, 0)",
        "(start + steps - 1) // SHARE - start // SHARE, 0)",
        (f"{_STREAM_K}::test_values",),
    ),
    Fault(
        "a filter position that meets nothing has a part all the same",
        "kernels/convolution/stream_k_wgrad.py",
        "parts = tl.where(steps > 0, (start",
        "parts = tl.where(steps >= 0, (start",
        (f"{_STREAM_K}::test_values",),
    ),
    Fault(
        "the second block of columns begins where the first does",
        "kernels/convolution/stream_k_wgrad.py",
        "acc2 = dot(b_z, load_images(x2_desc, h, n0, o_x + BLOCK_N, BY_BATCH), acc2, INPUT_PRECISION)",
        "acc2 = dot(b_z, load_images(x2_desc, h, n0, o_x, BY_BATCH), acc2, INPUT_PRECISION)",
        (f"{_STREAM_K}::test_values",),
    ),
    Fault(
        "an image past the last in a copy with the batch innermost",
        "kernels/convolution/by_batch.py",
        "mask = (o_n < N)[:, None] & (o_c < channels)[None, :]",
        "mask = (o_n <= N)[:, None] & (o_c < channels)[None, :]",
        (f"{_TF32}::test_copies_of_ragged_batches",),
    ),
    Fault(
        "a tile that no program copies",
        "kernels/convolution/by_batch.py",
        "        for i in range(pid, copy_pixels[j] * blocks_n * blocks_c, programs):",
        "        for i in range(pid, copy_pixels[j] * blocks_n * blocks_c, programs + 1):",
        (f"{_TF32}::test_copies_of_ragged_batches",),
    ),
    Fault(
        "missing mask: columns right of the image are cells of the next row",
        "kernels/convolution/by_batch.py",
        "(h >= 0) & (h < H) & (w >= 0) & (w < W))[None, :]",
        "(h >= 0) & (h < H) & (w >= 0))[None, :]",
        (f"{_ROWS}::test_the_convolution_alone",),
    ),
    Fault(
        "a row's positions shifted the wrong way",
        "kernels/convolution/row_stem.py",
        "cdiv(before, 4) * 4, -before % 4, problem.s * problem.c)",
        "cdiv(before, 4) * 4, before % 4, problem.s * problem.c)",
        (f"{_ROWS}::test_the_convolution_alone",),
    ),
    Fault(
        "off by one in the filter rows above the image",
        "kernels/convolution/row_stem.py",
        "    r_low = tl.maximum(0, pad_h - p * STRIDE_H)\n",
        "    r_low = tl.maximum(0, pad_h - p * STRIDE_H + 1)\n",
        (f"{_ROWS}::test_the_convolution_alone",),
    ),
    Fault(
        "the wrong place of a pixel in the window on its left",
        "kernels/convolution/row_stem_wgrad.py",
        "below = _at(at_left, 5, left)",
        "below = _at(at_left, 4, left)",
        (f"{_STEM_POOL}::test_gradients_are_exact_on_integers",),
    ),
    Fault(
        "a window that the ReLU stops counted in the bias's gradient",
        "kernels/convolution/row_stem_wgrad.py",
        "total = tl.sum(tl.where(at_own == NO_GRADIENT, 0.0, own), axis=0)",
        "total = tl.sum(own, axis=0)",
        (f"{_STEM_POOL}::test_gradients_are_exact_on_integers",),
    ),
    Fault(
        "the wrong place of a pixel in the window above",
        "kernels/convolution/stem_pool_wgrad.py",
        "z_00 = left_8 + _passed(b_above, above, 6)",
        "z_00 = left_8 + _passed(b_above, above, 7)",
        (f"{_STEM_POOL}::test_gradients_are_exact_on_integers",),
    ),
    Fault(
        "what the windows on the left pass on is forgotten where a program begins",
        "kernels/convolution/stem_pool_wgrad.py",
        "left_5 = _passed(b_dy, b_position, 5)\n    #",
        "left_5 = _passed(b_dy, b_position, 9)\n    #",
        (f"{_STEM_POOL}::test_gradients_are_exact_on_integers",),
    ),
    Fault(
        "a row of windows follows the last one",
        "kernels/convolution/stem_pool_wgrad.py",
        "n0 += tl.where(i > P, BLOCK_K, 0)",
        "n0 += tl.where(i >= P, BLOCK_K, 0)",
        (f"{_STEM_POOL}::test_gradients_are_exact_on_integers",),
    ),
    Fault(
        "the odd columns' sums begin a cell too late",
        "kernels/convolution/stem_pool_wgrad.py",
        "p_part + (3 * FOLD - DEPTH) * K + o_out, odd",
        "p_part + 3 * FOLD * K + o_out, odd",
        (f"{_STEM_POOL}::test_gradients_are_exact_on_integers",),
    ),
    Fault(
        "an image that is not there: the index one past the last",
        "kernels/images.py",
        "inside = (i_d >= 0) & (i_d < D)",
        "inside = (i_d >= 0) & (i_d <= D)",
        ("tests/kernels/test_images.py::test_an_index_outside_is_an_image_of_nan_and_touches_no_memory",),
    ),
    Fault(
        "a window's last row is followed by the image's next one, not by itself",
        "kernels/images.py",
        "tl.minimum(y0 + 1, height - 1)",
        "tl.minimum(y0 + 1, H - 1)",
        ("tests/kernels/test_images.py::test_windows_are_torchvisions",),
    ),
    Fault(
        "the padding in cells is an edge that goes on, not zero",
        "kernels/images.py",
        "    b_out = tl.where(m_image, b_out, 0.0)\n",
        "",
        ("tests/kernels/test_images.py::test_cells_are_those_of_the_images_bit_for_bit",),
    ),
    Fault(
        "rows and columns swapped within a cell",
        "kernels/images.py",
        "    o_x = o_p // CELL % COLUMNS * STRIDE + o_p % STRIDE - PAD_W\n",
        "    o_x = o_p // CELL % COLUMNS * STRIDE + o_p // STRIDE % STRIDE - PAD_W\n",
        ("tests/kernels/test_images.py::test_cells_are_those_of_the_images_bit_for_bit",),
    ),
    Fault(
        "a network takes cells that were made for another padding",
        "alexnet_triton/runs.py",
        "    if reads is None or reads.pairs() != given.pairs():\n",
        "    if reads is None:\n",
        ("tests/alexnet_triton/test_cells.py::test_other_cells_and_layers_that_read_none_are_refused",),
    ),
    Fault(
        "a mask one element too long in the optimizer",
        "kernels/sgd.py",
        "o < size - start, lr",
        "o <= size - start, lr",
        ("tests/kernels/test_sgd.py::test_float32_is_torch_sgd_bit_for_bit",),
    ),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a fault's tests.

    Attributes:
        verdict: ``"caught"``, ``"SURVIVED"`` or ``"BROKEN"`` (no test could run, or the faulty source is not valid code).
        by: the first test that failed, and why.
    """

    verdict: str
    by: str


#: Exit codes of pytest: all tests passed; some tests failed.
_PASSED, _FAILED = 0, 1
#: Errors of code that cannot run at all: such a fault shows nothing about the suite.
_MEANINGLESS = re.compile(r"\b(NameError|SyntaxError|AttributeError|ImportError|IndentationError)\b")


def judge(returncode: int, output: str) -> Outcome:
    """The outcome of a run of pytest with ``-rf`` on a planted fault."""
    if returncode == _PASSED:
        return Outcome("SURVIVED", "")
    found = re.search(r"^FAILED (\S*/)?(\S+?) - (.*)$", output, re.MULTILINE)
    if returncode != _FAILED or found is None:
        return Outcome("BROKEN", (output.strip().splitlines() or ["no output"])[-1])
    _, test, reason = found.groups()
    return Outcome("BROKEN" if _MEANINGLESS.search(reason) else "caught", f"{test}: {reason}")


def run_tests(tree: Path, tests: tuple[str, ...], stop_at_first: bool = True) -> Outcome:
    """Run ``tests`` of the copy at ``tree`` in the interpreter, even where there is a GPU: the guard checks every address."""
    # No bytecode files: their time stamps cannot tell apart two versions written within one second.
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"COLUMNS": "1000"}  # pytest cuts off the reason of a failure at the terminal's width
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-rf", "-p", "no:cacheprovider", "-m", "not slow", *tests]
    if stop_at_first:
        command.append("-x")
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    return judge(result.returncode, result.stdout + result.stderr)


def copy_tree(target: Path) -> None:
    """Copy what the tests need to ``target``, without build and result files."""
    for name in ("kernels", "alexnet_triton", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", target)


def check_fault(tree: Path, fault: Fault) -> Outcome:
    """Plant ``fault`` in the copy at ``tree``, run its tests, restore the source."""
    path = tree / fault.path
    source = path.read_text(encoding="utf-8")
    try:
        path.write_text(fault.planted(source), encoding="utf-8")
    except ValueError as error:
        return Outcome("BROKEN", str(error))
    try:
        return run_tests(tree, fault.tests)
    finally:
        path.write_text(source, encoding="utf-8")


def main() -> None:
    """Check every fault; the exit code is 1 unless each is caught."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="also write the table to this file, as Markdown")
    parser.add_argument("words", nargs="*", help="check only faults whose name or file contains one of these words")
    arguments = parser.parse_args()
    faults = [f for f in FAULTS if not arguments.words or any(w in f.name + f.path for w in arguments.words)]
    if not faults:
        sys.exit(f"mutation: no fault's name or file contains {' or '.join(arguments.words)}")
    console = Console()
    table = Table("fault", "file", "verdict", "caught by", title=f"{len(faults)} faults")
    rows, bad = [], []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        sound = run_tests(tree, tuple(dict.fromkeys(test for fault in faults for test in fault.tests)))
        if sound.verdict != "SURVIVED":  # without a fault there is nothing to catch
            sys.exit(f"mutation: the tests fail without a fault: {sound.by}")
        for fault in faults:
            outcome = check_fault(tree, fault)
            bad += [fault.name] * (outcome.verdict != "caught")
            rows.append((fault.name, fault.path, outcome.verdict, outcome.by))
            table.add_row(*rows[-1])
            print(f"{outcome.verdict:8}  {fault.name}", flush=True)
    console.print(table)
    caught = len(faults) - len(bad)
    if arguments.out is not None:
        head = f"# Planted faults\n\n`python -m tests.mutation`: {caught} of {len(faults)} caught.\n\n"
        arguments.out.write_text(
            head + markdown_table(("fault", "file", "verdict", "caught by"), rows) + "\n", encoding="utf-8"
        )
    print(f"{caught} of {len(faults)} faults caught in {time.perf_counter() - start:.0f} s")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
