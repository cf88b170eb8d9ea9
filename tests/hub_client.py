"""A process that uses the real huggingface_hub client against a server of the tests.

huggingface_hub reads its settings when it is imported, so the server's address has to be in the environment before that.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch
from model_helpers import features

ROOT = Path(__file__).resolve().parent.parent

# Waits of the client between its tries are shortened: they change no decision.
_LOOP = """
import json, sys, time
answers, sys.stdout = sys.stdout, sys.stderr
time.sleep = (lambda sleep: lambda seconds: sleep(min(seconds, 0.01)))(time.sleep)
names = {}
for line in sys.stdin:
    job = json.loads(line)
    names.update(job["names"], result=None)
    try:
        exec(job["code"], names)
        answer = {"result": names["result"]}
    except BaseException as error:
        answer = {"error": [cls.__name__ for cls in type(error).__mro__], "message": str(error)}
    print(json.dumps(answer), file=answers, flush=True)
"""


class RemoteError(Exception):
    """What was raised in the client; ``kinds`` are the names of its classes."""

    def __init__(self, kinds: list[str], message: str) -> None:
        super().__init__(f"{kinds[0]}: {message}")
        self.kinds, self.message = kinds, message


class HubClient:
    """Runs code in a process of its own until :meth:`close`; names stay from one run to the next."""

    def __init__(self, url: str, home: Path, prelude: str = "", **environment: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        settings = {
            "HF_ENDPOINT": url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",  # which needs more than HTTP
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
            "TMPDIR": str(home),
            **environment,
        }
        home.mkdir(parents=True, exist_ok=True)
        self.errors = home.with_suffix(".log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LOOP],
            env={**kept, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        if prelude:
            self.run(prelude)

    def run(self, code: str, **names: Any) -> Any:
        """What ``code`` leaves in ``result``; arguments are names it can use.

        Raises:
            RemoteError: what the code raised.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"code": textwrap.dedent(code), "names": names}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the client process ended: {Path(self.errors.name).read_text()[-3000:]}"
        answer = json.loads(line)
        if "error" in answer:
            raise RemoteError(answer["error"], answer["message"])
        return answer["result"]

    def close(self) -> None:
        self.process.kill()  # torch takes seconds to end by itself
        self.process.wait(timeout=60)
        self.errors.close()


def fingerprint(model: Any) -> str:
    """Hash of every tensor of the model and of its outputs for fixed inputs: equal only where all bits are."""
    found = hashlib.sha256(str(model.quant_state).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    with torch.no_grad():
        found.update(model.eval()(inputs_embeds=features(seed=9))[0].numpy().tobytes())
    return found.hexdigest()
