"""The fuzzer of tests/fuzz_ops.py: that it finds nothing, and that it would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fuzz_ops
import pytest

SCRIPT = Path(fuzz_ops.__file__)


@pytest.mark.slow
def test_a_hundred_thousand_calls() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(int(line.split()[-1]) for line in done.stdout.splitlines()) == 100_000


def test_every_op_is_called() -> None:
    """A type of argument that the fuzzer cannot draw ends it, with the name of what to add."""
    assert {"rms_norm.default", "fused_rms_norm.default"} < set(fuzz_ops.ops())
    for op in fuzz_ops.ops().values():
        drawn = fuzz_ops.Arguments(1, 1)
        for argument in op._schema.arguments:
            drawn.of(argument)


MISTAKES = {
    "signal 11 in call": "import ctypes; ctypes.string_at(0)",
    "a message that is not in the contract: Internal error": "raise RuntimeError('Internal error')",
    "KeyError: 'input'": "raise KeyError('input')",
    "an argument was changed": "input.fill_(7); return input",
}


@pytest.mark.slow
@pytest.mark.parametrize(("report", "mistake"), MISTAKES.items(), ids=MISTAKES)
def test_what_it_finds(report: str, mistake: str, tmp_path: Path) -> None:
    """An op that is wrong in one way makes it fail, and say which call to repeat."""
    module = tmp_path / "fuzz_wrong.py"
    module.write_text(
        "import fuzz_ops, torch\n"
        "def wrong(input: torch.Tensor) -> torch.Tensor:\n"
        f"    {mistake}\n"
        "library = torch.library.Library('coreai_torch_wrong', 'DEF')\n"
        "library.define('wrong(Tensor input) -> Tensor')\n"
        "library.impl('wrong', wrong, 'CPU')\n"
        "fuzz_ops.ops = lambda: {'wrong': torch.ops.coreai_torch_wrong.wrong.default}\n"
        "fuzz_ops.__file__ = __file__\n"
        "if __name__ == '__main__':\n"
        "    raise SystemExit(fuzz_ops.main())\n"
    )
    done = subprocess.run(
        [sys.executable, module, "--calls", "200", "--jobs", "1"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(SCRIPT.parent)},
    )
    assert done.returncode == 1
    assert report in done.stderr
    assert "of seed 1; to repeat it:" in done.stderr
