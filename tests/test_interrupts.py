"""A Ctrl-C that Python would swallow, or that hits an import, is raised where it can be caught."""

import subprocess
import sys

import pytest

INSIDE_A_FINALIZER = """
class Closing:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
closing = Closing()
del closing
"""
INSIDE_AN_IMPORT = """
import pathlib, tempfile
folder = tempfile.mkdtemp()
code = "import os, signal; os.kill(os.getpid(), signal.SIGINT); finished = True"
pathlib.Path(folder, "interrupted_module.py").write_text(code)
sys.path.insert(0, folder)
import interrupted_module
assert interrupted_module.finished
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGALRM")
@pytest.mark.parametrize("where", [INSIDE_A_FINALIZER, INSIDE_AN_IMPORT])
def test_an_interrupt_is_deferred_not_lost(where):
    program = f"""
import os, signal, sys, time
from tpu_stack.interrupts import catch_ctrl_c, requested
catch_ctrl_c()
assert not requested()
try:
{"".join(f"    {line}{chr(10)}" for line in where.strip().splitlines())}
    time.sleep(10)
except KeyboardInterrupt:
    print("caught", requested())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("caught True\n", "", 0)
