"""What goes on in a thread for as long as something else is done?"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def going_on(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run ``work`` beside the block, which waits for it at its end; the event says: that is now.

    The thread does not keep a process alive that ends in the midst of the block.
    """
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
