"""The built program as a black box: what it prints, and the rule every failure keeps: exit 2, one line on stderr that begins "kvasir: ", nothing on stdout."""
import os
import re
import subprocess
import tempfile
import unittest

PROGRAM = os.environ["KVASIR_PROGRAM"]
SOURCE = os.environ["KVASIR_SOURCE"]
SHORT = os.environ.get("KVASIR_TEST_SHORT", "") not in ("", "0")
DEADLINE = 300
# What took long says how far it is: nothing that a test waits for or forbids, as it depends on the machine alone.
PROGRESS = re.compile(rb"^(?:<6>|\S+Z )info +(?:loading|making weights|measuring): \d+ %(?:, about \d+:\d\d left)?\n", re.M)


def kvasir(*arguments, environment=None, cwd=None):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KVASIR_")}
    done = subprocess.run([PROGRAM, *arguments], env={**clean, **(environment or {})}, stdin=subprocess.DEVNULL, capture_output=True, timeout=DEADLINE, cwd=cwd)
    done.stderr = PROGRESS.sub(b"", done.stderr)
    return done


class Case(unittest.TestCase):
    maxDiff = None

    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)

    def file(self, name, content):
        path = os.path.join(self.folder.name, name)
        with open(path, "wb") as out:
            out.write(content if isinstance(content, bytes) else content.encode())
        return path

    def works(self, *arguments, **options):
        done = kvasir(*arguments, **options)
        self.assertEqual((done.returncode, done.stderr.decode("utf-8", "replace")), (0, ""), arguments)
        return done.stdout.decode("utf-8", "replace")

    def refused(self, *arguments, says=(), **options):
        done = kvasir(*arguments, **options)
        words = done.stderr.decode("utf-8", "replace")
        self.assertEqual(done.returncode, 2, (arguments, words))
        self.assertTrue(words.startswith("kvasir: ") and words.endswith("\n") and words.count("\n") == 1, (arguments, words))
        self.assertFalse(any(ord(c) < 32 or ord(c) == 127 for c in words[:-1]), (arguments, words))
        for part in [says] if isinstance(says, str) else says:
            self.assertIn(part, words)
        return words
