"""Runs train_gpt.py in forks of a process that has torch loaded, so that the seconds of an import are paid once.

One JSON request per line on stdin: {"folder", "env", "world", "blocked", "output", "port"}; the answer is the exit
status of the worst rank.
"""

import json
import os
import runpy
import signal
import socket
import sys
import traceback

import numpy  # noqa: F401
import sentencepiece  # noqa: F401
import torch
import torch._dynamo  # noqa: F401
import torch.distributed  # noqa: F401


def refuse(*_):
    raise OSError("the network is blocked")


def rank_process(request: dict, rank: int) -> int:
    """The script as the command line would run it; the exit status."""
    out = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(request["env"])
    if request["world"] > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(request["world"]),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(request["port"]),
        )
    if request["blocked"]:
        os.environ["PATH"] = request["folder"]
        socket.socket.connect = socket.socket.connect_ex = refuse
    os.chdir(request["folder"])
    torch.set_num_threads(1)
    signal.alarm(120)
    sys.argv = ["train_gpt.py"]
    try:
        runpy.run_path("train_gpt.py", run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main():
    for line in sys.stdin:
        request = json.loads(line)
        children = []
        for rank in range(request["world"]):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    code = rank_process(request, rank)
                    sys.stdout.flush(), sys.stderr.flush()
                finally:
                    os._exit(code)
            children.append(pid)
        print(max(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) for pid in children), flush=True)


if __name__ == "__main__":
    main()
