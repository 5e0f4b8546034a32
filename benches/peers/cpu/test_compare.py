"""Tests of what compare.py computes and how it treats its workers: `python3 benches/peers/cpu/test_compare.py`.

They need the standard library alone.
"""

import json
import sys
import tempfile
import time
import unittest
from argparse import Namespace
from pathlib import Path
from unittest import mock

sys.dont_write_bytecode = True

import compare
import figures

# A worker that halves what it is sent, and ends when it is sent 0.
HALVING = """
import json, sys
for line in sys.stdin:
    number = json.loads(line)["number"]
    if not number:
        sys.exit("to no avail")
    print(json.dumps({"half": number / 2} if number > 0 else {"error": "below zero"}), flush=True)
"""


def record():
    """Two rounds: the read bandwidth halves, and so does kiln; the peer stays and has no second batch 8."""
    runs = lambda first_ms, step_ms: {"first_ms": first_ms, "step_ms": step_ms}
    kiln = lambda slower: {
        "decode": {"1": runs([20 * slower], [10 * slower]), "8": runs([90], [40 * slower])}, "prefill": runs([1024 * slower], []),
    }
    peer = {"decode": {"1": runs([30, 50], [19, 21]), "8": runs([100], [80])}, "prefill": runs([512], [])}
    return {
        "model": "opt-125m", "class": "int8", "date": "2026-11-22", "commit": "abc", "threads": 2,
        "machine": {"processor": "P", "cores": 2, "memory_gib": 23.5, "kernel": "6.1"},
        "lengths": {"prompt": 32, "steps": 32, "prefill": 512, "batches": [1, 8], "runs": 2},
        "systems": {
            "openvino int8": {"weight_bytes": 200_000_000, "load_ms": [1000], "peak_bytes": 3e8, "note": "u8 | keys", "versions": "OpenVINO 1"},
            "kiln int8": {"weight_bytes": 100_000_000, "load_ms": [1, 2, 9], "peak_bytes": 1.5e8, "versions": "kiln 0"},
        },
        "failed": {"ctranslate2 int8": "no such type"},
        "rounds": [
            {"read_gb_per_s": [19, 20, 29], "measured": {"kiln int8": kiln(1), "openvino int8": peer}},
            {"read_gb_per_s": [10], "measured": {"kiln int8": kiln(2), "openvino int8": peer}},
        ],
    }


class Figures(unittest.TestCase):
    def test_rates_are_of_the_median_run(self):
        self.assertEqual(figures.rate(8, [40, 80, 50]), 160)

    def test_share_uses_the_same_round(self):
        shares = [one["share"] for one in figures.rounds_of(record(), "kiln int8")]
        self.assertEqual(shares, [0.5, 0.5])
        self.assertEqual([one["share"] for one in figures.rounds_of(record(), "openvino int8")], [0.5, 1.0])

    def test_batch_8_counts_all_sequences(self):
        first = figures.rounds_of(record(), "kiln int8")[0]
        self.assertEqual((first["decode 1"], first["decode 8"], first["prefill"], first["first_ms"]), (100, 200, 500, 20))

    def test_ratios_pair_rounds(self):
        one = record()
        self.assertEqual(figures.ratios(one, "kiln int8", "openvino int8", "decode 1"), 1.5)
        del one["rounds"][1]["measured"]["openvino int8"]
        self.assertEqual(figures.ratios(one, "kiln int8", "openvino int8", "decode 1"), 2)
        self.assertIsNone(figures.ratios(one, "kiln int8", "llama int8", "decode 1"))

    def test_shown(self):
        self.assertEqual(figures.shown([12.34]), "12.3")
        self.assertEqual(figures.shown([50.2, 300, 200]), "200 (50 to 300)")


class Table(unittest.TestCase):
    def test_rows(self):
        kiln, peer, failed = figures.rows(record())
        self.assertEqual((kiln["system"], kiln["decode, batch 1"], kiln["share"]), ("kiln int8", "75.0 (50.0 to 100.0)", "50%"))
        self.assertEqual((kiln["peak MB"], kiln["load ms"], kiln["first token ms"]), ("150", "2", "30"))
        self.assertNotIn("kiln int8/peer", kiln)
        self.assertEqual(peer["kiln int8/peer"], "1.50 · 1.50 · 0.38")
        self.assertEqual(failed, {"system": "ctranslate2 int8", "note": "not measured: no such type"})

    def test_markdown(self):
        other = record() | {"class": "f32", "rounds": [], "failed": {"kiln int8": "it went"}}
        text = figures.markdown([record(), other])
        self.assertLess(text.index("f32, commit abc, 2026-11-22: 0 rounds, no round"), 
            text.index("int8, commit abc, 2026-11-22: 2 rounds, read bandwidth 19.5 GB/s (10.0 to 29.0)"))
        self.assertIn("| ctranslate2 int8 |", text)
        self.assertIn("u8 \\| keys", text)
        self.assertIn("not measured: it went", text)
        self.assertIn("- OpenVINO 1\n- kiln 0\n", text)

    def test_batch_8_alone(self):
        one = json.loads(json.dumps(record()))
        one["lengths"]["batches"] = [8]
        for turn in one["rounds"]:
            for measured in turn["measured"].values():
                del measured["decode"]["1"]
        kiln, peer, _ = figures.rows(one)
        self.assertNotIn("share", kiln)
        self.assertEqual(peer["kiln int8/peer"].count("·"), 1)

    def test_each_kiln_has_its_ratios(self):
        one = json.loads(json.dumps(record()))
        one["systems"]["kiln int8-a8"] = one["systems"]["kiln int8"]
        for turn in one["rounds"]:
            turn["measured"]["kiln int8-a8"] = turn["measured"]["openvino int8"]
        *kilns, peer, _ = figures.rows(one)
        self.assertEqual([row["system"] for row in kilns], ["kiln int8", "kiln int8-a8"])
        self.assertEqual((peer["kiln int8/peer"], peer["kiln int8-a8/peer"]), ("1.50 · 1.50 · 0.38", "1.00 · 1.00 · 1.00"))
        self.assertFalse([name for row in kilns for name in row if name.endswith("/peer")])


    def test_disturbance(self):
        one = record()
        self.assertEqual(figures.disturbance(one), "")
        one["rounds"][1]["measured"] = {"a": {"others": 0.02, "stolen": 0.01}, "b": {"others": 0.0, "stolen": 0.2}}
        self.assertIn("took 0% of the processor and the host 20% in", figures.disturbance(one))


class Turns(unittest.TestCase):
    def contest(self, shares):
        """One whose systems, "a" and "b", are disturbed by these shares in turn."""
        contest = compare.Contest.__new__(compare.Contest)
        contest.args, contest.name, contest.failed, contest.systems = Namespace(), "m", {}, {"a": mock.Mock(), "b": mock.Mock()}
        contest.measure = mock.Mock(side_effect=shares)
        with mock.patch.object(compare, "read_bandwidth", lambda _: 20):
            return contest, contest.round()

    def test_a_disturbed_turn_is_tried_again(self):
        turn = lambda others, stolen: {"others": others, "stolen": stolen}
        _, found = self.contest([turn(0.3, 0), turn(0.01, 0), turn(0, 0.02)])
        self.assertEqual([one["others"] for one in found["measured"].values()], [0.01, 0])
        self.assertEqual(len(found["read_gb_per_s"]), 3)
        _, found = self.contest([turn(0.3, 0), turn(0.2, 0), turn(0.25, 0), turn(0, 0.02)])
        self.assertEqual([one["others"] for one in found["measured"].values()], [0.2, 0])

    def test_who_fails_leaves(self):
        contest, found = self.contest([compare.Failed("gone"), {"others": 0, "stolen": 0}])
        self.assertEqual((contest.failed, list(contest.systems), list(found["measured"])), ({"a": "gone"}, ["b"], ["b"]))

    def test_own_time_is_not_that_of_others(self):
        before = compare.processor_seconds({})
        sum(range(10**6))
        after = compare.processor_seconds({})
        self.assertGreaterEqual(after["all"], before["all"])


class Workers(unittest.TestCase):
    def worker(self):
        worker = compare.Worker([sys.executable, "-c", HALVING], None)
        self.addCleanup(worker.close)
        return worker

    def stopped(self, worker):
        """Whether it is within a second or so."""
        for _ in range(100):
            if Path(f"/proc/{worker.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T":
                return True
            time.sleep(0.01)
        return False

    def test_waits_stopped(self):
        worker = self.worker()
        self.assertEqual(worker.ask(60, number=8), {"half": 4})
        self.assertTrue(self.stopped(worker))
        self.assertEqual(worker.ask(60, number=4), {"half": 2})

    def test_failures_have_a_name(self):
        worker = self.worker()
        with self.assertRaisesRegex(compare.Failed, "below zero"):
            worker.ask(60, number=-1)
        with self.assertRaisesRegex(compare.Failed, "ended with status 1: to no avail"):
            worker.ask(60, number=0)


class Preparing(unittest.TestCase):
    def test_refusals_are_kept(self):
        with tempfile.TemporaryDirectory() as folder:
            args = Namespace(work=Path(folder), envs=Path(folder), threads=2, peers=["openvino"])
            (Path(folder) / "m").mkdir()
            refuses = mock.Mock(side_effect=compare.Failed("status 1: unsupported: not this"))
            with mock.patch.multiple(compare, worker=lambda *_: ["python"], checkpoint=lambda *_: "hf", run=refuses):
                for _ in range(2):
                    self.assertEqual(compare.prepare(args, "m", "int8"), ([], {"openvino int8": "not this"}))
            self.assertEqual(refuses.call_count, 1)

    def test_an_absent_environment_is_told(self):
        with self.assertRaisesRegex(compare.Failed, "scripts/peer-env llama"):
            compare.worker(Namespace(envs=Path("/nowhere")), "llama", "convert", "hf", "folder", "f32")

    def test_compiled_is_a_form_of_a_peer(self):
        args = Namespace(envs=Path("/"), threads=2)
        with mock.patch.object(Path, "exists", lambda _: True):
            command = compare.worker(args, "torch-compiled", "serve", "hf", "folder", "f32")
        self.assertEqual((command[0], command[-1]), ("/torch/bin/python", "--compiled"))
        self.assertTrue(command[1].endswith("with_torch.py"))

    def test_tokenizer_has_a_word_for_each_token(self):
        made = json.loads(json.dumps(compare.word_tokenizer(10, 2)))
        self.assertEqual(sorted(made["model"]["vocab"].values()), list(range(10)))
        self.assertEqual(made["model"]["vocab"]["t2"], made["added_tokens"][0]["id"])

    def test_classes_name_known_peers(self):
        self.assertLessEqual({peer for pairs in compare.CLASSES.values() for peer, _ in pairs}, set(compare.PEERS))
        self.assertEqual(list(compare.CLASSES), figures.ORDER)


class Machine(unittest.TestCase):
    def test_facts(self):
        self.assertGreater(compare.machine()["memory_gib"], 0)
        self.assertGreater(compare.available_bytes(), 0)


if __name__ == "__main__":
    unittest.main()
