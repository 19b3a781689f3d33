"""The machine that numbers come from: what it is, how busy it is, how fast it reads memory right now."""
import datetime
import os
import pathlib
import platform
import re
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]


def cpu_name():
    match = re.search(r"^model name\s*: (.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.M)
    return match[1] if match else platform.processor()


def commit():
    """Of the checkout the scripts stand in; + where files differ from it."""
    ask = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return (ask("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if ask("status", "--porcelain", "--untracked-files=no") else "")


def describe():
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def load_average():
    return round(os.getloadavg()[0], 2)


def cpu_ticks():
    """(stolen, all) since boot: time that the hypervisor gave to others."""
    fields = [int(word) for word in pathlib.Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return fields[7], sum(fields)


def stolen_share(before, after):
    return round((after[0] - before[0]) / max(1, after[1] - before[1]), 4)


class Probe:
    """Read bandwidth in GB/s, from a buffer as large as what one step of the model reads."""

    def __init__(self, program, size, threads):
        self.command = [str(program), str(size), str(threads)]

    def __call__(self):
        return float(subprocess.run(self.command, capture_output=True, text=True, check=True, timeout=120).stdout)
