import pytest

from harness.errors import UsageError
from harness.gates.margins import Margin, Margins, read_margins
from harness.paths import conf_dir

ENTRY = "{kind: exact, scale: ratio, margin: 0.005, equivalence: 0.005}"


def write(folder, text):
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_the_shipped_margins_are_those_of_the_specification():
    margins = read_margins(conf_dir() / "gate" / "ci.yaml")
    assert margins.metrics["peak_alloc_bytes"] == Margin(
        kind="exact", scale="ratio", margin=0.005, equivalence=0.005
    )
    assert margins.metrics["saved_bytes"].margin == 0.005
    assert margins.metrics["flops"].margin == margins.metrics["operators"].margin == 0
    assert margins.metrics["accuracy"] == Margin(kind="paired", scale="points", margin=1, equivalence=2)
    assert {margins.metrics[name].kind for name in ("step_s", "forward_s", "backward_s")} == {"timing"}


def test_a_metric_covers_its_phases_but_not_its_settings_or_percentiles():
    margin = Margin(kind="exact", scale="ratio", margin=0, equivalence=0)
    margins = Margins(metrics={"peak_alloc_bytes": margin, "step_s": margin})
    assert margins.of("peak_alloc_bytes.forward") is margin
    assert margins.of("peak_alloc_bytes@n_hashes=1") is None
    assert margins.of("step_s.p90") is None
    assert margins.of("recall") is None


def test_defaults(tmp_path):
    margins = read_margins(write(tmp_path, f"metrics:\n  flops: {ENTRY}\n"))
    assert (margins.min_seeds, margins.process_sd) == (3, 0.08)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("metrics: [", "cannot be read"),
        ("- 1", "needs a mapping `metrics`"),
        ("metrics: 3", "needs a mapping `metrics`"),
        (
            "metrics: {flops: {kind: exact}}",
            r"metrics\.flops: needs exactly kind, scale, margin, equivalence",
        ),
        (
            f"metrics: {{flops: {ENTRY.replace('exact', 'sharp')}}}",
            "'sharp' is none of exact, paired, timing",
        ),
        (f"metrics: {{flops: {ENTRY.replace('ratio', 'log')}}}", "'log' is none of ratio, points, absolute"),
        (f"metrics: {{flops: {ENTRY.replace('margin: 0.005', 'margin: -1')}}}", "-1 is no number from 0 on"),
        (
            f"metrics: {{flops: {ENTRY.replace('equivalence: 0.005', 'equivalence: 0')}}}",
            "0 is no number from 0.005",
        ),
        (f"metrics: {{flops: {ENTRY}}}\nmin_seeds: 1", "min_seeds: 1 is no number from 2 on"),
        (f"metrics: {{flops: {ENTRY}}}\nprocess_sd: .nan", "process_sd: nan is no number"),
        (f"metrics: {{flops: {ENTRY}}}\nprocess_sd: true", "process_sd: True is no number"),
    ],
)
def test_wrong_margins_are_told_by_their_place(tmp_path, text, complaint):
    with pytest.raises(UsageError, match=complaint) as caught:
        read_margins(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_no_such_margins(tmp_path):
    write(tmp_path, "metrics: {}")
    with pytest.raises(UsageError, match=r"no margins 'other' in .*; there: mine"):
        read_margins(tmp_path / "other.yaml")
