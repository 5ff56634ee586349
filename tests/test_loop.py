"""The loop end to end, through the command line, on small real projects."""
from __future__ import annotations

from conftest import Project

LOWER = 'open("src/value.txt", "w").write("90\\n")'


def test_a_true_gain_is_kept_and_handed_back(project: Project) -> None:
    project.turns(LOWER)
    before = project.fingerprint()
    result = project.run()
    assert result.code == 0, result
    assert project.verdicts() == ["keep metric.better"]
    assert project.git("show", "scalarloop/t:src/value.txt") == "90"
    assert project.git("log", "-1", "--format=%s", "scalarloop/t") == "#1 value 100 -> 90 (-10.0 %)"
    assert project.fingerprint() == before
    assert project.leftovers() == []
    assert project.run("verify").code == 0
