"""What cmake/cuda.cmake makes of the toolkits there may be: none, one that is too old, one that is broken, and of architectures that there is no code for. No toolkit is needed."""
import os
import pathlib
import subprocess
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROJECT = f"""cmake_minimum_required(VERSION 3.25)
project(configured LANGUAGES NONE)
include({ROOT}/cmake/cuda.cmake)
"""
# As Ubuntu 22.04's: it has never heard of compute capability 9.0.
OLD = """#!/bin/sh
case "$*" in *--version*) echo "Cuda compilation tools, release 11.5, V11.5.119"; exit 0 ;; esac
echo "nvcc fatal   : Unsupported gpu architecture 'compute_90'" >&2
exit 1
"""


class Configure(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.folder = pathlib.Path(scratch.name)
        (self.folder / "CMakeLists.txt").write_text(PROJECT)

    def program(self, name, text):
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def configure(self, nvcc, *words):
        """(exit status, what it says, as one line)"""
        environment = {**os.environ, "CUDACXX": str(nvcc)}
        done = subprocess.run(["cmake", "-G", "Ninja", "-S", self.folder, "-B", self.folder / "build", *words], env=environment, capture_output=True, text=True, timeout=300)
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    def assert_without(self, nvcc, why, *words):
        """AUTO does without, ON insists."""
        for choice, expected in (("AUTO", 0), ("ON", 1), ("AUTO", 0)):
            status, said = self.configure(nvcc, f"-DKVASIR_CUDA={choice}", *words)
            self.assertEqual(status, expected, said)
            self.assertIn(why, said)

    def test_none(self):
        self.assert_without(self.folder / "nowhere", "is no nvcc that works")

    def test_too_old(self):
        old = self.program("nvcc", OLD)
        self.assert_without(old, f"{old} is 11.5, older than 12.0")

    def test_too_old_named(self):
        old = self.program("nvcc", OLD)
        self.assert_without("", f"{old} is 11.5, older than 12.0", f"-DCMAKE_CUDA_COMPILER={old}")

    def test_broken(self):
        self.assert_without(self.program("nvcc", "#!/bin/sh\nexit 1\n"), "is no nvcc that works")
        self.assert_without(self.program("nvcc-13", OLD.replace("11.5", "13.0")), "does not compile")

    def test_looked_for_anew(self):
        self.assert_without(self.folder / "nowhere", "is no nvcc that works")
        old = self.program("nvcc", OLD)
        self.assert_without(old, f"{old} is 11.5, older than 12.0")

    def test_architectures(self):
        old = self.program("nvcc", OLD)
        for wrong in ("75", "80;75", "", "sm_90", "80,90", "90 80", "all", "native", "OFF", "9.0"):
            for choice in ("AUTO", "ON"):
                status, said = self.configure(old, f"-DKVASIR_CUDA={choice}", f"-DKVASIR_CUDA_ARCHITECTURES={wrong}")
                self.assertEqual(status, 1, (wrong, said))
                self.assertIn(f'KVASIR_CUDA_ARCHITECTURES is "{wrong}"', said)
        for right in ("80", "80;86;89;90", "90a", "80-real;90-virtual", "100"):
            status, said = self.configure(old, "-DKVASIR_CUDA=AUTO", f"-DKVASIR_CUDA_ARCHITECTURES={right}")
            self.assertEqual(status, 0, (right, said))

    def test_choices(self):
        for wrong in ("on", "", "yes"):
            status, said = self.configure(self.folder / "nowhere", f"-DKVASIR_CUDA={wrong}")
            self.assertEqual(status, 1, said)
            self.assertIn(f'KVASIR_CUDA is "{wrong}"; it is AUTO, ON or OFF', said)
        status, said = self.configure(self.folder / "nowhere", "-DKVASIR_CUDA=OFF", "-DKVASIR_CUDA_ARCHITECTURES=75")
        self.assertEqual(status, 0, said)
        self.assertIn("not built, KVASIR_CUDA=OFF", said)


if __name__ == "__main__":
    unittest.main()
