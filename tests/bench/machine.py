"""The machine that numbers come from: what it is, how busy it is, how fast it reads memory right now."""
import datetime
import json
import os
import pathlib
import platform
import re
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]


def cpu_name():
    match = re.search(r"^model name\s*: (.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.M)
    return match[1] if match else platform.processor()


def commit(kvasir):
    """Of the program that is measured, which says it in its bench's JSON; + where the checkout has changes that no commit has."""
    command = [kvasir, "bench", "--json", "--dummy", "tiny", "--backend", "cpu", "-t", "1", "-p", "1", "-n", "0", "-r", "1"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KVASIR_")}
    built = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=clean, timeout=120).stdout)["commit"]
    changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return built + ("+" if changed else "")


def describe(kvasir):
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "commit": commit(kvasir),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def load_average():
    return round(os.getloadavg()[0], 2)


class Watch:
    """What else this machine did since the watch was made: the load average alone does not tell others' work from that of the measurement before."""

    def __init__(self):
        self.load = load_average()
        self.begin = self._look()

    @staticmethod
    def _look():
        user, nice, system, _, _, irq, soft_irq, stolen = (int(word) for word in pathlib.Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
        tick = os.sysconf("SC_CLK_TCK")
        return time.monotonic(), (user + nice + system + irq + soft_irq) / tick, stolen / tick, sum(os.times()[:4])

    def report(self):
        """Load average when the watch began; shares of all cores' time: others' processes (all but this one and the children it has waited for), and stolen by the hypervisor."""
        wall, busy, stolen, own = (now - then for now, then in zip(self._look(), self.begin))
        capacity = max(wall, 0.01) * os.cpu_count()
        return {"load": self.load, "others": round(max(0, busy - own) / capacity, 3), "stolen": round(stolen / capacity, 3)}


def disturbance(watched):
    return f"load {watched['load']} before, others {100 * watched['others']:.1f} %, stolen {100 * watched['stolen']:.1f} %"


class Probe:
    """Read bandwidth in GB/s, from a buffer as large as what one step of the model reads."""

    def __init__(self, program, size, threads):
        self.command = [str(program), str(size), str(threads)]

    def __call__(self):
        return float(subprocess.run(self.command, capture_output=True, text=True, check=True, timeout=120).stdout)
