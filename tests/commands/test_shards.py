"""What the options of shards refuse, wherever they come from; and what status says of a shard."""

from __future__ import annotations

import pytest

from tests.commands.places import Place

NO_LAUNCHER = dict.fromkeys(
    ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "SLURM_ARRAY_TASK_ID", "SGE_TASK_ID", "JOB_ID"), ""
)


@pytest.mark.parametrize(
    "shard", ["4/4", "5/4", "0/0", "-1/4", "1/-4", "1", "1/", "/4", "a/b", "1.0/4", "", "0/99999999"]
)
@pytest.mark.parametrize("command", ["mount", "run"])
def test_nonsense_shards(own_place: Place, shard: str, command: str):
    arguments = (own_place.source,) if command == "mount" else ("--data", own_place.source)
    command_line = () if command == "mount" else ("--", "true")
    own_place.refused(command, *arguments, "--shard", shard, *command_line, code=2, says=("'--shard'", shard))


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4, WORLD_SIZE=4"),
        ({"RANK": "1", "WORLD_SIZE": ""}, "RANK=1, WORLD_SIZE="),
        ({"RANK": "x", "WORLD_SIZE": "4"}, "RANK is 'x'"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID=3"),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "0"}, "PMIX_RANK=0"),
        ({}, "finds nothing that says which rank this is"),
    ],
)
@pytest.mark.parametrize("command", ["mount", "run"])
def test_what_launchers_contradict(own_place: Place, environment: dict[str, str], says: str, command: str):
    arguments = (own_place.source,) if command == "mount" else ("--data", own_place.source)
    command_line = () if command == "mount" else ("--", "true")
    line = own_place.refused(
        *(command, *arguments, "--shard", "auto", *command_line), env={**NO_LAUNCHER, **environment}, code=2, says=says
    )
    assert "write --shard R/N" in line


def test_disks_are_counted_by_nobody(own_place: Place):
    own_place.refused(
        "mount", own_place.source, "--shard", "auto", "--shard-by", "disk", code=2, says="N the number of"
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--shard-by", "rack"), "'rack' is not"),
        (("--shard-mode", "hide"), "'hide' is not"),
        (("--shard-seed", "-1"), "--shard-seed"),
        (("--shard-seed", "many"), "--shard-seed"),
        (("--shard-seed", "9" * 40), "--shard-seed"),
    ],
)
def test_nonsense_values(own_place: Place, options: tuple[str, str], says: str):
    own_place.refused("mount", own_place.source, "--shard", "0/2", *options, code=2, says=says)


@pytest.mark.parametrize(
    "options", [("--shard-mode", "view"), ("--shard-by", "node"), ("--shard-seed", "1"), ("--shard-fill",)]
)
def test_options_without_a_shard(own_place: Place, options: tuple[str, ...]):
    own_place.refused("mount", own_place.source, *options, code=2, says=f"{options[0]} without --shard")


def test_environment_and_file_are_for_those_that_have_a_shard(own_place: Place):
    file = own_place.write(own_place.path / "options.toml", "shard-mode = 'view'\nshard-cut = true\nshard_seed = 5")
    env = {"CACHEFS_CONFIG": str(file), "CACHEFS_SHARD_BY": "node"}
    at = own_place.mount(env=env)
    assert own_place.status(at)["shard"] is None
    own_place.do("umount", at)
    at = own_place.mount(env={**env, "CACHEFS_SHARD": "1/2", "CACHEFS_SHARD_SEED": "6"})
    status = own_place.status(at)
    said = [status[f"shard{key}"] for key in ("", "_by", "_mode", "_seed")]
    assert said == ["1/2", "node", "view", 6]
    shown = own_place.do("status", at)
    assert "shard fingerprint" in shown
    assert str(status["shard_fingerprint"]) in shown
    own_place.do("umount", at)
    file.write_text("shard = '3/2'")
    own_place.refused(
        "mount", own_place.source, env=env, code=2, says=("options.toml, key shard", "the last of 2 is 1/2")
    )
