"""Machines of one machine: three, each with network, processes, files and an SSH server of its own, for `ray up`.

`python -m tests.clusters.machines up` (Linux, as root) leaves them running and says what is next; `down` ends them and
deletes their files. They share this kernel, Python and installed packages, and the folder ~/yan/runs, as by NFS: `up`
keeps what is in it.
"""

import hashlib
import json
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import yaml

from yan_core.files import write_commit

ROOT = Path(__file__).parents[2]
NETWORK = "10.77.0"
NAMES = ("head", "worker-1", "worker-2")
ADDRESSES = {name: f"{NETWORK}.{11 + i}" for i, name in enumerate(NAMES)}
BRIDGE = "yan-net"
NETWORKS = Path("/sys/class/net")
MACHINE = """set -e
hostname {name}
mount --bind {home}/hosts /etc/hosts
mount --bind {home}/resolv.conf /etc/resolv.conf
mount -t tmpfs -o size=16g tmpfs /dev/shm
mkdir -p {home}/yan/runs /run/sshd
mount --bind {shared} {home}/yan/runs
{keep}
mount --rbind {home} {root}
mount --rbind {root}/.tmp /tmp
exec $(command -v sshd || echo /usr/sbin/sshd) -D -e -f {root}/.sshd/config
"""
SSHD = """ListenAddress {address}
HostKey {root}/.sshd/host_key
PidFile none
AuthorizedKeysFile {root}/.ssh/authorized_keys
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
Subsystem sftp internal-sftp
"""
PROGRAMS = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "rsync": "rsync",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}
"""What is called, and Debian's package of it."""
# The requirements are there already, and no network leads to more; Ray notices soon that a node is gone.
ENVIRONMENT = """export PIP_NO_INDEX=1 PIP_NO_BUILD_ISOLATION=0 PIP_DISABLE_PIP_VERSION_CHECK=1
export RAY_USAGE_STATS_ENABLED=0
export RAY_health_check_initial_delay_ms=2000 RAY_health_check_period_ms=1000
export RAY_health_check_timeout_ms=3000 RAY_health_check_failure_threshold=5 RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.5
"""


def missing() -> str:
    """Why machines cannot be made here; empty: they can."""
    if os.getuid() != 0:
        return "network namespaces want root"
    for program, package in PROGRAMS.items():
        if not shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin"):
            return f"{program} is not installed: apt-get install {package}"
    if subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], capture_output=True).returncode:
        return "the kernel allows no network namespaces here"
    return ""


def packages() -> Path:
    """Where those of this Python are, links followed."""
    return next(Path(sys.prefix).glob("lib/python*/site-packages")).resolve()


def call(*command: str, check: bool = True) -> None:
    subprocess.run(command, check=check, capture_output=not check)


def _ended(pid: str) -> bool:
    """Whether a process, and every other one of its namespace if it is the first of one, is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _running(folder: Path) -> dict[int, list[str]]:
    """The first processes of a folder's machines, each with its children."""
    pids = folder / "pids.json"
    found: dict[int, list[str]] = {}
    for pid in json.loads(pids.read_text()).values() if pids.is_file() else []:
        try:
            if b"unshare" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found[pid] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            continue
    return found


class Machines:
    """The machines: `folder` has what a person needs of them, `homes` their own files; `user_home` is the person's.

    The homes are not in the checkout: `ray up` reads every file of it for a hash, and they hold sockets.
    """

    def __init__(self, folder: Path, user_home: Path) -> None:
        self.folder, self.user_home = folder.resolve(), user_home
        self.root = Path(pwd.getpwuid(os.getuid()).pw_dir)
        self.homes = user_home / ".yan/machines"
        self.shared, self.key = self.folder / "shared", self.folder / "key"
        self.file, self.serve_file = self.folder / "cluster.yaml", self.shared / "serve.yaml"

    # --- on and off ---------------------------------------------------------------------------------------------------

    def up(self) -> None:
        """Start them; what an earlier call left is ended first, and what its machines shared stays.

        Raises:
            RuntimeError: If machines of another folder run: they would lose their network.
        """
        self._refuse_others()
        self._end()
        shutil.rmtree(self.homes, ignore_errors=True)
        for left in self.folder.glob("*"):
            if left.is_dir() and left != self.shared:
                shutil.rmtree(left)
            elif left != self.shared:
                left.unlink()
        self.shared.mkdir(parents=True, exist_ok=True)
        self._write_secrets()
        call("ip", "link", "add", BRIDGE, "type", "bridge")
        call("ip", "link", "set", BRIDGE, "alias", str(self.folder))
        call("ip", "address", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
        call("ip", "link", "set", BRIDGE, "up")
        pids = {name: self._start(name) for name in NAMES}
        (self.folder / "pids.json").write_text(json.dumps(pids))
        self._write_configs()
        write_commit()  # `ray up` copies the code without its history

    def down(self) -> None:
        """End them with every process in them, and delete all their files: those that they share too.

        Raises:
            RuntimeError: If machines of another folder run: theirs are the homes.
        """
        self._refuse_others()
        self._end()
        for left in (self.homes, self.folder):
            shutil.rmtree(left, ignore_errors=True)

    def _refuse_others(self) -> None:
        """Raise if the network is that of machines of another folder, and they run."""
        try:
            owner = Path((NETWORKS / BRIDGE / "ifalias").read_text().strip())
        except OSError:
            return
        if owner != self.folder and _running(owner):
            raise RuntimeError(f"the machines of {owner} run: `make machines-down` in that checkout first")

    def _end(self) -> None:
        ending = []
        for pid, children in _running(self.folder).items():
            os.kill(pid, signal.SIGKILL)  # its children end with it
            ending += children
        deadline = time.monotonic() + 30
        while not all(map(_ended, ending)) and time.monotonic() < deadline:  # or they write into what is deleted
            time.sleep(0.1)
        for i, name in enumerate(NAMES):
            call("ip", "link", "delete", f"yan-{i}", check=False)
            call("ip", "netns", "delete", f"yan-{name}", check=False)
        call("ip", "link", "delete", BRIDGE, check=False)

    def _start(self, name: str) -> int:
        i, space = NAMES.index(name), f"yan-{name}"
        inside = ["ip", "-n", space]
        call("ip", "netns", "add", space)
        call("ip", "link", "add", f"yan-{i}", "type", "veth", "peer", "name", "eth0", "netns", space)
        call("ip", "link", "set", f"yan-{i}", "master", BRIDGE, "up")
        call(*inside, "link", "set", "lo", "up")
        call(*inside, "address", "add", f"{ADDRESSES[name]}/24", "dev", "eth0")
        call(*inside, "link", "set", "eth0", "up")
        call(*inside, "route", "add", "default", "via", f"{NETWORK}.1")
        home = self.homes / name / "home"
        tmp = home / ".tmp"
        self._fill(name, home)
        tmp.mkdir()
        keep = []
        for prefix in {packages(), Path(sys.base_prefix)}:  # they are under what is covered, maybe
            for covered, by in ((self.root, home), (Path("/tmp"), tmp)):
                if prefix.is_relative_to(covered):
                    place = by / prefix.relative_to(covered)
                    keep += [f"mkdir -p {place}", f"mount --bind {prefix} {place}"]
        script = MACHINE.format(name=name, home=home, shared=self.shared, root=self.root, keep="\n".join(keep))
        spaces = ["--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (self.homes / name / "log").open("w") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", space, "unshare", *spaces, "sh", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd="/",
                env={"PATH": f"{os.environ['PATH']}:/usr/sbin", "HOME": str(self.root), "LANG": "C.UTF-8"},
            )
        deadline = time.monotonic() + 30
        while "Server listening" not in (said := (self.homes / name / "log").read_text()):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"machine {name} does not start: {said}")
            time.sleep(0.1)
        return process.pid

    def _fill(self, name: str, home: Path) -> None:
        """A home with what a machine of one's own has: SSH, and ~/yan-env with the requirements."""
        for folder in (home / ".ssh", home / ".sshd"):
            folder.mkdir(parents=True, mode=0o700)
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / ".sshd/host_key"))
        (home / ".ssh/authorized_keys").write_text(self.key.with_suffix(".pub").read_text())
        (home / ".sshd/config").write_text(SSHD.format(address=ADDRESSES[name], root=self.root))
        (home / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in ADDRESSES.items()))
        (home / "resolv.conf").write_text("")
        (home / ".bashrc").write_text(ENVIRONMENT)
        (home / ".bash_profile").write_text(". ~/.bashrc\n")
        environment = home / "yan-env"
        venv.create(environment, symlinks=True)
        (next(environment.glob("lib/python*/site-packages")) / "packages.pth").write_text(f"{packages()}\n")
        for program in ("pip", "ray", "serve", "mlflow"):
            _, _, rest = (Path(sys.prefix) / "bin" / program).read_text().partition("\n")
            there = environment / "bin" / program
            there.write_text(f"#!{self.root}/yan-env/bin/python\n{rest}")
            there.chmod(0o755)

    @property
    def api_key(self) -> str:
        """That of a caller who may ask the service."""
        return (self.folder / "api_key").read_text()

    # --- what a person fills in ---------------------------------------------------------------------------------------

    def _write_secrets(self) -> None:
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))
        auth = self.user_home / ".yan/auth"
        auth.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (auth / "auth_token").is_file():
            (auth / "auth_token").touch(0o600)
            (auth / "auth_token").write_text(secrets.token_hex(32))
        api_key = secrets.token_hex(32)
        (self.folder / "api_key").touch(0o600)
        (self.folder / "api_key").write_text(api_key)
        known = (auth / "api_keys").read_text().splitlines() if (auth / "api_keys").is_file() else []
        known = [line for line in known if line.split()[:1] != ["machines"]]
        known.append(f"machines {hashlib.sha256(api_key.encode()).hexdigest()}")
        (auth / "api_keys").write_text("\n".join(known) + "\n")

    def _write_configs(self) -> None:
        config = yaml.safe_load((ROOT / "clusters/launcher/on_premises.yaml").read_text())
        config["provider"]["head_ip"], *config["provider"]["worker_ips"] = ADDRESSES.values()
        config["auth"] = {"ssh_user": pwd.getpwuid(os.getuid()).pw_name, "ssh_private_key": str(self.key)}
        self.file.write_text(yaml.safe_dump(config, sort_keys=False))
        if self.serve_file.is_file():  # kept as all that is shared: somebody may have changed it
            return
        served = yaml.safe_load((ROOT / "clusters/serve/cpu.yaml").read_text())
        served["applications"][0]["args"]["model"] = f"{self.root}/yan/runs/world/model"
        self.serve_file.write_text(yaml.safe_dump(served, sort_keys=False))

    # --- accidents ----------------------------------------------------------------------------------------------------

    def pids(self, name: str) -> list[int]:
        """Processes of a machine but for those of its SSH server."""
        space = os.readlink(f"/proc/{self._init(name)}/ns/pid")
        found = []
        for process in Path("/proc").iterdir():
            try:
                if process.name.isdigit() and os.readlink(process / "ns/pid") == space:
                    if (process / "comm").read_text().strip() not in ("sshd", "bash", "sh"):
                        found.append(int(process.name))
            except OSError:
                continue  # it ended
        return found

    def runs(self, name: str, what: str) -> bool:
        """Whether a process of a machine has these words in its command."""
        for pid in self.pids(name):
            try:
                if what in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode():
                    return True
            except OSError:
                continue
        return False

    def kill(self, name: str) -> None:
        """End everything on a machine at once, but for its SSH server."""
        for pid in self.pids(name):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def cut(self, name: str, off: bool = True) -> None:
        """Pull a machine's network cable, or put it in again."""
        call("ip", "link", "set", f"yan-{NAMES.index(name)}", "down" if off else "up")

    def _init(self, name: str) -> int:
        outer = json.loads((self.folder / "pids.json").read_text())[name]
        (child,) = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
        return int(child)


def main() -> None:
    """`up` or `down`."""
    word = " ".join(sys.argv[1:])
    if word not in ("up", "down"):
        sys.exit("machines: up or down")
    machines = Machines(ROOT / "runs/machines", Path.home())
    if reason := missing():
        sys.exit(f"machines: {reason}")
    try:
        if word == "down":
            machines.down()
            print(f"{machines.folder} is deleted, with the runs, models and MLflow that the machines shared")
            return
        machines.up()
    except RuntimeError as error:
        sys.exit(f"machines: {error}")
    print(f"{', '.join(f'{name} {address}' for name, address in ADDRESSES.items())}: ray up --yes {machines.file}")


if __name__ == "__main__":
    main()
