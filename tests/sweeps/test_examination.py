"""The examination before pairs are made: stored, refused, forced, and alone as ``bespoke check``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from click.testing import CliRunner, Result

from orchestrator.cli.main import main
from orchestrator.config.pair_plan import pair_specs
from orchestrator.config.reading import parse_config
from orchestrator.hosts.host import Host
from orchestrator.hosts.protocols import HostProtocol
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs.make import ensure_pairs
from orchestrator.pool.requests import LocalPool, Request
from orchestrator.storage import Storage
from sweeps.bills import opening_bill
from sweeps.examination import Subject, TeacherError, check_teacher, examine, subjects
from sweeps.session import Session, host_settings

WRONG = '''
import torch
from safetensors.torch import load_file
from orchestrator.models.zoo.adapter import WEIGHTS
from orchestrator.models.zoo.nets import build_net
from safetensors import safe_open
import json


class Reversed(torch.nn.Module):
    """A digits network that is given its time the wrong way round."""

    def __init__(self):
        super().__init__()
        path = WEIGHTS / "digits_fm_ot.safetensors"
        with safe_open(path, framework="pt") as file:
            self.net = build_net(json.loads(file.metadata()["bespoke_zoo"])["architecture"])
        self.net.load_state_dict(load_file(path))

    def forward(self, x, t, y):
        return self.net(x, 1 - t, y)
'''

EXPERIMENT: dict[str, Any] = {
    "name": "looked-at",
    "model": {"name": "zoo", "options": {"weights": "digits_fm_ot"}},
    "conditioning": {"name": "labels", "options": {"classes": 10}},
    "pairs": {"train": 8, "validation": 8, "test": 8, "batch_size": 8, "shard_size": 8, "rtol": 1e-5, "atol": 1e-5},
    "nfe": [4],
    "fixed": ["euler"],
    "learned": [{"family": "bns", "method": "levenberg_marquardt"}],
}


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An experiment whose network gets its time the wrong way round."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "wrong.py").write_text(WRONG, encoding="utf-8")
    options = {
        "factory": "wrong:Reversed",
        "path": str(folder),
        "shape": [1, 8, 8],
        "prediction": "velocity",
        "native_scheduler": "cond_ot",
        "call": "x, t, y",
        "classes": 10,
        "null_label": 10,
    }
    return EXPERIMENT | {"model": {"name": "torch_module", "options": options}}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Result]:
    """Runs a command on an experiment."""

    def runner(command: str, experiment: dict[str, Any], *arguments: str) -> Result:
        file = tmp_path / "experiment.yaml"
        file.write_text(yaml.safe_dump(experiment), encoding="utf-8")
        storage = ("--storage", str(tmp_path / "data"))
        return CliRunner().invoke(main, [command, str(file), *arguments, *storage])

    return runner


class Counting(LocalPool):
    """A host in this process that counts its requests."""

    def __init__(self, host: Host):
        super().__init__(host)
        self.asked: list[str] = []

    def map(self, requests: Any) -> Any:
        requests = list(requests)
        self.asked += [request.method for request in requests]
        return super().map(requests)


def opened(experiment: dict[str, Any], storage: Storage) -> tuple[Counting, Any, Any]:
    config = parse_config(experiment | {"storage": storage.root}, "here")
    pool = Counting(Host(host_settings(config, storage)))
    facts = pool.call(Request.of(HostProtocol.facts))
    return pool, facts, pair_specs(config, facts)


def test_it_is_spent_once_per_guidance_scale_and_conditioning(storage: Storage) -> None:
    """Three sets at two scales take two examinations; a second command takes none."""
    pool, facts, specs = opened(EXPERIMENT | {"guidance_scale": [1.0, 3.0]}, storage)
    sentences: list[str] = []
    for _ in range(2):
        check_teacher(storage, pool, facts, specs.values(), force=False, announce=sentences.append)
        assert pool.asked.count("examine") == 2
    assert sentences == []
    assert [subject.guidance_scale for subject in subjects(specs.values())] == [1.0, 3.0]
    assert len(storage.names("teachers")) == 2


OTHER: dict[str, Any] = {"content": "d", "guidance_scale": 3.0, "rtol": 1e-6, "atol": 1e-6}
NOT_IN_THE_KEY = {"conditioning", "seed"}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Subject)])
def test_evidence_is_stored_under_all_that_decides_it(field: str, facts: ModelFacts) -> None:
    """The content stands for the dataset's name and options, and any noise will do."""
    conditioning: dict[str, Any] = {"name": "labels", "options": {"classes": 10}}
    subject = Subject(conditioning=conditioning, content="c", guidance_scale=1.0, seed=0, rtol=1e-5, atol=1e-5)
    other = dataclasses.replace(subject, **{field: OTHER.get(field, {"name": "other"})})
    assert (other.key(facts) == subject.key(facts)) == (field in NOT_IN_THE_KEY)


@pytest.mark.parametrize(
    "change", [{"digest": "ab"}, {"shape": (1, 16, 16)}, {"device_class": "x"}, {"data_range": 4.0}]
)
def test_evidence_is_stored_under_its_model(change: dict[str, Any], facts: ModelFacts) -> None:
    """A pipeline's digest does not cover the size of a sample."""
    subject = Subject(conditioning={}, content="c", guidance_scale=1.0, seed=0, rtol=1e-5, atol=1e-5)
    assert subject.key(dataclasses.replace(facts, **change)) != subject.key(facts)


def test_complete_pairs_need_no_examination(storage: Storage) -> None:
    """What was made earlier, or forced, is used without a question."""
    pool, facts, specs = opened(EXPERIMENT, storage)
    ensure_pairs(storage, list(specs.values()), pool, wait=True, announce=lambda sentence: None)
    check_teacher(storage, pool, facts, specs.values(), force=False, announce=lambda sentence: None)
    assert "examine" not in pool.asked


def test_damaged_evidence_is_measured_again(storage: Storage) -> None:
    pool, facts, specs = opened(EXPERIMENT, storage)
    (subject,) = subjects(specs.values())
    first = examine(storage, pool, facts, subject)
    storage.write(subject.key(facts), b'{"guidance_scale": 1}')
    again = examine(storage, pool, facts, subject)
    assert (first.stored, again.stored) == (False, False)
    assert again.evidence == first.evidence
    assert examine(storage, pool, facts, subject).stored


def test_a_refused_teacher_stops_before_its_pairs(storage: Storage, wrong: dict[str, Any]) -> None:
    """With the finding, its remedy and the way on; --force announces it instead."""
    pool, facts, specs = opened(wrong, storage)
    with pytest.raises(TeacherError, match=r"refuses it before pairs are made.* denoising: .*time \(dir.*; --force"):
        check_teacher(storage, pool, facts, specs.values(), force=False, announce=lambda sentence: None)
    sentences: list[str] = []
    check_teacher(storage, pool, facts, specs.values(), force=True, announce=sentences.append)
    assert any("and --force goes on" in sentence for sentence in sentences)
    assert "make_shard" not in pool.asked


def test_noted_findings_are_announced(storage: Storage) -> None:
    """A data range that is too large is a warning."""
    pool, facts, specs = opened(EXPERIMENT, storage)
    pool.host.model.data_range = 8.0
    sentences: list[str] = []
    check_teacher(storage, pool, facts, specs.values(), force=False, announce=sentences.append)
    assert [sentence for sentence in sentences if "data range: " in sentence and "set data_range" in sentence]


def test_it_is_on_the_bill(storage: Storage) -> None:
    """With what the host has counted; as reused when an earlier command spent it."""
    pool, facts, specs = opened(EXPERIMENT | {"pairs": EXPERIMENT["pairs"] | {"rtol": 1e-3}}, storage)
    examined = check_teacher(storage, pool, facts, specs.values(), force=False, announce=lambda sentence: None)
    spent = pool.host.work.forwards
    ensure_pairs(storage, list(specs.values()), pool, wait=True, announce=lambda sentence: None)
    for now, reuse in ((examined, ""), ([], "all")):
        session = SimpleNamespace(
            config=parse_config(EXPERIMENT, "here"), facts=facts, storage=storage, reused=set(), examined=now, hosts=1
        )
        bill = opening_bill(cast(Session, session), {"train": next(iter(specs.values()))}, [])
        (line,) = [line for line in bill.lines() if line.part == "the teacher is looked at"]
        assert line.cost is not None
        assert line.cost.forwards == line.cost.evaluations == spent
        assert line.texts[-1] == reuse


def test_check_passes_a_sane_model(run: Callable[..., Result], tmp_path: Path) -> None:
    """A table per guidance scale, the bill, and the figures in the experiment's folder."""
    done = run("check", EXPERIMENT | {"guidance_scale": [1.0, 3.0]})
    assert done.exit_code == 0, done.output
    assert "conditions from labels at guidance 3" in done.output
    assert "evaluations of 16 samples" in done.output
    folder = tmp_path / "data" / "experiments" / "looked-at" / "check"
    assert sorted(path.name for path in folder.iterdir()) == ["teacher-guidance-1.png", "teacher-guidance-3.png"]


def test_check_refuses_a_wrong_one(run: Callable[..., Result], wrong: dict[str, Any]) -> None:
    """Exit code 1, and 0 with --force; the findings are in the JSON."""
    done = run("check", wrong, "--json")
    assert done.exit_code == 1, done.output
    content = json.loads(done.stdout)
    assert content["refused"]
    (examination,) = content["examinations"]
    assert {"denoising", "bias"} <= {finding["name"] for finding in examination["findings"]}
    assert 0 < examination["evaluations"] <= 200
    forced = run("check", wrong, "--force")
    assert forced.exit_code == 0
    assert "refused: denoising" in forced.output
    assert "measured earlier" in forced.output
    assert "--force goes on" in forced.output


def test_a_check_ends_with_its_findings_when_its_figure_fails(
    run: Callable[..., Result], wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The picture costs a sentence."""

    def fail(*arguments: Any) -> None:
        raise ValueError("no ink")

    monkeypatch.setattr("sweeps.check.draw_teacher", fail)
    result = run("check", wrong)
    assert result.exit_code == 1, result.output
    assert "the figure of guidance scale 1 could not be drawn: " in result.stderr
    assert "no ink" in result.stderr
    assert "refused: " in result.output
