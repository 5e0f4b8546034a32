"""Tests of what the GPU check parses, counts and judges: `python3 scripts/gpu/test_parts.py`.

They need the standard library alone.
"""

import json
import struct
import sys
import tempfile
import unittest
from pathlib import Path

sys.dont_write_bytecode = True

from parts import PARTS, common, conformance, decode, facts, invariance, kernels, parity, prefill, sanitizer, speed, summary

OPT_125M = {"name": "opt-125m", "architecture": "opt", "layers": 12, "hidden_size": 768, "heads": 12,
            "ffn_size": 3072, "vocab_size": 50272, "max_positions": 2048}


class Facts(unittest.TestCase):
    def test_smi(self):
        found = facts.parse_smi("NVIDIA H200, 580.159, 143771 MiB, 345 MHz, 1980 MHz, 3201 MHz, 700.00 W\n")
        self.assertEqual(found["gpu name"], "NVIDIA H200")
        self.assertEqual(found["gpu power.limit"], "700.00 W")


class Conformance(unittest.TestCase):
    def test_lines(self):
        line = '{"case":"linear","passed":true,"detail":"1e-4"}'
        self.assertEqual(conformance.parse(line), {"case": "linear", "passed": True, "detail": "1e-4"})
        self.assertEqual(conformance.parse('{"case":"x","passed":false}')["detail"], "")
        for other in ("", "noise", "3", "[]", '{"passed":true}'):
            self.assertIsNone(conformance.parse(other), other)

    def test_a_status_is_that_of_the_cases(self):
        cases = [{"passed": True}, {"passed": False}]
        for found, status, right in [
            (cases[:1], 0, True), (cases, 1, True), (cases, 0, False), (cases[:1], 1, False), ([], 0, False),
            (cases[:1], -11, False), (cases, "stopped after 60 s", False),
        ]:
            self.assertEqual(conformance.judge(found, status)[0], right, (found, status))


class Sanitizer(unittest.TestCase):
    def test_counts(self):
        self.assertEqual(sanitizer.error_count("========= ERROR SUMMARY: 0 errors\n"), 0)
        self.assertEqual(sanitizer.error_count("========= ERROR SUMMARY: 1 error\n"), 1)
        racecheck = "========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)\n"
        self.assertEqual(sanitizer.error_count(racecheck), 3)
        self.assertEqual(sanitizer.error_count(racecheck.replace("3", "0")), 0)
        self.assertIsNone(sanitizer.error_count("========= COMPUTE-SANITIZER\n"))

    def test_first_error(self):
        output = "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 16 bytes\n========= ERROR SUMMARY: 1 error"
        self.assertEqual(sanitizer.first_error(output), "Invalid __global__ read of size 16 bytes")
        self.assertEqual(sanitizer.first_error("========= COMPUTE-SANITIZER\nerror: no device"), "error: no device")
        self.assertEqual(sanitizer.first_error("========= ERROR SUMMARY: 0 errors"), "")


class Parity(unittest.TestCase):
    def test_ids(self):
        judge = lambda step, reach: parity.judge_ids(step, [1, 2, 9], [1, 2, 3], [0.5, 0.4, 0.01], reach)[0]
        self.assertTrue(judge(None, 0.0))
        self.assertTrue(judge(2, 0.02))
        self.assertFalse(judge(2, 0.005))
        self.assertFalse(parity.judge_ids(2, [1, 2], [1, 2, 3], [0.5, 0.4, 0.0], 1.0)[0])

    def test_logits(self):
        class Tensor(float):
            shape = (1,)

        deviation = lambda a, b: abs(a - b) / abs(a)
        self.assertEqual(parity.judge_logits(deviation, Tensor(1), Tensor(1.25), Tensor(1.5)), (0.25, 0.75, 0.5))
        self.assertEqual(parity.judge_logits(deviation, Tensor(1), Tensor(1), Tensor(1))[1], parity.SMALL_DEVIATION)


class Invariance(unittest.TestCase):
    def test_refusals_name_both(self):
        both = invariance.names_both
        self.assertTrue(both("compiled for sm_80; this GPU is sm_90a", "sm_90a", "sm_80"))
        self.assertTrue(both("compiled for sm_80; this GPU has compute capability 9.0", "sm_90a", "sm_80"))
        self.assertTrue(both("for sm_80, not cpu", "cpu", "sm_80"))
        self.assertFalse(both("compiled for sm_80", "sm_90a", "sm_80"))
        self.assertFalse(both("this GPU is sm_90a", "sm_90a", "sm_80"))


class Speed(unittest.TestCase):
    def test_bytes(self):
        # All parameters but the positions and the norms, whose rows and vectors are not multiplied with.
        c, layers = OPT_125M["hidden_size"], OPT_125M["layers"]
        rest = 2050 * c + (4 * layers + 2) * c
        self.assertEqual(speed.weight_bytes(OPT_125M), 2 * (125239296 - rest))
        self.assertEqual(speed.kv_bytes(OPT_125M, 3), 3 * 2 * layers * c * 2)

    def test_figures(self):
        tokens, columns = decode.figures(OPT_125M, 8, "kiln", 0.1, {"read_gb_per_s": 4000})
        self.assertEqual(tokens, 8)
        self.assertAlmostEqual(columns["GB/s"], (speed.weight_bytes(OPT_125M) + 8 * 160 * 36864) / 1e5, delta=0.1)
        self.assertEqual(columns["share"], f"{columns['GB/s'] / 4000:.0%}")
        self.assertNotIn("share", decode.figures(OPT_125M, 8, "kiln", 0.1, {})[1])

    def test_full_prompts_leave_room(self):
        self.assertEqual(prefill.kiln_length(OPT_125M, 512), 512)
        self.assertEqual(prefill.kiln_length(OPT_125M, 2048), 2046)
        self.assertEqual(prefill.figures(OPT_125M, 2048, "kiln", 1.0, {})[0], 2046)
        self.assertEqual(prefill.figures(OPT_125M, 2048, "torch eager", 1.0, {})[0], 2048)

    def test_lengths_fit(self):
        self.assertEqual(decode.lengths(OPT_125M), (128, 64))
        self.assertEqual(decode.lengths(OPT_125M | {"max_positions": 128}), (64, 64))


def table(kernel_us, step_us, peers=()):
    """As `kiln-perf table` writes it: one step of three kernels that are alike."""
    times = lambda us: {"min_us": us, "median_us": us, "p95_us": us}
    row = {"kernel": "linear", "spec": "linear 8 -> 4", "shapes": "(1, 8) x (4, 8)", "count": 3, "bytes": 6000.0,
           "time": times(kernel_us), "floor_us": 1.0, "share_of_step": 3 * kernel_us / step_us,
           "references": [{"name": name, "format": "f16", "time": times(us)} for name, us in peers]}
    step = {"executable": "decode-b1-kv256", "kv_len": 256, "rows": [row], "time": times(step_us),
            "remainder_us": step_us - 3 * kernel_us}
    return {"models": [{"model": "opt-125m", "steps": [step]}]}


class Kernels(unittest.TestCase):
    def test_rows(self):
        (row,) = kernels.rows(table(2.0, 5.0, [("torch", 3.0), ("cublaslt", 1.0)]))
        self.assertEqual(row["step"], "decode-b1-kv256 at 256")
        self.assertEqual((row["count"], row["us"], row["GB/s"], row["of limit"], row["of step"]), (3, 2.0, 3.0, "50%", "120%"))
        self.assertEqual((row["torch f16"], row["cublaslt f16"]), ("1.50x", "0.50x"))

    def test_times_that_cannot_be(self):
        passed = lambda *times: [passed for _, passed, _ in kernels.judge(table(*times))]
        self.assertEqual(passed(2.0, 5.0), [True, True])
        # Events that no replay has recorded, and those of another step.
        self.assertEqual(passed(0.0, 5.0), [False, False])
        self.assertEqual(passed(0.5, 5.0), [True, False])
        self.assertEqual(passed(7.0, 5.0), [True, False])
        self.assertEqual(list(kernels.rows(table(0.0, 5.0, [("torch", 3.0)])))[0]["of limit"], "")
        self.assertIn("remainder -1.0 us", list(kernels.judge(table(2.0, 5.0)))[1][2])

    def test_the_library_is_found(self):
        with tempfile.TemporaryDirectory() as folder:
            package, toolkit = Path(folder) / "nvidia/cublas/lib", Path(folder) / "toolkit"
            package.mkdir(parents=True)
            toolkit.mkdir()
            find = lambda: kernels.library_folder([folder], [str(toolkit)])
            self.assertIsNone(find())
            (toolkit / "libcublasLt.so.13").touch()
            self.assertEqual(find(), str(toolkit))
            (package / "libcublasLt.so.12").touch()
            self.assertEqual(find(), str(package))


class Common(unittest.TestCase):
    def test_safetensors(self):
        header = json.dumps({"__metadata__": {}, "a": {"dtype": "F32", "shape": [1, 2], "data_offsets": [4, 12]}}).encode()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x.safetensors"
            path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4) + struct.pack("<2f", 1, 2))
            self.assertEqual(common.read_safetensors(path), {"a": ([1, 2], struct.pack("<2f", 1, 2))})

    def test_prompts(self):
        ids = common.prompt_ids(500, 3, 300)
        self.assertTrue(all(4 <= token < 300 for token in ids))
        self.assertEqual(ids[:7], common.prompt_ids(7, 3, 300))
        self.assertNotEqual(ids[:7], common.prompt_ids(7, 4, 300))

    def test_median(self):
        self.assertEqual((common.median([3, 1, 2]), common.median([4, 1, 2, 3]), common.median([5])), (2, 2.5, 5))

    def test_context_travels(self):
        context = common.Context(bin="b", root="r", scratch="s", results="d", models=["opt-125m"], ceilings={"read_gb_per_s": 1.5})
        self.assertEqual(common.Context.from_json(context.to_json()), context)

    def test_programs_see_their_environment(self):
        program = [sys.executable, "-c", "import os; print(os.environ['LD_LIBRARY_PATH'])"]
        self.assertEqual(common.run(program, {"LD_LIBRARY_PATH": "/x:/y"}), "/x:/y\n")

    def test_programs_that_fail(self):
        with self.assertRaisesRegex(common.Failed, "status 3: to no avail"):
            common.run([sys.executable, "-c", "import sys; print('to no avail', file=sys.stderr); sys.exit(3)"])


class Summary(unittest.TestCase):
    def test_markdown(self):
        check = lambda case, passed: {"case": case, "passed": passed, "detail": "a|b"}
        many = [check(f"case {i}", i != 7) for i in range(summary.LISTED_CHECKS + 1)]
        rows = [{"who": "kiln", "ms": 1, "rounds_ms": [1]}, {"who": "torch", "note": "failed"}]
        part = {"part": "decode", "status": "failed", "elapsed_s": 1.0, "checks": many, "rows": rows, "facts": {"x": 1}}
        text = summary.markdown({"device": "cuda:0", "quick": True, "elapsed_s": 2.0, "parts": [part]})
        self.assertIn("| who | ms | note |", text)
        self.assertIn("| torch |  | failed |", text)
        self.assertIn("| case 7 | **FAIL** | a\\|b |", text)
        self.assertNotIn("case 8", text)
        self.assertIn("40 of 41", text)

    def test_parts_exist(self):
        folder = Path(common.__file__).parent
        self.assertTrue(all((folder / f"{name}.py").is_file() for name in PARTS))


if __name__ == "__main__":
    unittest.main()
