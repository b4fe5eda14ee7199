# ruff: noqa: E501
"""Programs that try to get out of the sandbox, to look out of it, or to use the machine up.

Each body of REACHES returns something true if it came through; `aim` says what there is to reach:
`file` and its `secret`, `folder`, `port`, `udp`, `socket`, `abstract`, `pid`, `key` of a System V
segment. Each of EXHAUSTS is a whole script that would go on for ever, or kill.
"""

from __future__ import annotations

_HEAD = """
import ctypes, mmap, os, resource, signal, socket, struct, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
def works(result):
    return result not in (-1, None)
"""
_TAIL = """
def attack(names, aim):
    came = {}
    for name in names:
        try:
            got = globals()[name](aim, aim["secret"], aim["file"], aim["folder"], aim["pid"])
        except BaseException:
            continue
        if got:
            came[name] = repr(got)[:200]
    return came
"""


def program_of(bodies: dict[str, str]) -> str:
    """One program that tries each body: `attack(names, aim)` tells what came through."""
    functions = [
        f"def {name}(aim, secret, file, folder, pid):\n    place = folder + '/planted'\n"
        + "".join(f"    {line}\n" for line in body.splitlines())
        for name, body in bodies.items()
    ]
    return "\n".join([_HEAD, *functions, _TAIL])


def _named(family: str, *bodies: str) -> dict[str, str]:
    return {f"{family}_{number}": body for number, body in enumerate(bodies, start=1)}


READS = _named(
    "read",
    "return open(file).read() == secret",
    "return os.read(os.open(file, os.O_RDONLY), 99).decode() == secret",
    "return os.listdir(folder)",
    "return [each.name for each in os.scandir(folder)]",
    "return open('/proc/self/root' + file).read() == secret",
    "return open('/proc/1/root' + file).read() == secret",
    "return open(f'/proc/{pid}/root' + file).read() == secret",
    "return open(f'/proc/{pid}/cwd/..' + file).read() == secret",
    "return open('/../../../..' + file).read() == secret",
    "return subprocess.run(['/bin/cat', file], capture_output=True).stdout.decode() == secret",
    "return os.popen('cat ' + file).read() == secret",
    "libc.fopen.restype = ctypes.c_void_p\nreturn libc.fopen(file.encode(), b'r')",
    "return mmap.mmap(os.open(file, os.O_RDONLY), 0, prot=mmap.PROT_READ)[:].decode() == secret",
    "up = os.open('/', os.O_RDONLY)\nreturn os.read(os.open('..' + file, 0, dir_fd=up), 9)",
    "return os.open(file, os.O_PATH)",
    "import linecache\nreturn linecache.getline(file, 1).strip() == secret",
    "import zipfile\nreturn zipfile.ZipFile(open(file, 'rb'), 'r')",
    "import importlib.machinery as m\n"
    "return m.SourceFileLoader('x', file).get_data(file).decode() == secret",
    "return os.stat(file).st_size",
    "return os.path.getsize('/etc/shadow') or os.path.getsize('/etc/passwd')",
    "return os.listdir('/home') or os.listdir('/root/.ssh')",
    "return [n for n in os.listdir('/proc') if n == str(pid)]",
    "return open(f'/proc/{pid}/environ', 'rb').read()",
    "return open(f'/proc/{pid}/mem', 'rb').read(1)",
    "return open(f'/proc/{pid}/maps').read()",
    "return os.readlink(f'/proc/{pid}/exe')",
    "return [os.pread(n, 9, 0) for n in range(3) if libc.lseek(n, 0, 1) == 0 and os.pread(n, 9, 0)]",
    "return set(os.environ) - {'LC_CTYPE', 'PWD'}",
    "return libc.getenv(b'PATH')",
    "return os.listdir('/sys/class') or os.listdir('/sys/kernel')",
    "return open('/dev/kmsg').read(1) or open('/dev/mem', 'rb').read(1)",
    "return libc.syscall(103, 3, ctypes.create_string_buffer(9), 8) > 0",
    "handle = ctypes.create_string_buffer(struct.pack('Ii', 128, 0) + bytes(128))\n"
    "return libc.syscall(303, -100, file.encode(), handle, ctypes.byref(ctypes.c_int()), 0) == 0",
)
WRITES = _named(
    "write",
    "return open(place, 'w').write('x')",
    "return os.write(os.open(place, os.O_CREAT | os.O_WRONLY), b'x')",
    "return os.mkdir(place) is None",
    "return os.symlink(file, place) is None",
    "return os.link(file, place) is None",
    "return os.mkfifo(place) is None",
    "return os.mknod(place, 0o600 | 0o020000, os.makedev(1, 3)) is None",
    "return os.rename(file, place) is None",
    "return os.unlink(file) is None",
    "return os.truncate(file, 0) is None",
    "return os.chmod(file, 0o777) is None",
    "return os.utime(file) is None",
    "return open('/tmp/packtrain-planted', 'w')",
    "return open('/dev/shm/packtrain-planted', 'w')",
    "return open('/var/tmp/packtrain-planted', 'w')",
    "return open('packtrain-planted', 'w')",
    "return open(os.__file__, 'a')",
    "return os.unlink(os.__file__) is None",
    "return open(os.path.dirname(os.__file__) + '/planted.py', 'w')",
    "return open('/etc/ld.so.preload', 'w')",
    "import sqlite3\nsqlite3.connect(place).execute('create table t (c)')\nreturn True",
    "import tempfile\nreturn tempfile.mkstemp()",
    "import shelve\nreturn shelve.open(place)",
    "return os.setxattr(file, 'user.x', b'x') is None",
    "import multiprocessing.shared_memory as m\nreturn m.SharedMemory(create=True, size=9)",
    "return open('/dev/sda', 'wb') or open('/dev/vda', 'wb')",
)
NETWORK = _named(
    "network",
    "return socket.create_connection(('127.0.0.1', aim['port']), 1)",
    "return socket.create_connection(('localhost', aim['port']), 1)",
    "return socket.create_connection(('::1', aim['port']), 1)",
    "return socket.create_connection(('::ffff:127.0.0.1', aim['port']), 1)",
    "return socket.create_connection(('0.0.0.0', aim['port']), 1)",
    "return socket.create_connection(('169.254.169.254', 80), 1)",
    "return socket.create_connection(('1.1.1.1', 53), 1)",
    "socket.socket(type=2).sendto(b'x', ('127.0.0.1', aim['udp']))",
    "socket.socket(type=2).sendto(b'x', 0x40, ('127.0.0.1', aim['udp']))",
    "return socket.socket(1).connect(aim['socket']) is None",
    "return socket.socket(1).connect('\\0' + aim['abstract']) is None",
    "return socket.socket(1, 2).sendto(b'x', aim['socket'])",
    "return socket.getaddrinfo('example.com', 80)",
    "return socket.socket(2, 3, 1)",
    "return socket.socket(17, 3)",
    "return socket.socket(40, 1).connect((2, 22)) is None",
    "import urllib.request as u\nreturn u.urlopen(f'http://127.0.0.1:{aim[\"port\"]}/', timeout=1)",
    "import http.client as h\nh.HTTPConnection('127.0.0.1', aim['port'], timeout=1).request('GET', '/')\n"
    "return True",
    "import asyncio\nreturn asyncio.run(asyncio.open_connection('127.0.0.1', aim['port']))",
    "import ftplib\nreturn ftplib.FTP().connect('127.0.0.1', aim['port'], 1)",
)
PROCESSES = _named(
    "process",
    "return os.kill(pid, 0) is None",
    "return os.kill(pid, signal.SIGUSR1) is None",
    "return os.killpg(os.getpgid(pid), 0) is None",
    "return os.pidfd_open(pid) if os.path.exists(f'/proc/{pid}') else None",
    "return libc.ptrace(16, pid, 0, 0) == 0",
    "return libc.ptrace(0x4206, pid, 0, 0) == 0",
    "space = ctypes.create_string_buffer(8)\nvector = (ctypes.c_void_p * 2)(ctypes.addressof(space), 8)\n"
    "return libc.process_vm_readv(pid, vector, 1, vector, 1, 0) > 0",
    "return os.setpriority(os.PRIO_PROCESS, pid, 19) is None",
    "return os.sched_setaffinity(pid, {0}) is None",
    "return resource.prlimit(pid, resource.RLIMIT_NOFILE)",
    "return resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))",
    "return works(libc.shmget(aim['key'], 0, 0))",
    "return works(libc.semget(aim['key'], 0, 0))",
    "return works(libc.msgget(aim['key'], 0))",
    "return libc.syscall(312, os.getpid(), pid, 0, 0, 0) == 0",
    "return libc.syscall(438, libc.syscall(434, pid, 0), 0, 0) >= 0",
)
PRIVILEGE = _named(
    "privilege",
    "return os.getuid() == 0 or os.geteuid() == 0",
    "return os.setuid(0) is None",
    "return os.seteuid(0) is None",
    "return os.setgid(0) is None or os.setresgid(0, 0, 0) is None",
    "return os.setgroups([0]) is None",
    "return libc.unshare(0x10000000) == 0",
    "return libc.unshare(0x00020000) == 0",
    "return libc.setns(os.open('/', 0), 0) == 0",
    "return libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0) > 0",
    "return libc.mount(b'none', b'/usr', b'tmpfs', 0, None) == 0",
    "return libc.mount(None, b'/', None, 32 | 4096, None) == 0",
    "return libc.umount2(b'/', 2) == 0",
    "return libc.chroot(b'/usr') == 0",
    "return libc.syscall(155, b'/', b'/') == 0",
    "return libc.syscall(321, 0, ctypes.create_string_buffer(72), 72) >= 0",
    "return libc.syscall(298, ctypes.create_string_buffer(120), 0, -1, -1, 0) >= 0",
    "return libc.syscall(425, 4, ctypes.create_string_buffer(120)) >= 0",
    "return libc.syscall(323, 0) >= 0",
    "return libc.syscall(248, b'user', b'k', b'v', 1, -3) >= 0",
    "return libc.syscall(250, 0, -3, 0, 0, 0) >= 0",
    "return libc.syscall(435, ctypes.create_string_buffer(88), 88) >= 0",
    "return socket.sethostname('x') is None",
    "import time\nreturn time.clock_settime(time.CLOCK_REALTIME, 0) is None",
    "return os.nice(-5)",
    "return resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40)) is None",
    "return resource.setrlimit(resource.RLIMIT_CPU, (9999, 9999)) is None",
    "return resource.setrlimit(resource.RLIMIT_NPROC, (9999, 9999)) is None",
    "return libc.syscall(175, b'', 0, b'') == 0",
    "return libc.syscall(246, 0, 0, 0, 0) == 0",
    "return libc.syscall(169, 0xfee1dead, 672274793, 0, 0) == 0",
    "return libc.syscall(167, b'/dev/null', 0) == 0",
    "return libc.syscall(163, b'/dev/null') == 0",
    "return subprocess.run(['/usr/bin/sudo', '-n', 'true']).returncode == 0",
    "return subprocess.run(['/bin/su', '-c', 'true']).returncode == 0",
    "import fcntl\nreturn fcntl.ioctl(0, 0x5412, b'x') == 0",
    "return libc.syscall(428, -100, b'/', 1) >= 0",
    "return libc.prctl(24, 21, 0, 0, 0) == 0",
)
REACHES = {
    "reads": READS,
    "writes": WRITES,
    "network": NETWORK,
    "processes": PROCESSES,
    "privilege": PRIVILEGE,
}
METADATA = {"read_15", "read_19", "read_20", "read_26"}
"""What Landlock, and so sandlock, does not hide: that a path is there, and how large it is."""

EXHAUSTS = {
    "fork-bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "fork-and-sleep": "import os, time\n"
    "for _ in range(50):\n    if os.fork() == 0: time.sleep(99); os._exit(0)",
    "thread-bomb": "import threading, time\n"
    "while True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "memory": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "memory-of-children": "import os\n"
    "for _ in range(6): os.fork()\nx = []\nwhile True: x.append(bytearray(1 << 24))",
    "mapped-memory": "import mmap\nx = [mmap.mmap(-1, 1 << 30) for _ in range(99)]",
    "memory-files": "import os\n"
    "x = [os.write(os.memfd_create('x'), bytes(1 << 24)) for _ in range(999)]\nprint(sum(x))",
    "endless-loop": "while True: pass",
    "endless-loop-in-c": "sum(iter(int, 1))",
    "big-power": "print(9 ** 9 ** 9 ** 9)",
    "slow-regex": "import re\nre.match('(a+)+$', 'a' * 64 + 'b')",
    "sleep": "import time\ntime.sleep(99)",
    "deaf-loop": "import signal\nfor n in range(1, 65):\n"
    "    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
    "while True: pass",
    "stop-itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "output-flood": "while True: print('x' * 65536)",
    "error-flood": "import sys\nwhile True: sys.stderr.write('x' * 65536)",
    "silent-daemon": "import os, time\n"
    "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(99)\n    os._exit(0)\n"
    "print(6)",
    "daemon-on-our-pipe": "import os, time\nprint(6, flush=True)\n"
    "if os.fork() == 0:\n    os.setsid()\n    while True: time.sleep(9)",
    "recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()",
    "crash": "import ctypes\nctypes.string_at(0)",
    "abort": "import os\nos.abort()",
    "deadlock": "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()",
    "waits-for-input": "import os\nr, w = os.pipe()\nos.read(r, 1)",
    "open-files": "x = []\nwhile True: x.append(open('/dev/null'))",
    "unpacked-bomb": "import zlib\n"
    "d = zlib.compress(bytes(1 << 24))\nx = []\nwhile True: x.append(zlib.decompress(d))",
    "syntax-bomb": "exec('(' * 100000 + ')' * 100000)",
    "broken-source": "def f(:\n",
    "kill-all": "import os, signal\nos.kill(-1, signal.SIGKILL)\nwhile True: pass",
}
