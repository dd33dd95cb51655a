"""Which part of a job this is, by what launchers and batch systems say; and what does not fit together."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cachefs.config import MOST_SHARDS, Sharding, parse_shard
from cachefs.errors import UsageError
from cachefs.mount.launchers import find_part

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "6",
    "OMPI_COMM_WORLD_SIZE": "12",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_RANK": "6",
}
SLURM_STEP = {
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_NTASKS": "6",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NNODES": "3",
}
SLURM_SCRIPT = {"SLURM_JOB_ID": "71", "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1"}
SLURM_ARRAY = {
    "SLURM_ARRAY_TASK_ID": "14",
    "SLURM_ARRAY_TASK_MIN": "10",
    "SLURM_ARRAY_TASK_MAX": "18",
    "SLURM_ARRAY_TASK_STEP": "2",
    "SLURM_ARRAY_TASK_COUNT": "5",
}
GRID_ENGINE = {
    "JOB_ID": "9",
    "NHOSTS": "1",
    "NSLOTS": "1",
    "SGE_TASK_ID": "undefined",
    "SGE_TASK_FIRST": "undefined",
    "SGE_TASK_LAST": "undefined",
    "SGE_TASK_STEPSIZE": "undefined",
}
GRID_ENGINE_ARRAY = {
    **GRID_ENGINE,
    "SGE_TASK_ID": "6",
    "SGE_TASK_FIRST": "2",
    "SGE_TASK_LAST": "10",
    "SGE_TASK_STEPSIZE": "4",
}


@pytest.mark.parametrize(
    ("environment", "rank", "node"),
    [
        (TORCHRUN, (5, 8), (1, 2)),
        (OPEN_MPI, (6, 12), (1, 3)),
        (SLURM_STEP, (3, 6), (1, 2)),
        ({**SLURM_STEP, **TORCHRUN}, (5, 8), (1, 2)),
        ({**SLURM_STEP, **OPEN_MPI}, (6, 12), (1, 3)),
        ({**OPEN_MPI, **TORCHRUN}, (5, 8), (1, 2)),
        ({**SLURM_STEP, **SLURM_ARRAY}, (3, 6), (1, 2)),
        ({**SLURM_STEP, "WORLD_SIZE": "6"}, (3, 6), (1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "4", **SLURM_STEP}, (1, 4), (1, 2)),
        ({"RANK": "3", "WORLD_SIZE": "6", **SLURM_STEP}, (3, 6), (1, 2)),
        ({**TORCHRUN, "RANK": "5", "WORLD_SIZE": "6", **SLURM_STEP}, (5, 6), (1, 2)),
        ({"RANK": "0", "WORLD_SIZE": "1", **SLURM_SCRIPT, **SLURM_ARRAY}, (0, 1), (0, 1)),
        (SLURM_SCRIPT, (0, 1), (0, 1)),
        ({**SLURM_SCRIPT, "SLURM_NTASKS": "1"}, (0, 1), (0, 1)),
        ({**SLURM_SCRIPT, **SLURM_ARRAY}, (2, 5), (0, 1)),
        ({**SLURM_SCRIPT, **SLURM_ARRAY, "SLURM_NTASKS": "4"}, (2, 5), (0, 1)),
        ({**SLURM_SCRIPT, **SLURM_ARRAY, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (2, 5), (0, 1)),
        (GRID_ENGINE, (0, 1), (0, 1)),
        (GRID_ENGINE_ARRAY, (1, 3), (0, 1)),
        ({**GRID_ENGINE_ARRAY, "SGE_TASK_ID": "10", "SGE_TASK_LAST": "12"}, (2, 3), (0, 1)),
        ({**GRID_ENGINE_ARRAY, **OPEN_MPI}, (6, 12), (1, 3)),
        ({**GRID_ENGINE, "NSLOTS": "8", **TORCHRUN}, (5, 8), (1, 2)),
    ],
)
def test_what_launchers_say(environment, rank, node):
    assert find_part(environment, "rank") == rank
    assert find_part(environment, "node") == node


def test_open_mpi_on_one_node_and_with_one_rank_a_node():
    local = {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    assert find_part({**OPEN_MPI, **local}, "node") == (6, 12)
    assert find_part({**OPEN_MPI, **local, "OMPI_MCA_orte_num_nodes": "12"}, "node") == (6, 12)
    local = {"OMPI_COMM_WORLD_LOCAL_RANK": "6", "OMPI_COMM_WORLD_LOCAL_SIZE": "12"}
    assert find_part({**OPEN_MPI, **local}, "node") == (0, 1)


@pytest.mark.parametrize(("rank", "local"), [(0, (0, 4)), (3, (3, 4)), (4, (0, 2)), (7, (1, 2))])
def test_open_mpi_with_other_numbers_of_ranks_on_other_nodes(rank, local):
    """4 + 2 + 2: each node for itself looks like one of 2, or of 4, that are all alike."""
    environment = {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": "8",
        "OMPI_COMM_WORLD_LOCAL_RANK": str(local[0]),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(local[1]),
        "OMPI_MCA_orte_num_nodes": "3",
    }
    with pytest.raises(UsageError, match=r"Open MPI does not say which node.*OMPI_MCA_orte_num_nodes=3"):
        find_part(environment, "node")


class TestParallelEnvironment:
    def environment(self, folder: Path, lines: str, **variables: str) -> dict[str, str]:
        path = folder / "pe_hostfile"
        path.write_text(lines)
        return {**GRID_ENGINE, "NHOSTS": "3", "NSLOTS": "9", "PE_HOSTFILE": str(path), **variables}

    HOSTS = "node7.example.org 4 all.q@node7 UNDEFINED\nnode2 1 a.q <NULL>\nnode2 2 b.q\nnode5 2 all.q@node5\n"

    @pytest.mark.parametrize(
        ("host", "number"), [("node7", 0), ("node7.example.org", 0), ("node2", 1), ("node5.example.org", 2)]
    )
    def test_hosts_are_nodes(self, tmp_path, host, number):
        assert find_part(self.environment(tmp_path, self.HOSTS, HOSTNAME=host), "node") == (number, 3)

    def test_this_host_where_no_variable_names_it(self, tmp_path):
        lines = f"a 1 q\n{socket.gethostname()} 1 q\nb 1 q\n"
        assert find_part(self.environment(tmp_path, lines), "node") == (1, 3)

    def test_with_one_slot_a_host_they_are_ranks(self, tmp_path):
        environment = self.environment(tmp_path, self.HOSTS, HOSTNAME="node5", NSLOTS="3")
        assert find_part(environment, "rank") == (2, 3)

    def test_slots_are_no_ranks(self, tmp_path):
        with pytest.raises(UsageError, match=r"no ranks.*NHOSTS=3, NSLOTS=9"):
            find_part(self.environment(tmp_path, self.HOSTS, HOSTNAME="node5"), "rank")

    def test_bad_host_files(self, tmp_path):
        with pytest.raises(UsageError, match="does not name this host, node9"):
            find_part(self.environment(tmp_path, self.HOSTS, HOSTNAME="node9"), "node")
        with pytest.raises(UsageError, match="has 1 hosts, and NHOSTS is 3"):
            find_part(self.environment(tmp_path, "node1 1 q\n", HOSTNAME="node1"), "node")
        with pytest.raises(UsageError, match=r"does not name this host, a\.x, just once"):
            find_part(self.environment(tmp_path, "a.y 1\na.z 1\nb 1\n", HOSTNAME="a.x"), "node")
        missing = self.environment(tmp_path, "", PE_HOSTFILE=str(tmp_path / "none"))
        with pytest.raises(UsageError, match=r"PE_HOSTFILE .*/none cannot be read: No such file"):
            find_part(missing, "node")
        del missing["PE_HOSTFILE"]
        with pytest.raises(UsageError, match="NHOSTS=3, no PE_HOSTFILE"):
            find_part(missing, "node")


@pytest.mark.parametrize(
    ("environment", "by", "names"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4"}, "rank", "RANK=4, WORLD_SIZE=4"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "rank", "RANK=0, WORLD_SIZE=0"),
        ({"RANK": "1"}, "rank", "RANK=1, no WORLD_SIZE"),
        ({"WORLD_SIZE": "4"}, "rank", "WORLD_SIZE=4, no RANK"),
        ({**SLURM_STEP, "WORLD_SIZE": "4"}, "rank", "WORLD_SIZE=4, no RANK"),
        ({**SLURM_STEP, "RANK": "0", "WORLD_SIZE": "6"}, "rank", "RANK=0, WORLD_SIZE=6, SLURM_PROCID=3"),
        ({**OPEN_MPI, "RANK": "0", "WORLD_SIZE": "12"}, "rank", "RANK=0, WORLD_SIZE=12, OMPI_COMM_WORLD_RANK=6"),
        ({**SLURM_STEP, "RANK": "0", "WORLD_SIZE": "6"}, "node", "RANK=0, WORLD_SIZE=6, SLURM_PROCID=3"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "rank", "LOCAL_RANK=4, LOCAL_WORLD_SIZE=4"),
        ({**TORCHRUN, "GROUP_RANK": "2"}, "node", "GROUP_RANK=2, GROUP_WORLD_SIZE=2"),
        ({**TORCHRUN, "RANK": "8"}, "node", "RANK=8, WORLD_SIZE=8"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "6"}, "rank", "OMPI_COMM_WORLD_RANK=6, OMPI_COMM_WORLD_SIZE=6"),
        ({**OPEN_MPI, "PMIX_RANK": "2"}, "rank", "OMPI_COMM_WORLD_RANK=6, PMIX_RANK=2"),
        ({**SLURM_STEP, "SLURM_PROCID": "6"}, "rank", "SLURM_PROCID=6, SLURM_STEP_NUM_TASKS=6"),
        ({**SLURM_STEP, "SLURM_NODEID": "2"}, "node", "SLURM_NODEID=2, SLURM_STEP_NUM_NODES=2"),
        ({**SLURM_SCRIPT, "SLURM_STEP_ID": "1"}, "rank", "SLURM_PROCID=0, no SLURM_STEP_NUM_TASKS"),
        ({**SLURM_ARRAY, "SLURM_ARRAY_TASK_ID": "15"}, "rank", "SLURM_ARRAY_TASK_ID=15, SLURM_ARRAY_TASK_MIN=10"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "rank", "SLURM_ARRAY_TASK_ID=1, no SLURM_ARRAY_TASK_MIN"),
        ({**GRID_ENGINE_ARRAY, "SGE_TASK_ID": "11"}, "rank", "SGE_TASK_ID=11, SGE_TASK_FIRST=2"),
        ({**GRID_ENGINE_ARRAY, "SGE_TASK_ID": "1"}, "rank", "SGE_TASK_ID=1, SGE_TASK_FIRST=2"),
        ({**GRID_ENGINE_ARRAY, "SGE_TASK_STEPSIZE": "0"}, "rank", "SGE_TASK_STEPSIZE=0"),
        ({"JOB_ID": "9", "SGE_TASK_ID": "1"}, "rank", "SGE_TASK_ID=1, no SGE_TASK_FIRST"),
        ({**SLURM_ARRAY, **GRID_ENGINE_ARRAY}, "rank", "SLURM_ARRAY_TASK_ID=14, SGE_TASK_ID=6"),
    ],
)
def test_contradictions_name_the_variables(environment, by, names):
    with pytest.raises(UsageError, match="contradict each other") as caught:
        find_part(environment, by)
    assert names in str(caught.value)
    assert "--shard R/N" in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "by", "says"),
    [
        ({}, "rank", "finds nothing that says which rank this is"),
        ({}, "node", "finds nothing that says which node this is"),
        ({"RANK": "", "WORLD_SIZE": ""}, "rank", "finds nothing"),
        (dict.fromkeys({**SLURM_STEP, **GRID_ENGINE}, ""), "rank", "finds nothing"),
        (dict.fromkeys({**SLURM_STEP, **GRID_ENGINE}, ""), "node", "finds nothing"),
        (TORCHRUN, "disk", "cannot be by disk"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "rank", "RANK is 'one', which is not a number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "rank", "RANK is '-1'"),
        ({"RANK": "1", "WORLD_SIZE": "9" * 30}, "rank", "WORLD_SIZE is '999"),
        ({"RANK": "1", "WORLD_SIZE": "1000000"}, "rank", f"{MOST_SHARDS} is the most"),
        (
            {**SLURM_SCRIPT, "SLURM_NTASKS": "4"},
            "rank",
            "several tasks, and none of them (SLURM_NTASKS=4, no SLURM_STEP",
        ),
        ({**SLURM_SCRIPT, "SLURM_NNODES": "4"}, "rank", "several tasks, and none of them (SLURM_NNODES=4"),
        ({**SLURM_SCRIPT, "SLURM_NNODES": "4"}, "node", "several nodes, and none of them (SLURM_NNODES=4"),
        ({**SLURM_ARRAY, "SLURM_ARRAY_TASK_COUNT": "3"}, "rank", "a Slurm array that is a range"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, "node", "Open MPI does not say which node"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "5"}, "node", "Open MPI does not say which node"),
    ],
)
def test_what_says_nothing_or_nonsense(environment, by, says):
    with pytest.raises(UsageError) as caught:
        find_part(environment, by)
    assert says in str(caught.value)
    assert caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "shard"),
    [("0/1", (0, 1)), ("3/4", (3, 4)), (" 2 / 9 ", (2, 9)), ("auto", "auto"), ("AUTO", "auto"), ("007/8", (7, 8))],
)
def test_shards_as_they_are_written(text, shard):
    assert parse_shard(text) == shard


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("4/4", "R counts from 0: the last of 4 is 3/4"),
        ("9/4", "the last of 4 is 3/4"),
        ("0/0", "there cannot be 0 shards"),
        ("0/65537", "there cannot be 65537 shards"),
        *((text, "is not a shard") for text in ("", "/", "1", "1/", "/2", "-1/2", "1/-2", "1/2/3", "a/b", "0.5/2")),
        *(
            (text, "is not a shard")
            for text in ("1\\2", "0/4 ranks", "\u0661/\u0664", "0/" + "9" * 30, "automatic", "1e0/2")
        ),
    ],
)
def test_nonsense_is_not_a_shard(text, says):
    with pytest.raises(UsageError) as caught:
        parse_shard(text)
    assert says in str(caught.value)
    assert caught.value.hint


def test_what_a_sharding_is_called():
    one = Sharding(0, 4, seed=3)
    assert str(one) == "0/4 by rank seed 3 keep"
    assert str(Sharding(1, 4, "node", "view", 3, fill=True, cut=True)) == "1/4 by node seed 3 view fill cut"
    assert one.division == Sharding(2, 4, "node", "view", 3, cut=True).division != Sharding(0, 4).division
