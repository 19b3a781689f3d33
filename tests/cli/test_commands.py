"""Names, help, configuration: what a person meets first."""
import os
import tomllib
import unittest

from program import SOURCE, Case, kvasir


class Commands(Case):
    def test_no_command(self):
        done = kvasir()
        self.assertEqual((done.returncode, done.stdout), (2, b""))
        self.assertIn(b"usage: kvasir COMMAND", done.stderr)

    def test_version(self):
        self.assertRegex(self.works("--version"), r"\Akvasir \d+\.\d+\.\d+\n\Z")

    def test_unknown_command_names_the_nearest(self):
        for wrong, right in [("serv", "serve"), ("becnh", "bench"), ("inpsect", "inspect"), ("check-confg", "check-config")]:
            self.refused(wrong, says=[f'unknown command "{wrong}"', f'did you mean "{right}"?'])
        self.assertNotIn("did you mean", self.refused("frobnicate"))
        self.refused("a\nb", says="unknown command")

    def test_help(self):
        overview = self.works("--help")
        self.assertEqual(overview, self.works("-h"))
        for command in ("serve", "bench", "eval", "inspect", "check-config"):
            self.assertIn(f"  {command} ", overview)
            help_text = self.works(command, "--help")
            self.assertIn(f"usage: kvasir {command} [options]", help_text)
            self.assertIn("--config FILE", help_text)
        self.assertIn("--port", self.works("serve", "--help"))
        self.assertNotIn("--rounds", self.works("serve", "--help"))
        self.assertNotIn("--port", self.works("bench", "--help"))
        self.assertIn("-p, --prompt", self.works("bench", "--help"))
        self.assertIn("  --prompt TOKENS\n", self.works("eval", "--help"))
        self.assertIn("--recent-tokens", self.works("eval", "--help"))
        self.assertNotIn("--rounds", self.works("eval", "--help"))
        # What is on unless its flag is given is not told as if the flag did it.
        self.assertIn("  --no-prefix-cache\n        turns this off: keep the KV blocks", self.works("serve", "--help"))
        self.assertIn("\\fB\\-\\-no\\-prefix\\-cache\\fR\nturns this off: keep the KV blocks", self.works("check-config", "--print-manual"))
        self.assertNotIn("[true]", self.works("serve", "--help"))
        self.assertNotIn("Default: true", self.works("check-config", "--print-manual"))
        # Help wins over everything else on the line.
        self.works("serve", "--help", "--port", "99999999")

    def test_flags(self):
        self.refused("serve", "--prot", "1", says='unknown option --prot (did you mean "--port"?)')
        self.refused("serve", "--port", says="--port: a value must follow")
        self.refused("serve", "--port", "70000", says="out of range (0 to 65535)")
        self.refused("serve", "--rounds", "3", says="belongs to kvasir bench")
        self.refused("inspect", "-mone", "two", says="given twice")
        self.refused("inspect", "one", "two", says='argument "two" is one too many')
        self.refused("serve", says="model: none given; -m FILE")
        self.refused("serve", "--host", "0.0.0.0", "--backend", "mock", says="api_key_file")
        self.refused("inspect", environment={"KVASIR_THREADS": "many"}, says="KVASIR_THREADS")

    def test_long_and_hostile_arguments(self):
        for argument in ("x" * 100000, "-" * 1000, "--" + "y" * 5000, "\x1b[31m", "a\x7fb", "é" * 300, "%s%n", "--model=" + "z" * 600):
            self.refused(argument)
            self.refused("inspect", argument)
            self.refused("check-config", argument)


class CheckConfig(Case):
    def test_committed_files_are_what_the_table_says(self):
        for flag, name in (("--print-example", "kvasir.toml"), ("--print-manual", "kvasir.1")):
            with open(os.path.join(SOURCE, "deploy", name), encoding="utf-8") as committed:
                self.assertEqual(committed.read(), self.works("check-config", flag), f"deploy/{name}: run `cmake --build build/ci --target generated`")

    def test_example_is_valid_and_changes_nothing(self):
        example = os.path.join(SOURCE, "deploy", "kvasir.toml")
        self.assertEqual(self.works("check-config", example), self.works("check-config"))

    def test_effective_values_and_where_they_came_from(self):
        path = self.file("kvasir.toml", "[server]\nport = 81\nmax_queue = 7\n[engine]\nthreads = 3\n")
        printed = self.works("check-config", path, "--threads", "5", environment={"KVASIR_MAX_QUEUE": "9"})
        self.assertIn("server.port = 81 # file\n", printed)
        self.assertIn("server.max_queue = 9 # environment\n", printed)
        self.assertIn("engine.threads = 5 # flag\n", printed)
        self.assertIn('server.host = "127.0.0.1" # default\n', printed)
        self.assertEqual(tomllib.loads(printed)["server"]["port"], 81)  # what is printed is itself a configuration

    def test_keys_that_are_there(self):
        keys = self.file("keys", "# mine\nsecret\n")
        printed = self.works("check-config", self.file("kvasir.toml", f"[server]\napi_key_file = '{keys}'\nhost = '0.0.0.0'\n"))
        self.assertIn(f'server.api_key_file = "{keys}" # file\n', printed)
        self.assertNotIn("secret", printed)

    def test_unknown_environment_is_said_and_no_error(self):
        done = kvasir("check-config", environment={"KVASIR_PROT": "1"})
        self.assertEqual(done.returncode, 0)
        self.assertIn(b"KVASIR_PROT", done.stderr)

    def test_wrong_files(self):
        cases = [
            ("[server]\nprot = 1\n", [":2:1:", 'unknown key "server.prot"', 'did you mean "server.port"?']),
            ("[server]\nport = 700000\n", [":2:8:", "server.port", "0 to 65535"]),
            ("[server]\nport = \"x\"\n", [":2:8:", "server.port"]),
            ("[server]\nport = 1\nport = 2\n", [":3:"]),
            ("port = 1\n", ['unknown key "port"', 'did you mean "server.port"?']),
            ("[server\n", [":1:"]),
            ("[bench]\nrounds = 3\n", ["unknown key"]),
            ("[server]\nhost = \"0.0.0.0\"\n", ["server.host", "api_key_file"]),
            ("[server]\nfirst_byte_timeout = \"2h\"\nrequest_timeout = \"1h\"\n", ["is out of range"]),
            ("[server]\nfirst_byte_timeout = \"20m\"\n", ["server.first_byte_timeout", "server.request_timeout"]),
            ("model = \"/nowhere/model.gguf\"\n", ["/nowhere/model.gguf", "No such file"]),
            (b"[server]\nhost = \"\xff\"\n", [":2:"]),
            (b"\x00" * 100, [":1:"]),
            (b"a = " + b"[" * 100000, []),
            (b"a" * (4 << 20), []),
            (b"[server]\nport = 1 \x1b[31m\n", [":2:"]),
        ]
        for text, says in cases:
            self.refused("check-config", self.file("wrong.toml", text), says=says)
        for text, says in ((None, "No such file"), ("# none\n", "no key"), ("good\nb\xe4d\n", "keys:2: a key consists of")):
            keys = os.path.join(self.folder.name, "keys")
            if text is not None:
                self.file("keys", text)
            path = self.file("wrong.toml", f"[server]\napi_key_file = '{keys}'\n")
            self.refused("check-config", path, says=[f"kvasir: {path}:2: server.api_key_file: {keys}:", says])
            self.refused("serve", "--backend", "mock", "--config", path, says=[f"kvasir: {path}:2: server.api_key_file: {keys}:", says])
            self.refused("check-config", path, environment={"KVASIR_API_KEY_FILE": keys}, says=[f"kvasir: KVASIR_API_KEY_FILE: {keys}:", says])
        self.refused("check-config", os.path.join(self.folder.name, "absent.toml"), says=["absent.toml", "No such file"])
        self.refused("check-config", self.folder.name, says="is a directory")
        self.refused("check-config", "/dev/zero")
        self.refused("serve", "--config", self.file("wrong.toml", "x = 1\n"), says="unknown key")


if __name__ == "__main__":
    unittest.main()
