"""The mount in its simplest use."""


def test_a_file_is_fetched_once_and_served_from_scratch_after(source, mounted):
    (source / "a").write_bytes(b"x" * 110_000)
    cache = mounted(source)
    assert (source / "a").read_bytes() == b"x" * 110_000
    assert (source / "a").read_bytes() == b"x" * 110_000
    status = cache.status()
    assert (status["misses"], status["hits"], status["fetches"]) == (1, 1, 1)
    assert status["resident_files"] == 1
    assert status["resident_bytes"] == status["source_bytes_read"] == 110_000
