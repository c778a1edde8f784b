"""Work for a process of its own: light to import, for each test starts one anew."""

import os
import time


def rows(*found):
    yield from found


def fail():
    yield {"status": "ok", "n": 1}
    raise RuntimeError("out of\nluck")


def die(avoid=()):
    """Starts tiles 0, 1 and 2; tile 1 takes the process down."""
    for tile in range(3):
        mark = {"provider": "p", "tile": tile}
        if mark in avoid:
            continue
        yield {**mark, "status": "started"}
        if tile == 1:
            os._exit(7)
        yield {**mark, "status": "ok"}


def hang(seconds):
    yield {"status": "started", "tile": "deadlock"}
    time.sleep(seconds)


def process():
    yield {"status": "ok", "pid": os.getpid()}


class Device:
    """Stands in for torch in a process whose device has a fault."""

    def is_initialized(self):
        return True

    def synchronize(self):
        raise RuntimeError("illegal memory access")


def fault(avoid=()):
    """The way of tile 1 leaves a broken device behind, and reports an error of its own."""
    import sys
    import types

    for tile in range(3):
        mark = {"provider": "p", "tile": tile}
        if mark in avoid:
            continue
        yield {**mark, "status": "started"}
        if tile == 1:
            sys.modules["torch"] = types.SimpleNamespace(cuda=Device())
            yield {**mark, "status": "failed", "detail": "launch failed"}
        else:
            yield {**mark, "status": "ok"}
