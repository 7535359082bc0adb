"""A damaged model is never used: whatever reads it names the file and what makes it again."""

from pathlib import Path

import pytest

from pipeline.artifacts.store import Store
from pipeline.commands.cli import main
from tests.pipeline.small_store import small_store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("CHATMILL_STORE", str(tmp_path / "store"))
    return small_store(tmp_path / "store")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damaged", ["finetune/model.safetensors", "finetune/model.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("verb", [["chat", "--prompt", "Hi"], ["export"], ["eval", "tasks=[Arithmetic]"]], ids=str)
@pytest.mark.parametrize("by", ["stage", "folder"])
def test_one_flipped_bit_ends_what_would_have_used_it(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], damaged: str, verb: list[str], by: str
) -> None:
    module, name = damaged.split("/")
    artifact = store.find_by_name("sft" if module == "finetune" else "tokenizer")
    model = "sft" if by == "stage" else str(store.find_by_name("sft").folder)
    flip(artifact.folder / name)

    line = [verb[0], model, *verb[1:], *([str(tmp_path / "out")] if verb[0] == "export" else [])]
    assert main(line) == 1

    told = capsys.readouterr().err
    assert f"{artifact.folder / name} is not what was published" in told
    assert f"until={artifact.stages[0]}`" in told and "quarantine" in told
    assert not artifact.folder.exists() and not (tmp_path / "out").exists()


def test_the_report_is_verified_before_it_is_shown(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    work = store.work("report", "a" * 16)
    (work / "out").mkdir(parents=True)
    (work / "out" / "report.md").write_text("All is well.")
    artifact = store.publish(work, {"module": "report", "key": "a" * 16, "stages": ["report"], "finished": 1.0})
    assert main(["report"]) == 0
    assert "All is well." in capsys.readouterr().out
    (artifact.folder / "report.md").write_text("All is gone.")

    assert main(["report"]) == 1
    assert "All is gone." not in capsys.readouterr().out
