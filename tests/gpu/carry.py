"""Programs that travel to another machine: the libraries they need and where a machine has them, the archive they are carried in, and unpacking it there. For tests/gpu/run."""
import glob
import lzma
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile

PACK_BYTES_MAX = 60 * 10**6
PACK_WINDOW = 128 << 20  # bytes in which the packer looks for what it has seen before
# Of the machine itself, never brought along: the loader and libc are one with its kernel, the driver's library with its driver, and cuBLASLt is half a gigabyte.
NOT_PACKED = re.compile(r"^(ld-linux.*|lib(c|m|dl|rt|pthread|resolv|util|cuda|cublasLt|cublas)\.so.*|linux-vdso.*)$")
NOT_UNPACKED = (OSError, tarfile.TarError, lzma.LZMAError, EOFError)  # nowhere to, or it is not whole


def stop(words):
    sys.exit(f"tests/gpu/run: {words}")


def unpack(archive, scratch):
    """The folder that an archive becomes, once: beside it, or `scratch` among the temporary ones where that may not be written. Else NOT_UNPACKED."""
    stamp = f"{archive.stat().st_size} {archive.stat().st_mtime_ns}"
    for folder in (archive.parent / "unpacked", pathlib.Path(tempfile.gettempdir()) / f"{scratch}-{os.getuid()}"):
        try:
            if (folder / "stamp").exists() and (folder / "stamp").read_text() == stamp:
                return folder
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700, parents=True)
            with tarfile.open(archive) as file:
                file.extractall(folder)
            (folder / "stamp").write_text(stamp)
            return folder
        except OSError as problem:
            why = problem
    raise OSError(f"nowhere to unpack {archive.name}: {why}")


# ---- libraries ----

def libraries_of(path, search=""):
    """[(soname, path or None)] as the loader finds them."""
    environment = {**os.environ, "LD_LIBRARY_PATH": search}
    done = subprocess.run(["ldd", str(path)], capture_output=True, text=True, env=environment)
    found = []
    for line in done.stdout.splitlines():
        match = re.match(r"\s*(\S+) => (not found|\S+)", line)
        if match:
            found.append((match[1], None if match[2] == "not found" else pathlib.Path(match[2])))
    return found


def library_folder(soname):
    """Where this machine has a library of CUDA's: the toolkit's folders, those of pip packages, the loader's own."""
    places = [*sorted(glob.glob("/usr/local/cuda*/lib64"), reverse=True), *sorted(glob.glob("/usr/local/cuda*/targets/*/lib"), reverse=True), "/usr/lib/x86_64-linux-gnu", "/opt/cuda/lib64"]
    roots = {path for path in sys.path if path.endswith("-packages")}
    for pattern in ("/usr/lib/python3*/*-packages", "/usr/local/lib/python3*/*-packages", "/opt/*/lib/python3*/site-packages", str(pathlib.Path.home() / ".local/lib/python3*/site-packages")):
        roots.update(glob.glob(pattern))
    for root in sorted(roots):
        places += sorted(glob.glob(f"{root}/nvidia/*/lib"))
    for place in places:
        if os.path.exists(os.path.join(place, soname)):
            return place
    listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout if shutil.which("ldconfig") else ""
    match = re.search(rf"{re.escape(soname)} .*=> (\S+)", listed)
    return os.path.dirname(match[1]) if match else None


def search_path(programs, places, given=""):
    """What LD_LIBRARY_PATH must be for these programs: `places`, this machine's folders of what is still not found, and of what that needs, and what was given."""
    places = list(places)
    joined = lambda: ":".join(filter(None, [*places, given]))
    grown = True
    while grown:
        grown = False
        for program in programs:
            for soname, path in libraries_of(program, joined()):
                folder = library_folder(soname) if path is None else None
                if folder and folder not in places:
                    places.append(folder)
                    grown = True
    return joined()


# ---- the folder to carry ----

def begin(folder, archive):
    """An empty folder in place of what was packed there before; never of anything else."""
    folder = pathlib.Path(folder).resolve()
    if folder.exists() and any(folder.iterdir()) and not (folder / archive).exists():
        stop(f"{folder} is not empty, and no folder that was packed")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def gather(found, folder, search="", own=None):
    """Programs {name: path} without symbols in folder/bin, the libraries another machine may lack in folder/lib: those of the folder `own` without symbols as well."""
    (folder / "bin").mkdir()
    (folder / "lib").mkdir()
    for name, path in found.items():
        subprocess.run(["strip", "--strip-all", "-o", str(folder / "bin" / name), str(path)], check=True)
        for soname, library in libraries_of(path, search):
            if NOT_PACKED.match(soname) or (folder / "lib" / soname).exists():
                continue
            if library is None:
                stop(f"{name} needs {soname}, which is not on this machine either")
            if own and own.resolve() in library.resolve().parents:
                subprocess.run(["strip", "--strip-unneeded", "-o", str(folder / "lib" / soname), str(library.resolve())], check=True)
            else:
                shutil.copy(library.resolve(), folder / "lib" / soname)


def write_archive(source, archive, preset):
    """All that lies in the folder `source`; returns its bytes before."""
    with lzma.open(archive, "wb", format=lzma.FORMAT_XZ, filters=[{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": PACK_WINDOW}]) as out, tarfile.open(fileobj=out, mode="w|") as file:
        for path in sorted(source.iterdir()):
            file.add(path, path.name)
    return sum(path.stat().st_size for path in source.rglob("*") if path.is_file())


def told(folder, unpacked, more):
    """Says what it comes to; the exit status."""
    total = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder.name}: {total / 1e6:.1f} MB, {unpacked / 1e6:.1f} MB unpacked; {more}")
    if total > PACK_BYTES_MAX:
        print(f"tests/gpu/run: more than {PACK_BYTES_MAX / 1e6:.0f} MB", file=sys.stderr)
        return 1
    return 0
