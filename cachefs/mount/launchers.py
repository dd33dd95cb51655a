"""Which part of a job this process is, by the variables of whatever has started it: for --shard auto.

Who started it last knows best: torchrun, then Open MPI, then a step of Slurm, then the job itself (a task of an array,
a host of a parallel environment). Within one of them the variables must fit together; what does not is a UsageError
that names them, for a rank that takes itself for another would leave out a part of the data.

| launcher | rank | node |
|---|---|---|
| torchrun (torch.distributed.run) | RANK of WORLD_SIZE | GROUP_RANK of GROUP_WORLD_SIZE |
| Open MPI (environment variables set for MPI applications) | OMPI_COMM_WORLD_RANK of _SIZE | see `_mpi_node` |
| a step of Slurm (srun(1)) | SLURM_PROCID of SLURM_STEP_NUM_TASKS | SLURM_NODEID of SLURM_STEP_NUM_NODES |
| an array of Slurm (sbatch(1)) | SLURM_ARRAY_TASK_ID in _MIN, _MAX, _STEP, _COUNT | |
| Grid Engine (qsub(1), sge_pe(5)) | SGE_TASK_ID in _FIRST, _LAST, _STEPSIZE | this host in PE_HOSTFILE, NHOSTS lines |
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

from cachefs.config import MOST_SHARDS
from cachefs.errors import UsageError, describe

Environment = Mapping[str, str]
Part = tuple[int, int]
"""(which, of how many)."""

_SAY_IT = "write --shard R/N"
_MPI_NODES = "OMPI_MCA_orte_num_nodes"
"""Set up to Open MPI 4: without it, 4 + 2 + 2 ranks look like as many on each of other numbers of nodes."""
_SLURM_TASKS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
_SLURM_NODES = ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
"""Within a step, and of the whole job; that of tasks is not set where --nodes alone was given."""
_UNDEFINED = ("", "undefined")
"""Grid Engine's value of a variable that a job has not."""


def find_part(environment: Environment, by: str) -> Part:
    """The part that this process is, `by` "rank" or "node". Raises UsageError where nothing says it, or not clearly."""
    if by == "disk":
        raise UsageError(
            "--shard auto cannot be by disk: no launcher counts scratch disks", f"{_SAY_IT}, N the number of disks"
        )
    for read in _LAUNCHERS[by]:
        part = read(environment)
        if part is not None:
            return part
    raise UsageError(
        f"--shard auto finds nothing that says which {by} this is (torchrun, Slurm, Open MPI or Grid Engine)",
        f"start cachefs with one of them, or {_SAY_IT}",
    )


def _torchrun_rank(environment: Environment) -> Part | None:
    part = _pair(environment, "RANK", "WORLD_SIZE")
    _pair(environment, "LOCAL_RANK", "LOCAL_WORLD_SIZE", is_optional=True)
    size = _number(environment, "WORLD_SIZE")
    if part is None and size is not None:  # scripts export it ahead of srun, whose ranks then must be as many
        outer = _mpi_rank(environment) or _slurm_rank(environment)
        if outer is None or outer[1] != size:
            raise _contradiction(environment, "WORLD_SIZE", "RANK")
    if part is not None and not environment.get("TORCHELASTIC_RUN_ID"):
        _check_exported(environment, part)
    return part


def _check_exported(environment: Environment, part: Part) -> None:
    """RANK of WORLD_SIZE is not torchrun's: scripts export it from the step's own, and ahead of the step all get one's.

    Launchers that are none of ours set it too, for more ranks than the step has; torchrun may number them otherwise.
    """
    for read, names in (
        (_mpi_rank, ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")),
        (_slurm_step_rank, ("SLURM_PROCID", *_SLURM_TASKS)),
    ):
        outer = read(environment)
        if outer is not None:
            if outer[1] == part[1] and outer != part:
                raise _contradiction(environment, "RANK", "WORLD_SIZE", *names)
            return


def _torchrun_node(environment: Environment) -> Part | None:
    _torchrun_rank(environment)
    return _pair(environment, "GROUP_RANK", "GROUP_WORLD_SIZE")


def _mpi_rank(environment: Environment) -> Part | None:
    part = _pair(environment, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    if part is not None and _number(environment, "PMIX_RANK") not in (None, part[0]):
        raise _contradiction(environment, "OMPI_COMM_WORLD_RANK", "PMIX_RANK")
    return part


def _mpi_node(environment: Environment) -> Part | None:
    """Open MPI says how many ranks a node has, and not which node this is: that follows where nodes are filled in turn.

    It places ranks like that unless it is told otherwise.
    """
    world = _mpi_rank(environment)
    if world is None:
        return None
    rank, size = world
    names = ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
    local, nodes = _pair(environment, *names), _number(environment, _MPI_NODES)
    if local is None:
        raise _contradiction(environment, "OMPI_COMM_WORLD_RANK", *names)
    is_regular = not size % local[1] and rank % local[1] == local[0]
    if not is_regular or nodes not in (None, size // local[1]):
        raise UsageError(
            f"Open MPI does not say which node this is where ranks are not placed node by node, as many on each "
            f"({_quoted(environment, 'OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', *names, _MPI_NODES)})",
            _SAY_IT,
        )
    return rank // local[1], size // local[1]


def _slurm_step_rank(environment: Environment) -> Part | None:
    """A task of srun's, of several."""
    return _slurm_rank(environment) if environment.get("SLURM_STEP_ID") else None


def _slurm_rank(environment: Environment) -> Part | None:
    """A task of srun's. Where that has started just one, the job may be one of an array's."""
    part = _slurm_part(environment, "SLURM_PROCID", _SLURM_TASKS, "tasks")
    return part if part != (0, 1) or _task(environment) is None else None


def _slurm_node(environment: Environment) -> Part | None:
    return _slurm_part(environment, "SLURM_NODEID", _SLURM_NODES, "nodes")


def _slurm_part(environment: Environment, which: str, sizes: tuple[str, ...], what: str) -> Part | None:
    """Within a step. A batch script has the variables of the first task or node, and is none of them."""
    if _number(environment, which) is None:
        return None
    if environment.get("SLURM_STEP_ID"):
        size = next((name for name in sizes if environment.get(name)), sizes[0])
        return _pair(environment, which, size)
    of_job = dict.fromkeys((*sizes[1:], *_SLURM_NODES[1:]))  # a job on several nodes has several tasks
    several = [name for name in of_job if _number(environment, name) not in (None, 1)]
    if not several:
        return 0, 1
    if _task(environment) is not None and what == "tasks":
        return None
    raise UsageError(
        f"--shard auto: this is the script of a Slurm job with several {what}, and none of them "
        f"({_quoted(environment, *several)}, no SLURM_STEP_ID)",
        f"start cachefs with srun, or {_SAY_IT}",
    )


def _task(environment: Environment) -> Part | None:
    """A task of an array, of whichever batch system."""
    slurm, grid_engine = _slurm_task(environment), _grid_engine_task(environment)
    if slurm is not None and grid_engine is not None and slurm != grid_engine:
        raise _contradiction(environment, "SLURM_ARRAY_TASK_ID", "SGE_TASK_ID")
    return grid_engine if slurm is None else slurm


def _slurm_task(environment: Environment) -> Part | None:
    names = tuple(f"SLURM_ARRAY_TASK_{end}" for end in ("ID", "MIN", "MAX", "STEP", "COUNT"))
    task, first, last, step, count = (_number(environment, name) for name in names)
    if task is None:
        return None
    if first is None or last is None or count is None:
        raise _contradiction(environment, *names)
    step = step or 1
    if (last - first) // step + 1 != count:  # --array=1,2,5: what the third one is it cannot know
        raise UsageError(
            f"--shard auto needs a Slurm array that is a range ({_quoted(environment, *names)})",
            f"write --array=0-{max(count, 1) - 1}, or {_SAY_IT}",
        )
    return _task_in_range(environment, task, first, last, step, names)


def _grid_engine_task(environment: Environment) -> Part | None:
    names = ("SGE_TASK_ID", "SGE_TASK_FIRST", "SGE_TASK_LAST", "SGE_TASK_STEPSIZE")
    task, first, last, step = (_number(environment, name) for name in names)
    if task is None:
        return None
    if first is None or last is None or step is None:
        raise _contradiction(environment, *names)
    return _task_in_range(environment, task, first, last, step, names)


def _task_in_range(
    environment: Environment, task: int, first: int, last: int, step: int, names: tuple[str, ...]
) -> Part:
    if not (first <= task <= last and step > 0 and (task - first) % step == 0):
        raise _contradiction(environment, *names)
    return (task - first) // step, _plausible((last - first) // step + 1, names[0])


def _grid_engine_rank(environment: Environment) -> Part | None:
    """A parallel environment has hosts and slots; ranks are what mpirun, say, starts in it."""
    slots, hosts = _number(environment, "NSLOTS"), _number(environment, "NHOSTS")
    if not environment.get("JOB_ID") or slots is None or hosts is None:
        return None
    if slots == hosts:
        return _grid_engine_host(environment)
    raise UsageError(
        f"--shard auto: a parallel environment of Grid Engine has hosts and slots, and no ranks "
        f"({_quoted(environment, 'NHOSTS', 'NSLOTS')})",
        f"start cachefs with mpirun or torchrun, choose --shard-by node, or {_SAY_IT}",
    )


def _grid_engine_host(environment: Environment) -> Part | None:
    count = _number(environment, "NHOSTS")
    if not environment.get("JOB_ID") or count is None:
        return None
    if count == 1:
        return 0, 1
    path = environment.get("PE_HOSTFILE")
    if not path:
        raise _contradiction(environment, "NHOSTS", "PE_HOSTFILE")
    try:
        with open(path, errors="replace") as file:
            hosts = list(dict.fromkeys(line.split()[0] for line in file if line.strip()))  # one line a queue
    except OSError as error:
        raise UsageError(f"--shard auto: PE_HOSTFILE {path} cannot be read: {describe(error)}", _SAY_IT) from None
    if len(hosts) != count:
        raise UsageError(f"--shard auto: PE_HOSTFILE {path} has {len(hosts)} hosts, and NHOSTS is {count}", _SAY_IT)
    ours = environment.get("HOSTNAME") or socket.gethostname()
    found = [host for host in hosts if host == ours]
    found = found or [host for host in hosts if host.partition(".")[0] == ours.partition(".")[0]]
    if len(found) == 1:
        return hosts.index(found[0]), count
    raise UsageError(f"--shard auto: PE_HOSTFILE {path} does not name this host, {ours}, just once", _SAY_IT)


def _pair(environment: Environment, which: str, of: str, *, is_optional: bool = False) -> Part | None:
    """(which, of how many), None without the first. Raises UsageError where they do not fit."""
    number, count = _number(environment, which), _number(environment, of)
    if number is None or (count is None and is_optional):
        return None
    if count is None or number >= count:
        raise _contradiction(environment, which, of)
    return number, _plausible(count, of)


def _number(environment: Environment, name: str) -> int | None:
    """A variable's value; None where it is not set."""
    text = environment.get(name, "").strip()
    if text in _UNDEFINED:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise UsageError(f"--shard auto: {name} is {text!r}, which is not a number", f"unset it, or {_SAY_IT}")
    return int(text)


def _plausible(count: int, name: str) -> int:
    if count > MOST_SHARDS:
        raise UsageError(f"--shard auto: {name} makes {count} shards, and {MOST_SHARDS} is the most", _SAY_IT)
    return count


def _contradiction(environment: Environment, *names: str) -> UsageError:
    return UsageError(
        f"--shard auto: the variables of the launcher contradict each other ({_quoted(environment, *names)})",
        f"set them right, unset them, or {_SAY_IT}",
    )


def _quoted(environment: Environment, *names: str) -> str:
    """The variables as they are: "RANK=4, no WORLD_SIZE"."""
    return ", ".join(f"{name}={environment[name]}" if name in environment else f"no {name}" for name in names)


_LAUNCHERS = {
    "rank": (_torchrun_rank, _mpi_rank, _slurm_rank, _task, _grid_engine_rank),
    "node": (_torchrun_node, _mpi_node, _slurm_node, _grid_engine_host),
}
"""Who started it last comes first."""
