"""Real extractions are killed at spread moments, and two are run into one store at once; the script that does it 200 times does it here a few times."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_extractions.py"


def test_five_killed_extractions_are_resumed_to_the_same_store_and_of_two_at_once_each_is_whole_or_refused():
    done = subprocess.run([sys.executable, "-W", "ignore", SCRIPT, "--kills", "5", "--pairs", "1", "--images", "16", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["kills"] == report["same_store_after_resume"] == 5
    assert report["ended_whole"] + report["refused"] == 2
    assert report["ended_whole"] >= 1
