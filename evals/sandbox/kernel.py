"""Mechanisms of the Linux kernel that confine a process, one function each, through ctypes.

Runs inside the sandbox's processes, which have only the standard library. Each function raises OSError where its
mechanism is not available (another system, an old kernel, a container that forbids it).
"""

import ctypes
import os
import platform
import signal
import stat
import struct
from collections.abc import Iterable
from pathlib import Path

NEW_NAMESPACE = {"mount": 0x20000, "ipc": 0x8000000, "user": 0x10000000, "pid": 0x20000000, "net": 0x40000000}

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_MS_BIND, _MS_REC, _MS_PRIVATE, _MS_NOSUID, _MS_NODEV = 0x1000, 0x4000, 0x40000, 2, 4
_AT_RECURSIVE, _MOUNT_ATTR_RDONLY = 0x8000, 1
_CAPSET = {"x86_64": 126, "aarch64": 91}
# The same numbers on every architecture, as all calls added since 2018.
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446

# audit architecture, then system calls a short computation never makes: reaching the network, starting processes and
# threads, programs, signals to and memory of others, namespaces, kernel keys and log, and memory that no limit counts;
# what Landlock leaves open, modes, owners, times, attributes and watches of files; priorities and processors of other
# processes.
_DENIED = {
    "x86_64": (
        0xC000003E,
        "29 30 31 41 42 53 56 57 58 59 62 64 65 66 67 68 69 70 71 76 90 91 92 93 94 101 103 129 132 141 142 144 "
        "161 165 166 188 189 190 197 198 199 200 203 220 234 235 240 248 249 250 251 253 256 260 261 268 272 279 "
        "280 294 297 298 300 302 308 310 311 314 319 321 322 323 424 425 434 435 440 447 452 463 466",
    ),
    "aarch64": (
        0xC00000B7,
        "5 6 7 14 15 16 26 30 39 40 45 51 52 53 54 55 88 97 116 117 118 119 122 129 130 131 138 140 180 186 187 "
        "188 189 190 191 192 193 194 195 196 197 198 199 203 217 218 219 220 221 238 239 240 241 261 262 268 270 "
        "271 274 279 280 281 282 424 425 434 435 440 447 452 463 466",
    ),
}
# fcntl, and what of it is refused: signals of any kind to any process of the same user, by F_SETOWN, F_SETSIG and
# F_SETOWN_EX.
_FCNTL = {"x86_64": 72, "aarch64": 25}
_SIGNALLING = (8, 10, 15)


def _libc() -> ctypes.CDLL:
    if platform.system() != "Linux":
        raise OSError("only Linux has this")
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _syscall(number: int, *arguments: object) -> int:
    return _check(_libc().syscall(ctypes.c_long(number), *arguments))


def limit_processes(name: str, processes: int) -> Path:
    """Create a cgroup of at most this many processes below this process's own (cgroup v1 and v2); returns its folder.

    Works for root, or where the own cgroup is delegated. Raises OSError elsewhere.
    """
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers == "pids":
            parents = [Path("/sys/fs/cgroup/pids" + own)]
        elif not controllers:
            parents = [Path(root + own) for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")]
        else:
            continue
        for parent in parents:
            made = parent / name
            try:
                made.mkdir()
            except OSError:
                continue
            try:
                (made / "pids.max").write_text(str(processes))
                return made
            except OSError:
                made.rmdir()
    raise OSError("no cgroup of this process may limit processes")


def unshare(kind: str) -> None:
    """Enter a new namespace of `kind`; of "pid", only children do. Without privileges, "user" must come first."""
    user, group = os.getuid(), os.getgid()
    _check(_libc().unshare(NEW_NAMESPACE[kind]))
    if kind == "user":  # map only ourselves, so that our files stay ours
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str) -> None:
    encoded = kind.encode() if kind else None
    _check(_libc().mount(source.encode(), target.encode(), encoded, ctypes.c_ulong(flags), options.encode()))


def detach_mounts() -> None:
    """Keep later mounts invisible outside this mount namespace."""
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE, "")


def mount_memory(folder: str, size_bytes: int, user: int) -> None:
    """Mount a file system in memory, of limited size, at `folder`; it belongs to `user`."""
    options = f"size={size_bytes},nr_inodes=4096,mode=700,uid={user}"
    _mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, options)


def uncover(path: str, needed: str) -> None:
    """Let all users reach the folder `path` if a parent is closed to them, as /root is. Hides the rest of that parent.

    Raises OSError if that would hide `needed`.
    """
    target = Path(path).resolve()
    closed = next((above for above in reversed(target.parents) if not above.stat().st_mode & stat.S_IXOTH), None)
    if closed is None:
        return
    if Path(needed).is_relative_to(closed):
        raise OSError(f"{needed} is in {closed}")
    source = os.open(target, os.O_PATH | os.O_CLOEXEC)
    _mount("tmpfs", str(closed), "tmpfs", _MS_NOSUID | _MS_NODEV, "size=64k,mode=755")
    target.mkdir(parents=True)
    _mount(f"/proc/self/fd/{source}", str(target), None, _MS_BIND | _MS_REC, "")
    os.close(source)


def make_read_only(except_folder: str | None) -> None:
    """Make every mount read-only but the one at `except_folder` (Linux 5.12)."""
    for path, flags, set_, clear in (("/", _AT_RECURSIVE, 1, 0), (except_folder, 0, 0, _MOUNT_ATTR_RDONLY)):
        if path is not None:
            attributes = struct.pack("QQQQ", set_, clear, 0, 0)
            _syscall(_MOUNT_SETATTR, -100, path.encode(), flags, attributes, ctypes.c_size_t(len(attributes)))


def drop_capabilities() -> None:
    """Give up the rights of root, or of the first process of a user namespace; executing a program restores none."""
    libc = _libc()
    _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    header = struct.pack("Ii", 0x20080522, 0)
    number = _CAPSET.get(platform.machine())
    if number is not None:
        _syscall(number, header, bytes(24))


def deny_calls() -> None:
    """Install a seccomp filter: the calls in _DENIED, and those of fcntl that signal, fail with EPERM; the calls of a
    foreign instruction set kill."""
    machine = platform.machine()
    if machine not in _DENIED:
        raise OSError(f"no list of system calls for {machine}")
    architecture, listed = _DENIED[machine]
    numbers = [int(number) for number in listed.split()]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    kill, refuse, allow = 0x80000000, 0x00050001, 0x7FFF0000
    rules = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, 0)]
    tests = [(at_least, 0x40000000)]  # x32 calls would slip past the numbers
    tests += [(equal, number) for number in numbers]
    last = [(equal, 0, len(_SIGNALLING) + 1, _FCNTL[machine]), (load, 0, 0, 24)]  # the second argument's low half
    last += [(equal, len(_SIGNALLING) - place, 0, command) for place, command in enumerate(_SIGNALLING)]
    last += [(answer, 0, 0, allow), (answer, 0, 0, refuse)]
    ahead = len(tests) + len(last) - 2
    rules += [(kind, ahead - place, 0, value) for place, (kind, value) in enumerate(tests)]
    rules += last
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = struct.pack("HxxxxxxP", len(rules), ctypes.addressof(code))
    libc = _libc()
    _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _check(libc.prctl(_PR_SET_SECCOMP, 2, program, 0, 0))


def hide_memory() -> None:
    """Prevent processes of the same user from tracing this one and from opening its memory."""
    _check(_libc().prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))


def end_with_parent() -> None:
    """Have this process killed when its parent ends. A change of user undoes this."""
    _check(_libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


# Landlock's rights, by bit: 0 execute, 1 write and 2 read a file, 3 list a folder, 4 to 12 change a folder, and from
# later versions 13 link and rename between folders, 14 truncate, 15 control a device.
_READ, _READ_FILE, _WRITE_FILE = 0b1100, 0b0100, 0b0010 | 1 << 14
_CHANGE = 0b1_1111_1111_1110 | 1 << 13 | 1 << 14


def landlock(readable: Iterable[str], writable: str | None) -> None:
    """Allow reading below `readable` only, reading and changing below `writable`, and no executing (Linux 5.13).

    Later versions also refuse TCP (4), and signals and abstract sockets to processes outside (6).
    """
    version = _syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    handled = (1 << 13) - 1
    for right, since in ((13, 2), (14, 3), (15, 5)):
        handled |= (version >= since) << right
    attributes = struct.pack("QQQ", handled, 0b11, 0b11)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    try:
        for path in readable:
            _allow(ruleset, path, handled & (_READ if os.path.isdir(path) else _READ_FILE))
        _allow(ruleset, os.devnull, handled & (_READ_FILE | _WRITE_FILE))
        if writable is not None:
            _allow(ruleset, writable, handled & _CHANGE)
        _check(_libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        _syscall(_LANDLOCK_RESTRICT, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    target = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        _syscall(_LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", rights, target), 0)
    finally:
        os.close(target)
