"""Several nodes: two torchrun processes that meet on loopback do what two ranks of one machine do."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, RUN, clean_environ, environment, forked, free_port, main, result

SHORT = dict(RUN, iterations=3, ttt_enabled=False)


def one_node(rank: int, world: int, folder: Path):
    main({**SHORT, "rank": rank, "local_rank": rank, "world_size": world}, folder).ok()


def test_two_nodes_give_the_artifact_and_the_score_of_one(tmp_path):
    """Static rendezvous, as in the README: the first node's address and port, one process each. The same bytes and the
    same score, to the last digit."""
    env = clean_environ(environment(SHORT, tmp_path / "two")) | {"GLOO_SOCKET_IFNAME": "lo"}
    launch = [
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=1",
        "--master_addr=127.0.0.1",
        f"--master_port={free_port()}",
    ]
    nodes = [
        subprocess.Popen(
            [sys.executable, *launch, f"--node_rank={node}", str(ROOT / "train_gpt.py")],
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in (0, 1)
    ]
    try:
        outputs = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)[-3000:]
    forked(one_node, 2, tmp_path / "one")
    two, one = result(tmp_path / "two"), result(tmp_path / "one")
    assert two["hardware"].endswith("x 2 rank(s)") and two["bpb"] == one["bpb"]
    assert (tmp_path / "two" / "model.bin").read_bytes() == (tmp_path / "one" / "model.bin").read_bytes()
    main(SHORT, tmp_path / "alone").ok()
    assert result(tmp_path / "alone")["val_bpb"] == pytest.approx(
        two["val_bpb"], abs=1e-3
    )  # one rank adds the gradients in another order
