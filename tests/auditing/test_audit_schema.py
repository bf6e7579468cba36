"""audit.json is what its schema says, in each shape that an audit has, and what is not is found; its summary is the page's."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
from written import SCHEMA, faults_of_json

import gdiff_jax as gd
from gdiff_jax.auditing import answers, worst
from gdiff_jax.auditing.enough import enough
from gdiff_jax.auditing.record import FORMAT, AuditRecord


@pytest.fixture(scope="module")
def audit(small):
    return gd.Audit.load(small / "audit.json")


@pytest.fixture(scope="module")
def written(small):
    return json.loads((small / "audit.json").read_text())


def test_the_schema_is_of_this_format():
    assert SCHEMA["properties"]["format"]["const"] == FORMAT
    assert SCHEMA["$id"].endswith(f":{FORMAT}")
    fields = {field.name for field in dataclasses.fields(AuditRecord)}
    assert SCHEMA["properties"].keys() == {"format", "summary"} | fields
    assert set(SCHEMA["required"]) == SCHEMA["properties"].keys()


def failing(audit):
    """Every second trial of the attacks, and each at the last level."""
    lost = {"failed": True, "psnr": None, "mse": None, "ssim": None, "distance": None}
    fails = lambda row: row["sigma"] is not None and (row["image"] % 2 or row["sigma"] == audit.sigmas[-1])
    without = lambda row: {name: v for name, v in row.items() if not name.startswith("rank")}
    return dict(trials=[{**without(row), **lost} if fails(row) else row for row in audit.trials], blind=None)


def found_out(audit):
    """Everything was named, whatever the bound is."""
    data = audit.identification
    all_named = lambda level: {**level, "counts": [{**c, "hits": data["repetitions"]} for c in level["counts"]]}
    return dict(identification={**data, "levels": [all_named(level) for level in data["levels"]]})


def unclipped(audit):
    """Without a guarantee, and so without a bound; and an interval without an end."""
    levels = [
        {**level, "epsilon": None, "counts": [{**c, "bound": None, "worst": None} for c in level["counts"]]}
        for level in audit.identification["levels"]
    ]
    enough = {"count": 3, "share": 0.4, "sigma": [1.5, 1.25, None]}
    return dict(identification={**audit.identification, "clip_norm": None, "levels": levels, "enough": enough})


def with_(audit, **about):
    return dict(about={**audit.about, **about})


SHAPES = {
    "as it was": lambda audit: {},
    "failing": failing,
    "found out": found_out,
    "unclipped": unclipped,
    "unfinished": lambda audit: dict(theory=None, identification=None, blind=None, **with_(audit, unfinished=True)),
    "no other image": lambda audit: dict(blind=None, **with_(audit, candidates=1)),
    "all above the threshold": lambda audit: with_(audit, threshold=-1.0),
    "of before": lambda audit: dict(
        identification={k: v for k, v in audit.identification.items() if k != "enough"},
        trials=[{k: v for k, v in r.items() if k not in ("rank_in_pixels", "image_sha256")} for r in audit.trials],
    ),
    "doubtful": lambda audit: with_(audit, doubt="It is another gradient.", failed_parts=["theory (E: x)"], module=["said"]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_of_an_audit_is_as_the_schema_says(audit, shape):
    """Those of a call, of a gradient without its image, and of a finding's command are validated where they are made."""
    other = dataclasses.replace(audit, **SHAPES[shape](audit))
    text = other.to_json()
    assert faults_of_json(text) == []
    assert bool(json.loads(text)["summary"]["findings"]) == (shape == "found out")
    assert bool(json.loads(text)["summary"]["warnings"])


def test_what_the_command_wrote_is_as_the_schema_says(small):
    assert faults_of_json((small / "audit.json").read_text()) == []


MUTATIONS = {
    "a format of another kind": lambda d: d.update(format="2"),
    "no summary": lambda d: d.pop("summary"),
    "a trial without its outcome": lambda d: d["trials"][0].pop("failed"),
    "a negative sigma": lambda d: d["trials"][-1].update(sigma=-0.1),
    "a score in words": lambda d: d["trials"][0].update(psnr="20 dB"),
    "a column that nobody knows": lambda d: d["trials"][0].update(colour="red"),
    "a share above one": lambda d: d["summary"]["levels"][0]["recovered"].update(value=12),
    "an interval without an end": lambda d: d["summary"]["levels"][0]["psnr"].pop("high"),
    "infinity in other words": lambda d: d["summary"]["smallest_noise"]["recovered"].update(high="inf"),
    "a picture of another kind": lambda d: d["pictures"].update({"thumbnail/0": ""}),
    "a bound above one": lambda d: d["identification"]["levels"][0]["counts"][0].update(bound=1.1),
    "a setting that nobody knows": lambda d: d["about"].update(mood="good"),
    "a picked image without its attacks": lambda d: d["worst"].pop("trials"),
    "a spectrum of nothing": lambda d: d["theory"]["spectra"][0].pop("lambda_max"),
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_what_is_not_as_it_says_is_found(written, what):
    data = copy.deepcopy(written)
    MUTATIONS[what](data)
    assert faults_of_json(json.dumps(data))


def test_a_number_that_is_not_finite_is_written_as_null(audit):
    """At any depth: Python's own JSON would hold NaN, which no other reader takes."""
    odd = dataclasses.replace(audit, trials=[{**audit.trials[0], "seconds": np.float32(np.nan)}, *audit.trials[1:]])
    assert json.loads(odd.to_json())["trials"][0]["seconds"] is None
    with pytest.raises(ValueError, match="NaN is no JSON"):
        faults_of_json('{"format": NaN}')


def test_the_summary_is_what_the_page_says(audit):
    data = json.loads(audit.to_json())["summary"]
    told = audit.verdict().replace("\n\n", " ").replace("For those who decide: ", "").replace("For those who build: ", "")
    assert " ".join(data["verdict"]) == told
    assert (data["warnings"], data["findings"]) == (audit.warnings(), audit.findings())
    for told, level in zip(data["levels"], audit.levels(), strict=True):
        assert (told["sigma"], told["trials"], told["failed"]) == (level.sigma, level.trials, level.failed)
        for name, interval in (("psnr", level.psnr), ("recovered", level.recovered), ("recognised", level.identified)):
            assert [end if end is not None else math.nan for end in told[name].values()] == pytest.approx(interval, nan_ok=True)
    for told, leaking in zip(data["worst"], worst.ranked(audit), strict=False):
        assert (told["image"], told["picked"], told["psnr"]) == (leaking.image, leaking.picked, list(leaking.psnr))
    assert len(data["worst"]) == worst.SHOWN
    assert [row["wanted"] for row in data["enough"]] == [row.wanted for row in enough(audit)]
    assert data["against_bound"][0]["success"]["value"] > 0
    everything = dataclasses.replace(audit, **SHAPES["all above the threshold"](audit))
    assert json.loads(everything.to_json())["summary"]["smallest_noise"]["recovered"]["value"] == answers.MORE
    assert data["levels"][0]["epsilon"] is None  # without noise
    assert data["levels"][1]["epsilon"] > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(format=99), "is of format 99, this version reads 1 and 2; read it with a later version of gdiff_jax"),
        (dict(format=0), "is of format 0, this version reads 1 and 2; make it again"),
        (dict(format="audit"), "is of format 'audit', this version reads 1 and 2; make it again"),
        (dict(format=99, trials=None, novelty=1), "is of format 99"),
    ],
)
def test_another_version_is_refused_in_one_line_whatever_it_holds(audit, written, changes, said, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "audit.json").write_text(json.dumps({**written, **(changes if name == "b" else {})}))
    from gdiff_jax.auditing.comparing.result import compare_named

    with pytest.raises(ValueError) as error:  # noqa: PT011 - its words are what is tested
        compare_named([tmp_path / "a", tmp_path / "b"])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_field_that_was_added_since_is_passed_over_and_the_first_format_is_read(audit, written, tmp_path):
    (tmp_path / "later.json").write_text(json.dumps({**written, "novelty": 1}))
    assert gd.Audit.load(tmp_path / "later.json") == audit
    before = {name: value for name, value in written.items() if name not in ("summary", "blind")}
    (tmp_path / "before.json").write_text(json.dumps({**before, "format": 1}))
    assert gd.Audit.load(tmp_path / "before.json") == dataclasses.replace(audit, blind=None)
    (tmp_path / "half.json").write_text(json.dumps({"format": 2, "about": {}}))
    with pytest.raises(ValueError, match=r"not an audit\.json that an audit wrote"):
        gd.Audit.load(tmp_path / "half.json")
