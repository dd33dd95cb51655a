"""The mode that is shown of a file with an access control list."""

from __future__ import annotations

import stat
import struct

from hypothesis import given
from hypothesis import strategies as st

from cachefs.source.acl import restricted_mode

PERMISSIONS = st.integers(0, 7)
NAMED = st.dictionaries(st.integers(1, 4), PERMISSIONS, max_size=3)
OWNER, OWNING_GROUP = 10, 20


def packed(owner, users, group, groups, mask, other):
    entries = [(1, owner, 0), *((2, p, u) for u, p in users.items()), (4, group, 0)]
    entries += [*((8, p, g) for g, p in groups.items()), (16, mask, 0), (32, other, 0)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def granted_by_list(owner, users, group, groups, mask, other, *, user, member_of):
    """Each set of permissions that acl(5) gives: a process needs one entry that has all that it asks for."""
    if user == OWNER:
        return [owner]
    if user in users:
        return [users[user] & mask]
    found = [group & mask] * (OWNING_GROUP in member_of) + [p & mask for g, p in groups.items() if g in member_of]
    return found or [other]


@given(PERMISSIONS, NAMED, PERMISSIONS, NAMED, PERMISSIONS, PERMISSIONS, st.integers(1, 10), st.sets(st.integers(1, 4)))
def test_nobody_has_more_than_the_list_gives(owner, users, group, groups, mask, other, user, member_of):
    for is_in_group in (False, True):
        members = member_of | ({OWNING_GROUP} if is_in_group else set())
        mode = restricted_mode(
            stat.S_IFREG | owner << 6 | mask << 3 | other, packed(owner, users, group, groups, mask, other)
        )
        assert stat.S_ISREG(mode)
        shift = 6 if user == OWNER else 3 if OWNING_GROUP in members else 0
        shown = mode >> shift & 7
        allowed = granted_by_list(owner, users, group, groups, mask, other, user=user, member_of=members)
        assert any(shown & one == shown for one in allowed)


def test_a_list_that_names_nobody_says_what_the_mode_does():
    mode = stat.S_IFREG | 0o754
    assert restricted_mode(mode, struct.pack("<I", 2)) == mode
    assert restricted_mode(mode, packed(7, {}, 5, {}, 7, 4)) == mode
