import itertools
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pandas as pd
import pytest

from harness import aggregate, report, store
from harness.effects import effects
from harness.errors import UsageError
from harness.metrics.catalogue import describe
from harness.plots.pareto import fronts
from harness.record import Sample
from harness.report import render
from harness.report.document import Document, Section, Table, Text, cell
from harness.report.narrative import cautions, change, verdict
from tests.harness import factory

LEVELS = {
    "attention.n_hashes": ["1", "4"],
    "attention.n_buckets": ["4", "16"],
    "model.residual": ["plain", "reversible"],
    "seed": ["0", "1"],
}
HOSTILE = "<img src=x onerror=document.title='owned'>\"'&|`[a](javascript:x) {{7*7}}{% x %}\x1b[31m\u202e"
FILES = {
    *(f"{name}.csv" for name in ("trials", "summary", "effects")),
    *(f"{name}.parquet" for name in ("trials", "samples")),
    *("report.md", "report.html", "figures"),
}


class Page(HTMLParser):
    """What a browser would see of a page: its elements, its text, its headings."""

    def __init__(self, html):
        super().__init__()
        self.elements = []
        self.texts = []
        self._open = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"style", "script"} & set(self._open):
            self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def built(folder, records, factors=None):
    page = report.build(factory.store(folder / "mine", records, factors=factors))
    return Page(page.read_text()), (page.parent / "report.md").read_text()


@pytest.fixture(scope="module")
def records():
    records = factory.sweep(LEVELS)
    records[3] = factory.failed(
        records[3],
        message="tried to allocate 3 GiB",
        traceback="Traceback\nMemoryError",
        stderr=("last words",),
    )
    return [*records, *factory.sweep({"task": ["text"], "attention.n_hashes": ["1", "4"]})]


@pytest.fixture(scope="module")
def whole(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    page, markdown = built(folder, records, LEVELS)
    return folder / "mine" / "report", page, markdown


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    times = {"ours": 1.0, "sdpa": 0.7, "transformers": 3.0, "reformer_pytorch": 4.0}
    records = [
        factory.layer(
            name,
            length,
            step_s=step_s * (length / 1024) ** (2 if name == "sdpa" else 1) * (1 + 0.2 * repeat),
            repeat=repeat,
        )
        for repeat in (0, 1)
        for length in (1024, 2048)
        for name, step_s in times.items()
    ]
    records[-1] = factory.failed(records[-1])
    records[-1 - len(times) * 2] = factory.failed(records[-1 - len(times) * 2])
    factors = {"implementation": list(times), "task.length": ["1024", "2048"], "repeat": ["0", "1"]}
    return built(tmp_path_factory.mktemp("peers"), records, factors)


class TestPeers:
    def test_the_verdict_tells_ratio_share_and_crossover(self, peers):
        page, markdown = peers
        for text in (page.text, markdown):
            assert "Our layer is 3.0× [3.0, 3.0] as fast as the best peer at 2,048 tokens" in text
            assert "at 11.5 % of its floor" in text
            assert "Crossover with SDPA, forward and backward: ours 1,460 tokens; " in text

    def test_layers_are_a_section_with_a_figure_and_two_tables(self, peers):
        page, markdown = peers
        assert "peers" in [attributes["id"] for attributes in page.all("section")]
        part = markdown.split("## Beside the peers")[1].split("\n## ")[0]
        assert "figures/scaling.svg" in part
        rows = [
            [entry.strip() for entry in line.strip("|").split("|")]
            for line in part.splitlines()
            if line.startswith("| ")
        ]
        assert rows[0][:4] == ["layer", "computed by", "tokens", "forward"]
        assert "× best peer" in rows[0]
        assert "share of the floor" in rows[0]
        table = {(row[0], row[2]): row for row in rows if len(row) == 9}
        assert table["ours", "2,048"][1] == "flash"
        assert table["ours", "2,048"][6] == "3.0×"
        assert table["reformer_pytorch", "2,048"][3] == "out of memory"
        assert table["reformer_pytorch", "2,048"][6] == "–"
        crossings = {row[0]: row[1:] for row in rows if len(row) == 3}
        assert crossings["ours"] == ["1,460 tokens"] * 2
        assert crossings["transformers"] == ["none in range (slower at 2,048 tokens)"] * 2


class TestFiles:
    def test_everything_is_there(self, whole):
        folder, _, _ = whole
        assert {path.name for path in folder.iterdir()} == FILES
        pictures = {path.name for path in (folder / "figures").iterdir()}
        assert {"pareto-copy.svg", "pareto-copy.png", "outcomes.png", "train-eval-text.svg"} <= pictures

    def test_tables_hold_what_was_measured(self, whole, records):
        folder, _, _ = whole
        trials = pd.read_csv(folder / "trials.csv")
        assert set(trials["trial_id"]) == {record.trial_id for record in records}
        assert len(pd.read_parquet(folder / "trials.parquet")) == len(trials)
        samples = pd.read_parquet(folder / "samples.parquet")
        assert list(samples.columns) == list(aggregate.SAMPLE_COLUMNS)
        assert {"copy", "text"} == set(pd.read_csv(folder / "effects.csv")["task"].dropna())
        assert "hash_seed_sd" in pd.read_csv(folder / "summary.csv").columns

    def test_a_rebuild_leaves_no_old_figures(self, tmp_path, records):
        built(tmp_path, records[:1])
        figures = tmp_path / "mine" / "report" / "figures"
        (figures / "factor-gone.svg").write_text("old")
        report.build(tmp_path / "mine")
        assert not (figures / "factor-gone.svg").exists()


class TestPage:
    def test_sections_are_in_the_order_of_the_specification(self, whole):
        _, page, _ = whole
        keys = [attributes["id"] for attributes in page.all("section")]
        order = "run verdict pareto effects factors train_eval training time trials failures environment"
        assert keys == order.split()

    def test_needs_no_network(self, whole):
        _, page, _ = whole
        assert not page.all("link")
        assert all("src" not in attributes for attributes in page.all("script"))
        assert all(
            attributes["src"].startswith("data:image/svg+xml;base64,") for attributes in page.all("img")
        )
        (policy,) = (a for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
        assert "default-src 'none'" in policy["content"]

    def test_can_be_read_by_a_screen_reader(self, whole):
        _, page, _ = whole
        assert page.all("html") == [{"lang": "en"}]
        assert all(len(attributes["alt"]) > 20 for attributes in page.all("img"))
        assert len(page.all("caption")) == len(page.all("table"))
        assert all(attributes.get("scope") in ("col", "row") for attributes in page.all("th"))
        names = [name for name, _ in page.elements]
        headings = [int(name[1]) for name in names if re.fullmatch(r"h\d", name)]
        assert headings[0] == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(headings))
        scrolling = [a for a in page.all("div") if a.get("class") in ("table", "scroll")]
        assert all(a.get("tabindex") == "0" and a.get("aria-label") for a in scrolling)

    def test_has_both_colour_schemes(self, whole):
        folder, _, _ = whole
        assert "@media (prefers-color-scheme: dark)" in (folder / "report.html").read_text()

    def test_trials_say_what_computed_them(self, tmp_path, records):
        ran = [replace(record, environment={"backend": "flash"}) for record in records[:2]]
        page, markdown = built(tmp_path, [*ran, records[2]])
        header = next(line for line in markdown.splitlines() if line.startswith("| trial"))
        assert "| outcome" in header
        assert "| backend" in header
        assert "Attention computed by" in page.text

    def test_trials_link_to_their_records(self, whole):
        folder, page, _ = whole
        links = [a["href"] for a in page.all("a") if a["href"].startswith("../trials/")]
        assert len(links) == 18
        assert all((folder / link).is_file() for link in links)

    def test_failures_tell_their_cause(self, whole):
        _, page, markdown = whole
        for text in (page.text, markdown):
            assert "tried to allocate 3 GiB" in text
            assert "MemoryError" in text
            assert "last words" in text
        assert "1 out of memory" in page.text


class TestMarkdown:
    def test_links_to_figures_that_are_there(self, whole):
        folder, _, markdown = whole
        links = re.findall(r"!\[.*?\]\((figures/[\w.-]+)\)", markdown)
        assert len(links) > 8
        assert all((folder / link).is_file() for link in links)

    def test_tables_are_well_formed(self, whole):
        _, _, markdown = whole
        for block in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE):
            counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
            assert len(counts) == 1

    def test_says_what_the_page_says(self, whole):
        _, page, markdown = whole
        for line in ("What was run", "To be read with care", "4 hash rounds instead of 1: "):
            assert line in page.text
            assert line in markdown

    @pytest.mark.parametrize(
        ("text", "escaped"),
        [
            ("n_hashes [1, 2]", "n_hashes [1, 2]"),
            ("_x_ *y* `z` |", r"\_x\_ \*y\* \`z\` \|"),
            ("[a](b)", r"\[a\](b)"),
            ("<b> & c", "&lt;b&gt; &amp; c"),
            ("- x", r"\- x"),
            ("1. x", r"1\. x"),
            ("# x", r"\# x"),
            ("-x +1", "-x +1"),
            ("a\\b $x$ ~y~", r"a\\b \$x\$ \~y\~"),
        ],
    )
    def test_text_is_escaped_where_it_would_mean_something(self, text, escaped):
        assert render.escape_markdown(text) == escaped

    def test_a_fence_is_longer_than_any_inside(self):
        assert render.code_block("a\n````\nb").startswith("`````text\n")

    def test_only_plain_links(self):
        table = Table(caption="c", headers=("a",), rows=((cell("x", href="javascript:alert(1)"),),))
        assert "javascript" not in render.markdown_table(table)

    def test_an_empty_table_has_its_headers(self):
        assert "| a" in render.markdown_table(Table(caption="c", headers=("a", "b"), rows=()))


class TestVerdict:
    def test_planted_effects_are_told_in_sentences(self, records):
        trials = aggregate.table(records, study="s")
        told = verdict(trials, effects=effects(trials, factors=LEVELS), fronts=fronts(trials))
        assert set(told) == {"copy", "text"}
        rounds = next(line for line in told["copy"] if line.startswith("4 hash rounds instead of 1: "))
        assert re.search(
            r"\+[78]\.\d points \[\+\d\.\d, \+\d\.\d\], 2\.[56]× slower \[2\.\d, 2\.\d\], ", rounds
        )
        assert re.search(r"2\.[23]× the peak memory \[2\.[23], 2\.[23]\] \(7 matched pairs\)\.$", rounds)
        reversible = next(line for line in told["copy"] if line.startswith("Reversible residuals"))
        assert "no clear change in accuracy" in reversible
        assert "30 % less peak memory [30, 30]" in reversible
        buckets = next(line for line in told["copy"] if line.startswith("16 buckets instead of 4"))
        assert "the same peak memory" in buckets
        assert any("with random buckets" in line and "chance is 1.6 %" in line for line in told["copy"])
        assert any(line.startswith("Best bits per byte") for line in told["text"])

    @pytest.mark.parametrize(
        ("metric", "effect", "low", "high", "words"),
        [
            ("step_s", 0.95, 0.91, 0.99, "2.6× slower [2.5, 2.7]"),
            ("step_s", -0.95, -0.99, -0.91, "2.6× faster [2.5, 2.7]"),
            ("step_s", 0.05, 0.04, 0.06, "5.1 % slower [4.1, 6.2]"),
            ("step_s", 0.01, -0.02, 0.04, "no clear change in speed (1.01× the time per step [0.98, 1.04])"),
            ("peak_alloc_bytes", 0.0, 0.0, 0.0, "the same peak memory"),
            (
                "peak_alloc_bytes",
                0.0,
                -0.2,
                0.2,
                "no clear change in peak memory (1.00× the peak memory [0.82, 1.22])",
            ),
            ("peak_alloc_bytes", 0.2, 0.1, 0.3, "22 % more peak memory [11, 35]"),
            ("peak_alloc_bytes", -0.3567, -0.4, -0.3, "30 % less peak memory [26, 33]"),
            ("peak_alloc_bytes", 0.8, float("nan"), float("nan"), "2.2× the peak memory"),
            ("accuracy", 8.3, 7.1, 9.4, "+8.3 points [+7.1, +9.4]"),
            ("accuracy", 0.3, -1.0, 1.6, "no clear change in accuracy (+0.3 points [−1.0, +1.6])"),
            ("bits_per_byte", -0.12, -0.2, -0.1, "−0.120 bits per byte [−0.200, −0.100]"),
        ],
    )
    def test_words_for_a_change(self, metric, effect, low, high, words):
        known = describe(metric)
        row = {"effect": effect, "low": low, "high": high, "scale": known.scale}
        assert change(row, metric=known) == words

    def test_the_only_undominated_setting_is_told_as_such(self):
        records = [
            factory.record({"attention.n_buckets": "16", "seed": 0}),
            factory.scaled(
                factory.scaled(factory.record({"attention.n_buckets": "4", "seed": 0}), "step_s", 2.0),
                "peak_alloc_bytes",
                2.0,
            ),
        ]
        trials = aggregate.table(records, study="s")
        told = verdict(trials, effects=effects(trials), fronts=fronts(trials))
        assert told["copy"][0].endswith("; no other setting is better in any of these.")


class TestCautions:
    def cautions(self, tmp_path, records, change=None):
        path = factory.store(tmp_path / "mine", records)
        if change is not None:
            change(path)
        study = report.read_study(store.Study(path))
        return " ".join(
            cautions(
                study.trials,
                records=study.records,
                unreadable=study.unreadable,
                info=study.info,
                effects=study.effects,
                factors=study.factors,
            )
        )

    def test_a_clean_study_has_none(self, tmp_path):
        assert self.cautions(tmp_path, factory.sweep(LEVELS)) == ""

    def test_trials_still_to_run(self, tmp_path):
        records = factory.sweep(LEVELS)
        told = self.cautions(
            tmp_path, records, lambda path: (path / "trials" / f"{records[0].trial_id}.json").unlink()
        )
        assert "1 of 16 planned trials have no record yet." in told

    def test_torn_records_and_torn_study_json(self, tmp_path):
        def tear(path):
            (path / "trials" / "deadbeef0000.json").write_text("{")
            (path / "study.json").write_text("{")

        told = self.cautions(tmp_path, factory.sweep(LEVELS), tear)
        assert "1 file among the records could not be read." in told
        assert "study.json is missing or torn" in told

    def test_mixed_code_and_machines(self, tmp_path):
        records = factory.sweep(LEVELS)
        records[0] = replace(
            records[0], code="fedcba", environment={**records[0].environment, "cpu_model": "Other CPU"}
        )
        told = self.cautions(tmp_path, records)
        assert "measured with 2 versions of the code (0123456789a…, fedcba)" in told
        assert "Several values of cpu_model: Other CPU; Some CPU" in told

    def test_other_evaluation_data(self, tmp_path):
        records = factory.sweep(LEVELS)
        records[0] = replace(records[0], theory={**records[0].theory, "evaluation_sha256": "f" * 64})
        assert "evaluated on different data" in self.cautions(tmp_path, records)

    def test_blocks_followers_and_balance(self, tmp_path):
        levels = {
            "attention.n_hashes": ["1", "4"],
            "model.residual": ["plain", "reversible"],
            "seed": ["0", "1"],
        }
        records = [*factory.sweep(levels, train__steps=100), *factory.sweep(levels, train__steps=200)[:4]]
        told = self.cautions(tmp_path, records)
        assert "copy: matched pairs keep equal, though nobody swept it: train.steps" in told

    def test_confounded_settings(self, tmp_path):
        records = [
            factory.record({"attention": kind, "seed": seed}, model__layers=[kind])
            for kind in ("lsh", "full")
            for seed in (0, 1)
        ]
        assert (
            "copy: changed along with a swept factor, as a part of its effect: model.layers"
            in self.cautions(tmp_path, records)
        )

    def test_combinations_that_were_not_run(self, tmp_path):
        told = self.cautions(tmp_path, factory.sweep(LEVELS)[:-2])
        assert "copy: 7 of the 8 combinations of levels were run" in told

    def test_one_seed_and_lost_pairs(self, tmp_path):
        records = factory.sweep({key: levels for key, levels in LEVELS.items() if key != "seed"})
        records[0] = factory.failed(records[0])
        told = self.cautions(tmp_path, records)
        assert "One seed only" in told
        assert "1 for n_hashes, 1 for n_buckets, 1 for residual" in told

    def test_models_that_learned_nothing(self, tmp_path):
        records = [
            replace(
                record,
                samples=tuple(
                    replace(sample, values=(100.0,)) if sample.metric == "correct" else sample
                    for sample in record.samples
                ),
            )
            for record in factory.sweep(LEVELS)
        ]
        assert "copy: accuracy is at chance or majority in 16 of 16 trials" in self.cautions(
            tmp_path, records
        )


class TestOddStudies:
    def test_empty(self, tmp_path):
        page, markdown = built(tmp_path, [])
        assert "No trial has a record yet." in page.text
        assert "No finished trial to judge by." in markdown

    def test_one_trial(self, tmp_path):
        page, _ = built(tmp_path, [factory.record({"seed": 0})])
        assert "no effect can be told" in page.text
        assert "There are no two settings" in page.text
        assert "1 trial, 1 finished" in page.text
        assert "% accuracy, at 40.0 MiB and " in page.text

    def test_only_failures(self, tmp_path):
        records = [
            factory.failed(record, status="killed", signal=9, rss_bytes_at_death=2**30)
            for record in factory.sweep(LEVELS)
        ]
        page, _ = built(tmp_path, records)
        assert "signal 9, 1,024 MiB resident at its end" in page.text
        assert "16 of 16 trials did not end well: 16 killed." in page.text

    def test_numbers_that_are_none(self, tmp_path):
        nan = Sample(metric="correct", unit="tokens", values=(float("nan"),))
        records = [replace(record, samples=(*record.samples[5:], nan)) for record in factory.sweep(LEVELS)]
        page, markdown = built(tmp_path, records[:2])
        assert "nan" not in markdown.lower().split()
        assert "nan" not in page.text.lower().split()

    def test_no_study_and_no_place_to_write(self, tmp_path, records, monkeypatch):
        with pytest.raises(UsageError, match="no study at"):
            report.build(tmp_path / "nothing")
        path = factory.store(tmp_path / "mine", records)
        (path / "report").write_text("a file where the folder goes")
        with pytest.raises(UsageError, match="cannot write the report to"):
            report.build(path)


def test_hostile_strings_stay_inert(tmp_path):
    records = [
        replace(
            record,
            experiment=HOSTILE,
            cell={**record.cell, HOSTILE: f"{HOSTILE}{index}"},
            environment={HOSTILE: HOSTILE, "torch": HOSTILE},
            spec={**record.spec, "task": {"_target_": HOSTILE}, HOSTILE: {"a": f"{HOSTILE}{index}"}},
        )
        for index, record in enumerate(factory.sweep({"attention.n_hashes": ["1", "2"]}))
    ]
    records.append(
        factory.failed(
            replace(records[0], trial_id="0" * 12, cell={HOSTILE: "z", "attention.n_hashes": "7"}),
            status="error",
            message=HOSTILE,
            traceback=f"{HOSTILE}\n```\n</pre><script>alert(1)</script>",
            stderr=(HOSTILE,),
        )
    )
    page, markdown = built(tmp_path, records, {HOSTILE: [HOSTILE]})
    harmless = """
        html head meta title style body header nav main section script h1 h2 h3 p ul li a div span small
        table caption thead tbody tr th td figure figcaption img details summary pre
    """
    assert {name for name, _ in page.elements} <= set(harmless.split())
    assert len(page.all("script")) == 1
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert all(a["src"].startswith("data:") for a in page.all("img"))
    assert "49" not in page.text.replace("{{7*7}}", "").split()
    assert not {"\x1b", "\u202e"} & set(page.text + markdown)
    outside = re.sub(r"(`{3,})text\n.*?\n\1", "", markdown, flags=re.DOTALL)
    assert "](javascript:" not in outside.replace("\\](", "")
    assert "<img" not in outside
    assert "<script" not in outside


class TestCommand:
    def test_prints_where_the_report_is(self, tmp_path, records, capsys):
        factory.store(tmp_path / "mine", records[:2])
        assert report.main(["mine", "--results-dir", str(tmp_path)]) == 0
        assert capsys.readouterr().out.strip() == str(tmp_path / "mine" / "report" / "report.html")

    @pytest.mark.parametrize("arguments", [["nothing"], [], ["a", "b"], ["--no-such"]])
    def test_wrong_usage_is_one_line(self, tmp_path, capsys, arguments):
        assert report.main([*arguments, "--results-dir", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("harness report: ")

    def test_help(self, capsys):
        with pytest.raises(SystemExit) as caught:
            report.main(["--help"])
        assert caught.value.code == 0
        assert "harness report quick" in capsys.readouterr().out


def test_a_document_needs_no_study():
    document = Document(
        title="t",
        subtitle="s",
        sections=(Section(key="k", title="Title", blocks=(Text(lines=("a & b",), title="head"),)),),
    )
    assert "a &amp; b" in render.html(document)
    assert "### head" in render.markdown(document)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVE = """
<script>
addEventListener("load", () => {
  const table = document.querySelector("#trials table");
  const column = [...table.tHead.rows[0].cells].findIndex((head) => head.textContent.trim() === "accuracy");
  const values = () => [...table.tBodies[0].rows].map((row) => row.cells[column].textContent.trim());
  const button = table.tHead.rows[0].cells[column].querySelector("button");
  const out = {title: document.title, before: values()};
  button.click();
  out.up = values();
  out.sort = table.tHead.rows[0].cells[column].getAttribute("aria-sort");
  button.click();
  out.down = values();
  out.images = [...document.images].every((image) => image.complete && image.naturalWidth > 0);
  out.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(out);
  document.body.append(result);
});
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_real_browser(whole, tmp_path, width):
    folder, _, _ = whole
    page = tmp_path / "page.html"
    page.write_text((folder / "report.html").read_text().replace("</body>", DRIVE + "</body>"))
    quiet = "no-first-run disable-background-networking disable-component-update disable-sync"
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu"]
    command += [f"--{name}" for name in quiet.split()]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000"]
    command += ["--enable-logging=stderr", "--dump-dom", page.as_uri()]
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    assert "CONSOLE" not in done.stderr
    (shown,) = re.findall(r'<pre id="result">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    told = json.loads(shown.replace("&amp;", "&"))
    numbers = [float(text.removesuffix(" %")) for text in told["up"] if text != "–"]
    assert told["before"] != told["up"]
    assert numbers == sorted(numbers)
    assert told["sort"] == "ascending"
    # What was not measured is last either way.
    assert told["up"][-1] == told["down"][-1] == "–"
    assert told["down"][0] == told["up"][-2]
    assert told["images"]
    assert told["overflow"] <= 0
