import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from made_up import artifact, chat_results, results, task, whole_run

from pipeline.job import Job, Launch
from pipeline.report import render
from pipeline.report.made import read
from pipeline.report.pictures import lineage
from pipeline.report.scores import footnotes, scores, warnings
from pipeline.report.tables import core_table, score_table
from pipeline.stages import report
from pipeline.stages.report import Params, main, summary

ROOT = Path(__file__).resolve().parents[2]


def write_report(inputs, work, params=None, context=None):
    job = Job("report", "k", params or Params(), Launch(), inputs, work, work, context=context or {})
    return job.out, main(job)


def run_stage(inputs, work, **env):
    """The stage in a process of its own, as the launcher starts it; its outcome and what it imported."""
    work.mkdir()
    described = {
        "module": "pipeline.stages.report",
        "stage": "report",
        "key": "k",
        "params": asdict(Params()),
        "launch": asdict(Launch()),
        "inputs": {name: str(folder) for name, folder in inputs.items()},
        "work": str(work),
        "store": str(work),
    }
    (work / "job.json").write_text(json.dumps(described))
    command = [sys.executable, "-X", "importtime", "-m", "pipeline.stages", str(work / "job.json")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=120)
    return json.loads((work / "outcome.json").read_text()), set(re.findall(r"\| +([\w.]+)$", done.stderr, re.M))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return whole_run(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def page(inputs, tmp_path_factory):
    out, _ = write_report(inputs, tmp_path_factory.mktemp("work"))
    return (out / "report.html").read_text()


def texts(table, row):
    line = next(line for line in table.rows if line[0] == row)
    return [cell if isinstance(cell, str) else cell.text for cell in line[1:]]


def test_the_same_artifacts_give_the_same_files_in_any_process_and_folder(inputs, tmp_path):
    first, imported = run_stage(inputs, tmp_path / "a", PYTHONHASHSEED="1")
    second, _ = run_stage(inputs, tmp_path / "b", PYTHONHASHSEED="2")

    assert first["status"] == second["status"] == "done"
    files = sorted(p.relative_to(tmp_path / "a/out") for p in (tmp_path / "a/out").rglob("*.*"))
    assert {"report.html", "report.md", "summary.json", "img/lineage.svg"} <= {str(f) for f in files}
    for file in files:
        assert (tmp_path / "a/out" / file).read_bytes() == (tmp_path / "b/out" / file).read_bytes(), file
    assert "torch" not in imported and "prefect" not in imported


def test_the_page_needs_nothing_from_outside(page):
    references = re.findall(r'(?:src|href)="([^"]{0,30})', page)

    assert references and all(r.startswith(("data:image/svg+xml;base64,", "#")) for r in references)
    assert "@import" not in page and "url(http" not in page


def test_every_picture_has_a_description_and_a_light_ground_in_the_page_and_as_a_file(inputs, page, tmp_path):
    out, _ = write_report(inputs, tmp_path)
    text = (out / "report.md").read_text()

    pictures = sorted((out / "img").iterdir())
    described = re.findall(r'<img alt="([^"]{10,})" src="data:', page)
    assert len(described) == page.count("<img ") == text.count("](img/") == len(pictures)
    for picture in pictures:  # ink is dark, and the page may be dark, too
        assert re.search(r"fill(: |=\")#fff", picture.read_text()), picture
        assert f"](img/{picture.name})" in text


def test_the_page_is_legible_in_a_light_and_in_a_dark_scheme(page):
    light, dark = re.findall(r":root \{(.*?)\}", page, re.S)
    colors = [dict(re.findall(r"--([\w-]+): (#\w+)", scheme)) for scheme in (light, dark)]

    assert colors[0].keys() == colors[1].keys()
    for scheme in colors:
        for ink in ("ink", "soft", "accent", "right", "wrong"):
            assert contrast(scheme[ink], scheme["page"]) >= 4.5, ink
        for ground in ("wash", "warning", "call", "output"):
            assert contrast(scheme["ink"], scheme[ground]) >= 4.5, ground


def contrast(one: str, other: str) -> float:
    """As WCAG 2.1 defines it: 4.5 and more is legible."""
    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def luminance(color: str) -> float:
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_change_of_a_template_enters_the_key(tmp_path, monkeypatch):
    folder = tmp_path / "templates"
    shutil.copytree(render.FOLDER, folder)
    before = report.data_identity(Params(), {}, online=False)["files"]
    monkeypatch.setattr(render, "FOLDER", folder)
    assert report.data_identity(Params(), {}, online=False)["files"] == before

    for name in before:
        with open(folder / name, "a") as file:
            file.write("\n")

    after = report.data_identity(Params(), {}, online=False)["files"]
    assert {"report.html.jinja", "report.md.jinja", "lineage.svg.jinja", "charts.mplstyle"} == after.keys()
    assert all(after[name] != before[name] for name in before)


def test_each_metric_stands_by_stage_with_interval_and_items(inputs):
    tested = [made for made in read(inputs) if made.module == "evaluate"]
    table = score_table(tested, [])

    assert table.header == ["", "base", "mid", "sft", "rl", "items"]
    assert texts(table, "Arithmetic") == ["-", "91.0%", "97.2%", "97.5%", "1,000"]
    assert texts(table, "val bpb") == ["1.1234", "1.1300", "1.1300", "1.1300", ""]
    rl = next(line for line in table.rows if line[0] == "Remainders")[4]
    assert rl.strong and re.fullmatch(r"8\d\.\d to 9\d\.\d", rl.detail)


def test_fewer_than_all_core_tasks_are_never_called_core(inputs):
    tested = [made for made in read(inputs) if made.module == "evaluate"]

    assert "CORE-14/22" in scores(tested)
    assert any("CORE-n/22" in note for note in footnotes(tested))
    assert any("at most 16 items" in note for note in footnotes(tested))
    assert any("ARC-Easy (400 of 2,376)" in note for note in footnotes(tested))


def test_core_by_task_has_intervals_guessing_items_and_times(inputs):
    table = core_table([made for made in read(inputs) if made.module == "evaluate"])

    assert table.header == ["", "base: accuracy", "centred", "time", "guessing", "items"]
    assert texts(table, "task_3") == ["26.6%", "0.0213", "1.5 s", "25.0%", "16"]
    assert next(line for line in table.rows if line[0] == "task_3")[1].detail == "10.0 to 51.2"


def test_results_of_older_code_that_were_accepted_are_shown_without_what_they_lack(tmp_path):
    core = {"centered": {"lm": 0.1}, "accuracy": {"lm": 0.1}, "counts": {"lm": 16}, "baseline": {"lm": 0.0}}
    core |= {"seconds_by_task": {"lm": 1.0}, "score": 0.1, "tasks": 1, "of": 22, "items": 16, "cropped": 0}
    chat = {"Sums": task(0.5, 10) | {"pass@4": 0.8}}
    folder = artifact(tmp_path, "base", "evaluate", {}, files={"results.json": results("base", core=core, chat=chat)})
    tested = read({"base": folder})

    assert texts(core_table(tested), "lm")[0] == "10.0%"
    assert texts(score_table(tested, []), "Sums pass@4")[0] == "80.0%"


def test_pass_at_k_has_an_interval_too(tmp_path):
    measured = results("sft", chat={"Sums": task(0.5, 10) | {"pass@4": 0.8, "pass_ci": [0.49, 0.943]}})
    folder = artifact(tmp_path, "evaluate_sft", "evaluate", {}, files={"results.json": measured})

    line = score_table(read({"evaluate_sft": folder}), []).rows[1]

    assert (line[0], line[1].text, line[1].detail) == ("Sums pass@4", "80.0%", "49.0 to 94.3")


def test_chatcore_of_some_tasks_says_how_many(tmp_path):
    measured = results("sft", chatcore=0.2, chatcore_tasks=2, chat={"ARC-Easy": task(0.4, 2376, 0.25)})
    folder = artifact(tmp_path, "evaluate_sft", "evaluate", {}, files={"results.json": measured})

    assert list(scores(read({"evaluate_sft": folder}))) == ["ChatCORE-2/6", "ARC-Easy"]


def test_what_lowers_trust_in_a_number_is_said(tmp_path):
    measured = chat_results("sft", 0.9, 0.5, 0.5) | {
        "sandbox": "weak",
        "sandbox_weakness": "a program could read files",
    }
    measured["chat"]["HumanEval"] = task(0.1, 164) | {"unfinished": 100}
    measured["chat"]["Riddles"] = task(0.1, 50) | {"advisory": 50}
    measured["left_out"] = ["MBPP"]
    measured["core"] = {"score": 0.1, "tasks": 22, "of": 22, "items": 50, "cropped": 7}
    folder = artifact(tmp_path, "evaluate_sft", "evaluate", {}, files={"results.json": measured})
    data = artifact(tmp_path, "sft_data", "render", {}, files={"rows.json": {"conversations": 90, "dropped": 10}})

    told = "\n".join(warnings(read({"evaluate_sft": folder, "sft_data": data})))

    assert "evaluate_sft: model-written programs ran without full isolation (sandbox=weak): a program" in told
    assert "Advisory: programs of Riddles report their own verdicts" in told
    assert "7 of 50 CORE items" in told
    assert "Answers that reached the length limit and were cut off, after sft: HumanEval 100 of 164." in told
    assert "evaluate_sft: MBPP left out, because of programs=skip." in told
    assert "of 100 conversations, 10 dropped" in told


def test_notes_of_the_config_stand_below_the_results(inputs, tmp_path):
    out, _ = write_report(inputs, tmp_path, Params(title="My mill", notes=["Measured on a small sample."]))

    text = (out / "report.md").read_text()
    assert text.startswith("# My mill\n") and "Measured on a small sample." in text


def test_times_and_costs_are_summed(tmp_path):
    slow = artifact(tmp_path, "pretrain", "pretrain", {}, seconds=7200.0, usd=48.0, device="H100", nproc=8)
    fast = artifact(tmp_path, "sft", "finetune", {"model": "pretrain"}, seconds=60.0, usd=0.4, device="H100", nproc=8)
    out, _ = write_report({"sft": fast, "pretrain": slow}, tmp_path / "w")

    text = (out / "report.md").read_text()
    assert "| total |  |  | 2 h 01 min | $48.40 |" in text
    assert "| pretrain | 8 x H100 |" in text
    assert text.index("| pretrain |") < text.index("| sft |")


def test_stages_behind_the_inputs_are_counted_when_the_run_tells_of_them(inputs, tmp_path):
    known = json.loads((inputs["pretrain"] / "artifact.json").read_text())
    behind = known | {"module": "tokenize", "key": known["inputs"]["tokens"], "inputs": {}, "seconds": 3600.0}
    out, _ = write_report(inputs, tmp_path, context={"stages": {"tokenize": behind}})

    text = (out / "report.md").read_text()
    assert "| tokenize |" in text and "1 h 10 min" in text
    assert "not read them: data sets, pack and text" in text


def test_tool_calls_are_shown_as_such_and_model_text_is_never_markup(tmp_path):
    evil = (
        "<script>alert(1)</script> | **bold** <|python_start|>1 < 2<|python_end|><|output_start|>True<|output_end|>yes"
    )
    measured = results("sft", chat={"Sums": task(0.5, 10)}, samples=[{"prompt": "<b>hi</b>", "text": evil}])
    folder = artifact(tmp_path, "evaluate_sft", "evaluate", {}, files={"results.json": measured})
    out, _ = write_report({"evaluate_sft": folder}, tmp_path / "w")

    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "<script>" not in page and "<b>hi</b>" not in page
    assert '<span class="tool">1 &lt; 2</span><span class="tool output">True</span>yes' in page
    assert r"\<script\>" in text and "`1 < 2` → `True` yes" in text
    assert "<|" not in page


def test_reinforcement_learning_is_shown_as_curves_rollouts_and_held_out_answers(inputs, tmp_path):
    out, _ = write_report(inputs, tmp_path)

    curves, text = (out / "img/curves-rl.svg").read_text(), (out / "report.md").read_text()
    shown = (
        "Reward",
        "Held-out accuracy",
        "Answer length",
        "Groups with signal",
        "Entropy",
        "Divergence from the start",
    )
    assert all(f">{title}" in curves for title in (*shown, "Remainders", "pass@16"))
    assert curves.count("PolyCollection_") == 2  # of both held-out tasks
    assert "6 rollouts of reinforcement learning" in text and "Remainders, step 1*" in text
    assert "1 held-out problem at each evaluation of reinforcement learning" in text
    assert "- step 0, reward 0 (wrong): 3." in text and "- step 120, reward 1 (right): 3." in text


def test_every_artifact_is_in_the_lineage_with_its_key(inputs, page):
    for folder in inputs.values():
        record = json.loads((folder / "artifact.json").read_text())
        assert f"{record['module']}/{record['key']}" in page
        for key in record["inputs"].values():
            assert key in page


def test_the_picture_of_the_lineage_has_a_row_for_each_artifact_and_a_dot_for_each_input(inputs):
    made = read(inputs)
    picture = lineage(made)

    assert picture is not None
    # Both data sets share a row; `text`, `tokens` and `pack` were only read.
    names = re.findall(r'font-weight="600"[^>]*>([^<]+)<', picture.svg)
    assert sorted(names) == sorted([*inputs, "data sets", "text", "tokens", "pack"])
    dots = sum(len({"dataset/" if name.startswith("dataset/") else name for name in m.inputs}) for m in made)
    assert picture.svg.count("<circle") == dots
    rows = {name: row for row, name in enumerate(names)}
    assert rows["pretrain"] < rows["evaluate_base"] < rows["midtrain"] < rows["sft"] < rows["rl"]


def test_names_in_the_picture_of_the_lineage_are_never_markup(tmp_path):
    made = artifact(tmp_path, "a<b", "pretrain", {"x</text>": "x"})

    picture = lineage(read({"a<b": made}))

    assert picture is not None and "a&lt;b" in picture.svg and "x&lt;/text&gt;" in picture.svg


def test_the_summary_is_a_short_table_and_the_metrics_are_the_last_stages(inputs, tmp_path):
    out, metrics = write_report(inputs, tmp_path)

    assert summary(out)[0] == ["", "base", "mid", "sft", "rl", "items"]
    assert ["Remainders", "-", "22.0%", "31.0%", "87.0%", "200"] in summary(out)
    assert metrics["Remainders"] == 0.87 and metrics["val bpb"] == 1.13


def test_a_run_without_evaluations_or_measurements_has_a_report_too(tmp_path):
    folder = artifact(tmp_path, "pretrain", "pretrain", {}, metrics={"steps": 3}, lines=[{"step": 1, "loss": 2.0}])
    out, metrics = write_report({"pretrain": folder}, tmp_path / "w")

    assert summary(out) == [] and metrics == {}
    assert "| pretrain | 3 |" in (out / "report.md").read_text()


def test_a_measurement_cut_off_by_a_crash_is_left_out(tmp_path):
    folder = artifact(tmp_path, "pretrain", "pretrain", {}, lines=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')

    lines = read({"pretrain": folder})[0].json_lines("metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
