"""The CUDA kernel: equal to the CPU kernel in the simulator, assembled without spills, and compared on a real card."""

import re

import pytest
import torch

from pipelines.augment.op import augment
from pipelines.cuda.report import assemble
from tests.pipelines.view_cases import strong_batch
from tests.simulator import run_in_simulator

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")


def test_the_kernel_equals_the_cpu_kernel_in_the_simulator():
    views = [int(count) for count in run_in_simulator("tests.pipelines.simulated_views").split()]
    operations, plans, workspace, crops = views
    assert operations >= 2 * 2 * 150  # two sizes and two dtypes of 150 different rows of the table
    assert plans >= 2 * 3 * 48
    assert workspace >= 40
    assert crops >= 2 * 4 * 24


OUT = {False: ["b16", "u16"], True: ["b32", "f32"]}
MORE = [(32, True, True), (64, False, True), (33, False, True), (86, False, True), (128, True, False)]
MORE += [(224, False, False), (384, False, False), (384, True, False)]


@pytest.mark.parametrize("cc", [(8, 0), (9, 0)])
@pytest.mark.parametrize(
    ("side", "full", "shared"),
    [
        (32, False, True),
        (64, True, True),
        (128, False, False),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in MORE),
    ],
)
def test_the_kernel_is_assembled_without_spills(cc, side, full, shared):
    from pipelines.augment import kernel_cuda as augment_cuda

    kernel = augment_cuda.build(side, side, full, shared)
    report = assemble(kernel, augment_cuda.signature(full), cc, augment_cuda.launch_bounds(shared))
    assert (report.spill_stores, report.spill_loads, report.stack_bytes) == (0, 0, 0)
    images = 6 * side * side if shared else 0
    assert images + augment_cuda.STATIC_BYTES <= report.shared_bytes <= augment_cuda.SHARED_BYTES
    assert min(report.blocks_per_multiprocessor(augment_cuda.THREADS).values()) >= 3
    # In device memory nothing is written but the views, and with images too large for shared memory, those.
    stores = set(re.findall(r"\bst\.([\w.]+)", report.ptx)) - {"shared.b8", "shared.u8", "shared.b32", "shared.u32"}
    assert stores <= {f"global.{kind}" for kind in ([] if shared else ["b8", "u8"]) + OUT[full]}, stores
    # Whatever could be rounded once instead of twice, or be called instead of inlined, would be in the code.
    assert not re.findall(r"\b(?:fma|call)\b.*", report.ptx)
    products = re.findall(r"\bmul(?:\.rn)?\.f(?:32|64)\b", report.ptx)
    assert products


def test_sizes_choose_where_the_scratch_is():
    from pipelines.augment.kernel_cuda import SHARED_BYTES, STATIC_BYTES

    fits = [side for side in range(1, 200) if 6 * side * side + STATIC_BYTES <= SHARED_BYTES]
    assert fits[-1] == 86


def test_images_on_a_device_are_dispatched_to_its_kernel():
    """The fake: shapes, strides and devices without a card. Rows and plans belong on the CPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    images, *others = strong_batch(views=5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        stored = torch.empty(images.shape, dtype=torch.uint8, device="cuda")
        out = augment(stored, *others, torch.bfloat16, 1)
    assert (out.device.type, out.dtype, tuple(out.shape)) == ("cuda", torch.bfloat16, (5, 3, 16, 16))
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["strong", "strong_photo"])
@pytest.mark.parametrize("side", [16, 17, 32, 64, 96, 128, 224])
def test_a_card_makes_the_views_of_the_cpu(side, name, dtype):
    images, *others = strong_batch(side=side, views=700, name=name)
    expected = augment(images, *others, dtype, 2)
    stream = torch.cuda.Stream()
    stored = images.cuda()
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.default_stream())
        before = augment(stored, *others, dtype, 1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = augment(stored, *others, dtype, 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got.cpu(), expected)
    assert torch.equal(before, got)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_operator_is_an_ordinary_one_for_torch_on_a_card():
    images, *others = strong_batch(views=5)
    torch.library.opcheck(torch.ops.semi_fast.augment.default, (images.cuda(), *others, torch.bfloat16, 1))
