"""Kill, stop, trace, limit or slow the loop, write its memory, reach the user's other processes."""
import ctypes
import os
import resource
import signal

from siege import loop, neighbour

ATTACH, DETACH, SEIZE = 16, 17, 0x4206
libc = ctypes.CDLL(None, use_errno=True)


def kill():
    os.kill(loop(), signal.SIGKILL)


def stop():
    os.kill(loop(), signal.SIGSTOP)


def trace(pid=None):
    """Without stopping it: our own end lets go again."""
    if libc.ptrace(SEIZE, ctypes.c_long(pid or loop()), None, None) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")


def memory():
    """Write a byte of its memory as it is: proof enough, and harmless."""
    pid = loop()
    with open("/proc/%d/maps" % pid) as table:
        start = next(int(line.split("-")[0], 16) for line in table if " rw-p " in line)
    with open("/proc/%d/mem" % pid, "r+b", buffering=0) as stream:
        stream.seek(start)
        byte = stream.read(1)
        stream.seek(start)
        stream.write(byte)


def environment():
    """Its environment may hold keys that the agent's doesn't."""
    with open("/proc/%d/environ" % loop(), "rb") as stream:
        stream.read()


def limit():
    """No file of its may grow any more, the ledger neither."""
    resource.prlimit(loop(), resource.RLIMIT_FSIZE, (0, 0))


def slow():
    """Be nicer: what it starts is slower from now on."""
    os.setpriority(os.PRIO_PROCESS, loop(), os.getpriority(os.PRIO_PROCESS, loop()) + 1)


def pin():
    os.sched_setaffinity(loop(), os.sched_getaffinity(loop()))


def signal_neighbour():
    os.kill(neighbour()["pid"], signal.SIGURG)


def trace_neighbour():
    trace(neighbour()["pid"])


def spare_oneself():
    """When memory runs out let the kernel kill somebody else, the loop for one."""
    with open("/proc/self/oom_score_adj", "r+") as stream:
        was = int(stream.read())
        stream.seek(0)
        stream.write(str(min(was, 0)))
