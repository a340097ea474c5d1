"""Under which commit rows are written."""

import subprocess

from benchmarks.run import commit_of


def test_a_changed_tree_is_marked_and_new_rows_are_no_change(tmp_path):
    def git(*arguments):
        names = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *names, *arguments], check=True, capture_output=True)

    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    assert commit_of(results) == "unknown"
    (results / "a.csv").write_text("1\n")
    (tmp_path / "code.py").write_text("a = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    name = commit_of(results)
    assert len(name) >= 7 and "dirty" not in name
    (results / "a.csv").write_text("1\n2\n")
    assert commit_of(results) == name
    (tmp_path / "code.py").write_text("a = 2\n")
    assert commit_of(results) == f"{name}-dirty"
