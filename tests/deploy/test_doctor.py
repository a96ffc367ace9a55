from __future__ import annotations

import pytest

from deploy import doctor


@pytest.mark.parametrize("check", [doctor.machine, doctor.packages, doctor.network])
def test_quick_checks_find_this_machine_able(check: object) -> None:
    found = list(check())  # type: ignore[operator]
    assert found and all(result.state != "fail" for result in found)


@pytest.mark.integration
def test_replay_server_comes_up_and_goes_down() -> None:
    (found,) = doctor.replay_server()
    assert found.state == "ok", found


def test_too_little_memory_fails_with_a_remedy() -> None:
    scarce = doctor._size("memory", doctor.GIB // 2, 2, 4, "close other programs")
    assert (scarce.state, scarce.remedy) == ("fail", "close other programs")
    assert doctor._size("memory", 3 * doctor.GIB, 2, 4, "x").state == "warn"
    assert not doctor._size("memory", 8 * doctor.GIB, 2, 4, "x").remedy


def test_one_failed_check_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken_fan():  # type: ignore[no-untyped-def]
        yield doctor.Check(name="fan", state="fail", detail="stands still", remedy="turn it")

    monkeypatch.setattr(doctor, "CHECKS", (doctor.machine, broken_fan))
    assert doctor.doctor(doctor.DoctorOptions()) == 1
    shown = capsys.readouterr().out
    assert "→ turn it" in shown and "1 of" in shown
