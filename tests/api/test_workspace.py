"""A result directory that appears whole or not at all."""

import errno
import fcntl
import json
import os

import pytest

from halve.api.workspace import EARLIER_STATE_FILE, LOCK_FILE, STATE_FILE, Workspace, refuse_existing, write_atomic
from halve.core.errors import OutputError, QualityError

KEY = {"model": "abc", "limit": 0.01}


def workspace(out, key=KEY, *, force=False, resume=False):
    return Workspace(out, key, force=force, resume=resume)


def a_bundle(path, content="old"):
    (path / "halve").mkdir(parents=True)
    (path / "halve" / "plan.json").write_text(content)
    return path


def finish(work, content="new"):
    directory = work.fresh_directory("model")
    (directory / "halve").mkdir()
    (directory / "halve" / "plan.json").write_text(content)
    work.publish(directory)


def interrupted_run(out, key=KEY, **state):
    def run():
        with workspace(out, key) as work:
            work.state |= state
            work.save_state()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()


def test_a_published_directory_is_all_that_is_left(tmp_path):
    with workspace(tmp_path / "out") as work:
        finish(work)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/halve/plan.json").read_text() == "new"


def test_an_error_of_the_users_leaves_nothing_not_even_the_parents_it_made(tmp_path):
    work = workspace(tmp_path / "a/b/out")
    work.__enter__().fresh_directory("model")
    work.__exit__(QualityError, QualityError("no format meets it"), None)
    assert list(tmp_path.iterdir()) == []


def test_parents_that_someone_else_uses_meanwhile_stay(tmp_path):
    work = workspace(tmp_path / "a/b/out")
    work.__enter__()
    (tmp_path / "a/other").write_text("mine")
    work.__exit__(QualityError, QualityError("no format meets it"), None)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == ["a", "a/other"]


def test_an_interrupted_run_keeps_its_work_and_is_taken_up(tmp_path):
    interrupted_run(tmp_path / "out", made=1)
    assert not (tmp_path / "out").exists()
    with workspace(tmp_path / "out", resume=True) as work:
        assert work.resumed
        assert work.state["made"] == 1


def test_without_resume_an_unfinished_run_is_started_afresh(tmp_path):
    interrupted_run(tmp_path / "out", made=1)
    (tmp_path / ".out.partial/model").mkdir()
    (tmp_path / ".out.partial/energies.npz").write_text("")
    with workspace(tmp_path / "out") as work:
        assert not work.resumed
        assert work.state == {"key": KEY}
        assert {p.name for p in work.path.iterdir()} == {LOCK_FILE, STATE_FILE}


def test_resume_with_nothing_to_take_up_starts_afresh(tmp_path):
    with workspace(tmp_path / "out", resume=True) as work:
        assert not work.resumed


def test_resume_with_other_inputs_is_refused_naming_them_and_keeps_the_work(tmp_path):
    interrupted_run(tmp_path / "out")
    other = {"model": "abc", "limit": 0.02, "portable": True}
    with pytest.raises(OutputError, match=r"unfinished run with other limit, portable;.*without --resume"):
        workspace(tmp_path / "out", other, resume=True).__enter__()
    with workspace(tmp_path / "out", resume=True) as work:
        assert work.resumed


def test_a_second_run_is_refused_while_the_first_holds_the_lock(tmp_path):
    with workspace(tmp_path / "out") as work:
        with pytest.raises(OutputError, match="another run is writing it just now"):
            workspace(tmp_path / "out", resume=True).__enter__()
        finish(work)
    assert (tmp_path / "out").exists()


def test_a_lock_whose_directory_another_run_took_away_is_no_lock(tmp_path, monkeypatch):
    real = fcntl.flock

    def flock_after_the_other_ended(file, how):
        (tmp_path / ".out.partial" / LOCK_FILE).unlink()
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock_after_the_other_ended)
    with pytest.raises(OutputError, match="another run is writing it just now"):
        workspace(tmp_path / "out").__enter__()


def test_force_replaces_a_bundle(tmp_path):
    out = a_bundle(tmp_path / "out")
    with workspace(out, force=True) as work:
        finish(work)
    assert (out / "halve/plan.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_run_killed_just_after_it_replaced_a_bundle_can_be_resumed(tmp_path):
    out = a_bundle(tmp_path / "out")
    interrupted_run(tmp_path / "elsewhere")
    os.rename(tmp_path / ".elsewhere.partial", tmp_path / ".out.partial")
    a_bundle(tmp_path / ".out.partial/replaced")
    with workspace(out, force=True, resume=True) as work:
        finish(work)
    assert (out / "halve/plan.json").read_text() == "new"


def test_a_bundle_that_cannot_be_replaced_comes_back(tmp_path, monkeypatch):
    out = a_bundle(tmp_path / "out")
    real = os.rename

    def rename(source, target):
        if os.path.basename(source) == "model":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OutputError, match="can't be put in place: Invalid"), workspace(out, force=True) as work:
        finish(work)
    assert (out / "halve/plan.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_result_that_appears_during_the_run_is_not_replaced_without_force(tmp_path):
    with workspace(tmp_path / "out") as work:
        a_bundle(tmp_path / "out", "someone else's")
        with pytest.raises(OutputError, match="exists already"):
            finish(work)
    assert (tmp_path / "out/halve/plan.json").read_text() == "someone else's"


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    with pytest.raises(OutputError, match="No space left on device; nothing was written"), workspace(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_an_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't be written: Not a directory; choose another --out"):
        workspace(tmp_path / "file/out").__enter__()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_parent_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="can't be written: Permission denied; choose another --out"):
        workspace(tmp_path / "out").__enter__()


@pytest.mark.parametrize("force", [False, True])
def test_what_does_not_exist_may_be_written(tmp_path, force):
    refuse_existing(tmp_path / "out", force=force)


def test_force_refuses_other_directories_files_and_dangling_links(tmp_path):
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory/thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("directory", "file", "link"):
        with pytest.raises(OutputError, match="exists already; choose another output or replace it with --force"):
            refuse_existing(tmp_path / name, force=False)
        with pytest.raises(OutputError, match="is not a bundle of Halve"):
            refuse_existing(tmp_path / name, force=True)


def test_an_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    write_atomic(path, json.dumps({"a": 1}))

    def no_space(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, json.dumps({"a": 2}))
    assert json.loads(path.read_text()) == {"a": 1}


def killed(out, steps, *, resume=False):
    """A run that notes its steps one by one and is then interrupted."""
    run = workspace(out, resume=resume)
    try:
        with run:
            taken_up = dict(run.state), run.resumed
            for step in steps:
                run.state["step"] = step
                run.save_state()
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        return run.path, taken_up


def test_of_a_damaged_state_the_one_before_it_is_taken_up(tmp_path, caplog):
    path, _ = killed(tmp_path / "out", range(3))
    (path / STATE_FILE).write_text('{"key": ')
    _, (state, resumed) = killed(tmp_path / "out", (), resume=True)
    assert (state["step"], resumed) == (1, True)
    assert "state.json: can't be read" in caplog.text
    assert "going on from the step before it" in caplog.text


def test_where_no_state_can_be_read_the_run_begins_afresh(tmp_path, caplog):
    path, _ = killed(tmp_path / "out", range(3))
    (path / STATE_FILE).write_text("[]")
    (path / EARLIER_STATE_FILE).write_bytes(b"\xff")
    _, (state, resumed) = killed(tmp_path / "out", (), resume=True)
    assert (state, resumed) == ({"key": KEY}, False)
    assert "holds no state of a run" in caplog.text
    assert "the run begins afresh" in caplog.text
