"""Reading in a process of its own that may take little more memory than this one, or as much as it likes, and some seconds."""

import os
import resource
import signal
import traceback


def in_little_room(read, *arguments, memory: int | None = 1 << 30, seconds: int = 20) -> str:
    """What `read(*arguments)` gives, as text; or the message of its ValueError, or the traceback of any other error."""
    said, say = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if memory is not None:
                with open("/proc/self/statm") as statm:
                    room = int(statm.read().split()[0]) * resource.getpagesize() + memory
                resource.setrlimit(resource.RLIMIT_AS, (room, room))
            signal.alarm(seconds)
            try:
                text = f"read: {read(*arguments)}"
            except ValueError as error:
                text = str(error)
            except BaseException:  # noqa: BLE001 - it is told
                text = traceback.format_exc()
            os.write(say, text.encode("utf-8", "backslashreplace")[:50_000])
        finally:
            os._exit(0)
    os.close(say)
    with open(said, encoding="utf-8") as stream:
        text = stream.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return text or f"the process ended with {code}"
