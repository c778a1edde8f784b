"""Memory for results on the CPU: what is let go serves again, what is held is nobody else's."""

import os
import resource
import threading

import pytest
import torch

from fused_resnet import native
from fused_resnet.bench import launches

pytestmark = pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))
ROOM = 256 << 20  # bytes that may lie idle


def image(channels, size=64, n=2, dtype=torch.float32):
    x = torch.empty(n, 3, 1, 1, dtype=dtype)
    return torch.ops.fused_resnet._image(x, (n, channels, size, size))


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("channels", [0, 1, 5, 64, 200])
def test_an_image_is_dense_in_channels_last_memory(channels, dtype):
    y = image(channels, dtype=dtype)
    like = torch.empty(2, channels, 64, 64, dtype=dtype, memory_format=torch.channels_last)
    assert (y.shape, y.dtype, y.is_contiguous(memory_format=torch.channels_last)) == (like.shape, dtype, True)
    assert channels == 0 or y.stride() == like.stride() and y.data_ptr() % 64 == 0
    torch.library.opcheck(torch.ops.fused_resnet._image.default, (y, (3, 7, 5, 4)),
                          test_utils=("test_schema", "test_faketensor"))


def test_what_is_let_go_serves_again_and_nothing_else_does():
    held = [image(200).fill_(i) for i in range(6)]
    starts = {y.data_ptr() >> 21 for y in held}
    assert len(starts) == 6
    view = held[3][1]
    del held[2:4]
    again = [image(198).fill_(9) for _ in range(3)]
    assert {y.data_ptr() >> 21 for y in again} & starts, "no block came back"
    assert all((y == i).all() for i, y in zip((0, 1, 4, 5), held)) and (view == 3).all(), "not ours alone"


def test_repeated_launches_touch_no_new_pages():
    def run():
        first = image(512)
        return image(300, n=4), first

    for _ in range(3):
        run()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        for y in run():
            y.fill_(1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 50, "20 times 36 MB are 9000 pages a time"


def test_only_so_much_lies_idle():
    held = [image(1200).fill_(1) for _ in range(11)]  # 39 MB each
    most = resident()
    assert sum(y.nbytes for y in held) > 1.6 * ROOM
    del held
    left = most - resident()
    assert left > 0.5 * ROOM, f"{left >> 20} MB went back"


def test_threads_do_not_share_what_they_hold():
    wrong = []

    def work(own):
        for i in range(200):
            y, z = image(40 + i % 3).fill_(own), image(20 + i % 7).fill_(own + 0.5)
            if not (y == own).all() or not (z == own + 0.5).all():
                wrong.append((own, i))

    threads = [threading.Thread(target=work, args=(own,)) for own in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_process_has_images_too():
    held = image(64).fill_(1)
    child = os.fork()
    if child == 0:
        other = image(64).fill_(2)
        os._exit(0 if (held == 1).all() and (other == 2).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and (held == 1).all()


def test_a_profile_counts_memory_as_no_launch():
    assert not launches.count(lambda: image(200))
