"""Which protections are in force inside the container, as the supervisor and a candidate see them.

The supervisor runs `inspect_container`; a candidate of every slot runs `INSPECT_CANDIDATE` before the first sample.
Standard library only.
"""

import ctypes
import errno
import os
import stat
from typing import Any

from fractal.sandbox.inside import packages

CAPABILITIES = 1 << 5 | 1 << 6 | 1 << 7  # CAP_KILL, CAP_SETGID, CAP_SETUID: capability.h
PR_GET_NO_NEW_PRIVS = 39  # prctl.h
DOCKER_SOCKETS = ("/var/run/docker.sock", "/run/docker.sock")


def inspect_container() -> dict[str, dict[str, Any]]:
    """Each protection by name: whether it is in force, and what was found."""
    status = dict(line.split(":\t", 1) for line in _read("/proc/self/status").splitlines() if ":\t" in line)
    capabilities = int(status["CapEff"], 16) | int(status["CapBnd"], 16)
    networks = [line.split(":")[0].strip() for line in _read("/proc/net/dev").splitlines() if ":" in line]
    mounts = [line.split() for line in _read("/proc/self/mounts").splitlines()]
    scratch = [m for m in mounts if m[1].startswith("/scratch/")]
    weak = [m[1] for m in scratch if not {"noexec", "nosuid", "nodev"} <= set(m[3].split(","))]
    writable = [m[1] for m in mounts if "rw" in m[3].split(",") and m not in scratch and _open_to_all(m[1])]
    no_new_privs = ctypes.CDLL(None).prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
    sockets = [path for path in DOCKER_SOCKETS if os.path.exists(path)]
    memory, pids = _limit("memory", "memory.max", "memory.limit_in_bytes"), _limit("pids", "pids.max", "pids.max")
    protections = {
        "capabilities": (capabilities == CAPABILITIES, f"{capabilities:#x}, expected {CAPABILITIES:#x}"),
        "no_new_privs": (no_new_privs == 1, f"no_new_privs {no_new_privs}"),
        "seccomp": (status.get("Seccomp") == "2", f"mode {status.get('Seccomp')}, expected 2 (filter)"),
        "network": (networks in ([], ["lo"]), f"interfaces {networks}"),
        "read_only_root": (_read_only("/"), "whether a file can be made in /"),
        "scratch": (bool(scratch) and not weak, f"{len(scratch)} scratch file systems, weak: {weak}"),
        "writable": (not writable, f"writable beside scratch: {writable}"),
        "memory_limit": (memory is not None, f"{memory} bytes"),
        "pids_limit": (pids is not None, f"{pids} processes"),
        "docker_socket": (not sockets, f"found {sockets}"),
    }
    return {name: {"ok": ok, "found": text} for name, (ok, text) in protections.items()}


# A program of ours: what the process that runs programs may do, as that process sees it.
INSPECT_CANDIDATE = """
import ctypes, os, resource
def inspect():
    status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
    limits = {n: list(resource.getrlimit(getattr(resource, "RLIMIT_" + n)))
              for n in ("AS", "CPU", "FSIZE", "NOFILE", "NPROC", "CORE", "MEMLOCK")}
    descriptors = []
    for fd in range(64):
        try:
            os.fstat(fd)
            descriptors.append(fd)
        except OSError:
            pass
    return {"uids": sorted({*os.getresuid(), *os.getresgid()}), "groups": os.getgroups(), "limits": limits,
            "capabilities": [status.get("Cap" + n, "0" * 16) for n in ("Prm", "Eff", "Amb")],
            "no_new_privs": ctypes.CDLL(None).prctl(39, 0, 0, 0, 0), "seccomp": status.get("Seccomp"),
            "descriptors": descriptors, "folder": os.getcwd()}
"""


def candidate_protections(seen: Any, uid: int, limits: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each protection of a candidate by name, from what INSPECT_CANDIDATE returned."""
    if type(seen) is not dict or "uids" not in seen:
        return {"candidate": {"ok": False, "found": f"cannot be looked at: {seen}"}}
    most = {
        "AS": (limits["memory_mib"] << 20) + packages.installed().address_space,
        "CPU": int(limits["cpu_s"]) + 2,
        "FSIZE": limits["file_mib"] << 20,
    }
    most |= {"NOFILE": 64, "NPROC": 64, "CORE": 0, "MEMLOCK": 0}
    not_in_force = [n for n, highest in most.items() if not 0 <= seen["limits"].get(n, [-1, -1])[1] <= highest]
    capabilities = seen["capabilities"]  # permitted, effective, ambient; the bounding set is the container's
    checks = {
        "candidate_uid": (seen["uids"] == [uid] and seen.get("groups") == [], f"uid and gid {seen['uids']}"),
        "candidate_capabilities": (all(mask == "0" * 16 for mask in capabilities), f"{capabilities}"),
        "candidate_no_new_privs": (seen.get("no_new_privs") == 1, f"no_new_privs {seen.get('no_new_privs')}"),
        "candidate_seccomp": (seen.get("seccomp") == "2", f"mode {seen.get('seccomp')}, expected 2 (filter)"),
        "candidate_limits": (not not_in_force, f"limits not in force: {not_in_force}"),
        "candidate_descriptors": (seen["descriptors"] == [0, 1, 2, 3], f"open descriptors {seen['descriptors']}"),
        "candidate_folder": (seen["folder"].startswith("/scratch/"), f"in {seen['folder']!r}"),
    }
    return {name: {"ok": ok, "found": text} for name, (ok, text) in checks.items()}


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


def _read_only(folder: str) -> bool:
    """By trying, as root: not every runtime tells in the mount's flags."""
    path = os.path.join(folder, f".check-{os.getpid()}")
    try:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600))
    except OSError as error:
        return error.errno == errno.EROFS
    os.unlink(path)
    return False


def _open_to_all(path: str) -> bool:
    """A folder in which any uid may make files. Message queues stand there, too: RLIMIT_MSGQUEUE 0 closes those."""
    mode = os.stat(path).st_mode
    return stat.S_ISDIR(mode) and bool(mode & stat.S_IWOTH) and path != "/dev/mqueue"


def _limit(controller: str, v2: str, v1: str) -> int | None:
    """This container's cgroup limit, or None where there is none (or no file tells)."""
    for path in (f"/sys/fs/cgroup/{v2}", f"/sys/fs/cgroup/{controller}/{v1}"):
        try:
            text = _read(path).strip()
        except OSError:
            continue
        return int(text) if text.isdigit() and int(text) < 1 << 60 else None
    return None
