"""The system-call filter of the programs: what a candidate process may not do.

Not to be confused with docker/seccomp.json, Docker's profile of the whole container: that one holds for the supervisor
and the judges, too, which need sockets and forks. A candidate has both filters; zygote.py sets this one after its fork.
Standard library only.
"""

import ctypes
import struct

# Numbers from the kernel's syscall tables (arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h).
# Each of them ends the process with SIGSYS, which the judge reads as `forbidden`.
FORBIDDEN: dict[str, dict[str, int]] = {
    "x86_64": dict(
        socket=41, connect=42, accept=43, sendmsg=46, bind=49, listen=50, fork=57, vfork=58,
        execve=59, ptrace=101, mount=165, umount2=166, pivot_root=155, chroot=161, swapon=167, reboot=169,
        sethostname=170,
        init_module=175, delete_module=176, add_key=248, request_key=249, keyctl=250, unshare=272, setns=308,
        perf_event_open=298, accept4=288, name_to_handle_at=303, open_by_handle_at=304, process_vm_readv=310,
        process_vm_writev=311, kcmp=312, finit_module=313, memfd_create=319, kexec_file_load=320, bpf=321, execveat=322,
        userfaultfd=323, io_uring_setup=425, io_uring_enter=426, io_uring_register=427, open_tree=428, move_mount=429,
        fsopen=430, fsconfig=431, fsmount=432, pidfd_open=434, pidfd_getfd=438, memfd_secret=447,
        shmget=29, shmat=30, shmctl=31, msgget=68, semget=64, mq_open=240, setuid=105, setgid=106, setreuid=113,
        setregid=114, setgroups=116, setresuid=117, setresgid=119, capset=126, personality=135, seccomp=317,
    ),
    "aarch64": dict(
        socket=198, connect=203, accept=202, sendmsg=211, bind=200, listen=201, execve=221,
        ptrace=117, mount=40, umount2=39, pivot_root=41, chroot=51, swapon=224, reboot=142, sethostname=161,
        init_module=105, delete_module=106, add_key=217, request_key=218, keyctl=219, unshare=97, setns=268,
        perf_event_open=241, accept4=242, name_to_handle_at=264, open_by_handle_at=265, process_vm_readv=270,
        process_vm_writev=271, kcmp=272, finit_module=273, memfd_create=279, kexec_file_load=294, bpf=280, execveat=281,
        userfaultfd=282, io_uring_setup=425, io_uring_enter=426, io_uring_register=427, open_tree=428, move_mount=429,
        fsopen=430, fsconfig=431, fsmount=432, pidfd_open=434, pidfd_getfd=438, memfd_secret=447,
        shmget=194, shmat=196, shmctl=195, msgget=186, semget=190, mq_open=180, setuid=146, setgid=144, setreuid=145,
        setregid=143, setgroups=159, setresuid=147, setresgid=149, capset=91, personality=92, seccomp=277,
    ),
}  # fmt: skip
CLONE = {"x86_64": 56, "aarch64": 220}
SOCKETPAIR = {"x86_64": 53, "aarch64": 199}
SENDTO = {"x86_64": 44, "aarch64": 206}
CLONE3 = 435  # same number everywhere
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE_THREAD = 0x00010000
AF_UNIX, SOCK_STREAM, SOCK_CLOEXEC_NONBLOCK = 1, 1, 0x80800
ALLOW, KILL, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050000 | 38  # SECCOMP_RET_ALLOW, _KILL_PROCESS, _ERRNO


def seccomp_filter(machine: str) -> bytes:
    """The candidate's classic BPF program (struct sock_filter[]), for prctl(PR_SET_SECCOMP); see seccomp(2).

    Threads are allowed (clone with CLONE_THREAD; clone3 hides its flags behind a pointer, so it answers ENOSYS and the
    C library falls back to clone). Raises KeyError on a machine whose numbers are not known: no filter, no candidate.
    """
    load, jump_eq, jump_ge, jump_set, ret, alu_and = 0x20, 0x15, 0x35, 0x45, 0x06, 0x54
    code: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4),  # seccomp_data.arch
        (jump_eq, 1, 0, AUDIT_ARCH[machine]),
        (ret, 0, 0, KILL),
        (load, 0, 0, 0),  # seccomp_data.nr
    ]
    if machine == "x86_64":
        code += [(jump_ge, 0, 1, 0x40000000), (ret, 0, 0, KILL)]  # the x32 calling convention
    for number in sorted(FORBIDDEN[machine].values()):
        code += [(jump_eq, 0, 1, number), (ret, 0, 0, KILL)]
    # A pair of connected stream sockets, with which asyncio wakes itself. It is as good as a pipe: it has no address,
    # and what could give it one, connect it or send descriptors through it is forbidden.
    code += [
        (jump_eq, 0, 7, SOCKETPAIR[machine]),
        (load, 0, 0, 16),  # domain
        (jump_eq, 0, 4, AF_UNIX),
        (load, 0, 0, 24),  # type
        (alu_and, 0, 0, 0xFFFFFFFF ^ SOCK_CLOEXEC_NONBLOCK),
        (jump_eq, 0, 1, SOCK_STREAM),
        (ret, 0, 0, ALLOW),
        (ret, 0, 0, KILL),
    ]
    # send(2) is sendto without an address: as good as write. With flags (MSG_OOB) or an address it is forbidden.
    code += [
        (jump_eq, 0, 10, SENDTO[machine]),
        (load, 0, 0, 40),  # flags
        (jump_eq, 0, 6, 0),
        (load, 0, 0, 48),  # address, low half
        (jump_eq, 0, 4, 0),
        (load, 0, 0, 52),  # high half
        (jump_eq, 0, 2, 0),
        (load, 0, 0, 56),  # its length
        (jump_eq, 1, 0, 0),
        (ret, 0, 0, KILL),
        (ret, 0, 0, ALLOW),
    ]
    code += [
        (jump_eq, 0, 1, CLONE3),
        (ret, 0, 0, ENOSYS),
        (jump_eq, 0, 3, CLONE[machine]),
        (load, 0, 0, 16),  # low half of the first argument: the flags
        (jump_set, 1, 0, CLONE_THREAD),
        (ret, 0, 0, KILL),
        (ret, 0, 0, ALLOW),
    ]
    return b"".join(struct.pack("HBBI", *line) for line in code)


class FilterProgram(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))
