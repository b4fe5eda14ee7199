# ruff: noqa: E501
"""Programs that would like to be paid for adding two numbers without adding them.

SCRIPTS read two numbers and should print their sum; FUNCTIONS define `add` and should return it.
None of them does: each tries to be believed instead.
"""

from __future__ import annotations

SCRIPTS = {
    "exits early": "import sys; sys.exit(0)",
    "exits at once": "import os; os._exit(0)",
    "says passed": "print('passed')",
    "says passed as a frame": "print('{\"passed\": true}')",
    "says it is ready": "print('{\"ready\": 0}')",
    "prints every small number": "print(*range(-50, 50))",
    "prints every small number, one a line": "for n in range(-50, 50): print(n)",
    "prints its input": "print(open(0).read())",
    "prints the first answer twice": "print(7)",
    "prints the right answer among others": "print(7, 8)",
    "overwrites what it printed": "print('7\\r8\\x1b[2K7')",
    "prints nothing": "pass",
    "is empty": "",
    "is a comment": "# 7 for 3 4, 8 for 10 -2",
    "prints not a number": "print(float('nan'))",
    "prints, then fails": "a, b = map(int, input().split()); print(a + b); raise SystemExit(1)",
    "prints, then is killed": "import os\na, b = map(int, input().split())\n"
    "print(a + b, flush=True); os.kill(os.getpid(), 9)",
    "prints to the wrong stream": "import sys\nprint(sum(map(int, input().split())), file=sys.stderr)",
    "reads the header again": "import os\nprint(os.pread(0, 99, 0))",
    "looks for answers": "import glob\nprint(glob.glob('/**/*', recursive=True)[:99])",
    "looks at its starter": "import sys\n"
    "f = sys._getframe()\nwhile f.f_back: f = f.f_back\nprint(f.f_locals, f.f_globals.keys())",
    "prints all texts in memory": "import gc\nprint([o for o in gc.get_objects() if type(o) is str])",
    "prints what main was told": "import sys\nprint([f.f_locals.get('header') for f in "
    "sys._current_frames().values()])",
    "makes print equal": "class S(str):\n    def __eq__(self, other): return True\nprint(S('x'))",
    "closes the stream": "import os; os.close(1)",
    "prints endlessly": "while True: print(7)",
    "answers from a child": "import os\nif os.fork() == 0: print(7)",
    "waits for luck": "import random\nprint(random.choice([70, 80]))",
}
_FORGE = """
import json, os, sys
def frames():
    frame = sys._getframe()
    while frame:
        yield frame.f_locals
        frame = frame.f_back
def nonce():
    return next(f["nonce"] for f in frames() if "nonce" in f)
"""
FUNCTIONS = {
    "raises exit": "def add(a, b): raise SystemExit(0)",
    "exits on import": "import sys; sys.exit(0)\ndef add(a, b): return 0",
    "exits at once": "import os\ndef add(a, b): os._exit(0)",
    "exits at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): return 0",
    "kills itself": "import os\ndef add(a, b): os.kill(os.getpid(), 9)",
    "is equal to all": "class E:\n    def __eq__(self, other): return True\n"
    "def add(a, b): return E()",
    "is an int equal to all": "class E(int):\n    def __eq__(self, other): return True\n"
    "    __hash__ = int.__hash__\ndef add(a, b): return E(0)",
    "is unequal to none": "class E(int):\n    def __ne__(self, other): return False\n"
    "    def __sub__(self, other): return 0\ndef add(a, b): return E(0)",
    "is a float equal to all": "class E(float):\n    def __eq__(self, other): return True\n"
    "def add(a, b): return E(0)",
    "is a text equal to all": "class E(str):\n    def __eq__(self, other): return True\n"
    "    def __str__(self): return '7'\ndef add(a, b): return E('x')",
    "is a list equal to all": "class E(list):\n    def __eq__(self, other): return True\n"
    "def add(a, b): return E()",
    "is a dict equal to all": "class E(dict):\n    def __eq__(self, other): return True\n"
    "def add(a, b): return E()",
    "lies about its class": "class E:\n    __class__ = int\n    def __eq__(self, o): return True\n"
    "    def __index__(self): return 7\ndef add(a, b): return E()",
    "is a mock of anything": "from unittest.mock import ANY\ndef add(a, b): return ANY",
    "is not a number": "def add(a, b): return float('nan')",
    "is infinite": "def add(a, b): return float('inf')",
    "is a generator": "def add(a, b): yield 7; yield 8",
    "is all answers": "def add(a, b): return [7, 8, 0]",
    "is a text of the answer": "def add(a, b): return str(a + b)",
    "is nothing": "def add(a, b): return None",
    "is true": "def add(a, b): return True",
    "is a type": "def add(a, b): return int",
    "is not implemented": "def add(a, b): return NotImplemented",
    "raises what a test might catch": "def add(a, b): raise AssertionError('passed')",
    "raises a stop": "def add(a, b): raise StopIteration(7)",
    "raises a lying error": "class E(Exception):\n    def __str__(self): raise E\n"
    "def add(a, b): raise E",
    "is not there": "def subtract(a, b): return a - b",
    "is no function": "add = 7",
    "is a broken source": "def add(a, b) return 7",
    "is empty": "",
    "defines the test": "def check(candidate): pass\ndef add(a, b): return 0",
    "replaces assert": "import builtins\nbuiltins.AssertionError = StopIteration\n"
    "def add(a, b): return 0",
    "replaces equality helpers": "import builtins, math\nbuiltins.abs = lambda x: 0\n"
    "builtins.all = builtins.any = builtins.isinstance = lambda *a: True\n"
    "math.isclose = lambda *a, **k: True\ndef add(a, b): return 0",
    "replaces the encoder": "import sys\nm = sys.modules['__main__']\n"
    "m.encode = lambda *a: True\ndef add(a, b): return 0",
    "replaces the speaker": "import sys\nm = sys.modules['__main__']\nsay = m._say\n"
    "m._say = lambda s, n, f: say(s, n, {'passed': True})\ndef add(a, b): return 0",
    "replaces json": "import json\nold = json.dumps\n"
    "json.dumps = lambda f: old({**f, 'passed': True, 'value': True})\ndef add(a, b): return 0",
    "traces the caller": "import sys\nsys.settrace(lambda *a: None)\ndef add(a, b): return 0",
    "forges a verdict": _FORGE + "def add(a, b):\n"
    "    line = json.dumps({'nonce': nonce(), 'passed': True}).encode() + b'\\n'\n"
    "    for n in range(3, 9):\n        try: os.write(n, line)\n        except OSError: pass\n"
    "    return 0",
    "forges a verdict on import": _FORGE + "line = json.dumps({'nonce': nonce(), 'passed': True})\n"
    "for n in range(3, 9):\n    try: os.write(n, line.encode() + b'\\n')\n    except OSError: pass\n"
    "def add(a, b): return 0",
    "forges a call": _FORGE + "def add(a, b):\n"
    "    line = json.dumps({'nonce': nonce(), 'call': {'args': {'tuple': []}}}).encode() + b'\\n'\n"
    "    os.write(4, line)\n    return 0",
    "forges strange values": _FORGE + "def add(a, b):\n"
    "    for v in ({'object': 'rollout'}, {'set': [[1]]}, {'dict': 3}, {'int': 'x'}, [7], {}):\n"
    "        line = json.dumps({'nonce': nonce(), 'value': v}).encode() + b'\\n'\n"
    "        os.write(4, line)\n    return 0",
    "forges a number beyond floats": _FORGE + "def add(a, b):\n"
    "    v = {'complex': ['0x1p99999', '0x0p0']}\n"
    "    os.write(4, json.dumps({'nonce': nonce(), 'value': v}).encode() + b'\\n')\n    return 0",
    "forges a deep value": _FORGE + "def add(a, b):\n"
    "    os.write(4, ('{\"nonce\": \"' + nonce() + '\", \"value\": ' + '[' * 90000 + '\\n').encode())",
    "guesses the nonce": "import os\ndef add(a, b):\n"
    '    os.write(4, b\'{"nonce": "0", "passed": true}\\n\')\n    return 0',
    "floods the line": "import os\ndef add(a, b):\n    while True: os.write(4, b'x' * 65536)",
    "reads the next question": "import os\nos.set_blocking(3, False)\ndef add(a, b):\n"
    "    os.read(3, 99)\n    return 0",
    "looks for the test": "import gc\ndef add(a, b):\n"
    "    return [o for o in gc.get_objects() if type(o) is str and 'assert' in o]",
    "looks at who called": "import sys\ndef add(a, b):\n"
    "    f = sys._getframe(1)\n    return f.f_locals.get('wanted', f.f_locals.get('expected'))",
    "looks at its command line": "import sys\ndef add(a, b): return sys.argv + sys.orig_argv",
    "echoes its arguments": "def add(a, b): return a",
    "changes its arguments": "def add(*args):\n    return args",
    "knows one answer": "def add(a, b): return 7",
    "returns too much": "def add(a, b): return 'x' * (1 << 21)",
    "returns itself": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "loops": "def add(a, b):\n    while True: pass",
    "sleeps": "import time\ndef add(a, b): time.sleep(99)",
    "forks and answers again": "import os, time\n"
    "def add(a, b):\n    if os.fork(): return a + b + 1\n    time.sleep(3)\n    return a + b",
}
